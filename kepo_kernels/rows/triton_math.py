"""Math of the Triton kernels on one block of columns: reading logits, softmax sums, the mixture.

The formulas are in docs/math.md. Everything is fp32, and logarithms are to base 2: a GPU has an
instruction for 2^x, and e^x is that one and four more. Numbers of a row change to nats on their way
to the table.
"""

from types import SimpleNamespace

try:
    import triton.language as tl
    from triton import jit

    IMPORT_ERROR = None
except ImportError as error:  # then nobody calls what follows
    IMPORT_ERROR = str(error)
    tl = SimpleNamespace(constexpr=None)

    def jit(kernel=None, **_):
        return kernel or jit


@jit
def weighted(probability, value):
    """probability * value; 0 where the probability is 0, the limit of p log p; NaN where it is."""
    return tl.where(probability > 0, probability * value, probability)


@jit
def capped(logit, softcap):
    """Compute softcap tanh(logit / softcap); -inf stays -inf, and a softcap of 0 caps nothing.

    With x = |logit| / softcap and e = exp(-2x) it is softcap - softcap 2e / (1 + e). From x = 5/8
    up the fraction is under 0.45, so that an exponential right to 2 ulp adds under 0.9 ulp of the
    softcap; x itself, rounded twice, adds 2^-23 x (1 - tanh^2) < 0.45 ulp; both die off as x grows,
    and the last rounding is left. Below 5/8 the difference would lose its leading digits;
    x + x^3 P(x^2) (Cephes' tanhf) does not.
    `where` comes last: a product that met the next subtraction as one fused operation would not be
    the rounded number that the peak was taken from.
    """
    x = tl.abs(logit) * (1.0 / tl.where(softcap > 0, softcap, 1.0))
    e = tl.exp2(-2.885390081777927 * x)  # e^(-2 x)
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    near = softcap * (p * s * x + x)
    far = softcap - tl.div_rn(2.0 * softcap * e, 1.0 + e)
    value = tl.where(x < 0.625, near, far)
    value = tl.where(logit < 0, -value, value)
    return tl.where((softcap > 0) & (logit > -float("inf")), value, logit)


@jit
def cap_slope(logit, softcap):
    """d capped / d logit = 1 - tanh^2, without its cancellation at the cap: 4 e / (1 + e)^2."""
    e = tl.exp2(tl.abs(logit) * (-2.885390081777927 / tl.where(softcap > 0, softcap, 1.0)))
    return tl.where(softcap > 0, 4.0 * e / ((1.0 + e) * (1.0 + e)), 1.0)


@jit
def read(row, column, end, softcap, CAPPED: tl.constexpr, EVICT: tl.constexpr):
    """Load one block of logits in fp32; past the end they are -inf, which has probability 0.

    EVICT has no default: before Triton 3.7 a default that is a string does not compile.
    """
    logit = tl.load(row + column, mask=column < end, other=-float("inf"), eviction_policy=EVICT).to(
        tl.float32
    )
    if CAPPED:
        logit = capped(logit, softcap)
    return logit


@jit
def below(logit, peak):
    """Compute logit - peak, at least -1e30: a logit of -inf then has probability 0 and a finite
    logarithm, whose product is 0. NaN may become -1e30, since the row's sums hold it already."""
    return tl.maximum(logit - peak, -1e30)


@jit
def section_columns(section, shared, vocab, SECTION: tl.constexpr):
    """Return columns [begin, end) of a section; none crosses the end of the shared columns."""
    inside = tl.cdiv(shared, SECTION)
    is_inside = section < inside
    begin = tl.where(is_inside, section * SECTION, shared + (section - inside) * SECTION)
    return begin, tl.minimum(begin + SECTION, tl.where(is_inside, shared, vocab))


@jit
def scan(row, begin, end, scale, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the peak of columns [begin, end), and their sums of 2^x and x 2^x.

    x = (logit - peak) * scale. A block is read as a whole, so that its peak is known before its
    first exponential. A NaN stays in the sums.
    """
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    for start in range(begin, end, BLOCK):
        logit = read(row, start + lanes, end, softcap, CAPPED, "")
        top = tl.maximum(peak, tl.max(logit, 0))
        base = tl.where(top == -float("inf"), 0.0, top)  # nothing but -inf has sum 0, not NaN
        e = tl.exp2((logit - base) * scale)
        rise = below(peak, base) * scale
        kept = tl.exp2(rise)
        moment = kept * (moment + rise * total) + tl.sum(e * (below(logit, base) * scale), 0)
        total = kept * total + tl.sum(e, 0)
        peak = top
    return peak, total, moment


@jit
def merged(parts, row, count, sections, scale, SECTIONS: tl.constexpr):
    """Merge peak and sums of a row's first `count` sections out of `sections` <= SECTIONS."""
    lanes = tl.arange(0, SECTIONS)
    present = lanes < count
    parts += row * (3 * sections) + lanes
    peak = tl.load(parts, mask=present, other=-float("inf"))
    total = tl.load(parts + sections, mask=present, other=0.0)
    moment = tl.load(parts + 2 * sections, mask=present, other=0.0)
    top = tl.max(peak, 0)
    x = below(peak, top) * scale
    kept = tl.exp2(x)
    return top, tl.sum(kept * total, 0), tl.sum(kept * (moment + x * total), 0)


@jit
def first_column(row, value, begin, end, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Find the first column of [begin, end) whose logit is `value`; `begin` if there is none
    (NaN)."""
    found = end
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = read(row, column, end, softcap, CAPPED, "")
        found = tl.minimum(found, tl.min(tl.where(logit == value, column, end), 0))
    return tl.where(found < end, found, begin)


@jit
def half_sum(t):
    """Compute log2((1 + t) / 2) for t in [0, 1], to a relative error of 1.5e-7: 0 at t = 1.

    s P(s) with s = t - 1; P is the minimax polynomial of its degree, 2.3e-8 off.
    """
    s = t - 1.0
    p = 4.0606968125e-03 * s + 9.5567757251e-03
    p = p * s + 1.4175234168e-02
    p = p * s + 4.5881711581e-03
    p = p * s + 1.2155268472e-02
    p = p * s - 2.1893358246e-02
    p = p * s + 6.0178527383e-02
    p = p * s - 1.8033430223e-01
    p = p * s + 7.2134753684e-01
    return p * s


@jit
def to_mixture(rise):
    """log2 q/m + log2 2(1 - beta) of m = (1 - beta) q + beta p; rise = log2 beta p/(1 - beta) q.

    m = high (1 + low/high), high and low the larger and the smaller of its two terms: it does not
    underflow while one of them lives. Where p = q, rise is log2 beta/(1 - beta) and log2 q/m is 0.
    """
    return -tl.maximum(rise, 0.0) - half_sum(tl.exp2(-tl.abs(rise)))

"""What the Triton kernels compute on one block of columns: reading, softmax sums, the mixture.

The formulas stand in docs/math.md. Everything is fp32.
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
    """softcap tanh(logit / softcap); -inf stays -inf, and a softcap of 0 caps nothing.

    With x = |logit| / softcap and e = exp(-2x) it is softcap - softcap 2e / (1 + e). From x = 5/8
    up the fraction is under 0.45, so that an exponential right to 2 ulp adds under 0.9 ulp of the
    softcap; x itself, rounded twice, adds 2^-23 x (1 - tanh^2) < 0.45 ulp; both die off as x grows,
    and the last rounding is left. Below 5/8 the difference would lose its leading digits;
    x + x^3 P(x^2) (Cephes' tanhf) does not.
    `where` comes last: a product that met the next subtraction as one fused operation would not be
    the rounded number that the peak was taken from.
    """
    x = tl.abs(logit) * (1.0 / tl.where(softcap > 0, softcap, 1.0))
    e = tl.exp(-2.0 * x)
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
    e = tl.exp(tl.abs(logit) * (-2.0 / tl.where(softcap > 0, softcap, 1.0)))
    return tl.where(softcap > 0, 4.0 * e / ((1.0 + e) * (1.0 + e)), 1.0)


@jit
def read(row, column, end, softcap, CAPPED: tl.constexpr, EVICT: tl.constexpr):
    """One block of logits in fp32; past the end they are -inf, which has no probability.

    EVICT has no default: before Triton 3.7 a default that is a string does not compile.
    """
    logit = tl.load(row + column, mask=column < end, other=-float("inf"), eviction_policy=EVICT).to(
        tl.float32
    )
    if CAPPED:
        logit = capped(logit, softcap)
    return logit


@jit
def section_columns(section, shared, vocab, SECTION: tl.constexpr):
    """Columns [begin, end) of a section: none lies on both sides of the shared columns' end."""
    inside = tl.cdiv(shared, SECTION)
    is_inside = section < inside
    begin = tl.where(is_inside, section * SECTION, shared + (section - inside) * SECTION)
    return begin, tl.minimum(begin + SECTION, tl.where(is_inside, shared, vocab))


@jit
def scan(
    row,
    begin,
    end,
    inverse_temperature,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each lane's peak and sums of e^x and x e^x over its columns among [begin, end).

    x = (logit - peak) / temperature. Of a logit and the peak the smaller one's exponential is the
    only one needed. A NaN never becomes the peak, but stays in the sums.
    """
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = total
    for start in range(begin, end, BLOCK):
        logit = read(row, start + lanes, end, softcap, CAPPED, "")
        x = tl.where(logit == -float("inf"), logit, (logit - peak) * inverse_temperature)
        e = tl.exp(-tl.abs(x))
        rises = x > 0
        moment = tl.where(rises, weighted(e, moment - x * total), moment + weighted(e, x))
        total = tl.where(rises, e * total + 1.0, total + e)
        peak = tl.where(rises, logit, peak)
    return peak, total, moment


@jit
def reduce(peak, total, moment, inverse_temperature):
    """The lanes' softmaxes as one."""
    top = tl.max(peak, 0)
    x = tl.where(peak == -float("inf"), peak, (peak - top) * inverse_temperature)
    scale = tl.exp(x)
    return top, tl.sum(scale * total, 0), tl.sum(weighted(scale, moment + x * total), 0)


@jit
def merged(parts, row, count, sections, inverse_temperature, SECTIONS: tl.constexpr):
    """Peak and sums of a row's first `count` sections out of `sections` <= SECTIONS."""
    lanes = tl.arange(0, SECTIONS)
    present = lanes < count
    parts += row * (3 * sections) + lanes
    peak = tl.load(parts, mask=present, other=-float("inf"))
    total = tl.load(parts + sections, mask=present, other=0.0)
    moment = tl.load(parts + 2 * sections, mask=present, other=0.0)
    return reduce(peak, total, moment, inverse_temperature)


@jit
def mixture(log_q, log_p, beta):
    """q, p, log q/m and log p/m of m = (1 - beta) q + beta p.

    log m is taken from the larger of the two, m = high (w + (1 - w) low/high): it does not
    underflow while one of them lives. Where both are 0 so are the logarithms of the ratios.
    """
    teacher_high = log_p > log_q
    gap = tl.where(teacher_high, log_p - log_q, log_q - log_p)
    high = tl.exp(tl.where(teacher_high, log_p, log_q))
    gap = tl.where(high > 0, gap, tl.where(high == high, 0.0, high))
    ratio = tl.exp(-gap)
    low = high * ratio
    weight = tl.where(teacher_high, beta, 1.0 - beta)
    log_m = tl.log(weight + (1.0 - weight) * ratio)  # log m/high
    q = tl.where(teacher_high, low, high)
    p = tl.where(teacher_high, high, low)
    log_q_m = -log_m - tl.where(teacher_high, gap, 0.0)
    log_p_m = -log_m - tl.where(teacher_high, 0.0, gap)
    return q, p, log_q_m, log_p_m


@jit
def policy_grad(log_q, hit, c, e, entropy):
    """What logprob and entropy send back, before the temperature."""
    q = tl.exp(log_q)
    return tl.where(hit, c, 0.0) - c * q - e * weighted(q, log_q + entropy)

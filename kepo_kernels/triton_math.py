"""What the Triton kernels compute on one block of columns: reading, softmax sums, the mixture.

The formulas stand in docs/math.md. Everything is fp32.
"""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    IMPORT_ERROR = None
except ImportError as error:  # then nobody calls what follows
    IMPORT_ERROR = str(error)
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)


@triton.jit
def weighted(probability, value):
    """probability * value; 0 where the probability is 0, the limit of p log p; NaN where it is."""
    return tl.where(probability > 0, probability * value, probability)


@triton.jit
def capped(logit, softcap):
    """softcap tanh(logit / softcap); -inf stays -inf.

    With x = |logit| / softcap and e = exp(-2x) it is softcap - softcap 2e / (1 + e). From x = 5/8
    up the fraction is under 0.45, so that an exponential right to 2 ulp adds under 0.9 ulp of the
    softcap; x itself, rounded twice, adds 2^-23 x (1 - tanh^2) < 0.45 ulp; both die off as x grows,
    and the last rounding is left. Below 5/8 the difference would lose its leading digits;
    x + x^3 P(x^2) (Cephes' tanhf) does not.
    `where` comes last: a product that met the next subtraction as one fused operation would not be
    the rounded number that the peak was taken from.
    """
    x = tl.abs(logit) * (1.0 / softcap)
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
    return tl.where(logit == -float("inf"), logit, value)


@triton.jit
def cap_slope(logit, softcap):
    """d capped / d logit = 1 - tanh^2, without its cancellation at the cap: 4 e / (1 + e)^2."""
    e = tl.exp(tl.abs(logit) * (-2.0 / softcap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def read(row, column, end, softcap, CAPPED: tl.constexpr):
    """One block of logits in fp32; past the end they are -inf, which has no probability."""
    logit = tl.load(row + column, mask=column < end, other=-float("inf")).to(tl.float32)
    if CAPPED:
        logit = capped(logit, softcap)
    return logit


@triton.jit
def scan(
    row,
    begin,
    end,
    peak,
    total,
    moment,
    inverse_temperature,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Takes columns [begin, end) into each lane's peak and sums of e^x and x e^x.

    x = (logit - peak) / temperature. Of a logit and the peak the smaller one's exponential is the
    only one needed. A NaN never becomes the peak, but stays in the sums.
    """
    lanes = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        logit = read(row, start + lanes, end, softcap, CAPPED)
        x = tl.where(logit == -float("inf"), logit, (logit - peak) * inverse_temperature)
        e = tl.exp(-tl.abs(x))
        rises = x > 0
        moment = tl.where(rises, weighted(e, moment - x * total), moment + weighted(e, x))
        total = tl.where(rises, e * total + 1.0, total + e)
        peak = tl.where(rises, logit, peak)
    return peak, total, moment


@triton.jit
def reduce(peak, total, moment, inverse_temperature):
    """The lanes' softmaxes as one."""
    top = tl.max(peak, 0)
    x = tl.where(peak == -float("inf"), peak, (peak - top) * inverse_temperature)
    scale = tl.exp(x)
    return top, tl.sum(scale * total, 0), tl.sum(weighted(scale, moment + x * total), 0)


@triton.jit
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


@triton.jit
def policy_grad(log_q, hit, c, e, entropy):
    """What logprob and entropy send back, before the temperature."""
    q = tl.exp(log_q)
    return tl.where(hit, c, 0.0) - c * q - e * weighted(q, log_q + entropy)

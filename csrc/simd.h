// One register of floats at a time, in GCC/Clang vector extensions: one source for every instruction set. The including
// file says how wide a register is (KEPO_LANES); wider generic vectors would compile too, but to much slower code.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

namespace KEPO_ISA {

constexpr int LANES = KEPO_LANES;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t v16 __attribute__((vector_size(2 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));

static inline vf splat(float x) { return x - vf{}; }
static inline vi splat_int(int32_t x) { return x - vi{}; }
static inline vf as_float(vi x) { return (vf)x; }
static inline vi as_int(vf x) { return (vi)x; }
static inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
static inline vf maximum(vf a, vf b) { return select(a > b, a, b); }
static inline vf magnitude(vf a) { return as_float(as_int(a) & 0x7fffffff); }

constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;  // their sum is ln 2; HIGH has few bits
constexpr float ROUND_MAGIC = 12582912.0f;                           // 1.5 * 2^23: adding it rounds to an integer
constexpr int32_t ROUND_MAGIC_BITS = 0x4B400000;

// x = n ln 2 + r with whole n, |r| <= ln 2 / 2, for x in [-87, 0]; e^r = 1 + small, about 1 ulp.
struct Reduced {
    vf shifted, small;  // low bits of `shifted` are n
};
static inline Reduced reduce(vf x) {
    vf bounded = select(x < -87.0f, splat(-87.0f), x);
    vf shifted = bounded * 1.44269504088896341f + ROUND_MAGIC;
    vf n = shifted - ROUND_MAGIC;
    vf r = bounded - n * LN2_HIGH;
    r = r - n * LN2_LOW;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return {shifted, p * r * r + r};
}
static inline vf scale_up(Reduced x) {  // 2^n (1 + small): n is added to the exponent; unsigned, for NaN may overflow
    return (vf)((vu)(x.small + 1.0f) + ((vu)x.shifted << 23));
}

// e^x for x <= 0 (a probability). Below -87 it is 0; NaN stays.
static inline vf exp_neg(vf x) {
    vf scaled = select(x < -87.0f, vf{}, scale_up(reduce(x)));
    return select(x == x, scaled, x);
}

// e^x - 1 for x <= 0, to full relative accuracy near 0: where n = 0 the polynomial already is the answer.
static inline vf expm1_neg(vf x) {
    Reduced parts = reduce(x);
    vf far = select(x < -87.0f, vf{}, scale_up(parts)) - 1.0f;
    return select(x == x, select(parts.shifted == ROUND_MAGIC, parts.small, far), x);
}

// Logits capped to (-size, size): size tanh(z / size). size 0 caps nothing.
struct Cap {
    float size, inverse;
    explicit Cap(float size) : size(size), inverse(size != 0.0f ? 1.0f / size : 0.0f) {}
};

// The capped logit, and its derivative by the logit. With x = |z / size| and e = exp(-2x)
//     size tanh x = -size t / (1 + e)            for x < 0.17, with t = e - 1 as the exponential's polynomial gives it
//                 = size - 2 size e / (1 + e)    beyond; wrong by 2 ulp of `size` at most, by 1/2 in the end
//     1 - tanh^2  = 4 e / (1 + e)^2              nothing cancels near the cap
// The sign is set in the bits, after the product: a product that met the next subtraction as one fused operation would
// not be the rounded number that went into the row's peak. -inf and NaN stay.
struct Capped {
    vf value, slope;
};
static inline Capped capped(vf z, Cap cap) {
    vf x = magnitude(z) * (-2.0f * cap.inverse);
    Reduced parts = reduce(x);
    vf e = select(x < -87.0f, vf{}, scale_up(parts));
    vf inverse = 1.0f / (1.0f + e);
    vf near = cap.size * -parts.small * inverse, far = cap.size - 2.0f * cap.size * e * inverse;
    vi sign = as_int(z) & (int32_t)0x80000000;
    vf value = as_float(as_int(select(parts.shifted == ROUND_MAGIC, near, far)) | sign);
    return {select((z == NEG_INF) | (z != z), z, value), 4.0f * e * inverse * inverse};
}

// log(1 + u) for -1 < u <= 0 and 1 + u normal, about 1 ulp. 1 + u = 2^e (1 + f), and f is u itself while e = 0. NaN stays.
static inline vf log1p_neg(vf u) {
    vi bits = (vi)((vu)(u + 1.0f) - 0x3f3504f3);  // sqrt(1/2): so that the exponent field rounds at sqrt(2)
    vi e = bits >> 23;
    vf f = select(e == 0, u, as_float((bits & 0x7fffff) + 0x3f3504f3) - 1.0f);
    vf exponent = as_float(e + ROUND_MAGIC_BITS) - ROUND_MAGIC;
    vf p = splat(7.0376836292e-2f);
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    vf square = f * f;
    vf tail = p * f * square + exponent * LN2_LOW - 0.5f * square;
    return select(u == u, f + tail + exponent * LN2_HIGH, u);
}

// Logits are stored as float or as bfloat16 (its sixteen bits are the upper half of a float).
struct bf16 {
    uint16_t bits;
};

static inline vf load(const float *p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
static inline vf load(const bf16 *p) {
    v16 x;
    std::memcpy(&x, p, sizeof x);
    return (vf)(__builtin_convertvector(x, vu) << 16);
}
static inline void store(float *p, vf x) { std::memcpy(p, &x, sizeof x); }
static inline void store(bf16 *p, vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;         // to nearest, ties to even
    vu quiet = (bits >> 16) | 0x40;                                  // a NaN must not round up to infinity
    vu nan = (vu)(x != x);
    v16 out = __builtin_convertvector((nan & quiet) | (~nan & rounded), v16);
    std::memcpy(p, &out, sizeof out);
}

// The last, partial vector of a row: absent columns are logits of -inf, which have no probability and no gradient.
template <class T> static inline vf load_part(const T *p, int count) {
    T lanes[LANES];
    const float absent = NEG_INF;
    for (int i = 0; i < LANES; ++i) std::memcpy(&lanes[i], (const char *)&absent + sizeof(float) - sizeof(T), sizeof(T));
    std::memcpy(lanes, p, count * sizeof(T));
    return load(lanes);
}
template <class T> static inline void store_part(T *p, vf x, int count) {
    T lanes[LANES];
    store(lanes, x);
    std::memcpy(p, lanes, count * sizeof(T));
}

// A sum that carries fp32 only over a short block and keeps the total in double: error far below one fp32 ulp.
struct Sum {
    vf block{};
    double total = 0.0;
    void add(vf x) { block += x; }
    void flush() {
        double s = 0.0;
        for (int i = 0; i < LANES; ++i) s += block[i];
        total += s;
        block = vf{};
    }
};

}  // namespace KEPO_ISA

// One register of floats at a time, in GCC/Clang vector extensions: one source for every instruction set. The including
// file says how wide a register is (KEPO_LANES); wider generic vectors would compile too, but to much slower code.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>
#ifdef __SSE2__
#include <immintrin.h>
#endif

// A function that takes or returns vectors by value is inlined, always: called, it passes them through memory.
#ifdef KEPO_FUZZ
#define KEPO_INLINE static inline  // under sanitizers time is spent elsewhere, and this compiles in half of it
#else
#define KEPO_INLINE static inline __attribute__((always_inline))
#endif

namespace KEPO_ISA {

constexpr int LANES = KEPO_LANES;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t v16 __attribute__((vector_size(2 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef float vh __attribute__((vector_size(2 * LANES)));   // half of a vf
typedef double vd __attribute__((vector_size(4 * LANES)));  // in double

KEPO_INLINE vf splat(float x) { return x - vf{}; }
KEPO_INLINE vi splat_int(int32_t x) { return x - vi{}; }
KEPO_INLINE vf as_float(vi x) { return (vf)x; }
KEPO_INLINE vi as_int(vf x) { return (vi)x; }
KEPO_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
// The larger, the smaller; b where either is NaN.
KEPO_INLINE vf maximum(vf a, vf b) { return select(a > b, a, b); }
KEPO_INLINE vf minimum(vf a, vf b) { return select(a < b, a, b); }
KEPO_INLINE vf magnitude(vf a) { return as_float(as_int(a) & 0x7fffffff); }

// Whether a <= b in every lane. Where no single instruction tells, the answer is no, which costs time only.
KEPO_INLINE bool all_at_most(vf a, vf b) {
#if KEPO_LANES == 16 && defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ) == 0xffff;
#elif KEPO_LANES == 8 && defined(__AVX__)
    return _mm256_movemask_ps((__m256)(a <= b)) == 0xff;
#elif KEPO_LANES == 4 && defined(__SSE2__)
    return _mm_movemask_ps((__m128)(a <= b)) == 0xf;
#else
    return false;
#endif
}

constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;  // their sum is ln 2; HIGH has few bits
constexpr float ROUND_MAGIC = 12582912.0f + 127.0f;                  // 1.5 * 2^23: adding it rounds to an integer
constexpr int32_t ROUND_MAGIC_BITS = 0x4B400000 + 127;

// e^x for x in [SMALLEST_LOG, 0], about 1 ulp. x = n ln 2 + r with whole n, |r| <= ln 2 / 2; e^r = 1 + small. NaN stays.
constexpr float SMALLEST_LOG = -87.0f;  // e^-87 is still a normal number
struct Exp {
    vf power, small;  // e^x = power (1 + small)
};
KEPO_INLINE Exp exp_parts(vf x) {
    vf shifted = x * 1.44269504088896341f + ROUND_MAGIC;
    vf n = shifted - ROUND_MAGIC;
    vf r = x - n * LN2_HIGH;
    r = r - n * LN2_LOW;
    vf square = r * r;  // even and odd powers apart: two short chains of dependent steps instead of a long one
    vf odd = splat(8.3687454462e-3f), even = splat(1.3814540580e-3f);  // minimax: 3e-9 of e^r, a twentieth of an ulp
    even = even * square + 4.1668388993e-2f;
    odd = odd * square + 1.6666521132e-1f;
    even = even * square + 4.9999994040e-1f;
    vf p = odd * r + even;
    return {(vf)((vu)shifted << 23), p * square + r};  // the low bits of `shifted` are n + 127: the exponent of 2^n
}
KEPO_INLINE vf exp_of(Exp e) { return e.power * e.small + e.power; }
KEPO_INLINE vf exp_of(vf x) { return exp_of(exp_parts(x)); }

// e^x for x <= 0 (a probability). Below -87 it is 0; NaN stays.
KEPO_INLINE vf exp_neg(vf x) {
    return select(x < SMALLEST_LOG, vf{}, exp_of(maximum(splat(SMALLEST_LOG), x)));
}

// e^x - 1 for x in [SMALLEST_LOG, 0], to full relative accuracy near 0: while n = 0 it is `small`. NaN stays.
KEPO_INLINE vf minus_one(Exp e) { return e.power * e.small + (e.power - 1.0f); }
KEPO_INLINE vf expm1_neg(vf x) { return minus_one(exp_parts(x)); }

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
KEPO_INLINE Capped capped(vf z, Cap cap) {
    vf x = magnitude(z) * (-2.0f * cap.inverse);
    vf bounded = maximum(splat(SMALLEST_LOG), x);
    vf t = expm1_neg(bounded), e = select(x < SMALLEST_LOG, vf{}, exp_of(bounded));
    vf inverse = 1.0f / (1.0f + e);
    vf near = cap.size * -t * inverse, far = cap.size - 2.0f * cap.size * e * inverse;
    vi sign = as_int(z) & (int32_t)0x80000000;
    vf value = as_float(as_int(select(x > -0.34f, near, far)) | sign);
    return {select((z == NEG_INF) | (z != z), z, value), 4.0f * e * inverse * inverse};
}

// log(1 + u) for -1 < u <= 0 and 1 + u normal, about 1 ulp; the caller knows sum = 1 + u better than u where u is near -1.
// sum = 2^e (1 + f), and f is u itself while e = 0. Of NaN it makes anything.
KEPO_INLINE vf log1p_neg(vf u, vf sum) {
    vi bits = (vi)((vu)sum - 0x3f3504f3);  // sqrt(1/2): so that the exponent field rounds at sqrt(2)
    vi e = bits >> 23;
    vf f = select(e == 0, u, as_float((bits & 0x7fffff) + 0x3f3504f3) - 1.0f);
    vf exponent = as_float(e + ROUND_MAGIC_BITS) - ROUND_MAGIC;
    vf square = f * f;
    vf even = splat(7.0376836292e-2f), odd = splat(-1.1514610310e-1f);
    even = even * square + 1.1676998740e-1f;
    odd = odd * square - 1.2420140846e-1f;
    even = even * square + 1.4249322787e-1f;
    odd = odd * square - 1.6668057665e-1f;
    even = even * square + 2.0000714765e-1f;
    odd = odd * square - 2.4999993993e-1f;
    even = even * square + 3.3333331174e-1f;
    vf p = odd * f + even;
    vf tail = p * f * square + exponent * LN2_LOW - 0.5f * square;
    return f + tail + exponent * LN2_HIGH;
}

// 16 bits to 32 with zeros, and the lower 16 of 32. GCC 12 splits in halves what one instruction does.
KEPO_INLINE vu widened(v16 x) {
#if KEPO_LANES == 16 && defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif KEPO_LANES == 8 && defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, vu);
#endif
}
KEPO_INLINE v16 narrowed(vu x) {
#if KEPO_LANES == 16 && defined(__AVX512F__)
    return (v16)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, v16);
#endif
}

// Logits are stored as float or as bfloat16 (its sixteen bits are the upper half of a float).
struct bf16 {
    uint16_t bits;
};

KEPO_INLINE vf load(const float *p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
KEPO_INLINE vf load(const bf16 *p) {
    v16 x;
    std::memcpy(&x, p, sizeof x);
    return (vf)(widened(x) << 16);
}
KEPO_INLINE void store(float *p, vf x) { std::memcpy(p, &x, sizeof x); }
KEPO_INLINE void store(bf16 *p, vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;         // to nearest, ties to even
    vu quiet = (bits >> 16) | 0x40;                                  // a NaN must not round up to infinity
    vu nan = (vu)(x != x);
    v16 out = narrowed((nan & quiet) | (~nan & rounded));
    std::memcpy(p, &out, sizeof out);
}

// The last, partial vector of a row: absent columns are logits of -inf, which have no probability and no gradient.
template <class T> KEPO_INLINE vf load_part(const T *p, int count) {
    T lanes[LANES];
    const float absent = NEG_INF;
    for (int i = 0; i < LANES; ++i) std::memcpy(&lanes[i], (const char *)&absent + sizeof(float) - sizeof(T), sizeof(T));
    std::memcpy(lanes, p, count * sizeof(T));
    return load(lanes);
}
template <class T> KEPO_INLINE void store_part(T *p, vf x, int count) {
    T lanes[LANES];
    store(lanes, x);
    std::memcpy(p, lanes, count * sizeof(T));
}

// A sum that carries fp32 only over a short block and keeps the total in double: error far below one fp32 ulp.
struct Sum {
    vf block{};
    vd low{}, high{};
    void add(vf x) { block += x; }
    void flush() {
        vh halves[2];
        std::memcpy(halves, &block, sizeof block);
        low += __builtin_convertvector(halves[0], vd), high += __builtin_convertvector(halves[1], vd);
        block = vf{};
    }
    double total() const {
        double s = 0.0;
        for (int i = 0; i < LANES / 2; ++i) s += low[i] + high[i];
        return s;
    }
};

}  // namespace KEPO_ISA

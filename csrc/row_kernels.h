// The two row kernels, once. rows_baseline.cpp, rows_avx2.cpp and rows_avx512.cpp each compile this file into their own
// namespace KEPO_ISA. docs/math.md derives the formulas; z, y are the scaled student and teacher logits, q, p their
// softmaxes.
#include <cmath>
#include <initializer_list>

#include "rows.h"
#include "simd.h"

namespace KEPO_ISA {

enum Kind { FORWARD_KL, REVERSE_KL, MIXTURE };  // beta = 0, beta = 1, between

// Calls step(column, vector_count) over [begin, end): whole vectors, then the partial one. `flush` runs every few vectors.
constexpr int64_t FLUSH_COLUMNS = 32 * LANES;
template <class Step, class Flush> KEPO_INLINE void sweep(int64_t begin, int64_t end, Step step, Flush flush) {
    for (int64_t block = begin; block < end; block += FLUSH_COLUMNS) {
        int64_t stop = block + FLUSH_COLUMNS < end ? block + FLUSH_COLUMNS : end;
        int64_t column = block;
        for (; column + LANES <= stop; column += LANES) step(column, LANES);
        if (column < stop) step(column, (int)(stop - column));
        flush();
    }
}

// A vector of logits: as they are stored, and as the formulas see them. Kernels compiled without CAPPED have no trace of
// a cap; with it one of the two sides may still have none.
template <class T> KEPO_INLINE vf read(const T *row, int64_t column, int count) {
    return count == LANES ? load(row + column) : load_part(row + column, count);
}
template <bool CAPPED, class T> KEPO_INLINE vf read(const T *row, int64_t column, int count, Cap cap) {
    vf z = read(row, column, count);
    return CAPPED && cap.size != 0.0f ? capped(z, cap).value : z;
}

KEPO_INLINE vf weighted(vf probability, vf value) {  // p * v, 0 where p is 0, NaN where p is NaN
    return select(probability > 0.0f, probability * value, probability);
}

// Rows of a trained model are peaked: nearly all columns have next to no probability on either side. The mixture, which
// costs most, skips a vector if all of its lanes have q, p <= e^DEAD = 1.3e-14. The most that this can leave out:
//     divergence  (1 - beta)(q log(q/m) - q + m) is in [0, q/e + m], for log(q/m) <= -log(1 - beta); so is p's: 4e-14
//                 per column, and 5e-9 in a row of V = 2^17 if all columns were just at the limit
//     gradient    3e-14 |g|, 1.3e-14 |c| and 6e-13 |e| (the last for |log q + H| <= 45); 0 is stored instead
// What is there already is 6e-8 = 2^-24, the rounding of one log-probability, of every term in a column that lives.
// Where the student is sure, its gradient is of the size of 1 - q(peak), and the limit sinks with that.
// -inf is dead like any other, NaN never: where a row is not finite the limit is NaN, which no lane is below.
constexpr float DEAD = -32.0f;

static inline float dead_limit(float log_q_of_peak, std::initializer_list<float> numbers_of_row) {
    float sum = 0.0f;
    for (float number : numbers_of_row) sum += number - number;  // 0, or NaN if one of them is not finite
    double others = -std::expm1((double)log_q_of_peak);
    return DEAD + (others < 1.0 ? (float)std::log(std::fmax(others, 1e-30)) : 0.0f) + sum;
}

// One stretch of a row: its largest logit, and with x = (logit - peak) / temperature the sums of e^x and (MOMENT) of x e^x.
struct Softmax {
    float peak = NEG_INF;
    double sum = 0.0, moment = 0.0;
    double log_sum() const { return std::log(sum); }
    double entropy() const { return log_sum() - moment / sum; }
};

template <bool CAPPED, bool MOMENT, class T>
static Softmax softmax_of(const T *row, int64_t begin, int64_t end, float inverse_temperature, Cap cap) {
    Softmax s;
    vf high = splat(NEG_INF);  // skips NaN, which then reaches the sums below
    sweep(begin, end, [&](int64_t column, int count) { high = maximum(read(row, column, count), high); }, [] {});
    if (CAPPED && cap.size != 0.0f) high = capped(high, cap).value;  // a cap keeps the order
    for (int i = 0; i < LANES; ++i) s.peak = high[i] > s.peak ? high[i] : s.peak;
    const float base = s.peak == NEG_INF ? 0.0f : s.peak;  // a stretch of nothing but -inf has sum 0, not NaN
    Sum sum, moment;
    sweep(begin, end, [&](int64_t column, int count) {
        vf x = (read<CAPPED>(row, column, count, cap) - base) * inverse_temperature;
        vf e = exp_neg(x);
        sum.add(e);
        if (MOMENT) moment.add(e * maximum(splat(SMALLEST_LOG), x));
    }, [&] { sum.flush(), moment.flush(); });
    s.sum = sum.total(), s.moment = moment.total();
    return s;
}

static inline Softmax merge(const Softmax &a, const Softmax &b, float inverse_temperature) {
    if (b.sum == 0.0) return a;  // nothing but -inf
    if (a.sum == 0.0) return b;
    Softmax out;
    out.peak = a.peak > b.peak ? a.peak : b.peak;
    for (const Softmax *part : {&a, &b}) {
        double shift = ((double)part->peak - out.peak) * inverse_temperature, scale = std::exp(shift);
        out.sum += scale * part->sum;
        out.moment += scale * (part->moment + shift * part->sum);
    }
    return out;
}

// One column vector of both sides.
struct Pair {
    vf q, p;              // probabilities; in a MIXTURE at least e^-87, for the caller to put right where it matters
    vf log_ratio_p;       // log p/q (not MIXTURE)
    vf log_q_m, log_p_m;  // log q/m, log p/m (MIXTURE only), m by log-add-exp from the larger of the two
};

template <Kind KIND> KEPO_INLINE Pair compare(vf log_q, vf log_p, const RowBatch &b) {
    Pair out;
    if (KIND != MIXTURE) {
        out.q = exp_neg(log_q), out.p = exp_neg(log_p);
        out.log_ratio_p = log_p - log_q;
        return out;
    }
    // m = high (w + (1 - w) low/high) = high (1 + (1 - w)(low/high - 1)), w the weight of the larger: no underflow while
    // `high` lives. The first form where w is small and low/high too, the second where p is close to q: nothing cancels.
    // Both bounded the difference is finite; NaN stays in it, and comes out everywhere.
    log_q = maximum(splat(SMALLEST_LOG), log_q), log_p = maximum(splat(SMALLEST_LOG), log_p);
    vi teacher_high = log_p > log_q;
    vf ratio = log_q - log_p;
    vf high = exp_of(maximum(log_q, log_p));
    Exp e = exp_parts(-magnitude(ratio));
    vf part = exp_of(e), low = high * part;  // not high (1 + (part - 1)), which has no digits where low is far below
    vf heavy = select(teacher_high, splat(b.beta), splat(b.rest)), light = select(teacher_high, splat(b.rest), splat(b.beta));
    vf log_m = log1p_neg(light * minus_one(e), heavy + light * part);  // log m/high
    out.q = select(teacher_high, low, high), out.p = select(teacher_high, high, low);
    out.log_q_m = minimum(vf{}, ratio) - log_m;
    out.log_p_m = -maximum(vf{}, ratio) - log_m;
    return out;
}

// The first column with this (capped) logit; 0 if there is none, as in a row of NaN.
template <bool CAPPED, class T>
static int64_t first_column(const T *row, int64_t end, float logit, Cap cap) {
    const vf less = splat(std::nextafter(logit, NEG_INF));
    for (int64_t column = 0; column < end; column += LANES) {
        int count = end - column < LANES ? (int)(end - column) : LANES;
        vf z = read<CAPPED>(row, column, count, cap);
        if (all_at_most(z, less)) continue;
        for (int i = 0; i < count; ++i) {
            if (z[i] == logit) return column + i;
        }
    }
    return 0;
}

// Which lane of a vector at `column` is this column, or none.
KEPO_INLINE bool holds(int64_t column, int count, int64_t wanted) { return wanted >= column && wanted < column + count; }
KEPO_INLINE vi lane_of(int64_t column, int64_t wanted) {
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return lane == splat_int((int32_t)(wanted - column));
}

// The divergence, and how log q/m (log q/p at beta 1) lies about its value at the student's peak: see RowStats.
template <class T, Kind KIND, bool CAPPED>
static void divergence(const T *z, const T *y, const Softmax &student, const Softmax &teacher, const RowBatch &b,
                       int64_t row) {
    const float inverse = 1.0f / b.temperature, teacher_inverse = 1.0f / b.teacher_temperature;
    const Cap cap(b.softcap), teacher_cap(b.teacher_softcap);
    const float log_z = (float)student.log_sum(), log_y = (float)teacher.log_sum();
    const float limit = dead_limit(-log_z, {student.peak, teacher.peak, log_z, log_y});
    int64_t token = 0;
    float peak_ratio = 0.0f;
    auto log_p_of = [&](vf logit) { return (logit - teacher.peak) * teacher_inverse - log_y; };
    if (KIND != FORWARD_KL) {
        token = first_column<CAPPED>(z, b.shared, student.peak, cap);
        Pair at = compare<KIND>(splat(-log_z), log_p_of(splat(read<CAPPED>(y, token, 1, teacher_cap)[0])), b);
        peak_ratio = KIND == MIXTURE ? at.log_q_m[0] : -at.log_ratio_p[0];
    }
    Sum sum, ratios;
    sweep(0, b.shared, [&](int64_t column, int count) {
        vf log_q = (read<CAPPED>(z, column, count, cap) - student.peak) * inverse - log_z;
        vf log_p = log_p_of(read<CAPPED>(y, column, count, teacher_cap));
        if (KIND == MIXTURE && all_at_most(maximum(log_q, log_p), splat(limit))) return;
        Pair at = compare<KIND>(log_q, log_p, b);
        // A KL as a log(a/b) - a + b, the mixture as it is: all terms >= 0, and an error in log(a/b) changes them to
        // second order only.
        if (KIND == FORWARD_KL) return sum.add(weighted(at.p, at.log_ratio_p) - at.p + at.q);
        if (KIND == REVERSE_KL) sum.add(weighted(at.q, -at.log_ratio_p) - at.q + at.p);
        if (KIND == MIXTURE) sum.add(b.rest * (at.q * at.log_q_m) + b.beta * (at.p * at.log_p_m));
        vf ratio = (KIND == MIXTURE ? at.log_q_m : -at.log_ratio_p) - peak_ratio;
        if (holds(column, count, token)) ratio = select(lane_of(column, token), vf{}, ratio);
        ratios.add(KIND == MIXTURE ? at.q * ratio : weighted(at.q, ratio));
    }, [&] { sum.flush(), ratios.flush(); });
    b.table[DIVERGENCE * b.n + row] = (float)sum.total();
    b.table[PEAK_TOKEN * b.n + row] = (float)token;
    b.table[PEAK_RATIO * b.n + row] = peak_ratio;
    b.table[MEAN_RATIO * b.n + row] = (float)ratios.total();
}

template <class T, bool CAPPED> static void forward_row(const RowBatch &b, int64_t row) {
    const T *z = (const T *)b.logits + row * b.logits_stride;
    const float inverse = 1.0f / b.temperature;
    const Cap cap(b.softcap);
    const Softmax shared = softmax_of<CAPPED, true>(z, 0, b.shared, inverse, cap);
    const Softmax whole =
        b.vocab > b.shared ? merge(shared, softmax_of<CAPPED, true>(z, b.shared, b.vocab, inverse, cap), inverse) : shared;
    auto out = [&](Stat stat) -> float & { return b.table[stat * b.n + row]; };
    out(PEAK) = whole.peak;
    out(LOG_SUM) = (float)whole.log_sum();
    out(SHARED_LOG_SUM) = (float)(((double)shared.peak - whole.peak) * inverse + shared.log_sum());
    out(ENTROPY) = (float)whole.entropy();
    out(LOGPROB) = 0.0f;
    if (b.targets) {
        double target = read<CAPPED>(z, b.targets[row], 1, cap)[0];
        out(LOGPROB) = (float)((target - whole.peak) * inverse - whole.log_sum());
    }
    for (Stat stat : {DIVERGENCE, TEACHER_PEAK, TEACHER_LOG_SUM, PEAK_TOKEN, PEAK_RATIO, MEAN_RATIO}) out(stat) = 0.0f;
    if (!b.teacher) return;
    const T *y = (const T *)b.teacher + row * b.teacher_stride;
    const Softmax teacher =
        softmax_of<CAPPED, false>(y, 0, b.shared, 1.0f / b.teacher_temperature, Cap(b.teacher_softcap));
    out(TEACHER_PEAK) = teacher.peak;
    out(TEACHER_LOG_SUM) = (float)teacher.log_sum();
    auto run = b.beta == 0.0f   ? divergence<T, FORWARD_KL, CAPPED>
               : b.rest == 0.0f ? divergence<T, REVERSE_KL, CAPPED>
                                : divergence<T, MIXTURE, CAPPED>;
    run(z, y, shared, teacher, b, row);
}

// d logits = [ c (onehot - q) - e q (log q + entropy) + g G ] / temperature on columns [begin, end), times the slope of
// the cap; G only with TEACHER.
struct RowGrad {
    float c, g, e, entropy, peak, log_sum, shared_log_sum, teacher_peak, teacher_log_sum, peak_ratio, mean_ratio;
    int64_t token, target;
};

template <class T, bool TEACHER, Kind KIND, bool CAPPED>
static void backward_columns(T *z, const T *y, const RowGrad &at, const RowBatch &b, int64_t begin, int64_t end) {
    const float inverse = 1.0f / b.temperature, teacher_inverse = 1.0f / b.teacher_temperature;
    const Cap cap(b.softcap), teacher_cap(b.teacher_softcap);
    const bool one_softmax = b.vocab == b.shared;  // the shared columns are all columns: q need not be computed twice
    const float middle = at.peak_ratio + at.mean_ratio;
    float log_q_of_peak = NEG_INF;
    if (TEACHER) log_q_of_peak = (read<CAPPED>(z, at.token, 1, cap)[0] - at.peak) * inverse - at.shared_log_sum;
    const float limit = dead_limit(log_q_of_peak, {at.c, at.g, at.e, at.entropy, at.peak, at.log_sum, at.shared_log_sum,
                                                   at.teacher_peak, at.teacher_log_sum, middle});
    sweep(begin, end, [&](int64_t column, int count) {
        auto put = [&](vf grad) {
            if (count == LANES) store(z + column, grad);
            else store_part(z + column, grad, count);
        };
        vf logit = read(z, column, count), slope{};
        if (CAPPED && b.softcap != 0.0f) {
            Capped of = capped(logit, cap);
            logit = of.value, slope = of.slope;
        }
        const bool has_target = holds(column, count, at.target);
        vf scaled = (logit - at.peak) * inverse;
        vf log_q = scaled - at.log_sum;
        vf grad{};
        if (TEACHER) {
            vf other = read<CAPPED>(y, column, count, teacher_cap);
            vf log_p = (other - at.teacher_peak) * teacher_inverse - at.teacher_log_sum;
            vf log_shared = one_softmax ? log_q : scaled - at.shared_log_sum;
            if (KIND == MIXTURE && !has_target && all_at_most(maximum(log_shared, log_p), splat(limit))) {
                return put(vf{});
            }
            Pair pair = compare<KIND>(log_shared, log_p, b);
            if (KIND == FORWARD_KL) grad = at.g * (pair.q - pair.p);
            if (KIND != FORWARD_KL) {
                // At the student's peak the ratio is its own origin: where the student is sure nothing cancels.
                vf ratio = (KIND == MIXTURE ? pair.log_q_m : -pair.log_ratio_p) - middle;
                if (holds(column, count, at.token)) ratio = select(lane_of(column, at.token), splat(-at.mean_ratio), ratio);
                grad = KIND == MIXTURE ? at.g * b.rest * (pair.q * ratio) : at.g * weighted(pair.q, ratio);
            }
            if (at.c != 0.0f || at.e != 0.0f) {
                vf q = one_softmax ? pair.q : exp_neg(log_q);
                grad -= q * (at.c + at.e * (maximum(splat(SMALLEST_LOG), log_q) + at.entropy));
            }
            if (KIND == MIXTURE) grad = select(log_shared < SMALLEST_LOG, vf{}, grad);
        } else {
            grad -= exp_neg(log_q) * (at.c + at.e * (maximum(splat(SMALLEST_LOG), log_q) + at.entropy));
        }
        if (has_target) {
            grad += select(lane_of(column, at.target), splat(at.c), vf{});
        }
        grad *= inverse;
        if (CAPPED && b.softcap != 0.0f) grad *= slope;
        put(grad);
    }, [] {});
}

template <class T, bool CAPPED> static void backward_row(const RowBatch &b, int64_t row) {
    T *z = (T *)b.logits + row * b.logits_stride;
    auto stat = [&](Stat s) { return b.table[s * b.n + row]; };
    RowGrad at{b.coefficients[row], b.coefficients[b.n + row], b.coefficients[2 * b.n + row],
               stat(ENTROPY), stat(PEAK), stat(LOG_SUM), stat(SHARED_LOG_SUM), stat(TEACHER_PEAK),
               stat(TEACHER_LOG_SUM), stat(PEAK_RATIO), stat(MEAN_RATIO), (int64_t)stat(PEAK_TOKEN),
               b.targets ? b.targets[row] : -1};
    if (!b.targets) at.c = 0.0f;  // no log-probability was asked for, so none sends anything back
    if (!b.teacher) return backward_columns<T, false, FORWARD_KL, CAPPED>(z, nullptr, at, b, 0, b.vocab);
    const T *y = (const T *)b.teacher + row * b.teacher_stride;
    if (b.beta == 0.0f) backward_columns<T, true, FORWARD_KL, CAPPED>(z, y, at, b, 0, b.shared);
    else if (b.rest == 0.0f) backward_columns<T, true, REVERSE_KL, CAPPED>(z, y, at, b, 0, b.shared);
    else backward_columns<T, true, MIXTURE, CAPPED>(z, y, at, b, 0, b.shared);
    backward_columns<T, false, FORWARD_KL, CAPPED>(z, nullptr, at, b, b.shared, b.vocab);
}

void forward(const RowBatch &b, int64_t begin, int64_t end) {
    const bool is_capped = b.softcap != 0.0f || b.teacher_softcap != 0.0f;
    auto run = b.dtype == FLOAT32 ? (is_capped ? forward_row<float, true> : forward_row<float, false>)
                                  : (is_capped ? forward_row<bf16, true> : forward_row<bf16, false>);
    for (int64_t row = begin; row < end; ++row) run(b, row);
}

void backward(const RowBatch &b, int64_t begin, int64_t end) {
    const bool is_capped = b.softcap != 0.0f || b.teacher_softcap != 0.0f;
    auto run = b.dtype == FLOAT32 ? (is_capped ? backward_row<float, true> : backward_row<float, false>)
                                  : (is_capped ? backward_row<bf16, true> : backward_row<bf16, false>);
    for (int64_t row = begin; row < end; ++row) run(b, row);
}

}  // namespace KEPO_ISA

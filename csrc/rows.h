// What one call to a row kernel works on. Shared by the three builds of row_kernels.h and by rows.cpp.
#pragma once
#include <cstdint>

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

// The columns of the stats table, in the order of kepo_kernels.rows.contract.RowStats; column k of row i is table[k * n + i].
enum Stat {
    LOGPROB, DIVERGENCE, ENTROPY, PEAK, LOG_SUM, SHARED_LOG_SUM, TEACHER_PEAK, TEACHER_LOG_SUM, PEAK_TOKEN, PEAK_RATIO,
    MEAN_RATIO, NUM_STATS
};

struct RowBatch {
    void *logits;            // (n, vocab), overwritten by the backward
    const void *teacher;     // (n, >= shared) or null
    const int64_t *targets;  // (n) or null
    float *table;            // (NUM_STATS, n)
    const float *coefficients;  // (3, n): what the loss sends back to logprob, divergence, entropy; forward: null
    int64_t n, vocab, shared;   // `shared` leading columns are common to student and teacher
    int64_t logits_stride, teacher_stride;  // in elements, from one row to the next
    float beta, rest, temperature, teacher_temperature;  // rest: 1 - beta, by a caller who knows it exactly; temperatures > 0
    float softcap, teacher_softcap;                // 0: none
    int32_t dtype;
};

// Rows [begin, end) of the batch. Rows are independent: any partition over threads gives the same bits.
typedef void (*RowRange)(const RowBatch &, int64_t begin, int64_t end);

namespace kepo_baseline {
void forward(const RowBatch &, int64_t, int64_t);
void backward(const RowBatch &, int64_t, int64_t);
}  // namespace kepo_baseline
namespace kepo_avx2 {
void forward(const RowBatch &, int64_t, int64_t);
void backward(const RowBatch &, int64_t, int64_t);
}  // namespace kepo_avx2
namespace kepo_avx512 {
void forward(const RowBatch &, int64_t, int64_t);
void backward(const RowBatch &, int64_t, int64_t);
}  // namespace kepo_avx512

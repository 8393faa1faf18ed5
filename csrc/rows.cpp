// The C interface of the CPU row kernels, bound by kepo_kernels/rows/cpu_rows.py through ctypes: it links against neither torch
// nor Python, so one binary serves every version of both.
//
// Threads are started per call and joined before it returns. A call works on a whole chunk of logits (milliseconds to
// seconds), so starting them is free, no idle pool competes with torch's, and a process that forks afterwards has
// no lost threads to wait for. Where the system gives no more threads, or no memory for one, the calling thread does
// what is left: nothing is thrown across the C interface.
#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

#include "rows.h"

namespace {

enum Isa : int32_t { BASELINE = 0, AVX2 = 1, AVX512 = 2 };
#ifdef KEPO_FUZZ
constexpr int64_t MIN_ELEMENTS_PER_THREAD = 1;  // so that small inputs have threads too
#else
constexpr int64_t MIN_ELEMENTS_PER_THREAD = 1 << 16;  // below this a thread costs more than it saves
#endif

void over_rows(RowRange kernel, const RowBatch &batch, int32_t threads) noexcept {
    int64_t useful = batch.n * batch.vocab / MIN_ELEMENTS_PER_THREAD;
    int64_t count = std::max<int64_t>(1, std::min<int64_t>({threads, useful, batch.n}));
    std::vector<std::thread> workers;
    try {
        workers.reserve(count - 1);
        for (int64_t i = 1; i < count; ++i) {
            workers.emplace_back(kernel, std::cref(batch), batch.n * i / count, batch.n * (i + 1) / count);
        }
    } catch (const std::exception &) {  // std::system_error: no thread; std::bad_alloc: no memory for one
    }
    kernel(batch, 0, batch.n / count);
    kernel(batch, batch.n * ((int64_t)workers.size() + 1) / count, batch.n);  // of the threads that were not to be had
    for (auto &worker : workers) worker.join();
}

RowRange pick(int32_t isa, bool backward) {
#ifdef KEPO_X86
    if (isa == AVX512) return backward ? kepo_avx512::backward : kepo_avx512::forward;
    if (isa == AVX2) return backward ? kepo_avx2::backward : kepo_avx2::forward;
#endif
    return backward ? kepo_baseline::backward : kepo_baseline::forward;
}

}  // namespace

extern "C" {

// The best instruction set this processor runs: 0 baseline, 1 AVX2, 2 AVX-512.
int32_t kepo_best_isa() {
#ifdef KEPO_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return BASELINE;
}

// By this Python tells a library of other sources: how long its table and its struct are.
int32_t kepo_layout() { return (int32_t)(1000 * NUM_STATS + sizeof(RowBatch)); }

void kepo_row_forward(const RowBatch *batch, int32_t threads, int32_t isa) { over_rows(pick(isa, false), *batch, threads); }

void kepo_row_backward(const RowBatch *batch, int32_t threads, int32_t isa) { over_rows(pick(isa, true), *batch, threads); }

}  // extern "C"

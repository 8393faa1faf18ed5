// Random inputs for the CPU row kernels, to be built with -fsanitize=address,undefined: tests/kernels/test_fuzz.py does
// so, the package does not. Buffers end where the last row ends and what lies between two rows is poisoned, so that one
// element too many is reported by the sanitizer; what it cannot see is checked here. Every input has a seed of its own:
// a failure names its number, and `--only` runs it alone.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include <sanitizer/asan_interface.h>

#include "rows.h"

extern "C" {
int32_t kepo_best_isa();
void kepo_row_forward(const RowBatch *, int32_t threads, int32_t isa);
void kepo_row_backward(const RowBatch *, int32_t threads, int32_t isa);
}

namespace {

struct Random {  // splitmix64
    uint64_t state;
    uint64_t bits() {
        uint64_t x = state += 0x9e3779b97f4a7c15;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        return x ^ (x >> 31);
    }
    int64_t below(int64_t n) { return (int64_t)(bits() % (uint64_t)n); }
    bool one_in(int64_t n) { return below(n) == 0; }
    double unit() { return (double)(bits() >> 11) * 0x1p-53; }
    double normal() { return std::sqrt(-2.0 * std::log(1.0 - unit())) * std::cos(6.283185307179586 * unit()); }
    double between(double low, double high) { return low * std::pow(high / low, unit()); }  // log-uniform
};

// The element that holds x (bf16: the upper half, cut off), and the way back. Any bits are an element.
uint32_t element(float x, int32_t dtype) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return dtype == FLOAT32 ? bits : bits >> 16;
}
float value(uint32_t bits, int32_t dtype) {
    if (dtype == BFLOAT16) bits <<= 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

enum Plant { NOTHING, OVER_READ, OVER_WRITE, CHANGED_TEACHER, LOST_NAN };  // faults of --plant
struct Options {
    uint64_t inputs = 20000, seed = 0, only = 0;
    bool one = false;
    Plant plant = NOTHING;
};

[[noreturn]] void fail(const Options &options, uint64_t number, const char *what, int64_t row) {
    std::fprintf(stderr, "fuzz_rows: %s in row %lld; again: --seed %llu --only %llu\n", what, (long long)row,
                 (unsigned long long)options.seed, (unsigned long long)number);
    std::exit(1);
}

// n rows in a heap block that ends with the last element of the last row; the gaps between rows are poisoned.
struct Matrix {
    int64_t n, width, stride;
    size_t size;  // of an element
    std::vector<char> bytes;

    Matrix(int64_t n, int64_t width, int64_t stride, int32_t dtype, Random &random)
        : n(n), width(width), stride(stride), size(dtype == FLOAT32 ? 4 : 2),
          bytes(n == 0 ? 0 : ((n - 1) * stride + width) * size) {
        for (char &byte : bytes) byte = (char)random.bits();
    }
    Matrix(const Matrix &other) : n(other.n), width(other.width), stride(other.stride), size(other.size) {
        other.poison(false);
        bytes = other.bytes;
        other.poison(true);
        bytes.shrink_to_fit();
    }
    ~Matrix() { poison(false); }
    void poison(bool on) const {
        for (int64_t row = 0; row + 1 < n; ++row) {
            const char *gap = bytes.data() + (row * stride + width) * size;
            size_t length = (stride - width) * size;
            if (on) __asan_poison_memory_region(gap, length);
            else __asan_unpoison_memory_region(gap, length);
        }
    }
    void set(int64_t row, int64_t column, uint32_t element) {
        std::memcpy(bytes.data() + (row * stride + column) * size, &element, size);
    }
    float at(int64_t row, int64_t column) const {
        uint32_t bits = 0;
        std::memcpy(&bits, bytes.data() + (row * stride + column) * size, size);
        return value(bits, size == 4 ? FLOAT32 : BFLOAT16);
    }
    // Whether the same bits stand there as in `other`, between the rows (gaps) or everywhere.
    bool same(const Matrix &other, bool only_gaps) const {
        poison(false), other.poison(false);
        bool equal = only_gaps || bytes == other.bytes;
        for (int64_t row = 0; only_gaps && row + 1 < n; ++row) {
            size_t begin = (row * stride + width) * size, length = (stride - width) * size;
            equal = equal && std::memcmp(bytes.data() + begin, other.bytes.data() + begin, length) == 0;
        }
        poison(true), other.poison(true);
        return equal;
    }
};

// A tame row is finite but for columns ruled out on both sides; a wild one is anything.
float wild(Random &random, int32_t dtype) {
    const float inf = std::numeric_limits<float>::infinity();
    const float special[] = {std::nanf(""), inf, -inf, 3.4e38f, -3.4e38f, 1e-40f, -1e-45f, 0.0f, -0.0f, 88.0f, -87.5f};
    if (random.one_in(3)) return special[random.below(sizeof special / sizeof *special)];
    return value((uint32_t)random.bits() & (dtype == FLOAT32 ? 0xffffffffu : 0xffffu), dtype);
}

void fill_row(Matrix &x, int64_t row, bool is_tame, int32_t dtype, Random &random) {
    const double scales[] = {0.0, 1e-40, 1e-3, 1.0, 3.0, 12.0, 100.0, 2000.0};
    const double scale = scales[random.below(8)], offset = random.one_in(2) ? 0.0 : 50.0 * random.normal();
    const bool sparse = random.one_in(2);  // wild values here and there among tame ones
    for (int64_t column = 0; column < x.width; ++column) {
        bool tame_value = is_tame || (sparse && !random.one_in(20));
        float logit = tame_value ? (float)(offset + scale * random.normal()) : wild(random, dtype);
        x.set(row, column, element(logit, dtype));
    }
}

float temperature(Random &random) { return random.one_in(2) ? 1.0f : (float)random.between(0.05, 20.0); }
float softcap(Random &random) { return random.one_in(2) ? 0.0f : (float)random.between(0.1, 100.0); }
float beta(Random &random) {
    const float ends[] = {0.0f, 1.0f, 0.5f, 1e-6f, 1.0f - 1e-6f};
    return random.one_in(3) ? (float)random.unit() : ends[random.below(5)];
}

void run_one(const Options &options, uint64_t number) {
    Random random{options.seed * 0x2545f4914f6cdd1d + number};
    auto require = [&](bool holds, const char *what, int64_t row = 0) {
        if (!holds) fail(options, number, what, row);
    };

    RowBatch b{};
    b.n = random.below(9), b.vocab = 1 + random.below(random.one_in(2) ? 300 : 20), b.shared = b.vocab;
    b.dtype = (int32_t)random.below(2);
    const bool has_teacher = !random.one_in(3), has_targets = !random.one_in(3);
    if (has_teacher && random.one_in(2)) b.shared = 1 + random.below(b.vocab);
    const int64_t teacher_width = b.shared < b.vocab || random.one_in(2) ? b.shared : b.shared + random.below(40);
    b.logits_stride = b.vocab + (random.one_in(2) ? 0 : random.below(50));
    b.teacher_stride = teacher_width + (random.one_in(2) ? 0 : random.below(50));
    b.beta = beta(random), b.rest = 1.0f - b.beta, b.temperature = temperature(random), b.teacher_temperature = temperature(random);
    b.softcap = softcap(random), b.teacher_softcap = softcap(random);

    Matrix logits(b.n, b.vocab, b.logits_stride, b.dtype, random);
    Matrix teacher(has_teacher ? b.n : 0, teacher_width, b.teacher_stride, b.dtype, random);
    std::vector<int64_t> targets(has_targets ? b.n : 0);
    std::vector<float> table(NUM_STATS * b.n - (options.plant == OVER_WRITE && b.n > 0)), coefficients(3 * b.n);
    std::vector<char> is_tame(b.n);
    for (int64_t row = 0; row < b.n; ++row) {
        is_tame[row] = !random.one_in(3);
        fill_row(logits, row, is_tame[row], b.dtype, random);
        if (has_teacher) fill_row(teacher, row, is_tame[row], b.dtype, random);
        if (has_targets) targets[row] = random.below(b.vocab);
        bool ruled_out = is_tame[row] && random.one_in(3);
        for (int64_t column = 1; ruled_out && column < b.vocab; ++column) {
            if (random.one_in(2) || (has_targets && column == targets[row])) continue;
            uint32_t none = element(-std::numeric_limits<float>::infinity(), b.dtype);
            logits.set(row, column, none);
            if (has_teacher && column < teacher_width) teacher.set(row, column, none);
        }
    }
    for (float &coefficient : coefficients) coefficient = random.one_in(4) ? 0.0f : (float)random.normal();
    logits.poison(true), teacher.poison(true);

    const Matrix logits_before = logits, teacher_before = teacher;
    const std::vector<int64_t> targets_before = targets;
    const std::vector<float> coefficients_before = coefficients;
    // No element is allocated for an empty vector, and a null pointer means that the input is absent.
    b.logits = logits.bytes.data(), b.table = table.data(), b.coefficients = coefficients.data();
    b.teacher = has_teacher ? teacher.bytes.data() : nullptr;
    b.targets = has_targets ? targets.data() : nullptr;
    const int32_t isa = (int32_t)random.below(kepo_best_isa() + 1), threads = random.one_in(16) ? 3 : 1;

    RowBatch call = b;
    if (options.plant == OVER_READ) call.vocab += 1;
    kepo_row_forward(&call, threads, isa);
    require(logits.same(logits_before, false), "the forward changed the logits");
    const std::vector<float> table_before = table;
    kepo_row_backward(&b, threads, isa);

    if (options.plant == CHANGED_TEACHER && has_teacher && b.n) teacher.set(0, 0, 0x1234);
    if (options.plant == LOST_NAN) for (float &stat : table) stat = std::isnan(stat) ? 0.0f : stat;
    require(logits.same(logits_before, true), "the backward wrote between two rows");
    require(teacher.same(teacher_before, false), "the teacher changed");
    require(targets == targets_before && coefficients == coefficients_before, "targets or coefficients changed");
    if (options.plant != LOST_NAN) {
        bool same = table.empty() || !std::memcmp(table.data(), table_before.data(), 4 * table.size());
        require(same, "the table changed");
    }

    auto stat = [&](Stat s, int64_t row) { return (double)table[s * b.n + row]; };
    for (int64_t row = 0; row < b.n; ++row) {
        bool student_nan = false, shared_nan = false;
        for (int64_t i = 0; i < b.vocab; ++i) {
            bool student = std::isnan(logits_before.at(row, i));
            student_nan |= student;
            shared_nan |= i < b.shared && has_teacher && (student || std::isnan(teacher_before.at(row, i)));
        }
        require(!student_nan || std::isnan(stat(ENTROPY, row)), "a NaN did not reach the entropy", row);
        require(!shared_nan || std::isnan(stat(DIVERGENCE, row)), "a NaN did not reach the divergence", row);
        if (!is_tame[row]) continue;

        for (int s = 0; s < NUM_STATS; ++s) require(std::isfinite(stat((Stat)s, row)), "a number is not finite", row);
        require(stat(LOGPROB, row) < 1e-4, "a log-probability is positive", row);
        double entropy = stat(ENTROPY, row);
        require(entropy > -1e-4 && entropy < std::log((double)b.vocab) + 1e-4, "an entropy is out of range", row);
        require(stat(DIVERGENCE, row) > -1e-4, "a divergence is negative", row);
        double sum = 0.0, size = 0.0;
        for (int64_t i = 0; i < b.vocab; ++i) {
            double gradient = logits.at(row, i);
            require(std::isfinite(gradient), "a gradient is not finite", row);
            sum += gradient, size += std::fabs(gradient);
        }
        // A softmax does not see a constant added to its logits, so that the gradient sums to 0; a cap does.
        auto coefficient = [&](int k) { return std::fabs((double)coefficients[k * b.n + row]); };
        double scale = coefficient(0) + coefficient(1) * (1.0 + std::fabs(stat(PEAK_RATIO, row)) + std::fabs(stat(MEAN_RATIO, row)));
        scale = (scale + coefficient(2) * (1.0 + entropy)) / b.temperature;
        // If the peak lies beyond the shared columns they are that far below it, and known to fp32 of that distance.
        double relative = 1e-4 + 1e-6 * std::fabs(stat(SHARED_LOG_SUM, row));
        double bound = relative * scale + (b.dtype == FLOAT32 ? 1e-5 : 1.0 / 256) * size;
        require(b.softcap != 0.0f || std::fabs(sum) <= bound, "the gradient does not sum to 0", row);
    }

    if (threads > 1) {
        Matrix again = logits_before;
        std::vector<float> table_again(table.size());
        RowBatch one = b;
        one.logits = again.bytes.data(), one.table = table_again.data();
        kepo_row_forward(&one, 1, isa), kepo_row_backward(&one, 1, isa);
        bool same = table.empty() || !std::memcmp(table_before.data(), table_again.data(), 4 * table.size());
        require(same && again.same(logits, false), "one thread and three disagree");
    }
}

constexpr const char *HELP =
    "fuzz_rows [--inputs N] [--seed S] [--only I] [--plant over-read|over-write|changed-teacher|lost-nan]\n"
    "Runs N random inputs (default 20000) through the row kernels; --only runs input I of seed S alone; --plant makes\n"
    "a mistake, which must be reported. Status 0: nothing was found.\n";

Options parse(int argc, char **argv) {
    Options options;
    auto usage = [](int status) { std::fputs(HELP, status ? stderr : stdout), std::exit(status); };
    for (int i = 1; i < argc; ++i) {
        std::string name = argv[i];
        if (name == "--help") usage(0);
        if (i + 1 == argc) usage(2);
        std::string text = argv[++i];
        const char *plants[] = {"", "over-read", "over-write", "changed-teacher", "lost-nan"};
        if (name == "--inputs") options.inputs = std::strtoull(text.c_str(), nullptr, 10);
        else if (name == "--seed") options.seed = std::strtoull(text.c_str(), nullptr, 10);
        else if (name == "--only") options.only = std::strtoull(text.c_str(), nullptr, 10), options.one = true;
        else if (name == "--plant") {
            for (int p = OVER_READ; p <= LOST_NAN; ++p) if (text == plants[p]) options.plant = (Plant)p;
            if (options.plant == NOTHING) usage(2);
        } else usage(2);
    }
    return options;
}

}  // namespace

int main(int argc, char **argv) {
    const Options options = parse(argc, argv);
    const auto start = std::chrono::steady_clock::now();
    if (options.one) run_one(options, options.only);
    else for (uint64_t number = 0; number < options.inputs; ++number) run_one(options, number);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const uint64_t inputs = options.one ? 1 : options.inputs;
    std::printf("%llu inputs of seed %llu in %.1f s, %.0f inputs/s, instruction sets 0 to %d: nothing found\n",
                (unsigned long long)inputs, (unsigned long long)options.seed, seconds, inputs / seconds,
                kepo_best_isa());
}

// Products of few rows with many weight matrices in one call: what a decode step asks of a layer's experts.
//
// A weight [n, k] lies in oneDNN's format for x86-64 with AVX-512: strips of 64 outputs, within a strip row by row of
// the transposed matrix. Each strip is read once for up to ROWS rows. A row's sums are taken in the order of k whatever
// rows are computed with it, so its bits depend on nobody else. Knows neither Python nor PyTorch; called through ctypes.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

constexpr int64_t STRIP = 64;  // outputs in a strip
constexpr int64_t ROWS = 6;    // rows at a time: 6 x 4 sums and the 4 vectors of a strip stay in the 32 registers

typedef float Lanes __attribute__((vector_size(64)));

struct Job {
    const float* x;               // [rows, k]
    float* out;                   // [rows, n]
    int64_t k, n, stride;         // stride: floats from one strip to the next
    int64_t n_weights;
    const float* const* weights;
    const int64_t* first;         // weight i: rows first[i] to last[i]
    const int64_t* last;
    std::atomic<int64_t> next;    // the next (weight, strip) that nobody has taken
};

inline Lanes load(const float* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

template <int... R>
__attribute__((always_inline)) inline void multiply(
    std::integer_sequence<int, R...>, const float* x, const float* strip, float* out, int64_t k, int64_t n, int64_t width
) {
    constexpr int rows = sizeof...(R);
    Lanes a[rows] = {}, b[rows] = {}, c[rows] = {}, d[rows] = {};
    for (int64_t i = 0; i < k; ++i, strip += STRIP) {
        const Lanes w0 = load(strip), w1 = load(strip + 16), w2 = load(strip + 32), w3 = load(strip + 48);
        ([&](float value) {
            a[R] += value * w0;
            b[R] += value * w1;
            c[R] += value * w2;
            d[R] += value * w3;
        }(x[R * k + i]), ...);
    }
    for (int r = 0; r < rows; ++r) {
        const Lanes sums[] = {a[r], b[r], c[r], d[r]};
        std::memcpy(out + r * n, sums, width * sizeof(float));
    }
}

#if defined(__x86_64__)
__attribute__((target_clones("arch=x86-64-v4", "default")))
#endif
void strip_of(const float* x, const float* strip, float* out, int64_t rows, int64_t k, int64_t n, int64_t width) {
    for (; rows > 0; rows -= ROWS, x += ROWS * k, out += ROWS * n) {
        switch (std::min(rows, ROWS)) {
            case 1: multiply(std::make_integer_sequence<int, 1>(), x, strip, out, k, n, width); break;
            case 2: multiply(std::make_integer_sequence<int, 2>(), x, strip, out, k, n, width); break;
            case 3: multiply(std::make_integer_sequence<int, 3>(), x, strip, out, k, n, width); break;
            case 4: multiply(std::make_integer_sequence<int, 4>(), x, strip, out, k, n, width); break;
            case 5: multiply(std::make_integer_sequence<int, 5>(), x, strip, out, k, n, width); break;
            default: multiply(std::make_integer_sequence<int, 6>(), x, strip, out, k, n, width);
        }
    }
}

void work(void* shared) {  // each thread takes strips until none is left
    Job& job = *static_cast<Job*>(shared);
    const int64_t strips = (job.n + STRIP - 1) / STRIP;
    for (;;) {
        const int64_t task = job.next.fetch_add(1, std::memory_order_relaxed);
        if (task >= job.n_weights * strips) return;
        const int64_t i = task / strips, s = task % strips, row = job.first[i];
        strip_of(
            job.x + row * job.k, job.weights[i] + s * job.stride, job.out + row * job.n + s * STRIP,
            job.last[i] - row, job.k, job.n, std::min(STRIP, job.n - s * STRIP)
        );
    }
}

}  // namespace

// out[first[i] : last[i]] = x[first[i] : last[i]] @ weights[i].T for each weight i. `parallel` is GOMP_parallel of the
// OpenMP runtime that PyTorch computes with: a runtime of its own would let two teams fight for the cores.
extern "C" void qllm_few_rows(
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned), const float* x, float* out, int64_t k, int64_t n,
    int64_t stride, int64_t n_weights, const float* const* weights, const int64_t* first, const int64_t* last
) {
    Job job{x, out, k, n, stride, n_weights, weights, first, last, {0}};
    parallel(work, &job, 0, 0);
}

// Products with many weight matrices in one call: what a pass asks of a linear layer, or of a group of experts.
//
// A weight [n, k] lies in oneDNN's format for x86-64 with AVX-512: strips of 64 outputs, within a strip row by row of
// the transposed matrix. A row's sums are taken in the order of k whatever is computed with it, so its bits depend on
// nobody else. Knows neither Python nor PyTorch; called through ctypes.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>

namespace {

typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;
constexpr int64_t STRIP = 4 * LANES;  // outputs in a strip
constexpr int64_t DEPTH = 512;        // of k at a time: that much of a strip, 128 KiB, stays in the second cache
constexpr int64_t CHUNK = 384;        // rows at most that all strips are taken with in turn: they stay there too
constexpr int SUMS = 24;              // vectors of sums; with a strip's 4 and a row's number they fill 32 registers
constexpr int64_t FEWEST_TIMES = 16;  // that a piece is used, for which fetching the next one ahead pays

struct Job {
    const float* x;               // [rows, k]
    float* out;                   // [rows, n]
    int64_t k, n, stride;         // stride: floats from one strip to the next
    int64_t n_weights;
    const float* const* weights;
    const int64_t* first;         // weight i: rows first[i] to last[i]
    const int64_t* last;
    std::thread::id caller;
    std::atomic<int64_t> next;    // the next (weight, chunk of rows, strip) that nobody has taken
    // What the calling thread did itself:
    int64_t ended, rows;          // when it found nothing left; rows of all its tasks
    int64_t spent, longest;       // nanoseconds on all its tasks, and on one

    int64_t strips() const { return (n + STRIP - 1) / STRIP; }
    int64_t chunks(int64_t i) const { return (last[i] - first[i] + CHUNK - 1) / CHUNK; }
    int64_t tasks(int64_t i) const { return chunks(i) * strips(); }
    int64_t chunk_rows(int64_t i) const { return (last[i] - first[i] + chunks(i) - 1) / chunks(i); }
};

int64_t now() {  // nanoseconds
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

struct Piece {  // of a strip
    const float* weights;
    int64_t depth;                // of k
    int64_t width;                // outputs
    bool begun;                   // whether `out` holds the sums over what comes before it in k
};

inline Lanes load(const float* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

// Adds to `out` the products of as many rows as R has numbers, in VECTORS vectors of outputs.
template <int VECTORS, int... R>
__attribute__((always_inline)) inline void multiply(
    std::integer_sequence<int, R...>, const float* x, float* out, const Job& job, const Piece& piece
) {
    constexpr int rows = sizeof...(R);
    Lanes a[rows] = {}, b[rows] = {}, c[rows] = {}, d[rows] = {};
    if (piece.begun) {
        for (int r = 0; r < rows; ++r) {
            Lanes sums[4] = {};
            std::memcpy(sums, out + r * job.n, piece.width * sizeof(float));
            a[r] = sums[0], b[r] = sums[1], c[r] = sums[2], d[r] = sums[3];
        }
    }
    const float* strip = piece.weights;
    for (int64_t i = 0; i < piece.depth; ++i, strip += STRIP) {
        const Lanes w0 = load(strip), w1 = load(strip + LANES);
        const Lanes w2 = load(strip + 2 * LANES), w3 = load(strip + 3 * LANES);
        ([&](float value) {
            a[R] += value * w0;
            b[R] += value * w1;
            if constexpr (VECTORS > 2) {
                c[R] += value * w2;
                d[R] += value * w3;
            }
        }(x[R * job.k + i]), ...);
    }
    for (int r = 0; r < rows; ++r) {
        const Lanes sums[] = {a[r], b[r], c[r], d[r]};
        std::memcpy(out + r * job.n, sums, piece.width * sizeof(float));
    }
}

// As many rows at a time as there are registers for, and at last those that are left: one of LESS, plus 1.
template <int VECTORS, int... LESS>
__attribute__((always_inline)) inline void multiply_all(
    std::integer_sequence<int, LESS...>, const float* x, float* out, int64_t rows, const Job& job, const Piece& piece
) {
    constexpr int MOST = SUMS / VECTORS;
    // Meanwhile what follows in memory, of this strip or of the next, is fetched into the second cache, evenly.
    const int64_t times = rows / MOST, fetched = times < FEWEST_TIMES ? 0 : DEPTH * STRIP / times;
    const float* next = piece.weights + DEPTH * STRIP;
    for (; rows >= MOST; rows -= MOST, x += MOST * job.k, out += MOST * job.n) {
        for (const float* end = next + fetched; next < end; next += LANES) __builtin_prefetch(next, 0, 2);
        multiply<VECTORS>(std::make_integer_sequence<int, MOST>(), x, out, job, piece);
    }
    ((rows == LESS + 1
          ? multiply<VECTORS>(std::make_integer_sequence<int, LESS + 1>(), x, out, job, piece)
          : void()), ...);
}

#if defined(__x86_64__)
__attribute__((target_clones("arch=x86-64-v4", "default")))
#endif
void strip_of(const float* x, const float* strip, float* out, int64_t rows, int64_t width, const Job& job) {
    for (int64_t at = 0; at < job.k; at += DEPTH) {
        const Piece piece{strip + at * STRIP, std::min(DEPTH, job.k - at), width, at > 0};
        if (width > 2 * LANES)
            multiply_all<4>(std::make_integer_sequence<int, SUMS / 4 - 1>(), x + at, out, rows, job, piece);
        else  // a router of few experts, say
            multiply_all<2>(std::make_integer_sequence<int, SUMS / 2 - 1>(), x + at, out, rows, job, piece);
    }
}

void work(void* shared) {  // each thread takes strips until none is left
    Job& job = *static_cast<Job*>(shared);
    const bool mine = std::this_thread::get_id() == job.caller;
    int64_t i = 0, before = 0;  // a weight, and the tasks of those before it
    for (int64_t begun = mine ? now() : 0;;) {
        const int64_t task = job.next.fetch_add(1, std::memory_order_relaxed);
        for (; i < job.n_weights && task >= before + job.tasks(i); ++i) before += job.tasks(i);
        if (i == job.n_weights) {
            if (mine) job.ended = begun;
            return;
        }
        const int64_t chunk = (task - before) / job.strips(), s = (task - before) % job.strips();
        const int64_t size = job.chunk_rows(i), row = job.first[i] + chunk * size;
        const int64_t rows = std::min(size, job.last[i] - row);
        strip_of(
            job.x + row * job.k, job.weights[i] + s * job.stride, job.out + row * job.n + s * STRIP, rows,
            std::min(STRIP, job.n - s * STRIP), job
        );
        if (mine) {
            const int64_t end = now();
            job.rows += rows, job.spent += end - begun, job.longest = std::max(job.longest, end - begun), begun = end;
        }
    }
}

// A helper whose core computes for somebody else keeps its caller waiting for as long as that one's turn lasts. The
// caller then works alone for ALONE times as long, which bounds the share of its time that such waits take.
constexpr int64_t ALONE = 16, SHORT_WAIT = 300'000;  // nanoseconds: below, it is the system's own noise
thread_local int64_t alone_until = 0;

// The longest that a helper of equal speed needs for the task that it has, by what the caller's own tasks took.
int64_t longest_task(const Job& job) {
    int64_t most = 0;
    for (int64_t i = 0; i < job.n_weights; ++i)
        if (job.last[i] > job.first[i]) most = std::max(most, job.chunk_rows(i));
    return std::max(job.longest, job.rows ? job.spent / job.rows * most : INT64_MAX / 4);
}

}  // namespace

// out[first[i] : last[i]] = x[first[i] : last[i]] @ weights[i].T for each weight i. `parallel` is GOMP_parallel of the
// OpenMP runtime that PyTorch computes with: a runtime of its own would let two teams fight for the cores.
extern "C" void qllm_products(
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned), const float* x, float* out, int64_t k, int64_t n,
    int64_t stride, int64_t n_weights, const float* const* weights, const int64_t* first, const int64_t* last
) {
    Job job{x, out, k, n, stride, n_weights, weights, first, last, std::this_thread::get_id(), {0}, 0, 0, 0, 0};
    if (now() < alone_until) return work(&job);
    parallel(work, &job, 0, 0);
    const int64_t end = now(), waited = end - job.ended;
    if (waited > std::max(SHORT_WAIT, 2 * longest_task(job))) alone_until = end + ALONE * waited;
}

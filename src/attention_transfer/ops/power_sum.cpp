// Σ |A|^p and its gradient for p = 1, 2, 4, each in one pass over A; see power_sum.py. A is (n, rows, columns), contiguous;
// `inner` tells which dimension is summed over: columns (a map value a row), else rows (a map value a column).
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t WIDTH = 64;    // partial sums of a row: a few vector registers
constexpr int64_t STRIP = 2048;  // columns at a time: their sums stay in the nearest cache
constexpr int64_t RUN = 64;      // rows added up before they join the sum, which keeps float32 exact enough

struct bf16 { uint16_t bits; };

inline float load(float x) { return x; }
inline float load(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}
inline void store(float& to, float x) { to = x; }
inline void store(bf16& to, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <int P> inline float power(float a) { return P == 1 ? __builtin_fabsf(a) : P == 2 ? a * a : a * a * (a * a); }
template <int P> inline float slope(float a, float g) {
    return P == 1 ? (a > 0 ? g : a < 0 ? -g : 0 * g) : P == 2 ? a * (2 * g) : a * (a * a) * (4 * g);
}

template <class T, int P> float sum_row(const T* a, int64_t columns) {
    float part[WIDTH] = {};
    int64_t j = 0;
    for (; j + WIDTH <= columns; j += WIDTH)
        for (int64_t k = 0; k < WIDTH; k++) part[k] += power<P>(load(a[j + k]));
    for (int64_t k = 0; j + k < columns; k++) part[k] += power<P>(load(a[j + k]));
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < WIDTH; k++) total += part[k];
    return total;
}

template <class T, int P> void sum_rows(const T* a, float* q, int64_t rows, int64_t columns, int64_t width) {
    std::fill(q, q + width, 0.0f);
    for (int64_t start = 0; start < rows; start += RUN) {
        float part[STRIP];
        std::fill(part, part + width, 0.0f);
        int64_t end = std::min(start + RUN, rows), i = start;
        for (; i + 4 <= end; i += 4) {
            const T *r0 = a + i * columns, *r1 = r0 + columns, *r2 = r1 + columns, *r3 = r2 + columns;
            for (int64_t j = 0; j < width; j++)
                part[j] += (power<P>(load(r0[j])) + power<P>(load(r1[j]))) + (power<P>(load(r2[j])) + power<P>(load(r3[j])));
        }
        for (; i < end; i++)
            for (int64_t j = 0; j < width; j++) part[j] += power<P>(load(a[i * columns + j]));
        for (int64_t j = 0; j < width; j++) q[j] += part[j];
    }
}

template <class T, int P> void sum(const T* a, float* q, int64_t n, int64_t rows, int64_t columns, bool inner, int threads) {
    if (inner) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t i = 0; i < n * rows; i++) q[i] = sum_row<T, P>(a + i * columns, columns);
        return;
    }
    int64_t strips = (columns + STRIP - 1) / STRIP;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n * strips; i++) {
        int64_t sample = i / strips, start = i % strips * STRIP;
        int64_t width = std::min(STRIP, columns - start);
        sum_rows<T, P>(a + sample * rows * columns + start, q + sample * columns + start, rows, columns, width);
    }
}

template <class T, int P>
void gradient(const T* a, const float* g, T* __restrict out, int64_t n, int64_t rows, int64_t columns, bool inner, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n * rows; i++) {
        const T* row = a + i * columns;
        T* to = out + i * columns;
        const float* each = g + i / rows * columns;
        if (inner)
            for (int64_t j = 0; j < columns; j++) store(to[j], slope<P>(load(row[j]), g[i]));
        else
            for (int64_t j = 0; j < columns; j++) store(to[j], slope<P>(load(row[j]), each[j]));
    }
}

template <class T, int P>
void either(const void* a, float* q, const float* g, void* out, int64_t n, int64_t rows, int64_t columns, bool inner, int threads) {
    if (q) sum<T, P>(static_cast<const T*>(a), q, n, rows, columns, inner, threads);
    else gradient<T, P>(static_cast<const T*>(a), g, static_cast<T*>(out), n, rows, columns, inner, threads);
}

}  // namespace

// With `q` the sum is written there; without it the gradient, g times the slope, to `out`. 0, or 1 for another p.
extern "C" int power_sum(const void* a, float* q, const float* g, void* out, int64_t n, int64_t rows, int64_t columns,
                         int p, int half, int inner, int threads) {
    auto run = p == 1 ? (half ? either<bf16, 1> : either<float, 1>)
             : p == 2 ? (half ? either<bf16, 2> : either<float, 2>)
             : p == 4 ? (half ? either<bf16, 4> : either<float, 4>) : nullptr;
    if (run) run(a, q, g, out, n, rows, columns, inner, threads);
    return run == nullptr;
}

// Kernels of the activation loss on a CPU; see kernels.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// Columns at a time: their sums stay in the nearest cache, and are short enough to be exact.
constexpr int64_t STRIP = 2048;
// Rows added up before they join the sum, which keeps float32 exact enough.
constexpr int64_t RUN = 64;

struct bf16 { uint16_t bits; };

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline float load(float x) { return x; }
inline float load(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline void store(float& to, float x) { to = x; }
inline void store(bf16& to, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <int P> inline float power(float a) {
    return P == 1 ? __builtin_fabsf(a) : P == 2 ? a * a : a * a * (a * a);
}
template <int P> inline float slope(float a, float g) {
    return P == 1 ? (a > 0 ? g : a < 0 ? -g : 0 * g) : P == 2 ? a * (2 * g) : a * (a * a) * (4 * g);
}

// The share of word k of a row in its sum. A word has four bytes: of bfloat16 two values, which are
// cheaper widened together.
template <int P> inline float word(const float* a, int64_t k) { return power<P>(a[k]); }
template <int P> inline float word(const bf16* a, int64_t k) {
    uint32_t both;
    std::memcpy(&both, a + 2 * k, 4);
    return power<P>(as_float(both << 16)) + power<P>(as_float(both & 0xffff0000u));
}

template <class T, int P> inline float sum_words(const T* a, int64_t words) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < words; k++) total += word<P>(a, k);
    return total;
}

template <class T, int P> inline float sum_row(const T* a, int64_t columns) {
    constexpr int64_t PER_WORD = 4 / sizeof(T);
    switch (columns) {  // as in the networks for CIFAR: without a loop
        case 16: return sum_words<T, P>(a, 16 / PER_WORD);
        case 32: return sum_words<T, P>(a, 32 / PER_WORD);
        case 64: return sum_words<T, P>(a, 64 / PER_WORD);
    }
    float total = columns % PER_WORD ? power<P>(load(a[columns - 1])) : 0;
    for (int64_t start = 0; start < columns; start += STRIP)
        total += sum_words<T, P>(a + start, std::min(STRIP, columns - start) / PER_WORD);
    return total;
}

template <class T, int P>
void sum_rows(const T* a, float* q, int64_t rows, int64_t columns, int64_t width) {
    std::fill(q, q + width, 0.0f);
    for (int64_t start = 0; start < rows; start += RUN) {
        float part[STRIP];
        std::fill(part, part + width, 0.0f);
        int64_t end = std::min(start + RUN, rows), i = start;
        for (; i + 8 <= end; i += 8) {
            const T *r0 = a + i * columns, *r1 = r0 + columns, *r2 = r1 + columns, *r3 = r2 + columns;
            const T *r4 = r3 + columns, *r5 = r4 + columns, *r6 = r5 + columns, *r7 = r6 + columns;
            for (int64_t j = 0; j < width; j++)
                part[j] += ((power<P>(load(r0[j])) + power<P>(load(r1[j]))) + (power<P>(load(r2[j])) + power<P>(load(r3[j]))))
                         + ((power<P>(load(r4[j])) + power<P>(load(r5[j]))) + (power<P>(load(r6[j])) + power<P>(load(r7[j]))));
        }
        for (; i < end; i++)
            for (int64_t j = 0; j < width; j++) part[j] += power<P>(load(a[i * columns + j]));
        for (int64_t j = 0; j < width; j++) q[j] += part[j];
    }
}

template <class T, int P>
void sum(const T* a, float* q, int64_t n, int64_t rows, int64_t columns, bool inner, int threads) {
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
        const T* from = a + sample * rows * columns + start;
        sum_rows<T, P>(from, q + sample * columns + start, rows, columns, width);
    }
}

template <class T, int P>
void gradient(const T* a, const float* g, T* __restrict out, int64_t n, int64_t rows,
              int64_t columns, bool inner, int threads) {
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

template <class Run> void with_exponent(int p, Run run) {
    if (p == 1) run(std::integral_constant<int, 1>());
    else if (p == 2) run(std::integral_constant<int, 2>());
    else run(std::integral_constant<int, 4>());
}

constexpr float EPS = 1e-12f;

// Σ of `term` over the columns: in single precision within a strip, in double across strips.
template <class Term> inline double sum_of(int64_t columns, Term term) {
    double total = 0;
    for (int64_t start = 0; start < columns; start += STRIP) {
        float part = 0;
        int64_t end = std::min(start + STRIP, columns);
#pragma omp simd reduction(+ : part)
        for (int64_t j = start; j < end; j++) part += term(j);
        total += part;
    }
    return total;
}

}  // namespace

// Y = Q / r and r = max(‖Q‖₂, 1e-12), row by row of q (n, columns). Scaled, because squares of
// Q > 1e19 overflow.
extern "C" void normalize(const float* q, float* y, float* r, int64_t n, int64_t columns,
                          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const float* row = q + i * columns;
        float scale = EPS;
#pragma omp simd reduction(max : scale)
        for (int64_t j = 0; j < columns; j++) scale = std::max(scale, std::fabs(row[j]));
        auto square = [=](int64_t j) { float x = row[j] / scale; return x * x; };
        float norm = scale * float(std::sqrt(sum_of(columns, square)));
        r[i] = norm < EPS ? EPS : norm;  // a NaN stays one
        for (int64_t j = 0; j < columns; j++) y[i * columns + j] = row[j] / r[i];
    }
}

// ∂L/∂Q = (g − Y·(⟨Y, g⟩ − r·g_r)) / r, without the projection where r is at its bound.
extern "C" void normalize_backward(const float* y, const float* r, const float* g,
                                   const float* g_r, float* out, int64_t n, int64_t columns,
                                   int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        const float *yi = y + i * columns, *gi = g + i * columns;
        auto product = [=](int64_t j) { return yi[j] * gi[j]; };
        float along = float(sum_of(columns, product)) - r[i] * g_r[i];
        float factor = r[i] > EPS ? along : 0.0f;
        for (int64_t j = 0; j < columns; j++) out[i * columns + j] = (gi[j] - yi[j] * factor) / r[i];
    }
}

// Σ |A|^p for p = 1, 2, 4, to q. A is (n, rows, columns), contiguous; `inner`: the sum goes over
// the columns (a map value a row), else over the rows (a map value a column). `half`: bfloat16.
extern "C" void power_sum(const void* a, float* q, int64_t n, int64_t rows, int64_t columns, int p,
                          int half, int inner, int threads) {
    auto run = [=](auto exponent) {
        constexpr int P = decltype(exponent)::value;
        if (half) sum<bf16, P>(static_cast<const bf16*>(a), q, n, rows, columns, inner, threads);
        else sum<float, P>(static_cast<const float*>(a), q, n, rows, columns, inner, threads);
    };
    with_exponent(p, run);
}

// Its gradient, g · p·|A|^(p−1)·sign(A), to out.
extern "C" void power_grad(const void* a, const float* g, void* out, int64_t n, int64_t rows,
                           int64_t columns, int p, int half, int inner, int threads) {
    auto run = [=](auto exponent) {
        constexpr int P = decltype(exponent)::value;
        auto call = [=](auto from, auto to) {
            using T = std::remove_pointer_t<decltype(to)>;
            gradient<T, P>(from, g, to, n, rows, columns, inner, threads);
        };
        if (half) call(static_cast<const bf16*>(a), static_cast<bf16*>(out));
        else call(static_cast<const float*>(a), static_cast<float*>(out));
    };
    with_exponent(p, run);
}

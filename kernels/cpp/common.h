// What the C++ kernels share: vectors of fp32 read from and written to tensors in fp32 or bf16, memory of a thread, and
// products of small matrices. It is compiled together with all kernels, and comes before them.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;
constexpr int64_t WIDTH = Vec::size();

// Reads a vector. Torch's conversions between fp32 and bf16 take some twenty instructions in place of two and one.
inline Vec load(const float* from) {
  return Vec::loadu(from);
}
inline Vec load(const BFloat16* from) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
#else
  float values[WIDTH];
  for (int64_t i = 0; i < WIDTH; ++i) values[i] = from[i];
  return Vec::loadu(values);
#endif
}

inline float value(float x) {
  return x;
}
inline float value(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline void store(float x, float* to) {
  *to = x;
}
inline void store(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->x = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
}
inline void store(const Vec& x, float* to) {
  x.store(to);
}
inline void store(const Vec& x, BFloat16* to) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  float values[WIDTH];
  x.store(values);
#pragma omp simd
  for (int64_t i = 0; i < WIDTH; ++i) store(values[i], to + i);
#endif
}

// Reads or writes the first n values of a vector; the others are zero.
template <typename T>
Vec load(const T* from, int64_t n) {
  if (n >= WIDTH) return load(from);
  T values[WIDTH] = {};
  std::copy(from, from + n, values);
  return load(values);
}
template <typename T>
void store(const Vec& x, T* to, int64_t n) {
  if (n >= WIDTH) return store(x, to);
  T values[WIDTH];
  store(x, values);
  std::copy(values, values + n, to);
}

template <typename T>
void convert(const float* x, int64_t n, T* out) {
  for (int64_t c = 0; c < n; c += WIDTH) store(load(x + c, n - c), out + c, n - c);
}

// exp, to the accuracy of the dtype of the tensors that it is computed for.
template <typename T>
Vec exponential(const Vec& x) {
  return std::is_same_v<T, float> ? x.exp_u20() : x.fexp_u20();
}

template <typename T>
Vec sigmoid(const Vec& x) {
  const Vec inverse = Vec(1.f) + exponential<T>(x.neg());
#if defined(CPU_CAPABILITY_AVX512)
  if (!std::is_same_v<T, float>) return Vec(_mm512_rcp14_ps(inverse));
#endif
  return Vec(1.f) / inverse;
}

// Memory of a thread, aligned and not initialised.
class Memory {
 public:
  template <typename T>
  T* get(int64_t n) {
    kept_.emplace_back(new char[n * sizeof(T) + 64]);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(kept_.back().get()) + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<std::unique_ptr<char[]>> kept_;
};

// Products of bf16 read their right matrix in pairs of rows, (k/2, n, 2), which is called packed.
template <typename T>
constexpr int64_t PAIR = std::is_same_v<T, BFloat16> ? 2 : 1;

// Packs x, (k, n) in rows that are `row` apart, as (k_out, n); the added rows are zero.
inline void pack(const float* x, int64_t row, int64_t k, int64_t n, int64_t k_out, float* out) {
  for (int64_t i = 0; i < k; ++i) std::memcpy(out + i * n, x + i * row, sizeof(float) * n);
  std::fill(out + k * n, out + k_out * n, 0.f);
}
inline void pack(const BFloat16* x, int64_t row, int64_t k, int64_t n, int64_t k_out, BFloat16* out) {
  auto bits = reinterpret_cast<const uint16_t*>(x);
  auto pairs = reinterpret_cast<uint32_t*>(out);
  for (int64_t i = 0; i < k; i += 2) {
    const uint16_t *low = bits + i * row, *high = i + 1 < k ? low + row : nullptr;
    uint32_t* line = pairs + i / 2 * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) line[j] = low[j] | (high ? static_cast<uint32_t>(high[j]) << 16 : 0u);
  }
  std::fill(pairs + (k + 1) / 2 * n, pairs + k_out / 2 * n, 0u);
}

// The transpose of x, (n, k), as (k, n), each in rows that are `row` and `row_out` apart.
inline void turn(const float* x, int64_t row, int64_t n, int64_t k, float* out, int64_t row_out) {
#if defined(CPU_CAPABILITY_AVX512)
  at::vec::transpose_mxn<float>(x, row, out, row_out, n, k);
#else
  for (int64_t i = 0; i < k; ++i)
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[i * row_out + j] = x[j * row + i];
#endif
}

// Packs the transpose of x, (n, k) in rows that are `row` apart, as (k, n_out); the added columns are zero.
template <typename T>
void pack_transposed(const T* x, int64_t row, int64_t n, int64_t k, int64_t n_out, T* out) {
  using Bits = std::conditional_t<std::is_same_v<T, float>, float, uint32_t>;  // one or two channels
  auto to = reinterpret_cast<Bits*>(out);
  const int64_t lines = k / PAIR<T>;
  if (n < n_out)
    for (int64_t i = 0; i < lines; ++i) std::fill(to + i * n_out + n, to + (i + 1) * n_out, Bits{});
  if (row % PAIR<T> == 0)
    return turn(reinterpret_cast<const float*>(x), row / PAIR<T>, n, lines, reinterpret_cast<float*>(out), n_out);
  for (int64_t i = 0; i < lines; ++i) {
    const T* from = x + PAIR<T> * i;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[i * n_out + j] = *reinterpret_cast<const Bits*>(from + j * row);
  }
}

// The transpose of x, (n, k) in rows that are `row` apart, as (k, n_out), not packed.
template <typename T>
void transpose(const T* x, int64_t row, int64_t n, int64_t k, int64_t n_out, T* out) {
  std::fill(out, out + k * n_out, T{});
  for (int64_t i = 0; i < k; ++i)
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[i * n_out + j] = x[j * row + i];
}

template <typename T>
void copy(const T* x, int64_t row, int64_t n, int64_t k, int64_t n_out, T* out) {
  for (int64_t j = 0; j < n; ++j) std::memcpy(out + j * k, x + j * row, sizeof(T) * k);
  std::fill(out + n * k, out + n_out * k, T{});
}

// c (m, n) = a (m, k) b (k, n), or c + a b, by oneDNN's kernels for small matrices; b is packed, c is fp32.
template <typename T>
void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t row_a, const T* b, int64_t row_b, float* c,
             int64_t row_c, bool add = false) {
  at::native::cpublas::brgemm(m, n, k, row_a, row_b, row_c, add, a, b, c, PAIR<T> == 2);
}

// Calls f(from, to) for parts of [0, n) in parallel. A thread gives up the units of its products at the end.
template <typename F>
void parallel(int64_t n, const F& f) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    f(begin, end);
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace

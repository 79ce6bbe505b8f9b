// Would pooling the text straight from quantised embedding rows be faster than from the float rows?
//
//   g++ -O3 -march=native -std=c++17 -w kernels/checks/pooling.cpp -o pooling && ./pooling
//
// The float rows exist anyway: the language model's prefill takes them as its input. So the question
// is the mean alone: D = 4096, rows in cache (they were just dequantised, which read the quantised
// ones too). CPU time of this thread, median of many.
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

constexpr int D = 4096, kBlock = 32;

struct Q8 {
  _Float16 scale;
  int8_t q[kBlock];
};
struct Q4 {
  _Float16 scale;
  uint8_t q[kBlock / 2];
};

static void add(const float *row, float *sum) {
  for (int d = 0; d < D; d++) sum[d] += row[d];
}
#if defined(__AVX512F__)  // GCC makes poor code of the plain loops below

static inline void add(float *sum, __m512 v) {
  _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), v));
}
static inline void add(float *sum, float scale, __m512i q) {
  const __m512 v = _mm512_cvtepi32_ps(q);
  _mm512_storeu_ps(sum, _mm512_fmadd_ps(v, _mm512_set1_ps(scale), _mm512_loadu_ps(sum)));
}
static __m128i bytes(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
static void add(const _Float16 *row, float *sum) {
  for (int d = 0; d < D; d += 16)
    add(sum + d, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(row + d))));
}
static void add(const Q8 *row, float *sum) {
  for (int b = 0; b < D / kBlock; b++)
    for (int i = 0; i < kBlock; i += 16)
      add(sum + b * kBlock + i, static_cast<float>(row[b].scale),
          _mm512_cvtepi8_epi32(bytes(row[b].q + i)));
}
static void add(const Q4 *row, float *sum) {
  const __m512i low = _mm512_set1_epi32(15), eight = _mm512_set1_epi32(8);
  for (int b = 0; b < D / kBlock; b++) {
    const float s = static_cast<float>(row[b].scale);
    const __m512i q = _mm512_cvtepu8_epi32(bytes(row[b].q));
    add(sum + b * kBlock, s, _mm512_sub_epi32(_mm512_and_si512(q, low), eight));
    add(sum + b * kBlock + kBlock / 2, s, _mm512_sub_epi32(_mm512_srli_epi32(q, 4), eight));
  }
}

#else

static void add(const _Float16 *row, float *sum) {
  for (int d = 0; d < D; d++) sum[d] += static_cast<float>(row[d]);
}
static void add(const Q8 *row, float *sum) {
  for (int b = 0; b < D / kBlock; b++) {
    const float s = static_cast<float>(row[b].scale);
    for (int i = 0; i < kBlock; i++) sum[b * kBlock + i] += s * static_cast<float>(row[b].q[i]);
  }
}
static void add(const Q4 *row, float *sum) {
  for (int b = 0; b < D / kBlock; b++) {
    const float s = static_cast<float>(row[b].scale);
    float *o = sum + b * kBlock;
    for (int i = 0; i < kBlock / 2; i++) {
      o[i] += s * static_cast<float>((row[b].q[i] & 15) - 8);
      o[i + kBlock / 2] += s * static_cast<float>((row[b].q[i] >> 4) - 8);
    }
  }
}

#endif

template <class T> static double median_us(int rows, size_t per_row, float *check) {
  std::vector<T> data(rows * per_row);
  memset(static_cast<void *>(data.data()), 1, data.size() * sizeof(T));
  std::vector<float> sum(D);
  std::vector<double> times;
  for (int i = 0; i < 2000; i++) {
    timespec a, b;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int r = 0; r < rows; r++) add(data.data() + r * per_row, sum.data());
    for (auto &s : sum) s /= static_cast<float>(rows);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
    times.push_back((b.tv_sec - a.tv_sec) * 1e6 + (b.tv_nsec - a.tv_nsec) * 1e-3);
    *check += sum[i % D];
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

int main() {
  float check = 0;
  for (int rows : {50, 65, 78})
    printf("%d rows: float32 %.1f us, F16 %.1f us, Q8_0 %.1f us, Q4_0 %.1f us\n", rows,
           median_us<float>(rows, D, &check), median_us<_Float16>(rows, D, &check),
           median_us<Q8>(rows, D / kBlock, &check), median_us<Q4>(rows, D / kBlock, &check));
  return check == 12345.0f;
}

#include <immintrin.h>

#include "ggml_q4_0.h"

namespace mse_ggml {
namespace {

struct Avx512 {
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int kColumns = 8, kVectors = 2;

  static inline Floats zero() { return _mm512_setzero_ps(); }

  static inline void nibbles(const uint8_t *values, Ints v[4]) {
    const Ints nibble = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(8);
    const Ints low = _mm512_loadu_si512(values), high = _mm512_loadu_si512(values + 64);
    // (x & 15) ^ 8 in one instruction each.
    v[0] = _mm512_ternarylogic_epi32(low, nibble, flip, 0x6a);
    v[1] = _mm512_ternarylogic_epi32(high, nibble, flip, 0x6a);
    v[2] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(low, 4), nibble, flip, 0x6a);
    v[3] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(high, 4), nibble, flip, 0x6a);
  }

  static inline Floats scales(const uint16_t *halfs) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(halfs)));
    return _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(eight));
  }

  template <int C>
  static inline void dots(const Ints (*v)[4], const int8_t *x, int32_t start, Ints *dot) {
    MSE_UNROLL
    for (int c = 0; c < C; c++) dot[c] = _mm512_set1_epi32(start);
    MSE_UNROLL
    for (int k = 0; k < 4; k++) {
      const Ints eight = _mm512_set1_epi64(eight_bytes(x + 32 * k));
      MSE_UNROLL
      for (int c = 0; c < C; c++) dot[c] = _mm512_dpbusd_epi32(dot[c], v[c][k], eight);
    }
  }

  static inline Floats scaled(Ints dot, Floats scale, float row, Floats sum) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, _mm512_set1_ps(row)), sum);
  }

  static inline void store(float *to, Floats sum) {
    const Floats both = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
    _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_maskz_compress_ps(0x5555, both)));
  }

  static inline void prepare(const Activations &from, Rows &to) {
    const Ints ones = _mm512_set1_epi8(1);
    Ints sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, _mm512_loadu_si512(from.values));
    sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(from.values + 64));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    const __m256i pairs = _mm256_add_epi32(half, _mm256_srli_epi64(half, 32));
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    const __m128i four = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(pairs, order));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to.start),
                     _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(four, 2)));
    const __m128i halfs = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from.scale));
    _mm_storeu_ps(to.scale, _mm_cvtph_ps(halfs));
  }
};

}  // namespace

void avx512_vnni(int n, float *out, size_t stride, const void *weights, const void *activations,
                 int n_rows, int n_columns, void *scratch) {
  product<Avx512>(n, out, stride, weights, activations, n_rows, n_columns, scratch);
}

}  // namespace mse_ggml

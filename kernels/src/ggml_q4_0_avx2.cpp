// Compiled twice: as it is, and with AVX-VNNI (MSE_AVX_VNNI).
#include <immintrin.h>

#include "ggml_q4_0.h"

namespace mse_ggml {
namespace {

struct Avx2 {
  using Ints = __m256i;
  using Floats = __m256;
  static constexpr int kColumns = 4, kVectors = 1;  // sixteen registers: eight sums, four weights

  static inline Floats zero() { return _mm256_setzero_ps(); }

  static inline Ints load(const void *from) {
    return _mm256_loadu_si256(static_cast<const __m256i *>(from));
  }

  static inline void nibbles(const uint8_t *values, Ints v[4]) {
    const Ints nibble = _mm256_set1_epi8(15), flip = _mm256_set1_epi8(static_cast<char>(0x88));
    const Ints low = _mm256_xor_si256(load(values), flip);
    const Ints high = _mm256_xor_si256(load(values + 64), flip);
    v[0] = _mm256_and_si256(low, nibble);
    v[1] = _mm256_and_si256(high, nibble);
    v[2] = _mm256_and_si256(_mm256_srli_epi16(low, 4), nibble);
    v[3] = _mm256_and_si256(_mm256_srli_epi16(high, 4), nibble);
  }

  static inline Floats scales(const uint16_t *halfs) {
    const Ints twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    const __m128 four = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(halfs)));
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(four), twice);
  }

  template <int C>
  static inline void dots(const Ints (*v)[4], const int8_t *x, int32_t start, Ints *dot) {
    const Ints x0 = _mm256_set1_epi64x(eight_bytes(x));
    const Ints x1 = _mm256_set1_epi64x(eight_bytes(x + 32));
    const Ints x2 = _mm256_set1_epi64x(eight_bytes(x + 64));
    const Ints x3 = _mm256_set1_epi64x(eight_bytes(x + 96));
    MSE_UNROLL
    for (int c = 0; c < C; c++) {
#ifdef MSE_AVX_VNNI
      dot[c] = _mm256_dpbusd_avx_epi32(_mm256_set1_epi32(start), v[c][0], x0);
      dot[c] = _mm256_dpbusd_avx_epi32(dot[c], v[c][1], x1);
      dot[c] = _mm256_dpbusd_avx_epi32(dot[c], v[c][2], x2);
      dot[c] = _mm256_dpbusd_avx_epi32(dot[c], v[c][3], x3);
#else
      // Eight products of at most 15 x 128 fit in 16 bits.
      const Ints first = _mm256_add_epi16(_mm256_maddubs_epi16(v[c][0], x0),
                                          _mm256_maddubs_epi16(v[c][1], x1));
      const Ints last = _mm256_add_epi16(_mm256_maddubs_epi16(v[c][2], x2),
                                         _mm256_maddubs_epi16(v[c][3], x3));
      const Ints pairs = _mm256_madd_epi16(_mm256_add_epi16(first, last), _mm256_set1_epi16(1));
      dot[c] = _mm256_add_epi32(pairs, _mm256_set1_epi32(start));
#endif
    }
  }

  static inline Floats scaled(Ints dot, Floats scale, float row, Floats sum) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(scale, _mm256_set1_ps(row)), sum);
  }

  static inline void store(float *to, Floats sum) {
    const Floats both = _mm256_add_ps(sum, _mm256_permute_ps(sum, 0xb1));
    const Ints order = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    _mm_storeu_ps(to, _mm256_castps256_ps128(_mm256_permutevar8x32_ps(both, order)));
  }

  static inline void prepare(const Activations &from, Rows &to) {
    const Ints ones = _mm256_set1_epi8(1), pairs = _mm256_set1_epi16(1);
    Ints sums = _mm256_setzero_si256();
    MSE_UNROLL
    for (int k = 0; k < 4; k++) {
      const Ints two = _mm256_maddubs_epi16(ones, load(from.values + 32 * k));
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(two, pairs));
    }
    sums = _mm256_add_epi32(sums, _mm256_srli_epi64(sums, 32));
    const Ints order = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    const __m128i four = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(sums, order));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to.start),
                     _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(four, 2)));
    const __m128i halfs = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from.scale));
    _mm_storeu_ps(to.scale, _mm_cvtph_ps(halfs));
  }
};

}  // namespace

#ifdef MSE_AVX_VNNI
void avx_vnni(int n, float *out, size_t stride, const void *weights, const void *activations,
              int n_rows, int n_columns, void *scratch) {
#else
void avx2(int n, float *out, size_t stride, const void *weights, const void *activations,
          int n_rows, int n_columns, void *scratch) {
#endif
  product<Avx2>(n, out, stride, weights, activations, n_rows, n_columns, scratch);
}

}  // namespace mse_ggml

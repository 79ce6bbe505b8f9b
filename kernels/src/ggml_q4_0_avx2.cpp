// Compiled twice: as it is, and with AVX-VNNI (MSE_AVX_VNNI).
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
    const Ints nibble = _mm256_set1_epi8(15), low = load(values), high = load(values + 64);
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

  static inline void dots(const Ints (*v)[4], const uint8_t *x, int32_t start, Ints *dot) {
    const Ints x0 = _mm256_set1_epi64x(eight_bytes(x));
    const Ints x1 = _mm256_set1_epi64x(eight_bytes(x + 8));
    const Ints x2 = _mm256_set1_epi64x(eight_bytes(x + 16));
    const Ints x3 = _mm256_set1_epi64x(eight_bytes(x + 24));
    MSE_UNROLL
    for (int c = 0; c < kVectors; c++) {
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
};

}  // namespace

#ifdef MSE_AVX_VNNI
const Kernel avx_vnni = {scratch, prepare, run<Avx2>};
#else
const Kernel avx2 = {scratch, prepare, run<Avx2>};
#endif

}  // namespace mse_ggml

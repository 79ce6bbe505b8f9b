#include "ggml_q4_0.h"

namespace mse_ggml {
namespace {

struct Avx512 {
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int kColumns = 8, kVectors = 2;

  static inline Floats zero() { return _mm512_setzero_ps(); }

  static inline void nibbles(const uint8_t *values, Ints v[4]) {
    const Ints nibble = _mm512_set1_epi8(15);
    const Ints low = _mm512_loadu_si512(values), high = _mm512_loadu_si512(values + 64);
    v[0] = _mm512_and_si512(low, nibble);
    v[1] = _mm512_and_si512(high, nibble);
    v[2] = _mm512_and_si512(_mm512_srli_epi16(low, 4), nibble);
    v[3] = _mm512_and_si512(_mm512_srli_epi16(high, 4), nibble);
  }

  static inline Floats scales(const uint16_t *halfs) {
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(halfs)));
    return _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(eight));
  }

  static inline void dots(const Ints (*v)[4], const uint8_t *x, int32_t start, Ints *dot) {
    MSE_UNROLL
    for (int c = 0; c < kVectors; c++) dot[c] = _mm512_set1_epi32(start);
    MSE_UNROLL
    for (int k = 0; k < 4; k++) {
      const Ints eight = _mm512_set1_epi64(eight_bytes(x + 8 * k));
      MSE_UNROLL
      for (int c = 0; c < kVectors; c++) dot[c] = _mm512_dpbusd_epi32(dot[c], v[c][k], eight);
    }
  }

  static inline Floats scaled(Ints dot, Floats scale, float row, Floats sum) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, _mm512_set1_ps(row)), sum);
  }

  static inline void store(float *to, Floats sum) {
    const Floats both = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
    _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_maskz_compress_ps(0x5555, both)));
  }
};

}  // namespace

const Kernel avx512_vnni = {scratch, prepare, run<Avx512>};

}  // namespace mse_ggml

// Sixteen lanes: AVX-512 F/BW/DQ/VL.

using V = __m512;
constexpr int W = 16;
constexpr int kRows = 6;   // 6 rows x 4 vectors = 24 accumulators of 32 registers
constexpr int kGroup = 4;

inline V load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, V v) { _mm512_storeu_ps(p, v); }
inline V set1(float v) { return _mm512_set1_ps(v); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
inline V vmin(V a, V b) { return _mm512_min_ps(a, b); }
inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
inline V round_even(V a) { return _mm512_roundscale_ps(a, 0); }
inline V pow2(V n) { return _mm512_scalef_ps(set1(1.0f), n); }
inline V select_negative(V x, V yes, V no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), no, yes);
}
inline float sum(V a) { return _mm512_reduce_add_ps(a); }
inline V load_f16(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
inline V load_bf16(const uint16_t *p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

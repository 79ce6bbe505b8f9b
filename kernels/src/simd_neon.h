// Four lanes: NEON, which every aarch64 processor has.

using V = float32x4_t;
constexpr int W = 4;
constexpr int kRows = 6;
constexpr int kGroup = 4;

inline V load(const float *p) { return vld1q_f32(p); }
inline void store(float *p, V v) { vst1q_f32(p, v); }
inline V set1(float v) { return vdupq_n_f32(v); }
inline V add(V a, V b) { return vaddq_f32(a, b); }
inline V sub(V a, V b) { return vsubq_f32(a, b); }
inline V mul(V a, V b) { return vmulq_f32(a, b); }
inline V div(V a, V b) { return vdivq_f32(a, b); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V fnma(V a, V b, V c) { return vfmsq_f32(c, a, b); }
inline V vmin(V a, V b) { return vminq_f32(a, b); }
inline V vmax(V a, V b) { return vmaxq_f32(a, b); }
inline V round_even(V a) { return vrndnq_f32(a); }
inline V pow2(V n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline V select_negative(V x, V yes, V no) { return vbslq_f32(vcltzq_f32(x), yes, no); }
inline float sum(V a) { return vaddvq_f32(a); }
inline V load_f16(const uint16_t *p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
inline V load_bf16(const uint16_t *p) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16));
}

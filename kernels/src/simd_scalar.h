// One lane: the baseline. It runs everywhere, uses the C library's exp and erfc instead of our
// polynomials, and is compiled with vectorisation off, so that it stays an independent check.

#define MSE_USE_LIBM 1

using V = float;
constexpr int W = 1;
constexpr int kRows = 2;
constexpr int kGroup = 1;

inline V load(const float *p) { return *p; }
inline void store(float *p, V v) { *p = v; }
inline V set1(float v) { return v; }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V mul(V a, V b) { return a * b; }
inline V div(V a, V b) { return a / b; }
inline V fma(V a, V b, V c) { return a * b + c; }
inline V vmin(V a, V b) { return a < b ? a : b; }
inline V vmax(V a, V b) { return a > b ? a : b; }
inline float sum(V a) { return a; }
inline V load_bf16(const uint16_t *p) {
  const uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}
inline V load_f16(const uint16_t *p) {
  const uint32_t sign = (*p & 0x8000u) << 16, e = (*p >> 10) & 31u, m = *p & 0x3ffu;
  if (e == 0) {
    const float v = static_cast<float>(m) * 5.9604644775390625e-8f;  // subnormal: m 2^-24
    return sign ? -v : v;
  }
  const uint32_t bits = sign | (e == 31 ? 0x7f800000u : (e + 112u) << 23) | m << 13;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

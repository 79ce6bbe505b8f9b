#include "pack.h"

#include <string.h>

namespace mse {

static uint32_t bits_of(float v) {
  uint32_t u;
  memcpy(&u, &v, sizeof u);
  return u;
}

static float float_of(uint32_t u) {
  float v;
  memcpy(&v, &u, sizeof v);
  return v;
}

uint16_t to_bf16(float v) {
  const uint32_t u = bits_of(v);
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

uint16_t to_f16(float v) {
  const uint32_t u = bits_of(v);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
  if (a < 0x38800000u) {                        // below 2^-14: steps of 2^-24
    // Adding 0.5 leaves the step count, rounded to even, in the low bits of the sum.
    return sign | static_cast<uint16_t>(bits_of(float_of(a) + 0.5f) - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13);
}

static float from_f16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, e = h >> 10 & 31u, m = h & 0x3ffu;
  const float sub = static_cast<float>(m) * 5.9604644775390625e-8f;
  if (e == 0) return sign ? -sub : sub;
  return float_of(sign | (e == 31 ? 0x7f800000u : (e + 112u) << 23) | m << 13);
}

float rounded(float v, int storage) {
  if (storage == 1) return from_f16(to_f16(v));
  if (storage == 2) return float_of(static_cast<uint32_t>(to_bf16(v)) << 16);
  return v;
}

void Matrix::shape(int N, int K, int panel, int storage) {
  const int Np = (N + panel - 1) / panel * panel;
  const int depth = storage == kSplit ? 3 * split_steps(K) * kSplitStep : K;
  const size_t n = static_cast<size_t>(Np) * depth;
  if (storage == 0)
    packed.data = wide.reset(n);
  else
    packed.data = half.reset(n);
  packed.bias = bias.reset(Np);
  packed.N = N;
  packed.K = K;
  packed.Np = Np;
  packed.storage = storage;
}

void Matrix::set(int n, int k, float v, int panel) {
  if (packed.storage == kSplit) return set_split(n, k, v);
  const size_t i = (static_cast<size_t>(n / panel) * packed.K + k) * panel + n % panel;
  if (packed.storage == 0)
    *wide.at(i) = v;
  else
    *half.at(i) = packed.storage == 1 ? to_f16(v) : to_bf16(v);
}

// A tile's row holds pairs of values of depth; those of a pair are half a step apart, since rows are
// split fastest that way.
void Matrix::set_split(int n, int k, float v) {
  constexpr int kPairs = kSplitStep / 2;
  const int column = n % kSplitColumns, tile = n / kSplitColumns, deep = k % kSplitStep;
  const size_t step = static_cast<size_t>(tile / 2) * split_steps(packed.K) + k / kSplitStep;
  for (int part = 0; part < 3; part++) {
    const size_t row = ((step * 3 + part) * 2 + tile % 2) * kPairs + deep % kPairs;
    *half.at((row * kSplitColumns + column) * 2 + deep / kPairs) = bits_of(v) >> 16;
    v -= float_of(bits_of(v) & 0xffff0000u);
  }
}

void pack_linear(Matrix *out, const float *w, const float *b, int N, int K, int panel,
                 int storage) {
  out->shape(N, K, panel, storage);
  for (int n = 0; n < N; n++) {
    for (int k = 0; k < K; k++) out->set(n, k, w[static_cast<size_t>(n) * K + k], panel);
    *out->bias.at(n) = b[n];
  }
}

void pack_lstm(LstmMatrices *out, const float *ih, const float *hh, const float *bih,
               const float *bhh, int dim, int hidden, const Kernels &k, int storage) {
  const int Hp = (hidden + k.lanes - 1) / k.lanes * k.lanes;
  const bool split = k.split_from && dim >= k.split_from;
  // Both are read by every step or tile, from cache: rounding costs precision, not bandwidth, so
  // they hold the rounded values as f32 (or what adds up to it).
  out->in.shape(4 * Hp, dim, k.panel, split ? kSplit : 0);
  out->rec.shape(4 * Hp, hidden, k.panel, 0);
  for (int g = 0; g < 4; g++)
    for (int u = 0; u < hidden; u++) {
      const int row = g * hidden + u, n = u / k.lanes * k.panel + g * k.lanes + u % k.lanes;
      for (int d = 0; d < dim; d++)
        out->in.set(n, d, rounded(ih[static_cast<size_t>(row) * dim + d], storage), k.panel);
      for (int j = 0; j < hidden; j++)
        out->rec.set(n, j, rounded(hh[static_cast<size_t>(row) * hidden + j], storage), k.panel);
      *out->in.bias.at(n) = bih[row] + bhh[row];
    }
  out->lstm = {out->in.packed, out->rec.packed, hidden, Hp, split ? kSplitRows : kChunk};
}

}  // namespace mse

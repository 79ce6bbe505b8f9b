// Weights in the published layout -> panels (isa.h), rounded to the storage that was asked for.
#ifndef MSE_PACK_H
#define MSE_PACK_H

#include "isa.h"
#include "memory.h"

namespace mse {

uint16_t to_f16(float v);   // round to nearest even; overflow becomes infinity
uint16_t to_bf16(float v);  // round to nearest even
float rounded(float v, int storage);

// A packed matrix and the memory it lives in.
struct Matrix {
  Packed packed;
  Buffer<float> wide, bias;
  Buffer<uint16_t> half;

  // Takes room for [N, K] (N rounded up to panels).
  void shape(int N, int K, int panel, int storage);
  void set(int n, int k, float v, int panel);
  void set_split(int n, int k, float v);
  size_t bytes() const { return wide.bytes() + half.bytes() + bias.bytes(); }
};

// w [N, K] and b [N] as they are.
void pack_linear(Matrix *out, const float *w, const float *b, int N, int K, int panel, int storage);

struct LstmMatrices {
  Matrix in, rec;
  Lstm lstm;
};

// Units in groups of `lanes`: i, f, g, o of the group beside each other; the group is one panel.
// Rows of the hidden state beyond H are zero, so padding units stay exactly 0.
void pack_lstm(LstmMatrices *out, const float *ih, const float *hh, const float *bih,
               const float *bhh, int dim, int hidden, const Kernels &k, int storage);

}  // namespace mse
#endif

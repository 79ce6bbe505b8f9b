// llama.cpp's product of weights as the file has them with rows of quantised activations.
#ifndef MSE_GGML_MAPPED_H
#define MSE_GGML_MAPPED_H

#include <stddef.h>
#include <stdint.h>

namespace mse_ggml {

// ggml's numbers of types.
enum Type : int {
  kF32 = 0, kQ4_0 = 2, kQ5_0 = 6, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kQ8_K = 15
};

// Weights [columns, depth] and activations [rows, depth] as ggml stores them; `out` [rows, columns],
// `stride` floats from row to row. Of the columns those from `begin` to `end`, multiples of 16.
struct Mapped {
  const uint8_t *weights, *activations;
  size_t weight_bytes, activation_bytes;  // of a row
  int blocks;                             // of a row of weights
  int rows;
  float *out;
  size_t stride;
};

// A way to multiply; `scratch` says how many bytes it wants, aligned to 64. prepare: once for a thread,
// before it runs some of the columns. next: weights of the columns that it runs afterwards, or null.
struct Kernel {
  size_t (*scratch)(int type, const Mapped &product);
  void (*prepare)(int type, const Mapped &product, void *scratch);
  void (*run)(int type, const Mapped &product, int begin, int end, const uint8_t *next,
              void *scratch);
};
extern const Kernel avx2, avx_vnni, avx512_vnni;  // Q4_0
extern const Kernel amx;                          // every type above but F32 and Q8_K
bool amx_allowed();                               // asks the system for the tiles' registers

}  // namespace mse_ggml
#endif

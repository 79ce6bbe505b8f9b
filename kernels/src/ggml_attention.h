// Attention of rows to a cache of half-precision keys and values, as llama.cpp lays them out.
#ifndef MSE_GGML_ATTENTION_H
#define MSE_GGML_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

namespace mse_ggml {

constexpr int kKeys = 8;  // keys are looked at so many at a time

// softmax(scale queries keys^T + mask) values, for each head. Strides in elements.
struct Attention {
  const float *queries;  // [heads, rows, depth]
  size_t query_head, query_row;
  const uint16_t *keys, *values;  // [heads / group, n_keys, depth], halves
  size_t key_head, key_row, value_head, value_row;
  const uint16_t *mask;  // [rows, n_keys], halves; minus infinity: not seen
  size_t mask_row;
  float *out;  // [rows, heads, depth]
  int rows, heads, group, n_keys, depth;
  float scale;
};

// lanes: rows of a tile, and what the depth is a multiple of. run: the heads from begin to end of a tile;
// after: the one that this thread does afterwards.
struct Attend {
  int lanes;
  size_t (*scratch)(const Attention &attention);  // bytes, aligned to 64
  void (*run)(const Attention &attention, int tile, int begin, int end, int after,
              void *scratch);
};
extern const Attend attend_avx2, attend_avx512;

}  // namespace mse_ggml
#endif

// llama.cpp's product of repacked Q4_0 weights with rows of Q8_0 activations: most of the time of a
// prompt. `product` is instantiated by one translation unit for each instruction set.
//
// Processors multiply unsigned by signed bytes. ggml takes the signs apart for that, with up to three
// instructions for each product; here the weights are what Q4_0 stores, 0 .. 15 standing for
// -8 .. 7, and the sum of a row's activations makes up for the 8.
#ifndef MSE_GGML_Q4_0_H
#define MSE_GGML_Q4_0_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace mse_ggml {

// ggml's layouts: blocks of 32 values of eight columns, or of four rows, interleaved by eight bytes.
struct Weights {
  uint16_t scale[8];    // float16
  uint8_t values[128];  // nibbles, as signed ones: value i below, value i + 16 above
};
struct Activations {
  uint16_t scale[4];
  int8_t values[128];
};
static_assert(sizeof(Weights) == 144 && sizeof(Activations) == 136, "no padding");

constexpr int kBlock = 32, kEight = 8;
constexpr int kAhead = 10;  // blocks from a prefetch to their use

// Of four rows in one block: scales, and what their sums start from, half of it in either lane of a
// column.
struct Rows {
  float scale[4];
  int32_t start[4];
};

// n values of depth, a multiple of 32; n_rows one of 4, n_columns one of 8; out [n_rows, n_columns]
// with `stride` floats from row to row. scratch: bytes that the kernel wants, aligned to 64.
using Kernel = void (*)(int n, float *out, size_t stride, const void *weights,
                        const void *activations, int n_rows, int n_columns, void *scratch);
void avx2(int, float *, size_t, const void *, const void *, int, int, void *);
void avx_vnni(int, float *, size_t, const void *, const void *, int, int, void *);
void avx512_vnni(int, float *, size_t, const void *, const void *, int, int, void *);
inline size_t scratch(int n, int n_rows) {
  return static_cast<size_t>(n / kBlock) * (n_rows / 4) * sizeof(Rows);
}

// Fetches the block kAhead after this one; at the end of the weights there is none, which does no harm.
static inline void ahead(const Weights *from) {
  const auto at = reinterpret_cast<uintptr_t>(from) + kAhead * sizeof(Weights) + offsetof(Weights, values);
  for (int line = 0; line < 2; line++) __builtin_prefetch(reinterpret_cast<const void *>(at + 64 * line));
}

#define MSE_UNROLL _Pragma("GCC unroll 16")

// Isa: Ints and Floats, vectors of two lanes for each of kColumns columns; a tile has eight rows and
// kVectors of them, whose sums stay in registers.
template <class Isa>
struct Product {
  using Ints = typename Isa::Ints;
  using Floats = typename Isa::Floats;
  static constexpr int kColumns = Isa::kColumns, kParts = kEight / kColumns;

  const Weights *w;
  const Activations *a;
  const Rows *rows;
  int blocks;
  float *out;
  size_t stride;

  // G times four rows from group g on, C vectors of columns from vector j on. First: weights come
  // from memory, and the processor looks less far ahead than it takes (20 rows: -3 %).
  template <int G, int C, bool First>
  void tile(int g, int j) const {
    constexpr int M = 4 * G;
    Floats sums[M][C];
    MSE_UNROLL
    for (int r = 0; r < M; r++) {
      MSE_UNROLL
      for (int c = 0; c < C; c++) sums[r][c] = Isa::zero();
    }
    const Activations *x = a + static_cast<size_t>(g) * blocks;
    const Rows *of = rows + static_cast<size_t>(g) * blocks;
    for (int b = 0; b < blocks; b++) {
      Ints v[C][4];
      Floats scale[C];
      MSE_UNROLL
      for (int c = 0; c < C; c++) {
        const Weights &from = w[static_cast<size_t>((j + c) / kParts) * blocks + b];
        const int part = (j + c) % kParts * kColumns;
        if (First && part == 0) ahead(&from);
        Isa::nibbles(from.values + part * 8, v[c]);
        scale[c] = Isa::scales(from.scale + part);
      }
      MSE_UNROLL
      for (int r = 0; r < M; r++) {
        const size_t at = static_cast<size_t>(r / 4) * blocks + b;
        Ints dot[C];
        Isa::template dots<C>(v, x[at].values + r % 4 * 8, of[at].start[r % 4], dot);
        MSE_UNROLL
        for (int c = 0; c < C; c++)
          sums[r][c] = Isa::scaled(dot[c], scale[c], of[at].scale[r % 4], sums[r][c]);
      }
    }
    float *to = out + static_cast<size_t>(4 * g) * stride + j * kColumns;
    MSE_UNROLL
    for (int r = 0; r < M; r++) {
      MSE_UNROLL
      for (int c = 0; c < C; c++) Isa::store(to + r * stride + c * kColumns, sums[r][c]);
    }
  }

  template <int C>
  void columns(int groups, int j) const {
    int g;
    if (groups == 1) return tile<1, C, true>(0, j);
    tile<2, C, true>(0, j);
    for (g = 2; g + 2 <= groups; g += 2) tile<2, C, false>(g, j);
    if (g < groups) tile<1, C, false>(g, j);
  }
};

template <class Isa>
void product(int n, float *out, size_t stride, const void *weights, const void *activations,
             int n_rows, int n_columns, void *scratch) {
  const int blocks = n / kBlock, groups = n_rows / 4, vectors = n_columns / Isa::kColumns;
  auto *rows = static_cast<Rows *>(scratch);
  const auto *a = static_cast<const Activations *>(activations);
  for (size_t i = 0; i < static_cast<size_t>(groups) * blocks; i++) Isa::prepare(a[i], rows[i]);
  const Product<Isa> p = {static_cast<const Weights *>(weights), a, rows, blocks, out, stride};
  int j = 0;
  // All rows by a few columns at a time: weights come from memory once, activations stay in a cache.
  for (; j + Isa::kVectors <= vectors; j += Isa::kVectors)
    p.template columns<Isa::kVectors>(groups, j);
  for (; j < vectors; j++) p.template columns<1>(groups, j);
}

static inline int64_t eight_bytes(const int8_t *from) {
  int64_t bits;
  memcpy(&bits, from, sizeof bits);
  return bits;
}

}  // namespace mse_ggml
#endif

// The product of Q4_0 weights as the file has them with rows of Q8_0 activations, by vectors. All of it
// is instantiated by one translation unit for each instruction set.
//
// Sixteen columns at a time are interleaved on the way, in the first-level cache, and meet all rows
// there. Processors multiply unsigned by signed bytes: the weights are what Q4_0 stores, 0 .. 15
// standing for -8 .. 7, and the sum of a row's activations makes up for the 8.
#ifndef MSE_GGML_Q4_0_H
#define MSE_GGML_Q4_0_H

#include <immintrin.h>
#include <string.h>

#include "ggml_mapped.h"

#define MSE_UNROLL _Pragma("GCC unroll 16")

namespace mse_ggml {
namespace {  // one unit's instructions must not become another's

constexpr int kEight = 8, kStrip = 16;
constexpr int kBytes = 18, kRowBytes = 34;  // of a block in the file, of one of activations

// A block of eight columns, interleaved by eight bytes: value i below, value i + 16 above.
struct Weights {
  uint16_t scale[kEight];  // float16
  uint8_t values[128];
};

// Of a row in one block: its scale, and what its sums start from, half of it in either lane of a
// column.
struct Row {
  float scale;
  int32_t start;
};

// The parts of the scratch, in multiples of its alignment.
struct Parts {
  size_t weights, rows, sums;

  explicit Parts(const Mapped &p) {
    const auto lines = [](size_t bytes) { return (bytes + 63) / 64 * 64; };
    weights = lines(kStrip / kEight * p.blocks * sizeof(Weights));
    rows = lines(static_cast<size_t>(p.rows) * p.blocks * sizeof(Row));
    sums = (p.rows + 3) / 4 * 4 * kStrip * sizeof(float);
  }
};

// Of eight columns, `row` bytes from one to the next, a block in the file.
inline void interleave(const uint8_t *from, size_t row, Weights *to) {
  for (int c = 0; c < kEight; c++, from += row) {
    memcpy(&to->scale[c], from, sizeof(uint16_t));
    memcpy(to->values + 8 * c, from + 2, 8);
    memcpy(to->values + 64 + 8 * c, from + 10, 8);
  }
}

inline int64_t eight_bytes(const uint8_t *from) {
  int64_t bits;
  memcpy(&bits, from, sizeof bits);
  return bits;
}

// Of the 32 activations of a block.
inline int32_t sum_of(const uint8_t *x) {
  const __m256i ones = _mm256_set1_epi8(1), pairs = _mm256_set1_epi16(1);
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
  const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, all), pairs);
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  sum = _mm_add_epi32(sum, _mm_srli_si128(sum, 8));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_srli_si128(sum, 4)));
}

// Isa: Ints and Floats, vectors of two lanes for each of kColumns columns; a tile has eight rows and
// kVectors of them, whose sums stay in registers.
template <class Isa>
struct Product {
  using Ints = typename Isa::Ints;
  using Floats = typename Isa::Floats;
  static constexpr int kColumns = Isa::kColumns, kParts = kEight / kColumns;
  static constexpr int kVectors = Isa::kVectors;

  const Mapped &p;
  Weights *weights;  // [strip / 8, blocks]
  const Row *rows;   // [rows, blocks]
  float *sums;       // [rows, strip]; the last four may be more than there are

  // M rows from `first` on, kVectors of columns from vector j on. Taking: weights are interleaved from
  // `file` for all rows after these, and meanwhile as much is fetched from `next`.
  template <int M, bool Taking>
  void tile(int first, int j, const uint8_t *file, const uint8_t *next) const {
    const int blocks = p.blocks;
    const uint8_t *x[M];
    const Row *of[M];
    Floats sum[M][kVectors];
    MSE_UNROLL
    for (int r = 0; r < M; r++) {
      const int row = first + r < p.rows ? first + r : p.rows - 1;
      x[r] = p.activations + row * p.activation_bytes + 2;
      of[r] = rows + static_cast<size_t>(row) * blocks;
      MSE_UNROLL
      for (int c = 0; c < kVectors; c++) sum[r][c] = Isa::zero();
    }
    constexpr size_t kPart = kVectors * kColumns * kBytes;
    uintptr_t line = reinterpret_cast<uintptr_t>(next) + static_cast<size_t>(j / kVectors) * blocks * kPart;
    uintptr_t end = line;
    // A block ahead: what was just stored in pieces cannot be loaded as a whole yet.
    const auto take = [&](int b) {
      for (int v = j; v < j + kVectors; v++)
        if (v % kParts == 0)
          interleave(file + v * kColumns * p.weight_bytes + static_cast<size_t>(b) * kBytes, p.weight_bytes,
                     weights + static_cast<size_t>(v / kParts) * blocks + b);
    };
    if (Taking) take(0);
    for (int b = 0; b < blocks; b++) {
      if (Taking) {
        for (end += kPart; line < end; line += 64)  // into the second-level cache
          __builtin_prefetch(reinterpret_cast<const void *>(line), 0, 2);
        if (b + 1 < blocks) take(b + 1);
      }
      Ints v[kVectors][4];
      Floats scale[kVectors];
      MSE_UNROLL
      for (int c = 0; c < kVectors; c++) {
        const Weights &from = weights[static_cast<size_t>((j + c) / kParts) * blocks + b];
        const int part = (j + c) % kParts * kColumns;
        Isa::nibbles(from.values + part * 8, v[c]);
        scale[c] = Isa::scales(from.scale + part);
      }
      MSE_UNROLL
      for (int r = 0; r < M; r++) {
        Ints dot[kVectors];
        Isa::dots(v, x[r] + static_cast<size_t>(b) * kRowBytes, of[r][b].start, dot);
        MSE_UNROLL
        for (int c = 0; c < kVectors; c++)
          sum[r][c] = Isa::scaled(dot[c], scale[c], of[r][b].scale, sum[r][c]);
      }
    }
    MSE_UNROLL
    for (int r = 0; r < M; r++) {
      MSE_UNROLL
      for (int c = 0; c < kVectors; c++)
        Isa::store(sums + (first + r) * kStrip + (j + c) * kColumns, sum[r][c]);
    }
  }

  void strip(const uint8_t *file, const uint8_t *next) const {
    for (int j = 0; j < kStrip / kColumns; j += kVectors) {
      if (p.rows <= 4) {
        tile<4, true>(0, j, file, next);
        continue;
      }
      tile<8, true>(0, j, file, next);
      int r = 8;
      for (; r + 4 < p.rows; r += 8) tile<8, false>(r, j, file, next);
      if (r < p.rows) tile<4, false>(r, j, file, next);
    }
  }
};

inline size_t scratch(int, const Mapped &p) {
  const Parts parts(p);
  return parts.weights + parts.rows + parts.sums;
}

inline void prepare(int, const Mapped &p, void *scratch) {
  auto *to = reinterpret_cast<Row *>(static_cast<char *>(scratch) + Parts(p).weights);
  for (int r = 0; r < p.rows; r++) {
    const uint8_t *from = p.activations + r * p.activation_bytes;
    for (int b = 0; b < p.blocks; b++, from += kRowBytes, to++) {
      uint16_t half;
      memcpy(&half, from, sizeof half);
      *to = {_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half))), -4 * sum_of(from + 2)};
    }
  }
}

template <class Isa>
void run(int, const Mapped &p, int begin, int end, const uint8_t *next, void *scratch) {
  const Parts parts(p);
  auto *weights = static_cast<Weights *>(scratch);
  auto *rows = reinterpret_cast<const Row *>(static_cast<char *>(scratch) + parts.weights);
  auto *sums = reinterpret_cast<float *>(static_cast<char *>(scratch) + parts.weights + parts.rows);
  const Product<Isa> product = {p, weights, rows, sums};
  for (int column = begin; column < end; column += kStrip) {
    const uint8_t *file = p.weights + column * p.weight_bytes;
    // The very last strip fetches itself once more, which costs nothing.
    const uint8_t *after = next ? next : file;
    product.strip(file, column + kStrip < end ? file + kStrip * p.weight_bytes : after);
    for (int r = 0; r < p.rows; r++)
      memcpy(p.out + r * p.stride + column, sums + r * kStrip, kStrip * sizeof(float));
  }
}

}  // namespace
}  // namespace mse_ggml
#endif

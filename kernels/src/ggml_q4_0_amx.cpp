// The product with int8 tiles (Intel AMX): 16 rows by 16 columns by 32 values of depth in one
// instruction, a block of Q4_0. Sums of a block leave the tile as integers and are scaled in vectors.
#include <immintrin.h>

#include "amx.h"
#include "ggml_q4_0.h"

namespace mse_ggml {
namespace {

constexpr int kTile = 16, kParts = kTile / 4;
// Of up to 64 rows, columns stay in the first-level cache from their unpacking to the sums: these
// blocks at a time. Of more, each tile's start would cost what that saves.
constexpr int kFewTiles = 4, kDepth = 16;

// Sixteen rows of activations in one block, and as many columns of weights times 16: a nibble in the
// upper half of its byte is a signed one as it is.
struct TileRows {
  int8_t values[kTile][kBlock];
  float scale[kTile];  // / 16
};
struct TileColumns {
  int8_t values[kBlock / 4][4 * kTile];  // four values of depth of each column
  float scale[kTile];
};

// Tiles: 0, 1 sums of 16 rows, 2 of the rest; 3, 4 rows, 5 the rest; 6, 7 columns.
#define MSE_DOT(sum, rows, columns)           \
  asm volatile("tilezero %%tmm" #sum "\n\t"   \
               "tdpbssd %%tmm" #columns ", %%tmm" #rows ", %%tmm" #sum ::)

void rows_of(const Activations *from, int groups, int blocks, int b, TileRows *to) {
  for (int g = 0; g < groups; g++) {
    const Activations &x = from[static_cast<size_t>(g) * blocks + b];
    const __m512i low = _mm512_loadu_si512(x.values), high = _mm512_loadu_si512(x.values + 64);
    // Eight bytes of each row follow each other four times: make them 32 of one row after the other.
    const __m512i first = _mm512_setr_epi64(0, 4, 8, 12, 1, 5, 9, 13);
    const __m512i last = _mm512_setr_epi64(2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to->values[4 * g], _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(to->values[4 * g + 2], _mm512_permutex2var_epi64(low, last, high));
    const __m128i halfs = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(x.scale));
    _mm_storeu_ps(to->scale + 4 * g, _mm_mul_ps(_mm_cvtph_ps(halfs), _mm_set1_ps(1.0f / 16)));
  }
}

void columns_of(const Weights &left, const Weights &right, TileColumns *to) {
  const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xf0));
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  MSE_UNROLL
  for (int half = 0; half < 2; half++) {
    const __m512i l = _mm512_loadu_si512(left.values + 64 * half);
    const __m512i r = _mm512_loadu_si512(right.values + 64 * half);
    MSE_UNROLL
    for (int high = 0; high < 2; high++) {
      const __m512i a = _mm512_and_si512(high ? l : _mm512_slli_epi16(l, 4), upper);
      const __m512i b = _mm512_and_si512(high ? r : _mm512_slli_epi16(r, 4), upper);
      int8_t(*row)[4 * kTile] = to->values + 4 * high + 2 * half;
      _mm512_storeu_si512(row[0], _mm512_permutex2var_epi32(a, even, b));
      _mm512_storeu_si512(row[1], _mm512_permutex2var_epi32(a, odd, b));
    }
  }
  const __m128i halfs[] = {_mm_loadu_si128(reinterpret_cast<const __m128i *>(left.scale)),
                           _mm_loadu_si128(reinterpret_cast<const __m128i *>(right.scale))};
  _mm256_storeu_ps(to->scale, _mm256_cvtph_ps(halfs[0]));
  _mm256_storeu_ps(to->scale + 8, _mm256_cvtph_ps(halfs[1]));
}

template <int M>
inline void add(const int32_t (*dots)[kTile], const TileRows &a, const TileColumns &w,
                __m512 *sums) {
  const __m512 scale = _mm512_loadu_ps(w.scale);
  MSE_UNROLL
  for (int r = 0; r < M; r++) {
    const __m512 dot = _mm512_cvtepi32_ps(_mm512_loadu_si512(dots[r]));
    sums[r] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(a.scale[r])), sums[r]);
  }
}

// Blocks b and b + 1 by the tiles: sums as integers in `dots`.
template <int M>
inline void two_blocks(const TileRows *a, const TileColumns *w, int32_t (*dots)[kTile][kTile]) {
  MSE_LOAD(6, w[0].values, 64);
  MSE_LOAD(7, w[1].values, 64);
  if (M == kTile) {
    MSE_LOAD(3, a[0].values, kBlock);
    MSE_LOAD(4, a[1].values, kBlock);
    MSE_DOT(0, 3, 6);
    MSE_DOT(1, 4, 7);
    MSE_STORE(0, dots[0], 64);
    MSE_STORE(1, dots[1], 64);
  } else {
    MSE_LOAD(5, a[0].values, kBlock);
    MSE_DOT(2, 5, 6);
    MSE_STORE(2, dots[0], 64);
    MSE_LOAD(5, a[1].values, kBlock);
    MSE_DOT(2, 5, 7);
    MSE_STORE(2, dots[1], 64);
  }
}

// Weights of the next columns, fetched while this tile computes, so that memory never waits.
struct Next {
  const Weights *left = nullptr, *right = nullptr;  // null: none

  // Block b and the one after it.
  void fetch(int b) const {
    if (!left) return;
    MSE_UNROLL
    for (size_t line = 0; line < 2 * sizeof(Weights); line += 64) {
      _mm_prefetch(reinterpret_cast<const char *>(left + b) + line, _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char *>(right + b) + line, _MM_HINT_T1);
    }
  }
};

// M rows, 16 or fewer, by 16 columns; `mask` of those that are there. One block more than there are
// must be readable. more: `out` holds the sums of the depth before this.
template <int M>
void tile(const TileRows *a, const TileColumns *w, int blocks, __mmask16 mask, const Next &next,
          bool more, float *out, size_t stride) {
  alignas(64) int32_t dots[4][kTile][kTile];
  __m512 sums[M];
  MSE_UNROLL
  for (int r = 0; r < M; r++)
    sums[r] = more ? _mm512_maskz_loadu_ps(mask, out + r * stride) : _mm512_setzero_ps();
  next.fetch(0);
  two_blocks<M>(a, w, dots);
  int b = 0;
  for (; b + 2 < blocks; b += 2) {  // while two are scaled, the tiles work on the next
    next.fetch(b + 2);
    two_blocks<M>(a + b + 2, w + b + 2, dots + (b + 2) % 4);
    add<M>(dots[b % 4], a[b], w[b], sums);
    add<M>(dots[b % 4 + 1], a[b + 1], w[b + 1], sums);
  }
  add<M>(dots[b % 4], a[b], w[b], sums);
  if (b + 1 < blocks) add<M>(dots[b % 4 + 1], a[b + 1], w[b + 1], sums);
  MSE_UNROLL
  for (int r = 0; r < M; r++) _mm512_mask_storeu_ps(out + r * stride, mask, sums[r]);
}

int tiles_of(int n_rows) { return (n_rows + kTile - 1) / kTile; }

}  // namespace

bool amx_allowed() { return may_use_tiles(); }

size_t amx_scratch(int n, int n_rows) {
  const size_t blocks = n / kBlock;
  return blocks * tiles_of(n_rows) * sizeof(TileRows) + (blocks + 1) * sizeof(TileColumns);
}

void amx_int8(int n, float *out, size_t stride, const void *weights, const void *activations,
              int n_rows, int n_columns, void *scratch) {
  const int blocks = n / kBlock, groups = n_rows / 4, tiles = tiles_of(n_rows);
  const auto *a = static_cast<const Activations *>(activations);
  const auto *w = static_cast<const Weights *>(weights);
  auto *rows = static_cast<TileRows *>(scratch);
  auto *columns = reinterpret_cast<TileColumns *>(rows + static_cast<size_t>(tiles) * blocks);
  for (int t = 0; t < tiles; t++)
    for (int b = 0; b < blocks; b++) {
      const int g = t * kParts, count = groups - g < kParts ? groups - g : kParts;
      rows_of(a + static_cast<size_t>(g) * blocks, count, blocks, b,
              rows + static_cast<size_t>(t) * blocks + b);
    }
  TileConfig before, ours;
  MSE_CONFIGURATION(before);
  const int rest = n_rows % kTile;
  for (int t = 0; t < 8; t++) {
    ours.rows[t] = static_cast<uint8_t>(t > 5 ? kBlock / 4 : t == 2 || t == 5 ? rest + !rest : kTile);
    ours.bytes[t] = t < 3 || t > 5 ? 64 : kBlock;
  }
  MSE_CONFIGURE(ours);
  const int eights = n_columns / kEight, depth = tiles > kFewTiles ? blocks : kDepth;
  for (int j = 0; j < eights; j += 2) {
    const bool both = j + 1 < eights, more = j + 2 < eights;
    const Weights *left = w + static_cast<size_t>(j) * blocks, *right = both ? left + blocks : left;
    const Weights *left_next = more ? left + 2 * static_cast<size_t>(blocks) : left;
    const Weights *right_next = j + 3 < eights ? left_next + blocks : left_next;
    const __mmask16 mask = both ? 0xffff : 0xff;
    for (int from = 0; from < blocks; from += depth) {
      const int count = blocks - from < depth ? blocks - from : depth;
      for (int b = 0; b < count; b++) {
        ahead(left + from + b);
        ahead(right + from + b);
        columns_of(left[from + b], right[from + b], columns + b);
      }
      for (int t = 0; t < tiles; t++) {
        const TileRows *x = rows + static_cast<size_t>(t) * blocks + from;
        float *to = out + static_cast<size_t>(t) * kTile * stride + j * kEight;
        const Next next = t == 0 && more ? Next{left_next + from, right_next + from} : Next{};
        switch (t * kTile + kTile <= n_rows ? kTile : rest) {
          case 16: tile<16>(x, columns, count, mask, next, from, to, stride); break;
          case 12: tile<12>(x, columns, count, mask, next, from, to, stride); break;
          case 8: tile<8>(x, columns, count, mask, next, from, to, stride); break;
          default: tile<4>(x, columns, count, mask, next, from, to, stride);
        }
      }
    }
  }
  MSE_CONFIGURE(before);
}

}  // namespace mse_ggml

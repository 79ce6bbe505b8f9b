// The product of weights as the file has them, with int8 tiles (Intel AMX): sixteen columns by
// sixteen rows by one step of depth, as far as one scale reaches, in one instruction. Rows of the
// file are rows of a tile, so 8-bit weights go into it from where they lie.
#include "ggml_mapped.h"

#include <immintrin.h>

#include "amx.h"
#include "ggml_formats.h"

namespace mse_ggml {
namespace {

// Of up to 64 rows, columns stay in the first-level cache from their unpacking to the sums: these
// steps at a time. Of more, each tile's start would cost what that saves.
constexpr int kFewTiles = 4, kChunk = 16;

// Without a memory operand of its own the compiler may drop the prefetches of a whole loop.
inline void prefetch(const uint8_t *at) { asm volatile("prefetcht1 %0" ::"m"(*at)); }

// Sixteen rows of activations in one step; rows that are not there are zeros.
template <int D>
struct Rows {
  int8_t values[D / 4][4 * kTile];  // four values of depth of each row
  float scale[kTile];
  float sum[kTile];  // of the values
};

// Rows of activations in tiles: Q8_0 has a half scale before 32 values, Q8_K a float before 256 and
// the sums of 16 each behind them.
template <class F>
void pack_rows(const Mapped &p, Rows<F::kDepth> *to) {
  const __m512i row = offsets(p.activation_bytes);
  const int steps = p.blocks * F::kSteps;
  for (int t = 0; t * kTile < p.rows; t++) {
    const int count = p.rows - t * kTile < kTile ? p.rows - t * kTile : kTile;
    const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
    const uint8_t *base = p.activations + t * kTile * p.activation_bytes;
    const auto fetch = [&](const uint8_t *at) {
      return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, row, at, 1);
    };
    for (int s = 0; s < steps; s++, to++) {
      const uint8_t *block = base + s / F::kSteps * F::kRowBytes;
      const uint8_t *values = block + (F::kSuper ? 4 + s % F::kSteps * F::kDepth : 2);
      const __m512i head = fetch(block);
      const __m512 scale = F::kSuper ? _mm512_castsi512_ps(head) : halves(head);
      _mm512_storeu_ps(to->scale, scale);
      MSE_UNROLL
      for (int k = 0; k < F::kDepth / 4; k++) _mm512_storeu_si512(to->values[k], fetch(values + 4 * k));
      if (F::kLow) {
        const __m512i two = fetch(block + 260 + s % F::kSteps * 4);
        const __m512i sum = _mm512_add_epi32(_mm512_srai_epi32(_mm512_slli_epi32(two, 16), 16),
                                             _mm512_srai_epi32(two, 16));
        _mm512_storeu_ps(to->sum, _mm512_cvtepi32_ps(sum));
      }
    }
  }
}

// Tiles 0 and 1 are sums, 4 and 5 columns, 6 and 7 rows.
#define MSE_DOT(sum, columns, rows)           \
  asm volatile("tilezero %%tmm" #sum "\n\t"   \
               "tdpbssd %%tmm" #rows ", %%tmm" #columns ", %%tmm" #sum ::)

template <class F>
struct Strip {
  static constexpr int D = F::kDepth;
  using C = Columns<D>;
  using R = Rows<D>;

  const uint8_t *at;  // the first step of the chunk in the first row, where values are as they are
  size_t stride;
  const C *columns;
  const uint8_t *next;  // what is fetched while this computes: the next strip's part

  static constexpr int kLines = (kTile * F::kBytes / F::kSteps + 63) / 64;  // for each step

  const void *values(int s) const {
    if constexpr (F::kAsItIs) return at + s * F::kBytes + F::kValues;
    else return columns[s].values;
  }

  long step() const { return F::kAsItIs ? static_cast<long>(stride) : D; }

  // Steps s and s + 1 of the chunk.
  void two(int s, const R *rows, int32_t (*dots)[kTile][kTile]) const {
    MSE_LOAD(6, rows[s].values, 64);
    MSE_LOAD(4, values(s), step());
    MSE_LOAD(7, rows[s + 1].values, 64);
    MSE_LOAD(5, values(s + 1), step());
    MSE_DOT(0, 4, 6);
    MSE_DOT(1, 5, 7);
    MSE_STORE(0, dots[0], 64);
    MSE_STORE(1, dots[1], 64);
  }

  void one(int s, const R *rows, int32_t (*dots)[kTile][kTile]) const {
    MSE_LOAD(6, rows[s].values, 64);
    MSE_LOAD(4, values(s), step());
    MSE_DOT(0, 4, 6);
    MSE_STORE(0, dots[0], 64);
  }

  // Adds step s, times its scale, to the sums, which are scaled by rows later where F::kSuper.
  // Ahead: fetches a step's share of `next`, a line at a time: many at once keep what is needed now
  // waiting for the same few buffers.
  template <bool Ahead>
  void add(int s, const R *rows, const int32_t (*dots)[kTile], __m512 *sums) const {
    const C &c = columns[s];
    const __m512 scale = _mm512_loadu_ps(rows[s].scale), sum = _mm512_loadu_ps(rows[s].sum);
    MSE_UNROLL
    for (int i = 0; i < kTile; i++) {
      const int line = i * kLines / kTile;
      if (Ahead && line != (i + 1) * kLines / kTile) prefetch(next + (s * kLines + line) * 64);
      const __m512 dot = _mm512_cvtepi32_ps(_mm512_loadu_si512(dots[i]));
      __m512 weight = _mm512_set1_ps(c.scale[i]);
      if (!F::kSuper) weight = _mm512_mul_ps(scale, weight);
      sums[i] = _mm512_fmadd_ps(dot, weight, sums[i]);
      if (F::kLow) sums[i] = _mm512_fnmadd_ps(_mm512_set1_ps(c.low[i]), sum, sums[i]);
    }
  }

  // The chunk's `count` steps by sixteen rows: adds to total [columns, rows], or sets it.
  template <bool Ahead>
  void tile(const R *rows, int count, bool first, float (*total)[kTile]) const {
    alignas(64) int32_t dots[4][kTile][kTile];
    __m512 sums[kTile];
    MSE_UNROLL
    for (int i = 0; i < kTile; i++)
      sums[i] = first || F::kSuper ? _mm512_setzero_ps() : _mm512_loadu_ps(total[i]);
    const int even = count & ~1;
    if (even) two(0, rows, dots);
    for (int s = 0; s < even; s += 2) {  // while two are scaled, the tiles work on the next
      if (s + 2 < even) two(s + 2, rows, dots + (s + 2) % 4);
      add<Ahead>(s, rows, dots[s % 4], sums);
      add<Ahead>(s + 1, rows, dots[s % 4 + 1], sums);
      if (F::kSuper && (s + 2) % F::kSteps == 0) {
        const __m512 scale = _mm512_loadu_ps(rows[s].scale);
        const bool set = first && s < F::kSteps;
        MSE_UNROLL
        for (int i = 0; i < kTile; i++) {
          const __m512 before = set ? _mm512_setzero_ps() : _mm512_loadu_ps(total[i]);
          _mm512_storeu_ps(total[i], _mm512_fmadd_ps(sums[i], scale, before));
          sums[i] = _mm512_setzero_ps();
        }
      }
    }
    if (F::kSuper) return;  // whole blocks: an even number of steps
    if (even < count) {
      one(even, rows, dots);
      add<Ahead>(even, rows, dots[0], sums);
    }
    MSE_UNROLL
    for (int i = 0; i < kTile; i++) _mm512_storeu_ps(total[i], sums[i]);
  }
};

// [columns, rows] to rows of the result.
void store_transposed(const float (*total)[kTile], int rows, float *out, size_t stride) {
  const __m512i row = offsets(sizeof *total);
  for (int j = 0; j < rows; j++)
    _mm512_storeu_ps(out + j * stride, _mm512_i32gather_ps(row, &total[0][j], 1));
}

int tiles_of(int rows) { return (rows + kTile - 1) / kTile; }

// Blocks that are unpacked at a time.
template <class F>
int chunk(const Mapped &p) {
  if (tiles_of(p.rows) > kFewTiles) return p.blocks;
  return kChunk > F::kSteps ? kChunk / F::kSteps : 1;
}

template <class F>
size_t scratch_of(const Mapped &p) {
  const size_t tiles = tiles_of(p.rows), steps = static_cast<size_t>(p.blocks) * F::kSteps;
  return tiles * steps * sizeof(Rows<F::kDepth>) +
         chunk<F>(p) * F::kSteps * sizeof(Columns<F::kDepth>) + tiles * sizeof(float[kTile][kTile]);
}

template <class F>
void run(const Mapped &p, int begin, int end, const uint8_t *next, void *scratch) {
  using C = Columns<F::kDepth>;
  using R = Rows<F::kDepth>;
  using Total = float[kTile][kTile];
  const int tiles = tiles_of(p.rows), steps = p.blocks * F::kSteps, depth = chunk<F>(p);
  auto *rows = static_cast<R *>(scratch);
  auto *columns = reinterpret_cast<C *>(rows + static_cast<size_t>(tiles) * steps);
  auto *total = reinterpret_cast<Total *>(columns + depth * F::kSteps);
  TileConfig before, ours;
  MSE_CONFIGURATION(before);
  for (int t = 4; t < 8; t++) {
    if (t < 6) ours.bytes[t] = F::kDepth;
    else ours.rows[t] = F::kDepth / 4;
  }
  MSE_CONFIGURE(ours);
  const __m512i row = offsets(p.weight_bytes);
  const size_t strip_bytes = kTile * p.weight_bytes;
  for (int column = begin; column < end; column += kTile) {
    const uint8_t *at = p.weights + column * p.weight_bytes;
    const uint8_t *after = column + kTile < end ? at + strip_bytes : next;
    Strip<F> strip = {at, p.weight_bytes, columns, nullptr};
    for (int from = 0; from < p.blocks; from += depth) {
      const int blocks = p.blocks - from < depth ? p.blocks - from : depth;
      strip.at = at + static_cast<size_t>(from) * F::kBytes;
      if (after) strip.next = after + static_cast<size_t>(from) * F::kSteps * strip.kLines * 64;
      for (int b = 0; b < blocks; b++)
        F::unpack(strip.at + b * F::kBytes, p.weight_bytes, row, columns + b * F::kSteps);
      for (int t = 0; t < tiles; t++) {
        const R *here = rows + static_cast<size_t>(t) * steps + from * F::kSteps;
        if (t == 0 && after) strip.template tile<true>(here, blocks * F::kSteps, from == 0, total[t]);
        else strip.template tile<false>(here, blocks * F::kSteps, from == 0, total[t]);
      }
    }
    for (int t = 0; t < tiles; t++) {
      const int count = p.rows - t * kTile < kTile ? p.rows - t * kTile : kTile;
      store_transposed(total[t], count, p.out + t * kTile * p.stride + column, p.stride);
    }
  }
  MSE_CONFIGURE(before);
}

size_t amx_scratch(int type, const Mapped &p) {
  switch (type) {
    case kQ4_0: return scratch_of<Q4_0>(p);
    case kQ5_0: return scratch_of<Q5_0>(p);
    case kQ8_0: return scratch_of<Q8_0>(p);
    case kQ4_K: return scratch_of<Q4_K>(p);
    case kQ5_K: return scratch_of<Q5_K>(p);
    case kQ6_K: return scratch_of<Q6_K>(p);
    default: return 0;
  }
}

void amx_prepare(int type, const Mapped &p, void *scratch) {
  switch (type) {
    case kQ4_0: return pack_rows<Q4_0>(p, static_cast<Rows<Q4_0::kDepth> *>(scratch));
    case kQ5_0: return pack_rows<Q5_0>(p, static_cast<Rows<Q5_0::kDepth> *>(scratch));
    case kQ8_0: return pack_rows<Q8_0>(p, static_cast<Rows<Q8_0::kDepth> *>(scratch));
    case kQ4_K: return pack_rows<Q4_K>(p, static_cast<Rows<Q4_K::kDepth> *>(scratch));
    case kQ5_K: return pack_rows<Q5_K>(p, static_cast<Rows<Q5_K::kDepth> *>(scratch));
    case kQ6_K: return pack_rows<Q6_K>(p, static_cast<Rows<Q6_K::kDepth> *>(scratch));
  }
}

void amx_run(int type, const Mapped &p, int begin, int end, const uint8_t *next, void *scratch) {
  switch (type) {
    case kQ4_0: return run<Q4_0>(p, begin, end, next, scratch);
    case kQ5_0: return run<Q5_0>(p, begin, end, next, scratch);
    case kQ8_0: return run<Q8_0>(p, begin, end, next, scratch);
    case kQ4_K: return run<Q4_K>(p, begin, end, next, scratch);
    case kQ5_K: return run<Q5_K>(p, begin, end, next, scratch);
    case kQ6_K: return run<Q6_K>(p, begin, end, next, scratch);
  }
}

}  // namespace

const Kernel amx = {amx_scratch, amx_prepare, amx_run};

bool amx_allowed() { return may_use_tiles(); }

}  // namespace mse_ggml

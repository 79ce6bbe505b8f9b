// The LSTM's input projection by bf16 tiles (Intel AMX), as precise as in f32.
//
// A float is the sum of three bf16 numbers, exactly: the upper, middle and lower eight bits of its
// significand. Of the nine products of two such sums the six largest are added up in f32; what is
// left out is about 2^-24 of the product, and 2^-21 at most. One instruction multiplies 16 rows by
// 16 columns by 32 values of depth, so that six of them take far less time than f32 vectors.
//
// As in gemm.h, each output is one chain of operations whatever the rows beside it.

// Narrower inputs gain nothing: their depth is mostly padding, and the recurrence takes the time.
constexpr int kSplitFrom = 64;
constexpr int kTile = kSplitColumns;  // of rows, too
constexpr int kValues = kTile * kSplitStep;

// Tiles: 0 .. 3 sums (two tiles of rows by two of columns), 4, 5 rows, 6, 7 columns.
#define MSE_DOT(sum, rows, columns) \
  asm volatile("tdpbf16ps %%tmm" #columns ", %%tmm" #rows ", %%tmm" #sum ::)

// The three parts of 32 values: word 2 i is of value i, word 2 i + 1 of value 16 + i (pack.cpp).
inline void split(__m512 a, __m512 b, uint16_t *to) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  MSE_UNROLL
  for (int part = 0; part < 3; part++, to += 2 * kValues) {
    const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
    _mm512_store_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(x, 16), y));
    a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(x, upper)));
    b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(y, upper)));
  }
}

// n rows of `depth` values into tiles [step][part][2], zeros after the last value.
inline void split_rows(const float *x, size_t ldx, int n, int depth, uint16_t *tiles) {
  for (int r = 0; r < n; r++, x += ldx) {
    uint16_t *to = tiles + r / kTile * kValues + r % kTile * kSplitStep;
    int k = 0;
    for (; k + kSplitStep <= depth; k += kSplitStep, to += 6 * kValues)
      split(load(x + k), load(x + k + W), to);
    if (k < depth) {
      const uint32_t there = (1u << (depth - k)) - 1;
      split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(there), x + k),
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> W), x + k + W), to);
    }
  }
}

// Rows of the next call: a pair of column tiles takes every `turns`th.
struct Later {
  const float *rows;
  size_t ldx;
  int follow, turn, turns;
};

// 32 columns of two tiles of rows, or of one, over `steps` steps of depth. init: where sums start,
// `from` bytes from row to row.
template <bool Two>
inline void tiles(const uint16_t *a, const uint16_t *b, int steps, const float *init, size_t from,
                  float *c, size_t stride, Later later) {
  MSE_LOAD(0, init, from);
  MSE_LOAD(1, init + kTile, from);
  if (Two) {
    const float *lower = init + kTile * from / sizeof(float);
    MSE_LOAD(2, lower, from);
    MSE_LOAD(3, lower + kTile, from);
  }
  // All products of one part, loaded here, with the other operand's part that is loaded already. Each
  // load stands just before its first use: processors do not run far ahead with tiles.
#define MSE_BY_ROWS(part)                          \
  MSE_LOAD(4, a + 2 * part * kValues, 64);         \
  MSE_DOT(0, 4, 6);                                \
  MSE_DOT(1, 4, 7);                                \
  if (Two) {                                       \
    MSE_LOAD(5, a + (2 * part + 1) * kValues, 64); \
    MSE_DOT(2, 5, 6);                              \
    MSE_DOT(3, 5, 7);                              \
  }
#define MSE_BY_COLUMNS(part)                       \
  MSE_LOAD(6, b + 2 * part * kValues, 64);         \
  MSE_DOT(0, 4, 6);                                \
  if (Two) MSE_DOT(2, 5, 6);                       \
  MSE_LOAD(7, b + (2 * part + 1) * kValues, 64);   \
  MSE_DOT(1, 4, 7);                                \
  if (Two) MSE_DOT(3, 5, 7);
  for (int s = 0; s < steps; s++, a += 6 * kValues, b += 6 * kValues) {
    for (int i = later.turn; i < later.follow; i += later.turns) {
      const float *row = later.rows + i * later.ldx + s * kSplitStep;
      __builtin_prefetch(row, 0, 2);
      __builtin_prefetch(row + kLine, 0, 2);
    }
    // In an order in which one of the two changes at a time: 0 upper, 1 middle, 2 lower bits.
    MSE_LOAD(6, b, 64);
    MSE_LOAD(7, b + kValues, 64);
    MSE_BY_ROWS(0)
    MSE_BY_COLUMNS(2)
    MSE_BY_COLUMNS(1)
    MSE_BY_ROWS(1)
    MSE_BY_COLUMNS(0)
    MSE_BY_ROWS(2)
  }
#undef MSE_BY_ROWS
#undef MSE_BY_COLUMNS
  MSE_STORE(0, c, stride);
  MSE_STORE(1, c + kTile, stride);
  if (Two) {
    float *lower = c + kTile * stride / sizeof(float);
    MSE_STORE(2, lower, stride);
    MSE_STORE(3, lower + kTile, stride);
  }
}

// Holds the tiles' configuration of this thread while it lives, and gives the one before back.
class Projection {
 public:
  Projection(const Packed &p, float *scratch)
      : tiles_(p.storage == kSplit), rows_(reinterpret_cast<uint16_t *>(scratch)) {
    if (!tiles_) return;
    MSE_CONFIGURATION(before_);
    const TileConfig ours;
    MSE_CONFIGURE(ours);
  }
  Projection(const Projection &) = delete;
  Projection &operator=(const Projection &) = delete;
  ~Projection() {
    if (tiles_) MSE_CONFIGURE(before_);
  }

  // c [n, Np] of rows [n, K]; c has room for whole tiles. later: `follow` rows of the next call.
  void run(const Packed &p, const float *rows, int n, float *c, const float *later,
           int follow) const {
    if (!tiles_)
      return panels<0>(p, 0, p.Np / kPanel, rows, p.K, n, c, p.Np, later, follow);
    const auto *w = static_cast<const uint16_t *>(p.data);
    const int all = split_steps(p.K), pairs = p.Np / (2 * kTile);
    const size_t ldx = p.K, stride = p.Np * sizeof(float);
    for (int k = 0; k < p.K; k += kSplitDepth) {
      const int depth = p.K - k < kSplitDepth ? p.K - k : kSplitDepth;
      split_rows(rows + k, ldx, n, depth, rows_);
      for (int j = 0; j < pairs; j++) {
        float *o = c + j * 2 * kTile;
        const auto *b = w + (static_cast<size_t>(j) * all + k / kSplitStep) * 6 * kValues;
        const float *init = k ? o : p.bias + j * 2 * kTile;
        const Later next = {later + k, ldx, follow, j, pairs};
        (n > kTile ? tiles<true> : tiles<false>)(rows_, b, split_steps(depth), init,
                                                 k ? stride : 0, o, stride, next);
      }
    }
  }

 private:
  bool tiles_;
  TileConfig before_;
  uint16_t *rows_;
};

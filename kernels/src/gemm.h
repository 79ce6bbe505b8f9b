// y = x w^T + b on packed panels: one kernel for the input projection of all steps, for a batch and
// for a single row.
//
// Each output is one chain of multiply-adds over k in order, whatever the tile: a row's result does
// not depend on the rows beside it, on the blocking or on the number of threads.

template <int S> struct Stored;
template <> struct Stored<0> {
  using T = float;
  static inline V at(const T *p) { return load(p); }
};
template <> struct Stored<1> {
  using T = uint16_t;
  static inline V at(const T *p) { return load_f16(p); }
};
template <> struct Stored<2> {
  using T = uint16_t;
  static inline V at(const T *p) { return load_bf16(p); }
};

constexpr int kPanel = 4 * W;
// Depth whose panel block (256 KB of f32 with the widest vectors) stays in the second-level cache while
// the rows go by: from there four vectors come in time for 24 multiply-adds, and the sums stay in
// registers for longer than with a block for the first level (bench/adapter.py, CHERMA: -2.5 %).
constexpr int kDepth = 1024;
constexpr int kLine = 16;  // floats of a cache line

// Before a loop over accumulators: GCC keeps them in registers only if it unrolls early, and
// otherwise writes all of them to the stack and back around every tile.
#define MSE_UNROLL _Pragma("GCC unroll 8")

// Rows of a next call, fetched while this one computes: a panel takes every `turns`th row of a tile,
// so that memory is read evenly all the time.
struct Ahead {
  const float *rows;  // null: none
  int turn, turns;
};

template <int S, int M>
inline void tile(const typename Stored<S>::T *w, const float *x, size_t ldx, int K, const float *init,
                 size_t ldi, float *c, size_t ldc, Ahead ahead) {
  V a[M][4];
  MSE_UNROLL
  for (int i = 0; i < M; i++) {
    MSE_UNROLL
    for (int j = 0; j < 4; j++) a[i][j] = load(init + i * ldi + j * W);
  }
  for (int k = 0; k < K; k++, w += kPanel) {
    if (ahead.rows && k % kLine == 0)
      for (int i = ahead.turn; i < M; i += ahead.turns)
        __builtin_prefetch(ahead.rows + i * ldx + k, 0, 2);
    const V w0 = Stored<S>::at(w), w1 = Stored<S>::at(w + W);
    const V w2 = Stored<S>::at(w + 2 * W), w3 = Stored<S>::at(w + 3 * W);
    MSE_UNROLL
    for (int i = 0; i < M; i++) {
      const V v = set1(x[i * ldx + k]);
      a[i][0] = fma(v, w0, a[i][0]);
      a[i][1] = fma(v, w1, a[i][1]);
      a[i][2] = fma(v, w2, a[i][2]);
      a[i][3] = fma(v, w3, a[i][3]);
    }
  }
  MSE_UNROLL
  for (int i = 0; i < M; i++) {
    MSE_UNROLL
    for (int j = 0; j < 4; j++) store(c + i * ldc + j * W, a[i][j]);
  }
}

template <int S, int M>
inline void tail(int rows, const typename Stored<S>::T *w, const float *x, size_t ldx, int K,
                 const float *init, size_t ldi, float *c, size_t ldc, Ahead ahead) {
  if (rows == M)
    tile<S, M>(w, x, ldx, K, init, ldi, c, ldc, ahead);
  else if constexpr (M > 1)
    tail<S, M - 1>(rows, w, x, ldx, K, init, ldi, c, ldc, ahead);
}

// later: `follow` rows of the next call, laid out as x.
template <int S>
void panels(const Packed &p, int first, int last, const float *x, size_t ldx, int M, float *c,
            size_t ldc, const float *later, int follow) {
  for (int q = first; q < last; q++) {
    const auto *w = static_cast<const typename Stored<S>::T *>(p.data) +
                    static_cast<size_t>(q) * p.K * kPanel;
    float *out = c + static_cast<size_t>(q) * kPanel;
    const int depth = M > kRows ? kDepth : p.K;
    const int tiles = (M + kRows - 1) / kRows, step = (M + tiles - 1) / tiles;
    for (int k = 0; k < p.K; k += depth) {
      const int n = p.K - k < depth ? p.K - k : depth;
      for (int m = 0; m < M; m += step) {
        float *o = out + m * ldc;
        const float *init = k ? o : p.bias + static_cast<size_t>(q) * kPanel;
        const int rows = M - m < step ? M - m : step;
        const Ahead ahead = {m + rows <= follow ? later + m * ldx + k : nullptr, q - first,
                             last - first};
        tail<S, kRows>(rows, w + static_cast<size_t>(k) * kPanel, x + m * ldx + k, ldx, n, init,
                       k ? ldc : 0, o, ldc, ahead);
      }
    }
  }
}

void linear(const Packed &p, int first, int last, const float *x, size_t ldx, int M, float *c,
            size_t ldc) {
  if (p.storage == 1)
    panels<1>(p, first, last, x, ldx, M, c, ldc, nullptr, 0);
  else if (p.storage == 2)
    panels<2>(p, first, last, x, ldx, M, c, ldc, nullptr, 0);
  else
    panels<0>(p, first, last, x, ldx, M, c, ldc, nullptr, 0);
}

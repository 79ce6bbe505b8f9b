// The LSTM's input projection, where the processor has no tiles: the plain product.
constexpr int kSplitFrom = 0;  // never
static_assert(kChunk % kRows == 0, "no tile that is only partly full");

struct Projection {
  Projection(const Packed &, float *) {}
  // c [n, Np] of rows [n, K]. later: `follow` rows of the next call.
  void run(const Packed &p, const float *rows, int n, float *c, const float *later,
           int follow) const {
    panels<0>(p, 0, p.Np / kPanel, rows, p.K, n, c, p.Np, later, follow);
  }
};

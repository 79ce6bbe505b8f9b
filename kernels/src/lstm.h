// The recurrence: a chunk of steps is projected ahead as one GEMM, then run step by step for a group
// of sequences at once, so that each recurrent weight that is loaded serves the whole group.

struct State {
  float *now, *next, *cells;  // [group, Hp] each
};

// One step for NB sequences and NQ neighbouring panels (NQ x W units), up or down through the depth.
// h is read from `now` and written to `next`: the panels of a step must all see the old one.
// Every: values of depth for one line fetched from `ahead` on; 0: none.
template <int NB, int NQ, int Every>
inline void units(const Lstm &w, int q, bool down, float *const *gates, const State &s,
                  const char *ahead) {
  const int H = w.H, Hp = w.Hp, first = down ? H - 1 : 0, stride = down ? -1 : 1;
  const size_t panel = static_cast<size_t>(H) * kPanel;
  V a[NB][NQ][4];
  MSE_UNROLL
  for (int b = 0; b < NB; b++) {
    MSE_UNROLL
    for (int j = 0; j < NQ; j++) {
      MSE_UNROLL
      for (int g = 0; g < 4; g++) a[b][j][g] = load(gates[b] + (q + j) * kPanel + g * W);
    }
  }
  const float *p = static_cast<const float *>(w.rec.data) + q * panel + first * kPanel;
  const float *h = s.now + first;
#pragma GCC unroll 4
  for (int k = 0; k < H; k++, p += stride * kPanel, h += stride) {
    if constexpr (Every > 0)
      if (k % Every == 0) __builtin_prefetch(ahead + k / Every * kLine * 4, 0, 2);
    V v[NB];
    MSE_UNROLL
    for (int b = 0; b < NB; b++) v[b] = set1(h[b * Hp]);
    MSE_UNROLL
    for (int j = 0; j < NQ; j++) {
      MSE_UNROLL
      for (int g = 0; g < 4; g++) {
        const V weight = load(p + j * panel + g * W);
        MSE_UNROLL
        for (int b = 0; b < NB; b++) a[b][j][g] = fma(v[b], weight, a[b][j][g]);
      }
    }
  }
  MSE_UNROLL
  for (int b = 0; b < NB; b++) {
    MSE_UNROLL
    for (int j = 0; j < NQ; j++) {
      const int at = b * Hp + (q + j) * W;
      V c = load(s.cells + at);
      store(s.next + at, lstm_cell(a[b][j][0], a[b][j][1], a[b][j][2], a[b][j][3], &c));
      store(s.cells + at, c);
    }
  }
}

static_assert(kChunk % 2 == 0 && kSplitRows % 2 == 0, "to and fro goes on from chunk to chunk");

// Bytes that `units` fetches.
inline int fetched(const Lstm &w, int every) { return (w.H + every - 1) / every * kLine * 4; }

template <int NB, int Every>
void steps(const Lstm &w, float *gates, int from, int to, State *s, const char *ahead) {
  constexpr int NQ = NB <= kGroup / 2 || NB == 1 ? 2 : 1;
  const int count = w.Hp / W;
  int on = 0;
  if constexpr (Every > 0) on = fetched(w, Every);
  for (int t = from; t < to; t++) {
    float *g[NB];
    for (int b = 0; b < NB; b++) g[b] = gates + (static_cast<size_t>(b) * w.chunk + t) * w.in.Np;
    // Every other step goes backwards through the panels: the ones used last are still in the
    // first-level cache, where a cyclic walk over 64 KB would find none of them. Depth is walked the
    // other way, so that a step begins with the values of h that were ready first.
    const bool back = t & 1;
    int q = 0;
    for (; q + NQ <= count; q += NQ, ahead += on)
      units<NB, NQ, Every>(w, back ? count - NQ - q : q, !back, g, *s, ahead);
    if constexpr (NQ > 1)
      for (; q < count; q++, ahead += on)
        units<NB, 1, Every>(w, back ? count - 1 - q : q, !back, g, *s, ahead);
    float *old = s->now;
    s->now = s->next;
    s->next = old;
  }
}

template <int NB>
void some_steps(int live, const Lstm &w, float *gates, int from, int to, State *s) {
  if (live == NB)
    steps<NB, 0>(w, gates, from, to, s, nullptr);
  else if constexpr (NB > 1)
    some_steps<NB - 1>(live, w, gates, from, to, s);
}

// A NaN or an infinity in a frame reaches every gate of it, and stays in the sum whatever is added or
// multiplied: so a look at one vector of gates per step saves a pass over the frames. False also
// where finite values overflowed.
inline bool passed(const float *gates, size_t stride, int n) {
  const V zero = set1(0.0f);
  V bad = zero;
  for (int t = 0; t < n; t++) bad = fma(load(gates + t * stride), zero, bad);
  return sum(bad) == 0.0f;
}

// Steps from t0 on that a chunk holds.
inline int part(int64_t len, int64_t t0, int chunk) {
  const int64_t left = len - t0;
  return left < 0 ? 0 : left > chunk ? chunk : static_cast<int>(left);
}

// n steps of one sequence. They compute and leave memory idle, so they fetch what the work aside needs,
// which then finds it in the second-level cache.
inline void steps_with(Aside *aside, const Lstm &w, float *gates, int n, State *s) {
  const int bytes = (w.Hp / W + 1) / 2 * fetched(w, aside->every);  // of a step
  for (int t = 0; t < n;) {
    const ptrdiff_t left = (aside->end - aside->at + bytes - 1) / bytes;
    if (left == 0) return steps<1, 0>(w, gates, t, n, s, nullptr);
    const int now = left < n - t ? static_cast<int>(left) : n - t;
    (aside->every == 1 ? steps<1, 1> : steps<1, 2>)(w, gates, t, t + now, s, aside->at);
    aside->at += now * bytes;
    if (now == left) aside->turn(aside);
    t += now;
  }
}

int lstm(const Lstm &w, int nb, const float *const *x, const int64_t *len, float *scratch,
         float *const *h_out, Aside *aside) {
  const size_t state = static_cast<size_t>(kGroup) * w.Hp;
  float *gates = scratch + 3 * state;
  const Projection project(w.in, gates + static_cast<size_t>(kGroup) * w.chunk * w.in.Np);
  State s = {scratch, scratch + state, scratch + 2 * state};
  for (size_t i = 0; i < 3 * state; i++) scratch[i] = 0.0f;
  for (int b = 0; b < nb; b++)
    for (int i = 0; i < w.Hp; i++) h_out[b][i] = 0.0f;
  const int D = w.in.K;
  for (int64_t t0 = 0; t0 < len[0]; t0 += w.chunk) {
    int n[kGroup] = {};
    for (int b = 0; b < nb; b++) {
      n[b] = part(len[b], t0, w.chunk);
      if (n[b] == 0) continue;
      const float *rows = x[b] + t0 * D;
      // The next rows: of the next sequence, or of the first one's next chunk.
      const bool more = b + 1 < nb && len[b + 1] > t0;
      const int c = more ? b + 1 : 0;
      const int64_t u0 = more ? t0 : t0 + w.chunk;
      float *own = gates + static_cast<size_t>(b) * w.chunk * w.in.Np;
      project.run(w.in, rows, n[b], own, x[c] + u0 * D, part(len[c], u0, w.chunk));
      if (!passed(own, w.in.Np, n[b]) && !finite(rows, static_cast<size_t>(n[b]) * D)) return b;
    }
    int t = 0;
    if (aside) {
      steps_with(aside, w, gates, n[0], &s);
      t = n[0];
    }
    for (int live = nb; live > 0; live--) {
      const int last = live - 1;
      if (n[last] > t) {
        some_steps<kGroup>(live, w, gates, t, n[last], &s);
        t = n[last];
      }
      if (n[last] > 0 && t0 + n[last] == len[last])
        for (int i = 0; i < w.Hp; i++) h_out[last][i] = s.now[last * w.Hp + i];
    }
  }
  return -1;
}

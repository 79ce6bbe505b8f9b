// The small kernels around the GEMMs: text pooling, mixing, GELU, the rank-one projector, checks.

// x * 0 is NaN exactly for an infinity or a NaN, and NaN stays in a sum.
bool finite(const float *x, size_t n) {
  const V zero = set1(0.0f);
  V a = zero, b = zero, c = zero, d = zero;
  size_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = fma(load(x + i), zero, a);
    b = fma(load(x + i + W), zero, b);
    c = fma(load(x + i + 2 * W), zero, c);
    d = fma(load(x + i + 3 * W), zero, d);
  }
  float rest = 0.0f;
  for (; i < n; i++) rest += x[i] * 0.0f;
  return sum(add(add(a, b), add(c, d))) + rest == 0.0f;
}

// Rows are read four at a time, each from end to end: the sums stay in the first-level cache, and
// memory sees a few long streams. Every column is one chain of additions in the order of the rows.
void add_rows(const float *rows, int64_t n, int D, float *out) {
  const int wide = D / W * W;
  int64_t t = 0;
  for (; t + 4 <= n; t += 4) {
    const float *a = rows + t * D, *b = a + D, *c = b + D, *e = c + D;
    int d = 0;
    for (; d < wide; d += W) {
      const V s = add(add(load(out + d), load(a + d)), load(b + d));
      store(out + d, add(add(s, load(c + d)), load(e + d)));
    }
    for (; d < D; d++) out[d] = (((out[d] + a[d]) + b[d]) + c[d]) + e[d];
  }
  for (; t < n; t++) {
    const float *a = rows + t * D;
    int d = 0;
    for (; d < wide; d += W) store(out + d, add(load(out + d), load(a + d)));
    for (; d < D; d++) out[d] += a[d];
  }
}

bool average(int64_t n, int D, float *out) {
  const float scale = n > 0 ? 1.0f / static_cast<float>(n) : 0.0f;
  const V zero = set1(0.0f), factor = set1(scale);
  const int wide = D / W * W;
  V bad = zero;
  float rest = 0.0f;
  int d = 0;
  for (; d < wide; d += W) {
    const V s = mul(load(out + d), factor);
    bad = fma(s, zero, bad);
    store(out + d, s);
  }
  for (; d < D; d++) {
    out[d] *= scale;
    rest += out[d] * 0.0f;
  }
  return sum(bad) + rest == 0.0f;
}

void gelu(float *x, size_t n) {
  for (size_t i = 0; i < n; i += W) store(x + i, gelu_(load(x + i)));  // n: a multiple of a panel
}

void mix(const float *k, const float *a, const float *v, float *z, size_t n) {
  for (size_t i = 0; i < n; i += W) {
    const V f = load(k + i);
    store(z + i, fma(f, load(a + i), mul(f, load(v + i))));
  }
}

void spread(const float *u, int n, const float *q, const float *r, int P, float *out, size_t stride) {
  for (int p = 0; p < P; p++) {
    const V slope = set1(q[p]), shift = set1(r[p]);
    float *o = out + p * stride;
    int i = 0;
    for (; i + W <= n; i += W) store(o + i, fma(load(u + i), slope, shift));
    for (; i < n; i++) o[i] = u[i] * q[p] + r[p];
  }
}

void activate(int what, const float *x, float *y, size_t n) {
  for (size_t i = 0; i < n; i += W) {
    float in[W] = {0}, out[W];
    const size_t m = n - i < static_cast<size_t>(W) ? n - i : W;
    for (size_t j = 0; j < m; j++) in[j] = x[i + j];
    const V v = load(in);
    store(out, what == 0 ? sigmoid(v) : what == 1 ? tanh_(v) : gelu_(v));
    for (size_t j = 0; j < m; j++) y[i + j] = out[j];
  }
}

int64_t probe_mac(int64_t rounds) {
  constexpr int N = 12;
  V a[N];
  for (int i = 0; i < N; i++) a[i] = set1(static_cast<float>(i));
  const V f = set1(0.999f), g = set1(1e-3f);
  for (int64_t r = 0; r < rounds; r++)
    for (int i = 0; i < N; i++) a[i] = fma(a[i], f, g);
  V s = a[0];
  for (int i = 1; i < N; i++) s = add(s, a[i]);
  return rounds * N * W + (sum(s) == -1.0f);
}

float probe_read(const float *x, size_t n) {
  V s[8];
  for (int j = 0; j < 8; j++) s[j] = set1(0.0f);
  size_t i = 0;
  for (; i + 8 * W <= n; i += 8 * W)
    for (int j = 0; j < 8; j++) s[j] = add(s[j], load(x + i + j * W));
  for (int j = 1; j < 8; j++) s[0] = add(s[0], s[j]);
  return sum(s[0]);
}

// Attention (ggml_attention.h), once for each instruction set: included after simd_*.h and
// activations.h.
//
// A tile is up to 2 W rows of one head, in lanes: the scores of a key by all of them are two vectors, so
// neither products nor softmax add across lanes. Keys that no row of a tile sees are left out, kKeys at a
// time; the others are converted once for it.

constexpr int kLanes = 2 * W;
constexpr short kHidden = static_cast<short>(0xfc00);  // minus infinity

// exp, zero for very low x and no number for what is none: of two that cannot be compared the maximum is
// the second. Eight lanes choose by a sign, which such a thing has too; their pow2 of -127 is zero.
inline V weight(V x) {
  if constexpr (W == 8) return exp_(vmax(set1(-88.0f), x));
  const V low = set1(-87.0f);
  return select_negative(sub(x, low), set1(0.0f), exp_(vmax(low, x)));
}

struct Tile {
  const Attention &a;
  int first, rows;  // of the queries
  float *queries;   // [depth, kLanes]
  float *keys, *values;   // [seen keys, depth]
  float *mask, *scores;   // [seen keys, kLanes]
  struct Group {
    int32_t key;    // the first of kKeys
    uint32_t seen;  // a bit for each that a row sees
  } *groups;
  int count = 0;  // of groups that are seen
  mutable bool finite = true;  // whether all values are

  Tile(const Attention &attention, int tile, void *scratch)
      : a(attention), first(tile * kLanes), rows(a.rows - first < kLanes ? a.rows - first : kLanes) {
    const size_t n = static_cast<size_t>(a.n_keys), depth = static_cast<size_t>(a.depth);
    queries = static_cast<float *>(scratch);
    keys = queries + depth * kLanes;
    values = keys + n * depth;
    mask = values + n * depth;
    scores = mask + n * kLanes;
    groups = reinterpret_cast<Group *>(scores + n * kLanes);
    for (int key = 0; key < a.n_keys; key += kKeys)
      if (const uint32_t bits = seen(key)) read_mask(key, bits);
  }

  static size_t bytes(const Attention &a) {
    const size_t n = static_cast<size_t>(a.n_keys), depth = static_cast<size_t>(a.depth);
    return sizeof(float) * (depth * kLanes + 2 * n * (depth + kLanes)) + sizeof(Group) * (n / kKeys);
  }

  __m128i mask_of(int row, int key) const {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(a.mask + (first + row) * a.mask_row + key));
  }

  uint32_t seen(int key) const {
    __m128i hidden = _mm_set1_epi16(-1);
    for (int r = 0; r < rows; r++)
      hidden = _mm_and_si128(hidden, _mm_cmpeq_epi16(mask_of(r, key), _mm_set1_epi16(kHidden)));
    return ~_mm_movemask_epi8(_mm_packs_epi16(hidden, hidden)) & 0xff;
  }

  void read_mask(int key, uint32_t bits) {
    float *to = mask + static_cast<size_t>(count) * kKeys * kLanes;
    for (int i = 0; i < kKeys * kLanes; i += W) store(to + i, set1(-INFINITY));
    for (int r = 0; r < rows; r++) {
      float wide[kKeys];
      _mm256_storeu_ps(wide, _mm256_cvtph_ps(mask_of(r, key)));
      for (int i = 0; i < kKeys; i++) to[i * kLanes + r] = wide[i];
    }
    groups[count++] = {key, bits};
  }

  // From halves; whether all are finite. Keys that no row sees: zeros, for what is left there of something
  // else may be no numbers.
  bool convert(const uint16_t *from, size_t stride, float *to) const {
    V zeros = set1(0.0f);
    for (int g = 0; g < count; g++) {
      for (int i = 0; i < kKeys; i++, to += a.depth) {
        const uint16_t *row = from + (groups[g].key + i) * stride;
        const bool there = groups[g].seen >> i & 1;
        for (int d = 0; d < a.depth; d += W) {
          const V x = there ? load_f16(row + d) : set1(0.0f);
          zeros = fma(x, set1(0.0f), zeros);
          store(to + d, x);
        }
      }
    }
    return sum(zeros) == 0.0f;
  }

  // Rows that are not there: zeros.
  void transpose(int head) const {
    const float *from = a.queries + head * a.query_head + first * a.query_row;
    for (int i = 0; i < a.depth * kLanes; i += W) store(queries + i, set1(0.0f));
    for (int r = 0; r < rows; r++)
      for (int d = 0; d < a.depth; d++) queries[d * kLanes + r] = from[r * a.query_row + d];
  }

  // A key that is seen, of all heads of the group `of`, and its value: into the second-level cache.
  void prefetch(int number, int of) const {
    const size_t key = groups[number / kKeys].key + number % kKeys;
    const uint16_t *k = a.keys + of * a.key_head + key * a.key_row;
    const uint16_t *v = a.values + of * a.value_head + key * a.value_row;
    for (int d = 0; d < a.depth; d += 32) {
      // Without a memory operand of its own the compiler drops them.
      asm volatile("prefetcht1 %0" ::"m"(k[d]));
      asm volatile("prefetcht1 %0" ::"m"(v[d]));
    }
  }

  // kAtOnce keys by C vectors of rows: their scores, and the highest so far. Meanwhile the same keys are
  // fetched for the heads of group `next` (-1: none): each row is in a page of its own.
  template <int C>
  void score(int key, int next, V *highest) const {
    V sum[kAtOnce][C];
    MSE_UNROLL
    for (int i = 0; i < kAtOnce; i++) {
      MSE_UNROLL
      for (int c = 0; c < C; c++) sum[i][c] = set1(0.0f);
    }
    const float *k = keys + static_cast<size_t>(key) * a.depth;
    for (int part = 0; part < kAtOnce; part++) {
      if (next >= 0) prefetch(key + part, next);
      for (int d = part * a.depth / kAtOnce; d < (part + 1) * a.depth / kAtOnce; d++, k++) {
        V q[C];
        MSE_UNROLL
        for (int c = 0; c < C; c++) q[c] = load(queries + d * kLanes + c * W);
        MSE_UNROLL
        for (int i = 0; i < kAtOnce; i++) {
          const V one = set1(k[i * a.depth]);
          MSE_UNROLL
          for (int c = 0; c < C; c++) sum[i][c] = fma(one, q[c], sum[i][c]);
        }
      }
    }
    MSE_UNROLL
    for (int i = 0; i < kAtOnce; i++) {
      MSE_UNROLL
      for (int c = 0; c < C; c++) {
        const size_t at = static_cast<size_t>(key + i) * kLanes + c * W;
        const V seen = load(mask + at);
        // Minus infinity where it is not seen, else infinity: of two that cannot be compared the minimum
        // is the second. So what is not seen counts for nothing, and what is no number becomes infinite.
        const V limit = mul(add(seen, set1(3e38f)), set1(1e38f));
        const V x = vmin(fma(sum[i][c], set1(a.scale), seen), limit);
        store(scores + at, x);
        highest[c] = vmax(highest[c], x);
      }
    }
  }

  // Scores to weights, and one over the sums: no numbers where a score was infinite, since infinity less
  // itself is none.
  template <int C>
  void exponentials(const V *highest, float *inverse) const {
    V top[C], sum[C];
    MSE_UNROLL
    for (int c = 0; c < C; c++) {
      top[c] = vmax(highest[c], set1(-3e38f));  // of a row that sees nothing
      sum[c] = set1(0.0f);
    }
    for (int key = 0; key < count * kKeys; key++) {
      MSE_UNROLL
      for (int c = 0; c < C; c++) {
        float *at = scores + static_cast<size_t>(key) * kLanes + c * W;
        const V e = weight(sub(load(at), top[c]));
        sum[c] = add(sum[c], e);
        store(at, e);
      }
    }
    MSE_UNROLL
    for (int c = 0; c < C; c++)
      store(inverse + c * W, div(set1(1.0f), vmax(set1(1e-30f), sum[c])));
  }

  // The mean of the values for R rows from row r on. Broken: a value is infinite or no number, which rows
  // that do not see it must not meet.
  template <int R, bool Broken>
  void mean(int head, int r, const float *inverse) const {
    for (int d = 0; d < a.depth; d += kLanes) {
      V sum[R][2];
      MSE_UNROLL
      for (int i = 0; i < R; i++) sum[i][0] = sum[i][1] = set1(0.0f);
      const float *from = values + d, *weights = scores + r;
      for (int key = 0; key < count * kKeys; key++, from += a.depth, weights += kLanes) {
        const V one = load(from), two = load(from + W);
        MSE_UNROLL
        for (int i = 0; i < R; i++) {
          if (Broken && weights[i] == 0.0f) continue;
          const V w = set1(weights[i]);
          sum[i][0] = fma(w, one, sum[i][0]);
          sum[i][1] = fma(w, two, sum[i][1]);
        }
      }
      MSE_UNROLL
      for (int i = 0; i < R; i++) {
        if (r + i >= rows) break;
        float *to = a.out + (static_cast<size_t>(first + r + i) * a.heads + head) * a.depth + d;
        store(to, mul(sum[i][0], set1(inverse[r + i])));
        store(to + W, mul(sum[i][1], set1(inverse[r + i])));
      }
    }
  }

  template <int C>
  void head(int number, int next) const {
    V highest[C];
    MSE_UNROLL
    for (int c = 0; c < C; c++) highest[c] = set1(-INFINITY);
    float inverse[kLanes];
    for (int key = 0; key < count * kKeys; key += kAtOnce) score<C>(key, next, highest);
    exponentials<C>(highest, inverse);
    if (finite) means<false>(number, inverse);
    else means<true>(number, inverse);
  }

  template <bool Broken>
  void means(int number, const float *inverse) const {
    int r = 0;
    for (; r + kMean / 2 < rows; r += kMean) mean<kMean, Broken>(number, r, inverse);
    if (r < rows) mean<kMean / 2, Broken>(number, r, inverse);
  }

  void heads(int begin, int end, int after) const {
    for (int h = begin; h < end; h++) {
      const int of = h / a.group, following = (h + 1 < end ? h + 1 : after) / a.group;
      if (h == begin || h % a.group == 0) {
        convert(a.keys + of * a.key_head, a.key_row, keys);
        finite = convert(a.values + of * a.value_head, a.value_row, values);
      }
      transpose(h);
      const int next = following != of ? following : -1;
      if (rows > W) head<2>(h, next);
      else head<1>(h, next);
    }
  }

  static constexpr int kAtOnce = W / 2, kMean = W / 2;  // what the registers hold the sums of
};

void run(const Attention &a, int tile, int begin, int end, int after, void *scratch) {
  Tile(a, tile, scratch).heads(begin, end, after);
}

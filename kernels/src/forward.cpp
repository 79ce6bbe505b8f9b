// The call: three rounds of tasks over a block of samples.
//   1. recurrences (a few sequences of one modality each) and text knowledge (a tile of samples)
//   2. mixer and experts (a tile)
//   3. the projector (a tile and a range of panels)
// One sample on one thread has its first round in one piece (Text).
// Which tasks there are depends on the number of threads; what a sample's numbers are doesn't, since
// every output is one chain of operations in a fixed order (gemm.h, lstm.h).

#include <math.h>

#include <algorithm>
#include <atomic>

#include "model.h"

using mse::kBlock;
using mse::kTile;

struct mse_block {
  mse_handle &h;
  const mse_inputs &in;
  float *out;      // of the whole batch
  int64_t base;    // first sample of the block
  int n;           // samples of the block
  int tile;        // samples per tile
  int group;       // sequences per recurrence
  int groups;      // recurrences per modality
  int tiles;
  int parts;       // panel ranges of the projector
  int order[2][kBlock];
  std::atomic<int> bad[3];  // lowest sample with a non-finite frame, or kBlock

  mse_block(mse_handle &handle, const mse_inputs &inputs, float *to, int64_t first, int count)
      : h(handle), in(inputs), out(to), base(first), n(count) {
    const int threads = h.pool_.threads();
    const int share = (n + threads - 1) / threads;
    tile = std::min(share, kTile);
    group = std::min(share, h.k.group);
    groups = (n + group - 1) / group;
    tiles = (n + tile - 1) / tile;
    const int panels = h.up_.packed.Np / h.k.panel;
    parts = std::max(1, std::min(panels, 2 * threads / tiles));
    for (auto &b : bad) b.store(kBlock, std::memory_order_relaxed);
    for (int m = 0; m < 2; m++) {
      const int64_t *len = (m ? in.video_len : in.audio_len) + base;
      for (int i = 0; i < n; i++) order[m][i] = i;
      // Longest first: sequences of a group end together, and the last task to start is short.
      std::sort(order[m], order[m] + n, [len](int a, int b) {
        return len[a] != len[b] ? len[a] > len[b] : a < b;
      });
    }
  }

  void report(int what, int sample) {
    int seen = bad[what].load(std::memory_order_relaxed);
    while (sample < seen && !bad[what].compare_exchange_weak(seen, sample)) {
    }
  }

  void recur(int m, int g, int worker, mse::Aside *aside) {
    const mse::Lstm &w = h.lstm_[m].lstm;
    const float *x[16];
    float *to[16];
    int64_t len[16];
    const int from = g * group, count = std::min(group, n - from);
    const int64_t steps = m ? in.video_steps : in.audio_steps;
    for (int i = 0; i < count; i++) {
      const int s = order[m][from + i];
      x[i] = (m ? in.video : in.audio) + (base + s) * steps * w.in.K;
      len[i] = (m ? in.video_len : in.audio_len)[base + s];
      to[i] = h.hidden_[m].at(static_cast<size_t>(s) * w.Hp);
    }
    const int wrong = h.k.lstm(w, count, x, len, h.recur_.at(h.recur_size_ * worker), to, aside);
    if (wrong >= 0) report(m, order[m][from + wrong]);
  }

  static int value_bytes(const mse::Packed &w) { return w.storage ? 2 : 4; }
  // One panel alone: its columns land at the start of an output.
  mse::Packed panel(mse::Packed w, int q) const {
    w.data = static_cast<const char *>(w.data) +
             static_cast<size_t>(q) * w.K * h.k.panel * value_bytes(w);
    w.bias += q * h.k.panel;
    return w;
  }

  void dense(const mse::Matrix &w, const float *x, size_t ldx, int from, int count, float *to) {
    h.k.linear(w.packed, 0, w.packed.Np / h.k.panel, x + from * ldx, ldx, count,
               to + static_cast<size_t>(from) * w.packed.Np, w.packed.Np);
  }

  void know(int t) {
    const int D = h.dims_.width, from = t * tile, count = std::min(tile, n - from);
    for (int i = from; i < from + count; i++) {
      const float *rows = in.text + (base + i) * in.text_steps * D;
      if (!mse::mean(h.k, rows, in.text_len[base + i], D, h.mean_.at(static_cast<size_t>(i) * D)))
        report(2, i);
    }
    dense(h.text_, h.mean_.get(), D, from, count, h.know_.get());
  }

  void fuse(int t) {
    const int from = t * tile, count = std::min(tile, n - from);
    const size_t mix = h.text_.packed.Np, at = from * mix;
    for (int m = 0; m < 2; m++)
      dense(h.lin_[m], h.hidden_[m].get(), h.lstm_[m].lstm.Hp, from, count, h.encoded_[m].get());
    h.k.mix(h.know_.at(at), h.encoded_[0].at(at), h.encoded_[1].at(at), h.mixed_.at(at),
            count * mix);
    dense(h.first_, h.mixed_.get(), mix, from, count, h.expert_.get());
    const size_t wide = h.first_.packed.Np;
    h.k.gelu(h.expert_.at(from * wide), count * wide);
    dense(h.second_, h.expert_.get(), wide, from, count, h.fused_.get());
  }

  void project(int t, int part, int worker) {
    const int from = t * tile, count = std::min(tile, n - from);
    const mse::Packed &w = h.up_.packed;
    const int wide = h.k.panel, panels = w.Np / wide, D = h.dims_.width, P = h.dims_.n_pseudo;
    const size_t mix = h.text_.packed.Np;
    float *u = h.panel_.at(static_cast<size_t>(worker) * kTile * wide);
    for (int q = panels * part / parts; q < panels * (part + 1) / parts; q++) {
      h.k.linear(panel(w, q), 0, 1, h.fused_.at(from * mix), mix, count, u, wide);
      const int columns = std::min(wide, D - q * wide);
      for (int i = 0; i < count; i++)
        h.k.spread(u + i * wide, columns, h.slope_.get(), h.shift_.get(), P,
                   out + (base + from + i) * P * D + q * wide, D);
    }
  }

  // What `know` does, for one sample and in slices that the recurrences take along. Text is 5 MB read
  // once, more than the second-level cache holds, and the recurrences compute for as long as that takes
  // without reading memory. What comes after the text is only asked for, since it waits for them.
  // (Several samples share one pass over the weights, and several threads read while others compute.)
  class Text : public mse::Aside {
   public:
    explicit Text(mse_block &block)
        : b_(block), h_(block.h), w_(h_.text_.packed),
          rows_(std::max(1, kSlice / (w_.K * static_cast<int>(sizeof(float))))),
          depth_(std::max(1, kSlice / (h_.k.panel * value_bytes(w_)))) {
      turn = [](mse::Aside *self) { static_cast<Text *>(self)->next(); };
      // Steps too few to fetch most of the text at their full pace do so at twice the rate.
      int64_t within = 0;
      for (int m = 0; m < 2; m++) {
        const mse::Lstm &lstm = h_.lstm_[m].lstm;
        const int64_t lines = static_cast<int64_t>(lstm.H) * lstm.Hp / h_.k.lanes / 4;
        within += (m ? b_.in.video_len : b_.in.audio_len)[b_.base] * lines * mse::kLine;
      }
      const int64_t bytes = static_cast<int64_t>(h_.text_.bytes()) + len() * w_.K * 4;
      every = within < bytes / 4 * 3 ? 1 : 2;
      std::fill_n(h_.mean_.get(), w_.K, 0.0f);  // stays so without rows
      ask();
    }
    void finish() {
      while (panel_ * h_.k.panel < w_.Np) next();
    }

   private:
    static constexpr int kSlice = 1 << 17;

    int64_t len() const { return b_.in.text_len[b_.base]; }
    const float *row() const { return b_.in.text + (b_.base * b_.in.text_steps + row_) * w_.K; }
    int64_t rows() const { return std::min<int64_t>(rows_, len() - row_); }
    float *sums() const { return h_.know_.at(panel_ * h_.k.panel); }
    // Some depth of one panel, which goes on with the sums of the depth before.
    mse::Packed part() const {
      mse::Packed p = b_.panel(w_, panel_);
      p.data = static_cast<const char *>(p.data) +
               static_cast<size_t>(k_) * h_.k.panel * value_bytes(w_);
      p.K = std::min(depth_, w_.K - k_);
      if (k_) p.bias = sums();
      return p;
    }

    void next() {
      if (row_ < len()) {
        h_.k.add_rows(row(), rows(), w_.K, h_.mean_.get());
        row_ += rows();
        if (row_ == len() && !h_.k.average(len(), w_.K, h_.mean_.get())) b_.report(2, 0);
      } else if (panel_ * h_.k.panel < w_.Np) {
        h_.k.linear(part(), 0, 1, h_.mean_.at(k_), w_.K, 1, sums(), w_.Np);
        k_ += depth_;
        if (k_ >= w_.K) k_ = 0, panel_++;
      } else {
        later_++;
      }
      ask();
    }
    void ask() {
      if (row_ < len()) return ask(row(), static_cast<size_t>(rows()) * w_.K * sizeof(float));
      if (panel_ * h_.k.panel < w_.Np) {
        const mse::Packed p = part();
        return ask(p.data, static_cast<size_t>(p.K) * h_.k.panel * value_bytes(p));
      }
      const mse::Matrix *const later[] = {&h_.lin_[0], &h_.lin_[1], &h_.first_, &h_.second_};
      if (later_ < 4) return ask(later[later_]->packed.data, later[later_]->bytes());
      ask(nullptr, 0);
    }
    void ask(const void *from, size_t bytes) {
      at = static_cast<const char *>(from);
      end = at + bytes;
    }

    mse_block &b_;
    mse_handle &h_;
    const mse::Packed &w_;
    const int rows_, depth_;  // of a slice
    int64_t row_ = 0;
    int panel_ = 0, k_ = 0, later_ = 0;
  };
  void alone() {
    Text text(*this);
    recur(0, 0, 0, &text);
    recur(1, 0, 0, &text);
    text.finish();
  }

  // Text tiles are spread among the audio recurrences: they wait for memory while the others
  // compute, so two of them at a time would share its bandwidth.
  static void first_round(void *self, int task, int worker) {
    auto &b = *static_cast<mse_block *>(self);
    const int mixed = b.groups + b.tiles;
    if (task >= mixed) return b.recur(1, task - mixed, worker, nullptr);
    const auto texts_before = [&](int i) { return (i * b.tiles + mixed / 2) / mixed; };
    const int texts = texts_before(task);
    if (texts_before(task + 1) > texts) return b.know(texts);
    b.recur(0, task - texts, worker, nullptr);
  }
  static void second_round(void *self, int task, int) { static_cast<mse_block *>(self)->fuse(task); }
  static void third_round(void *self, int task, int worker) {
    auto &b = *static_cast<mse_block *>(self);
    b.project(task / b.parts, task % b.parts, worker);
  }
};

static bool locate(const float *x, int64_t steps, int64_t len, int dim, int64_t sample, int what,
                   int64_t where[4]) {
  for (int64_t t = 0; t < len; t++)
    for (int d = 0; d < dim; d++)
      if (!isfinite(x[(sample * steps + t) * dim + d])) {
        const int64_t found[4] = {what, sample, t, d};
        std::copy(found, found + 4, where);
        return true;
      }
  return false;
}

int mse_handle::forward(const mse_inputs &in, float *out, int64_t where[4]) {
  const struct {
    const float *x;
    const int64_t *len;
    int64_t steps;
    int dim;
  } parts[3] = {{in.audio, in.audio_len, in.audio_steps, dims_.audio_dim},
                {in.video, in.video_len, in.video_steps, dims_.video_dim},
                {in.text, in.text_len, in.text_steps, dims_.width}};
  if (in.batch < 0 || (in.batch > 0 && !out)) return MSE_BAD_ARGUMENT;
  for (int m = 0; m < 3; m++) {
    if (parts[m].steps < 0 || (in.batch > 0 && !parts[m].len)) return MSE_BAD_ARGUMENT;
    if (in.batch > 0 && parts[m].steps > 0 && !parts[m].x) return MSE_BAD_ARGUMENT;
    for (int64_t b = 0; b < in.batch; b++)
      if (parts[m].len[b] < 0 || parts[m].len[b] > parts[m].steps) {
        where[0] = m;
        where[1] = b;
        return MSE_BAD_LENGTH;
      }
  }
  std::lock_guard<std::mutex> lock(busy_);
  for (int64_t base = 0; base < in.batch; base += kBlock) {
    mse_block block(*this, in, out, base, static_cast<int>(std::min<int64_t>(kBlock, in.batch - base)));
    if (block.n == 1 && pool_.threads() == 1)
      block.alone();
    else
      pool_.run(mse_block::first_round, &block, 2 * block.groups + block.tiles);
    for (int m = 0; m < 3; m++) {
      const int64_t sample = base + block.bad[m].load();
      if (block.bad[m].load() == kBlock) continue;
      where[0] = m;
      where[1] = sample;
      where[2] = where[3] = -1;  // stays so where only a sum overflowed
      locate(parts[m].x, parts[m].steps, parts[m].len[sample], parts[m].dim, sample, m, where);
      return MSE_NOT_FINITE;
    }
    pool_.run(mse_block::second_round, &block, block.tiles);
    pool_.run(mse_block::third_round, &block, block.tiles * block.parts);
  }
  return MSE_OK;
}

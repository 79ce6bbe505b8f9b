// The C ABI under random shapes, for sanitizers and for instruction sets run by an emulator.
//
//   fuzz ROUNDS SEED      every instruction set against a plain double-precision adapter
//
// Inputs lie in buffers of their exact size, padded frames hold NaNs, and operator new is counted:
// a call that allocates, reads a frame that doesn't count or one float too many fails.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../src/abi.h"

static std::atomic<long> allocations{0};

static void *counted(size_t n, size_t align) {
  allocations++;
  void *p = nullptr;
  if (posix_memalign(&p, align < sizeof(void *) ? sizeof(void *) : align, n ? n : 1))
    throw std::bad_alloc();
  return p;
}
void *operator new(size_t n) { return counted(n, 16); }
void *operator new(size_t n, std::align_val_t a) { return counted(n, static_cast<size_t>(a)); }
void operator delete(void *p) noexcept { free(p); }
void operator delete(void *p, size_t) noexcept { free(p); }
void operator delete(void *p, std::align_val_t) noexcept { free(p); }
void operator delete(void *p, size_t, std::align_val_t) noexcept { free(p); }

using Values = std::vector<float>;
static std::mt19937 rng;

static int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
static Values draw(size_t n, double scale) {
  std::uniform_real_distribution<float> d(-1.0f, 1.0f);
  Values v(n);
  for (auto &x : v) x = d(rng) * static_cast<float>(scale);
  return v;
}

struct Network {
  mse_dims dims;
  std::vector<Values> store;
  mse_weights weights;

  const float *keep(size_t n, double fan) {
    store.push_back(draw(n, 1.0 / sqrt(fan)));
    return store.back().data();
  }

  Network() {
    dims = {pick(1, 90), pick(1, 70), pick(1, 90), pick(1, 70), pick(1, 300), pick(1, 400),
            {pick(1, 90), pick(1, 20), pick(1, 50)}, pick(1, 6)};
    const mse_dims &d = dims;
    const int h = d.audio_hidden, g = d.video_hidden, m = d.mix;
    mse_weights &w = weights;
    w.audio_ih = keep(4 * h * d.audio_dim, d.audio_dim);
    w.audio_hh = keep(4 * h * h, h);
    w.audio_bih = keep(4 * h, h);
    w.audio_bhh = keep(4 * h, h);
    w.audio_lin = keep(m * h, h);
    w.audio_lin_b = keep(m, h);
    w.video_ih = keep(4 * g * d.video_dim, d.video_dim);
    w.video_hh = keep(4 * g * g, g);
    w.video_bih = keep(4 * g, g);
    w.video_bhh = keep(4 * g, g);
    w.video_lin = keep(m * g, g);
    w.video_lin_b = keep(m, g);
    w.text = keep(m * d.width, d.width);
    w.text_b = keep(m, d.width);
    for (int i = 0; i < 3; i++) {
      w.first[i] = keep(d.scale[i] * m, m);
      w.first_b[i] = keep(d.scale[i], m);
      w.second[i] = keep(m * d.scale[i], d.scale[i]);
      w.second_b[i] = keep(m, d.scale[i]);
    }
    w.mix = keep(3, 1);
    w.mix_b = keep(1, 1);
    w.up = keep(d.width * m, m);
    w.up_b = keep(d.width, m);
    w.pseudo = keep(d.n_pseudo, 1);
    w.pseudo_b = keep(d.n_pseudo, 1);
  }
};

using Doubles = std::vector<double>;

static Doubles dense(const float *w, const float *b, int N, const Doubles &x) {
  Doubles y(N);
  const size_t K = x.size();
  for (int n = 0; n < N; n++) {
    y[n] = b[n];
    for (size_t k = 0; k < K; k++) y[n] += static_cast<double>(w[n * K + k]) * x[k];
  }
  return y;
}

static Doubles hidden(const float *ih, const float *hh, const float *bih, const float *bhh, int H,
                      int D, const float *x, int64_t steps) {
  const auto sig = [](double v) { return 1.0 / (1.0 + exp(-v)); };
  Doubles h(H, 0.0), c(H, 0.0);
  for (int64_t t = 0; t < steps; t++) {
    const Doubles z = dense(hh, bhh, 4 * H, h);
    const Doubles in = dense(ih, bih, 4 * H, Doubles(x + t * D, x + (t + 1) * D));
    for (int u = 0; u < H; u++) {
      const auto at = [&](int g) { return z[g * H + u] + in[g * H + u]; };
      c[u] = sig(at(1)) * c[u] + sig(at(0)) * tanh(at(2));
      h[u] = sig(at(3)) * tanh(c[u]);
    }
  }
  return h;
}

struct Inputs {
  Values rows[3];
  std::vector<int64_t> len[3];
  mse_inputs in;

  Inputs(const mse_dims &d, int batch) {
    const int dims[3] = {d.audio_dim, d.video_dim, d.width};
    int64_t steps[3];
    for (int m = 0; m < 3; m++) {
      steps[m] = pick(0, m == 0 ? 150 : 20);
      rows[m] = draw(batch * steps[m] * dims[m], 1.0);
      for (int b = 0; b < batch; b++) {
        len[m].push_back(pick(0, static_cast<int>(steps[m])));
        for (int64_t i = len[m][b] * dims[m]; i < steps[m] * dims[m]; i++)
          rows[m][b * steps[m] * dims[m] + i] = NAN;
      }
    }
    in = {batch, rows[0].data(), rows[1].data(), rows[2].data(), len[0].data(), len[1].data(),
          len[2].data(), steps[0], steps[1], steps[2]};
  }
};

static Doubles expected(const Network &n, const Inputs &i, int b) {
  const mse_dims &d = n.dims;
  const mse_weights &w = n.weights;
  const auto row = [&](int m, int dim, int64_t steps) { return i.rows[m].data() + b * steps * dim; };
  const Doubles a = dense(w.audio_lin, w.audio_lin_b, d.mix,
                          hidden(w.audio_ih, w.audio_hh, w.audio_bih, w.audio_bhh, d.audio_hidden,
                                 d.audio_dim, row(0, d.audio_dim, i.in.audio_steps), i.len[0][b]));
  const Doubles v = dense(w.video_lin, w.video_lin_b, d.mix,
                          hidden(w.video_ih, w.video_hh, w.video_bih, w.video_bhh, d.video_hidden,
                                 d.video_dim, row(1, d.video_dim, i.in.video_steps), i.len[1][b]));
  Doubles mean(d.width, 0.0);
  for (int64_t t = 0; t < i.len[2][b]; t++)
    for (int k = 0; k < d.width; k++)
      mean[k] += row(2, d.width, i.in.text_steps)[t * d.width + k] / static_cast<double>(i.len[2][b]);
  Doubles z = dense(w.text, w.text_b, d.mix, mean);
  for (int k = 0; k < d.mix; k++) z[k] *= a[k] + v[k];
  Doubles e(d.mix, w.mix_b[0]);
  for (int m = 0; m < 3; m++) {
    Doubles g = dense(w.first[m], w.first_b[m], d.scale[m], z);
    for (auto &x : g) x = 0.5 * x * erfc(-x * sqrt(0.5));
    const Doubles s = dense(w.second[m], w.second_b[m], d.mix, g);
    for (int k = 0; k < d.mix; k++) e[k] += w.mix[m] * s[k];
  }
  const Doubles u = dense(w.up, w.up_b, d.width, e);
  Doubles out;
  for (int p = 0; p < d.n_pseudo; p++)
    for (double x : u) out.push_back(x * w.pseudo[p] + w.pseudo_b[p]);
  return out;
}

static int fail(const char *what, const char *isa, double value) {
  printf("FAILED: %s on %s (%g)\n", what, isa, value);
  return 1;
}

static int one_round(const std::vector<std::string> &isas) {
  Network net;
  Inputs inputs(net.dims, pick(0, 7));
  const size_t each = static_cast<size_t>(net.dims.n_pseudo) * net.dims.width;
  for (const auto &isa : isas)
    for (int storage = 0; storage < 3; storage++) {
      mse_handle *h = nullptr;
      if (mse_open(&net.dims, &net.weights, pick(1, 3), storage, isa.c_str(), &h) != MSE_OK)
        return fail("open", isa.c_str(), storage);
      Values out(inputs.in.batch * each, NAN);
      int64_t where[4] = {};
      const long before = allocations;
      const int code = mse_forward(h, &inputs.in, out.data(), where);
      if (allocations != before) return fail("a call allocated", isa.c_str(), allocations - before);
      if (code != MSE_OK) return fail("forward", isa.c_str(), code);
      const double budget = storage == 0 ? 1e-5 : storage == 1 ? 2e-2 : 1e-1;
      double most = 0.0, worst = 0.0;
      for (int64_t b = 0; b < inputs.in.batch; b++) {
        const Doubles want = expected(net, inputs, static_cast<int>(b));
        for (size_t i = 0; i < each; i++) {
          most = fmax(most, fabs(want[i]));
          const double off = fabs(want[i] - out[b * each + i]);
          worst = off <= worst ? worst : off;  // NaN stays
        }
      }
      if (!(worst <= budget * most)) return fail("result", isa.c_str(), worst / most);
      if (inputs.in.batch > 0 && inputs.len[0][0] > 0) {
        const float kept = inputs.rows[0][0];
        inputs.rows[0][0] = INFINITY;
        if (mse_forward(h, &inputs.in, out.data(), where) != MSE_NOT_FINITE || where[0] || where[1])
          return fail("an infinity went through", isa.c_str(), 0);
        inputs.rows[0][0] = kept;
      }
      if (inputs.in.batch > 0) {
        const int64_t kept = inputs.len[1][0];
        for (const int64_t wrong : {int64_t{-1}, inputs.in.video_steps + 1, INT64_MIN, INT64_MAX}) {
          inputs.len[1][0] = wrong;
          if (mse_forward(h, &inputs.in, out.data(), where) != MSE_BAD_LENGTH || where[0] != 1)
            return fail("a bad length went through", isa.c_str(), 0);
        }
        inputs.len[1][0] = kept;
      }
      mse_close(h);
    }
  return 0;
}

static int bad_arguments() {
  Network net;
  mse_handle *h = nullptr;
  int64_t where[4];
  mse_dims wrong = net.dims;
  wrong.audio_hidden = MSE_MAX_HIDDEN + 1;
  mse_weights missing = net.weights;
  missing.up = nullptr;
  if (mse_open(&wrong, &net.weights, 1, 0, "", &h) != MSE_BAD_DIMS || h) return 1;
  if (mse_open(&net.dims, &missing, 1, 0, "", &h) != MSE_BAD_ARGUMENT) return 1;
  if (mse_open(&net.dims, &net.weights, 0, 0, "", &h) != MSE_BAD_ARGUMENT) return 1;
  if (mse_open(&net.dims, &net.weights, 1, 3, "", &h) != MSE_BAD_STORAGE) return 1;
  if (mse_open(&net.dims, &net.weights, 1, 0, "vax", &h) != MSE_BAD_ISA) return 1;
  if (mse_open(nullptr, &net.weights, 1, 0, "", &h) != MSE_BAD_ARGUMENT) return 1;
  if (mse_forward(nullptr, nullptr, nullptr, where) != MSE_BAD_ARGUMENT) return 1;
  mse_close(nullptr);
  return 0;
}

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 20;
  rng.seed(argc > 2 ? static_cast<unsigned>(atoi(argv[2])) : 1);
  std::vector<std::string> isas;
  std::string all = mse_isas();
  for (size_t at = 0; at < all.size();) {
    const size_t end = std::min(all.find(',', at), all.size());
    const std::string isa = all.substr(at, end - at);
    if (mse_isa_usable(isa.c_str())) isas.push_back(isa);
    at = end + 1;
  }
  if (bad_arguments()) return fail("bad arguments", "any", 0);
  for (int i = 0; i < rounds; i++)
    if (one_round(isas)) {
      printf("in round %d\n", i);
      return 1;
    }
  printf("ok: %d rounds on", rounds);
  for (const auto &isa : isas) printf(" %s", isa.c_str());
  printf("\n");
  return 0;
}

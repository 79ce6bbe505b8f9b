#include "model.h"

#include <string.h>

#include <algorithm>

namespace mse {

int check_dims(const mse_dims &d) {
  const auto within = [](int32_t v, int32_t most) { return v >= 1 && v <= most; };
  const bool ok = within(d.audio_dim, MSE_MAX_DIM) && within(d.video_dim, MSE_MAX_DIM) &&
                  within(d.audio_hidden, MSE_MAX_HIDDEN) &&
                  within(d.video_hidden, MSE_MAX_HIDDEN) && within(d.mix, 4096) &&
                  within(d.width, MSE_MAX_DIM) && within(d.n_pseudo, MSE_MAX_PSEUDO) &&
                  within(d.scale[0], MSE_MAX_DIM) && within(d.scale[1], MSE_MAX_DIM) &&
                  within(d.scale[2], MSE_MAX_DIM);
  return ok ? MSE_OK : MSE_BAD_DIMS;
}

// The three experts read the same input and their outputs are summed with weights w_m, so that the
// first layers are one [sum of widths, mix] matrix, and the second ones, scaled by w_m, one
// [mix, sum of widths] matrix with all biases in one (spec, section 1.4).
static void fold_experts(const mse_dims &d, const mse_weights &w, int panel, int storage,
                         Matrix *first, Matrix *second) {
  const int total = d.scale[0] + d.scale[1] + d.scale[2];
  first->shape(total, d.mix, panel, storage);
  second->shape(d.mix, total, panel, storage);
  for (int o = 0; o < d.mix; o++) {
    double bias = w.mix_b[0];
    for (int m = 0; m < 3; m++) bias += static_cast<double>(w.mix[m]) * w.second_b[m][o];
    *second->bias.at(o) = static_cast<float>(bias);
  }
  for (int m = 0, at = 0; m < 3; at += d.scale[m++])
    for (int i = 0; i < d.scale[m]; i++) {
      *first->bias.at(at + i) = w.first_b[m][i];
      for (int j = 0; j < d.mix; j++) {
        first->set(at + i, j, w.first[m][static_cast<size_t>(i) * d.mix + j], panel);
        second->set(j, at + i, w.mix[m] * w.second[m][static_cast<size_t>(j) * d.scale[m] + i],
                    panel);
      }
    }
}

}  // namespace mse

mse_handle::mse_handle(const mse_dims &d, const mse_weights &w, const mse::Kernels &kernels,
                       int threads, int storage)
    : k(kernels), dims_(d), pool_(threads) {
  const int panel = k.panel;
  mse::pack_lstm(&lstm_[0], w.audio_ih, w.audio_hh, w.audio_bih, w.audio_bhh, d.audio_dim,
                 d.audio_hidden, k, storage);
  mse::pack_lstm(&lstm_[1], w.video_ih, w.video_hh, w.video_bih, w.video_bhh, d.video_dim,
                 d.video_hidden, k, storage);
  mse::pack_linear(&lin_[0], w.audio_lin, w.audio_lin_b, d.mix, d.audio_hidden, panel, storage);
  mse::pack_linear(&lin_[1], w.video_lin, w.video_lin_b, d.mix, d.video_hidden, panel, storage);
  mse::pack_linear(&text_, w.text, w.text_b, d.mix, d.width, panel, storage);
  mse::fold_experts(d, w, panel, storage, &first_, &second_);
  mse::pack_linear(&up_, w.up, w.up_b, d.width, d.mix, panel, storage);
  memcpy(slope_.reset(d.n_pseudo), w.pseudo, sizeof(float) * d.n_pseudo);
  memcpy(shift_.reset(d.n_pseudo), w.pseudo_b, sizeof(float) * d.n_pseudo);

  const size_t mix = text_.packed.Np, block = mse::kBlock;
  for (int m = 0; m < 2; m++) {
    hidden_[m].reset(block * lstm_[m].lstm.Hp);
    encoded_[m].reset(block * mix);
    recur_size_ = std::max(recur_size_, mse::lstm_scratch(lstm_[m].lstm, k.group));
  }
  mean_.reset(block * d.width);
  know_.reset(block * mix);
  mixed_.reset(block * mix);
  expert_.reset(block * first_.packed.Np);
  fused_.reset(block * mix);
  recur_size_ = (recur_size_ + 15) / 16 * 16;
  recur_.reset(recur_size_ * pool_.threads());
  panel_.reset(static_cast<size_t>(mse::kTile) * panel * pool_.threads());
}

int64_t mse_handle::weight_bytes() const {
  size_t n = slope_.bytes() + shift_.bytes() + text_.bytes() + first_.bytes() + second_.bytes() +
              up_.bytes();
  for (int m = 0; m < 2; m++) n += lstm_[m].in.bytes() + lstm_[m].rec.bytes() + lin_[m].bytes();
  return static_cast<int64_t>(n);
}

int64_t mse_handle::scratch_bytes() const {
  size_t n = mean_.bytes() + know_.bytes() + mixed_.bytes() + expert_.bytes() + fused_.bytes() +
              recur_.bytes() + panel_.bytes();
  for (int m = 0; m < 2; m++) n += hidden_[m].bytes() + encoded_[m].bytes();
  return static_cast<int64_t>(n);
}

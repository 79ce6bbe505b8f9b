// An opened adapter: packed weights, scratch memory for a block of samples, and its threads.
#ifndef MSE_MODEL_H
#define MSE_MODEL_H

#include <mutex>

#include "abi.h"
#include "isa.h"
#include "memory.h"
#include "pack.h"
#include "threads.h"

namespace mse {

// Samples that go through together; scratch memory is sized for it, any batch is cut into it.
constexpr int kBlock = 64;
// Samples whose small layers run as one GEMM.
constexpr int kTile = 24;

const Kernels *find_kernels(const char *isa);  // "" is the best one; null if unknown or unusable

int check_dims(const mse_dims &d);

}  // namespace mse

struct mse_handle {
  mse_handle(const mse_dims &dims, const mse_weights &weights, const mse::Kernels &kernels,
             int threads, int storage);

  int forward(const mse_inputs &in, float *out, int64_t where[4]);
  int64_t weight_bytes() const;
  int64_t scratch_bytes() const;

  const mse::Kernels &k;

 private:
  friend struct mse_block;
  mse_dims dims_;
  mse::LstmMatrices lstm_[2];
  mse::Matrix lin_[2], text_, first_, second_, up_;
  mse::Buffer<float> slope_, shift_;  // the projector: pseudo_p = slope_p u + shift_p
  // Per sample of a block.
  mse::Buffer<float> hidden_[2], encoded_[2], mean_, know_, mixed_, expert_, fused_;
  // Per worker.
  mse::Buffer<float> recur_, panel_;
  size_t recur_size_ = 0;
  std::mutex busy_;
  mse::Pool pool_;
};
#endif

// What of ggml's structs is read here. mse_kernels.mapped checks the places against tensors that ggml
// makes itself before anything that needs them is used.
#ifndef MSE_GGML_TENSOR_H
#define MSE_GGML_TENSOR_H

#include <stddef.h>
#include <stdint.h>

namespace mse_ggml {

struct Tensor {
  int32_t type;
  void *buffer;
  int64_t size[4];
  size_t stride[4];  // bytes
  int32_t op, parameters[16], flags;
  Tensor *source[10], *view_source;
  size_t view_offset;
  void *data;
};

// The beginning of ggml_compute_params.
struct Params {
  int thread, threads;
};

}  // namespace mse_ggml
#endif

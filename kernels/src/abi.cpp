// The C functions: checks, and no exception gets out.
#include "abi.h"

#include <new>

#include "model.h"
#include "pack.h"

using mse::find_kernels;

extern "C" {

int32_t mse_abi_version(void) { return MSE_ABI_VERSION; }

int32_t mse_open(const mse_dims *dims, const mse_weights *weights, int32_t threads, int32_t storage,
                 const char *isa, mse_handle **out) {
  if (!dims || !weights || !out || threads < 1 || threads > MSE_MAX_THREADS)
    return MSE_BAD_ARGUMENT;
  *out = nullptr;
  const auto *pointers = reinterpret_cast<const float *const *>(weights);
  for (size_t i = 0; i < sizeof(*weights) / sizeof(*pointers); i++)
    if (!pointers[i]) return MSE_BAD_ARGUMENT;
  if (mse::check_dims(*dims) != MSE_OK) return MSE_BAD_DIMS;
  if (storage < MSE_F32 || storage > MSE_BF16) return MSE_BAD_STORAGE;
  const mse::Kernels *k = find_kernels(isa);
  if (!k) return MSE_BAD_ISA;
  try {
    *out = new mse_handle(*dims, *weights, *k, threads, storage);
  } catch (...) {
    return MSE_NO_MEMORY;
  }
  return MSE_OK;
}

const char *mse_isa(const mse_handle *handle) { return handle ? handle->k.name : ""; }

void mse_memory(const mse_handle *handle, int64_t *weights, int64_t *scratch) {
  *weights = handle ? handle->weight_bytes() : 0;
  *scratch = handle ? handle->scratch_bytes() : 0;
}

int32_t mse_forward(mse_handle *handle, const mse_inputs *in, float *out, int64_t where[4]) {
  if (!handle || !in || !where) return MSE_BAD_ARGUMENT;
  return handle->forward(*in, out, where);
}

void mse_close(mse_handle *handle) { delete handle; }

int32_t mse_activate(const char *isa, int32_t what, const float *x, float *y, int64_t n) {
  const mse::Kernels *k = find_kernels(isa);
  if (!k) return MSE_BAD_ISA;
  if (!x || !y || n < 0 || what < 0 || what > 2) return MSE_BAD_ARGUMENT;
  k->activate(what, x, y, static_cast<size_t>(n));
  return MSE_OK;
}

int32_t mse_linear(const char *isa, int32_t storage, const float *w, const float *b, int32_t N,
                   int32_t K, const float *x, int32_t M, float *y) {
  const mse::Kernels *k = find_kernels(isa);
  if (!k) return MSE_BAD_ISA;
  if (storage < MSE_F32 || storage > MSE_BF16) return MSE_BAD_STORAGE;
  if (!w || !b || !x || !y || N < 1 || K < 1 || M < 1) return MSE_BAD_ARGUMENT;
  try {
    mse::Matrix m;
    mse::pack_linear(&m, w, b, N, K, k->panel, storage);
    mse::Buffer<float> wide;
    const size_t Np = m.packed.Np;
    wide.reset(Np * M);
    k->linear(m.packed, 0, m.packed.Np / k->panel, x, K, M, wide.get(), Np);
    for (size_t i = 0; i < static_cast<size_t>(M); i++)
      for (int j = 0; j < N; j++) y[i * N + j] = *wide.at(i * Np + j);
  } catch (...) {
    return MSE_NO_MEMORY;
  }
  return MSE_OK;
}

int32_t mse_mean_rows(const char *isa, const float *rows, int64_t n, int32_t D, float *out) {
  const mse::Kernels *k = find_kernels(isa);
  if (!k) return MSE_BAD_ISA;
  if ((!rows && n > 0) || !out || n < 0 || D < 1) return MSE_BAD_ARGUMENT;
  return mse::mean(*k, rows, n, D, out) ? MSE_OK : MSE_NOT_FINITE;
}

int64_t mse_probe_mac(const char *isa, int64_t rounds) {
  const mse::Kernels *k = find_kernels(isa);
  return k ? k->probe_mac(rounds) : 0;
}

float mse_probe_read(const char *isa, const float *x, int64_t n) {
  const mse::Kernels *k = find_kernels(isa);
  return k ? k->probe_read(x, static_cast<size_t>(n)) : 0.0f;
}
}

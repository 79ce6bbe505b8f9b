// The function by which ours stands in for llama.cpp's: this library is loaded before llama.cpp with
// its symbols global, so the dynamic linker finds the name here first. mse_kernels.ggml then compares
// the two on a sample, and where they do not agree, calls go on to llama.cpp's own.
#include "ggml_q4_0.h"

#include <stdlib.h>

#include <atomic>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Gemm = void (*)(int, float *, size_t, const void *, const void *, int, int);

// By number, as mse_kernels.ggml has them; 0 is llama.cpp's own.
constexpr mse_ggml::Kernel kKernels[] = {
    nullptr,
    mse_ggml::avx2,
#ifdef MSE_AVX_VNNI
    mse_ggml::avx_vnni,
#else
    nullptr,
#endif
#ifdef MSE_AVX512_VNNI
    mse_ggml::avx512_vnni,
#else
    nullptr,
#endif
};
constexpr int kCount = sizeof kKernels / sizeof *kKernels;

std::atomic<Gemm> theirs{nullptr};
std::atomic<mse_ggml::Kernel> own{nullptr};
std::atomic<uint64_t> calls{0};

struct Line {
  alignas(64) char bytes[64];
};

// False without memory for the kernel's scratch: nothing was done.
bool run(mse_ggml::Kernel kernel, int n, float *out, size_t stride, const void *weights,
         const void *activations, int n_rows, int n_columns) {
  static thread_local std::vector<Line> lines;
  const size_t wanted = (mse_ggml::scratch(n, n_rows) + sizeof(Line) - 1) / sizeof(Line);
  try {
    if (lines.size() < wanted) lines.resize(wanted);
  } catch (...) {
    return false;
  }
  kernel(n, out, stride, weights, activations, n_rows, n_columns, lines.data());
  return true;
}

}  // namespace

// 1 if this build has the kernel of that number.
EXPORT int32_t mse_ggml_has(int32_t kernel) {
  return kernel > 0 && kernel < kCount && kKernels[kernel];
}

// llama.cpp's own function, and the number of the kernel that is called instead from now on.
EXPORT void mse_ggml_use(Gemm original, int32_t kernel) {
  theirs.store(original, std::memory_order_release);
  own.store(mse_ggml_has(kernel) ? kKernels[kernel] : nullptr, std::memory_order_release);
}

// How often ours was called by name.
EXPORT uint64_t mse_ggml_calls(void) { return calls.load(std::memory_order_relaxed); }

EXPORT void ggml_gemm_q4_0_8x8_q8_0(int n, float *out, size_t stride, const void *weights,
                                    const void *activations, int n_rows, int n_columns) {
  const mse_ggml::Kernel kernel = own.load(std::memory_order_acquire);
  if (kernel && run(kernel, n, out, stride, weights, activations, n_rows, n_columns)) {
    calls.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  const Gemm original = theirs.load(std::memory_order_acquire);
  if (!original) abort();  // no memory for its scratch, and nobody else to ask
  original(n, out, stride, weights, activations, n_rows, n_columns);
}

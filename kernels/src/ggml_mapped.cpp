// The functions by which our product of mapped weights stands in for llama.cpp's: this library is loaded
// before llama.cpp with its symbols global, so the dynamic linker finds the names here first.
// mse_kernels.mapped compares the products on a sample before they are used, and what ours has not goes
// on to llama.cpp's.
#include <atomic>

#include "ggml_mapped.h"
#include "ggml_tensor.h"
#include "ggml_threads.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace mse_ggml;

using Sgemm = bool (*)(const Params *, int64_t, int64_t, int64_t, const void *, int64_t,
                       const void *, int64_t, void *, int64_t, int, int, int);
using Tiled = bool (*)(const Params *, const Tensor *);

struct Bytes {
  int type, weights, rows_type, activations;  // bytes of a block
};
constexpr Bytes kTypes[] = {
    {kQ4_0, 18, kQ8_0, 34},   {kQ5_0, 22, kQ8_0, 34},   {kQ8_0, 34, kQ8_0, 34},
    {kQ4_K, 144, kQ8_K, 292}, {kQ5_K, 176, kQ8_K, 292}, {kQ6_K, 210, kQ8_K, 292},
};

std::atomic<Sgemm> sgemm{nullptr};
std::atomic<Tiled> tiled{nullptr};
std::atomic<const Kernel *> own{nullptr};
std::atomic<bool> tensors_known{false};  // whether llama.cpp's are as we read them: else K-quants are its
std::atomic<uint64_t> calls{0};

// By number, as mse_kernels.mapped has them; 0 is llama.cpp's own.
constexpr const Kernel *kKernels[] = {
    nullptr,
    &avx2,
#ifdef MSE_AVX_VNNI
    &avx_vnni,
#else
    nullptr,
#endif
#ifdef MSE_AVX512_VNNI
    &avx512_vnni,
#else
    nullptr,
#endif
#ifdef MSE_AMX
    &amx,
#else
    nullptr,
#endif
};
constexpr int kCount = sizeof kKernels / sizeof *kKernels, kAmx = 4;
constexpr int kParts = 4;  // so many for each thread

// Null where it is not the kernel's.
const Bytes *find(int type, const Kernel *kernel) {
  if (!kernel || (type != kQ4_0 && kernel != kKernels[kAmx])) return nullptr;
  for (const Bytes &known : kTypes)
    if (known.type == type)
      return known.rows_type == kQ8_0 || tensors_known.load(std::memory_order_relaxed) ? &known : nullptr;
  return nullptr;
}

// Sixteen columns at a time; and offsets of sixteen rows are 32 bits wide.
bool fits(int64_t columns, int64_t row_bytes) {
  return columns > 0 && columns % 16 == 0 && row_bytes > 0 && row_bytes < (1 << 26);
}

// A thread's part of the product.
void multiply(const Kernel &kernel, int type, const Mapped &product, int strips, int threads) {
  char *place = scratch(kernel.scratch(type, product));
  kernel.prepare(type, product, place);
  if (threads == 1) return kernel.run(type, product, 0, 16 * strips, nullptr, place);
  Share share(product.out, threads);
  const int64_t parts = kParts * threads < strips ? kParts * threads : strips;
  const auto column = [&](int64_t part) { return static_cast<int>(strips * part / parts * 16); };
  int64_t part = share.take();
  while (part < parts) {
    const int64_t following = share.take();  // now: it is fetched while this one ends
    const uint8_t *next =
        following < parts ? product.weights + column(following) * product.weight_bytes : nullptr;
    kernel.run(type, product, column(part), column(part + 1), next, place);
    part = following;
  }
}

}  // namespace

// 1 if this build has the kernel of that number, and the system lets it run.
EXPORT int32_t mse_mapped_has(int32_t kernel) {
  if (kernel <= 0 || kernel >= kCount || !kKernels[kernel]) return 0;
#ifdef MSE_AMX
  if (kernel == kAmx) return amx_allowed();
#endif
  return 1;
}

// llama.cpp's own functions; the number of the kernel that runs instead from now on; whether its tensors
// are as ggml_tensor.h has them (else K-quants are left to it).
EXPORT void mse_mapped_use(Sgemm original, Tiled original_tiled, int32_t kernel, int32_t tensors) {
  sgemm.store(original, std::memory_order_relaxed);
  tiled.store(original_tiled, std::memory_order_relaxed);
  tensors_known.store(tensors != 0, std::memory_order_relaxed);
  own.store(mse_mapped_has(kernel) ? kKernels[kernel] : nullptr, std::memory_order_release);
}

// How often ours was called by name.
EXPORT uint64_t mse_mapped_calls(void) { return calls.load(std::memory_order_relaxed); }

// A thread's share of C = B A: A [m, k] weights, B [n, k] rows, in blocks of their types; ld: blocks
// (of C floats) from row to row. False where it is left to others, and then for every thread.
EXPORT bool llamafile_sgemm(const Params *params, int64_t m, int64_t n, int64_t k, const void *A,
                            int64_t lda, const void *B, int64_t ldb, void *C, int64_t ldc,
                            int a_type, int b_type, int c_type) noexcept {
  const Kernel *kernel = own.load(std::memory_order_acquire);
  const Bytes *type = find(a_type, kernel);
  if (type && b_type == type->rows_type && c_type == kF32 && n > 0 && fits(m, lda * type->weights) &&
      fits(16, ldb * type->activations)) {
    const Mapped product = {static_cast<const uint8_t *>(A), static_cast<const uint8_t *>(B),
                            static_cast<size_t>(lda * type->weights),
                            static_cast<size_t>(ldb * type->activations), static_cast<int>(k),
                            static_cast<int>(n), static_cast<float *>(C), static_cast<size_t>(ldc)};
    multiply(*kernel, a_type, product, static_cast<int>(m / 16), params->threads);
    calls.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  const Sgemm original = sgemm.load(std::memory_order_acquire);
  return original && original(params, m, n, k, A, lda, B, ldb, C, ldc, a_type, b_type, c_type);
}

// llama.cpp asks this one first for K-quants: what ours has is left to the function above.
EXPORT bool ggml_compute_forward_mul_mat_tiled(const Params *params, const Tensor *result) noexcept {
  if (tensors_known.load(std::memory_order_relaxed)) {
    const Tensor &weights = *result->source[0];
    const Bytes *type = find(weights.type, own.load(std::memory_order_acquire));
    if (type && fits(weights.size[1], type->weights)) return false;
  }
  const Tiled original = tiled.load(std::memory_order_acquire);
  return original && original(params, result);
}

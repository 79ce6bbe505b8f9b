// The functions by which our product of mapped weights stands in for llama.cpp's: this library is loaded
// before llama.cpp with its symbols global, so the dynamic linker finds the names here first.
// mse_kernels.mapped compares the products on a sample before they are used, and what ours has not goes
// on to llama.cpp's.
#include "ggml_mapped.h"

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace mse_ggml;

// What of ggml_compute_params is looked at: its beginning.
struct Params {
  int thread, threads;
};

using Sgemm = bool (*)(const Params *, int64_t, int64_t, int64_t, const void *, int64_t,
                       const void *, int64_t, void *, int64_t, int, int, int);
using Tiled = bool (*)(const Params *, const char *);

struct Bytes {
  int type, weights, rows_type, activations;  // bytes of a block
};
constexpr Bytes kTypes[] = {
    {kQ4_0, 18, kQ8_0, 34},   {kQ5_0, 22, kQ8_0, 34},   {kQ8_0, 34, kQ8_0, 34},
    {kQ4_K, 144, kQ8_K, 292}, {kQ5_K, 176, kQ8_K, 292}, {kQ6_K, 210, kQ8_K, 292},
};

struct Line {
  alignas(64) char bytes[64];
};

std::atomic<Sgemm> sgemm{nullptr};
std::atomic<Tiled> tiled{nullptr};
std::atomic<const Kernel *> own{nullptr};
std::atomic<long> source{-1};  // offset of a tensor's first source; -1: not known
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

// A product whose threads share the strips of sixteen columns: who is done takes some more. Cores may
// be of two kinds, or have a neighbour. All threads of a product call once, and none comes to the next
// one with the same result before all have left this one.
struct Shared {
  const void *result = nullptr;  // whose it is; null: nobody's
  int inside = 0;
  std::atomic<int64_t> taken{0};
};
constexpr int kShared = 64, kParts = 4;  // so many parts for each thread

std::mutex sharing;
Shared products[kShared];

Shared *place(const void *result, int threads) {
  const std::lock_guard<std::mutex> lock(sharing);
  Shared *free = nullptr;
  for (Shared &one : products) {
    if (one.result == result) return &one;
    if (!one.result && !free) free = &one;
  }
  if (!free) return nullptr;
  free->result = result;
  free->inside = threads;
  free->taken.store(0, std::memory_order_relaxed);
  return free;
}

// Waits for a place: somebody's product will be done.
Shared *enter(const void *result, int threads) {
  for (;;) {
    if (Shared *product = place(result, threads)) return product;
    std::this_thread::yield();
  }
}

void leave(Shared *product) {
  const std::lock_guard<std::mutex> lock(sharing);
  if (--product->inside == 0) product->result = nullptr;
}

// Null where it is not the kernel's.
const Bytes *find(int type, const Kernel *kernel) {
  if (!kernel || (type != kQ4_0 && kernel != kKernels[kAmx])) return nullptr;
  for (const Bytes &known : kTypes)
    if (known.type == type)
      return known.rows_type == kQ8_0 || source.load(std::memory_order_relaxed) >= 0 ? &known : nullptr;
  return nullptr;
}

// Sixteen columns at a time; and offsets of sixteen rows are 32 bits wide.
bool fits(int64_t columns, int64_t row_bytes) {
  return columns > 0 && columns % 16 == 0 && row_bytes > 0 && row_bytes < (1 << 26);
}

char *scratch(size_t wanted) {
  static thread_local std::vector<Line> lines;
  const size_t count = (wanted + sizeof(Line) - 1) / sizeof(Line);
  if (lines.size() < count) lines.resize(count);
  return lines.data()->bytes;
}

// A thread's part of the product.
void multiply(const Kernel &kernel, int type, const Mapped &product, int strips, int threads) {
  // Without memory it ends here, as llama.cpp does: the other threads have begun.
  char *place = scratch(kernel.scratch(type, product));
  kernel.prepare(type, product, place);
  if (threads == 1) return kernel.run(type, product, 0, 16 * strips, nullptr, place);
  Shared *shared = enter(product.out, threads);
  const int64_t parts = kParts * threads < strips ? kParts * threads : strips;
  const auto column = [&](int64_t part) { return static_cast<int>(strips * part / parts * 16); };
  const auto take = [&] { return shared->taken.fetch_add(1, std::memory_order_relaxed); };
  int64_t part = take();
  while (part < parts) {
    const int64_t following = take();  // now: it is fetched while this one ends
    const uint8_t *next =
        following < parts ? product.weights + column(following) * product.weight_bytes : nullptr;
    kernel.run(type, product, column(part), column(part + 1), next, place);
    part = following;
  }
  leave(shared);
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

// llama.cpp's own functions; the number of the kernel that runs instead from now on; where a tensor
// keeps its first source (-1: K-quants are left to llama.cpp).
EXPORT void mse_mapped_use(Sgemm original, Tiled original_tiled, int32_t kernel, int64_t offset) {
  sgemm.store(original, std::memory_order_relaxed);
  tiled.store(original_tiled, std::memory_order_relaxed);
  source.store(static_cast<long>(offset), std::memory_order_relaxed);
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
EXPORT bool ggml_compute_forward_mul_mat_tiled(const Params *params, const char *result) {
  const long offset = source.load(std::memory_order_relaxed);
  if (offset >= 0) {
    const char *weights = *reinterpret_cast<const char *const *>(result + offset);
    const auto *sizes = reinterpret_cast<const int64_t *>(weights + kSizes);
    const Bytes *type =
        find(*reinterpret_cast<const int *>(weights), own.load(std::memory_order_acquire));
    if (type && fits(sizes[1], type->weights)) return false;
  }
  const Tiled original = tiled.load(std::memory_order_acquire);
  return original && original(params, result);
}

// Our attention stands in for llama.cpp's by its name, as ggml_mapped.cpp's products do; what ours has
// not goes on to llama.cpp's.
#include "ggml_attention.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "ggml_tensor.h"
#include "ggml_threads.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace mse_ggml;

using Function = void (*)(const Params *, Tensor *);
constexpr int kF32 = 0, kF16 = 1, kParts = 4;  // so many parts for each thread
constexpr int64_t kMostKeys = 1024;            // converted, they are to stay in the second-level cache

std::atomic<Function> original{nullptr};
std::atomic<const Attend *> own{nullptr};
std::atomic<uint64_t> calls{0};

// By number, as mse_kernels.attention has them; 0 is llama.cpp's own.
constexpr const Attend *kKernels[] = {nullptr, &attend_avx2, &attend_avx512};
constexpr int kCount = sizeof kKernels / sizeof *kKernels;

// Whether it is ours, and then what to compute.
bool find(const Tensor &result, const Attend &kernel, Attention *a) {
  const Tensor *q = result.source[0], *k = result.source[1], *v = result.source[2];
  const Tensor *mask = result.source[3];
  float scale, bias, cap;
  memcpy(&scale, result.parameters, sizeof scale);
  memcpy(&bias, result.parameters + 1, sizeof bias);
  memcpy(&cap, result.parameters + 2, sizeof cap);
  if (!mask || result.source[4] || bias != 0 || cap != 0) return false;
  if (q->type != kF32 || k->type != kF16 || v->type != kF16 || mask->type != kF16) return false;
  const int64_t depth = q->size[0], rows = q->size[1], heads = q->size[2], keys = k->size[1];
  if (k->size[0] != depth || v->size[0] != depth || depth % kernel.lanes) return false;
  if (keys % kKeys || keys > kMostKeys || v->size[1] != keys || mask->size[0] != keys) return false;
  if (q->size[3] != 1 || mask->size[2] != 1 || mask->size[3] != 1 || mask->size[1] < rows) return false;
  if (k->size[2] <= 0 || heads % k->size[2] || v->size[2] != k->size[2] || rows < 2) return false;
  const auto row = static_cast<size_t>(4 * depth);
  if (result.type != kF32 || result.stride[1] != row || result.stride[2] != row * heads) return false;
  if (q->stride[0] != 4 || k->stride[0] != 2 || v->stride[0] != 2 || mask->stride[0] != 2) return false;
  a->queries = static_cast<const float *>(q->data);
  a->query_row = q->stride[1] / 4, a->query_head = q->stride[2] / 4;
  a->keys = static_cast<const uint16_t *>(k->data);
  a->key_row = k->stride[1] / 2, a->key_head = k->stride[2] / 2;
  a->values = static_cast<const uint16_t *>(v->data);
  a->value_row = v->stride[1] / 2, a->value_head = v->stride[2] / 2;
  a->mask = static_cast<const uint16_t *>(mask->data);
  a->mask_row = mask->stride[1] / 2;
  a->out = static_cast<float *>(result.data);
  a->rows = static_cast<int>(rows), a->heads = static_cast<int>(heads);
  a->group = static_cast<int>(heads / k->size[2]);
  a->n_keys = static_cast<int>(keys), a->depth = static_cast<int>(depth);
  a->scale = scale;
  return true;
}

// A thread's part.
void attend(const Attention &a, const Attend &kernel, int threads) {
  char *place = scratch(kernel.scratch(a));
  const int tiles = (a.rows + kernel.lanes - 1) / kernel.lanes;
  const int few = a.heads * tiles / (kParts * threads);
  const int each = few < 1 ? 1 : few < a.heads ? few : a.heads;  // heads of a part
  const int pieces = (a.heads + each - 1) / each;
  Share share(a.out, threads);
  const auto head = [&](int64_t part) { return static_cast<int>(part % pieces) * each; };
  for (int64_t part = share.take(); part < tiles * pieces;) {
    const int64_t following = share.take();
    const int begin = head(part), end = begin + each < a.heads ? begin + each : a.heads;
    const int after = following < tiles * pieces ? head(following) : begin;
    kernel.run(a, static_cast<int>(part / pieces), begin, end, after, place);
    part = following;
  }
}

}  // namespace

// llama.cpp's own function, and the number of the kernel that runs instead from now on.
EXPORT void mse_attention_use(Function theirs, int32_t kernel) {
  original.store(theirs, std::memory_order_relaxed);
  own.store(kernel > 0 && kernel < kCount ? kKernels[kernel] : nullptr, std::memory_order_release);
}

// How often ours was called by name.
EXPORT uint64_t mse_attention_calls(void) { return calls.load(std::memory_order_relaxed); }

EXPORT void ggml_compute_forward_flash_attn_ext(const Params *params, Tensor *result) noexcept {
  const Attend *kernel = own.load(std::memory_order_acquire);
  Attention attention;
  if (kernel && find(*result, *kernel, &attention)) {
    attend(attention, *kernel, params->threads);
    calls.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  const Function theirs = original.load(std::memory_order_acquire);
  if (!theirs) {  // it cannot decline, and a result that is not computed would look like one
    fputs("mse_ggml: attention was asked for before llama.cpp's own was known\n", stderr);
    abort();
  }
  theirs(params, result);
}

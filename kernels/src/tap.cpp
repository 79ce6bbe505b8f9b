// The callbacks that llama.cpp asks about every node of its graph: hundreds of times a pass, from threads
// that must not wait for Python.
#include <atomic>
#include <cstring>

#include "abi.h"

extern "C" bool mse_tap_node(const void *tensor, bool ask, void *user) {
  auto *tap = static_cast<mse_tap *>(user);
  if (ask) return tap->armed && std::strcmp(tap->name(tensor), tap->wanted) == 0;
  const size_t size = tap->size(tensor);
  if (static_cast<int64_t>(size) > tap->capacity) return true;  // go on, to the logits
  tap->read(tensor, tap->rows, 0, size);
  tap->taken = static_cast<int64_t>(size);
  return false;  // nothing after it
}

extern "C" bool mse_stop_asked(void *flag) {
  return static_cast<std::atomic<int32_t> *>(flag)->load(std::memory_order_relaxed) != 0;
}

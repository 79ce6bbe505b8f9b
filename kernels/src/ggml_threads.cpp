#include "ggml_threads.h"

#include <mutex>
#include <thread>
#include <vector>

namespace mse_ggml {
namespace {

struct Line {
  alignas(64) char bytes[64];
};

struct Place {
  const void *result = nullptr;  // whose it is; null: nobody's
  int inside = 0;
  std::atomic<int64_t> taken{0};
};

std::mutex mutex;
Place places[64];

Place *place_of(const void *result, int threads) {
  const std::lock_guard<std::mutex> lock(mutex);
  Place *free = nullptr;
  for (Place &one : places) {
    if (one.result == result) return &one;
    if (!one.result && !free) free = &one;
  }
  if (!free) return nullptr;
  free->result = result;
  free->inside = threads;
  free->taken.store(0, std::memory_order_relaxed);
  return free;
}

}  // namespace

char *scratch(size_t bytes) {
  static thread_local std::vector<Line> lines;
  const size_t count = (bytes + sizeof(Line) - 1) / sizeof(Line);
  if (lines.size() < count) lines.resize(count);
  return lines.data()->bytes;
}

Share::Share(const void *result, int threads) {
  if (threads == 1) return;
  Place *place;
  while (!(place = place_of(result, threads))) std::this_thread::yield();  // somebody's work will be done
  place_ = place;
  taken_ = &place->taken;
}

Share::~Share() {
  if (!place_) return;
  auto *place = static_cast<Place *>(place_);
  const std::lock_guard<std::mutex> lock(mutex);
  if (--place->inside == 0) place->result = nullptr;
}

}  // namespace mse_ggml

// llama.cpp's threads in a function of ours: their memory, and how they share its work.
#ifndef MSE_GGML_THREADS_H
#define MSE_GGML_THREADS_H

#include <stddef.h>
#include <stdint.h>

#include <atomic>

namespace mse_ggml {

// Memory of this thread's, aligned to 64 and kept for the next time. Without any left the process ends,
// as llama.cpp's does: the other threads have begun.
char *scratch(size_t bytes);

// Parts of a piece of work that threads take as they get done: cores may be of two kinds, or have a
// neighbour. All `threads` of a piece make one each, named by its `result`, and none comes to the next one
// with the same result before all have left this one.
class Share {
 public:
  Share(const void *result, int threads);
  ~Share();
  Share(const Share &) = delete;
  Share &operator=(const Share &) = delete;
  int64_t take() { return taken_->fetch_add(1, std::memory_order_relaxed); }  // 0, 1, ...

 private:
  void *place_ = nullptr;
  std::atomic<int64_t> alone_{0}, *taken_ = &alone_;
};

}  // namespace mse_ggml
#endif

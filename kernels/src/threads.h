// A bounded pool: `threads` - 1 workers that live as long as the handle, and the calling thread.
#ifndef MSE_THREADS_H
#define MSE_THREADS_H

#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace mse {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(context, i, worker) for every i < count, each once, in any order; returns when all
  // are done. worker < threads() is distinct among calls that run at the same time. The caller takes
  // tasks too and waits only for tasks that a worker has begun: workers lost to a fork cost speed.
  void run(void (*task)(void *, int, int), void *context, int count);

 private:
  void work(int worker);
  void take(int worker, uint64_t round);
  void spread(int worker);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  int sleeping_ = 0;
  void (*task_)(void *, int, int) = nullptr;
  void *context_ = nullptr;
  std::atomic<uint64_t> next_{0};
  std::atomic<int> done_{0};
  std::atomic<uint64_t> round_{0};
  std::vector<std::atomic<int>> seat_;  // processor on which each thread began this round, or -1
};

}  // namespace mse
#endif

#include "threads.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace mse {

static inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Phases of one call follow within microseconds; between calls a worker sleeps.
constexpr int kSpins = 2000;

// A worker that was woken beside another thread of its pool moves to a processor of its own. Some
// schedulers pack what they wake onto few processors, those of virtual machines above all, and leave it
// there for milliseconds: as long as a call takes, so that two threads need the time of one. The
// worker stays free to be moved: only the processors taken now are barred, and only for a moment.
void Pool::spread(int worker) {
#if defined(__linux__) && defined(__GLIBC__)
  int here = sched_getcpu();
  bool taken = false;
  for (size_t i = 0; i < seat_.size(); i++)
    taken |= static_cast<int>(i) != worker && seat_[i].load(std::memory_order_relaxed) == here;
  cpu_set_t allowed;
  const pthread_t self = pthread_self();
  if (taken && pthread_getaffinity_np(self, sizeof allowed, &allowed) == 0) {
    cpu_set_t free = allowed;
    for (const auto &seat : seat_) {
      const int other = seat.load(std::memory_order_relaxed);
      if (other >= 0 && other < CPU_SETSIZE) CPU_CLR(other, &free);
    }
    if (CPU_COUNT(&free) > 0 && pthread_setaffinity_np(self, sizeof free, &free) == 0) {
      pthread_setaffinity_np(self, sizeof allowed, &allowed);
      here = sched_getcpu();
    }
  }
  seat_[worker].store(here, std::memory_order_relaxed);
#else
  (void)worker;
#endif
}

Pool::Pool(int threads) : seat_(threads) {
  try {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {
    // The system refused another thread: carry on with those there are.
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto &w : workers_) w.join();
}

// next_ holds round, count and the next task in one word. A worker that comes late then can't take a
// task by the count of one round and the number of another, and `task_` is read only after a task
// was won, when the round can't end before that task does.
constexpr int kBits = 20;
constexpr uint64_t kMask = (1u << kBits) - 1;

void Pool::take(int worker, uint64_t round) {
  uint64_t at = next_.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t task = at & kMask;
    if (at >> 2 * kBits != round || task >= (at >> kBits & kMask)) return;
    if (!next_.compare_exchange_weak(at, at + 1, std::memory_order_acq_rel)) continue;
    task_(context_, static_cast<int>(task), worker);
    done_.fetch_add(1, std::memory_order_release);
    at = next_.load(std::memory_order_acquire);
  }
}

void Pool::run(void (*task)(void *, int, int), void *context, int count) {
  if (workers_.empty() || count < 2) {
    for (int i = 0; i < count; i++) task(context, i, 0);
    return;
  }
  uint64_t round;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    task_ = task;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    for (auto &seat : seat_) seat.store(-1, std::memory_order_relaxed);
    spread(0);
    round = (round_.load(std::memory_order_relaxed) + 1) & 0xffffffu;
    next_.store(round << 2 * kBits | static_cast<uint64_t>(count) << kBits,
                std::memory_order_release);
    round_.store(round, std::memory_order_release);
    if (sleeping_ > 0) wake_.notify_all();
  }
  take(0, round);
  int spins = 0;
  while (done_.load(std::memory_order_acquire) < count) {
    if (++spins < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
}

void Pool::work(int worker) {
  uint64_t seen = 0;
  for (;;) {
    for (int i = 0; i < kSpins && round_.load(std::memory_order_acquire) == seen; i++) pause();
    {
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_++;
      wake_.wait(lock, [&] { return stop_ || round_.load(std::memory_order_relaxed) != seen; });
      sleeping_--;
      if (stop_) return;
      seen = round_.load(std::memory_order_relaxed);
    }
    spread(worker);
    take(worker, seen);
  }
}

}  // namespace mse

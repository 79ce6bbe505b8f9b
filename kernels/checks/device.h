// A CUDA device on the host: every thread of a launch is a fiber, so that barriers, shuffles and the
// grid barrier keep their meaning. For tests of fusion.cu without a GPU; it says nothing about speed,
// memory ordering or the hardware's own arithmetic.
#ifndef MSE_EMULATION_DEVICE_H
#define MSE_EMULATION_DEVICE_H

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#define MSE_HOST_EMULATION
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define SHARED_MEMORY(name) float *name = emulation::now->block->shared.data()

struct Index {
  unsigned x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Warp {
  uint32_t value[2][32] = {};
  uint64_t count[32] = {};
};

struct Block {
  Index at;
  unsigned size, arrived = 0, rounds = 0;
  std::vector<float> shared;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;  // only to get onto its stack for the first time
  jmp_buf at;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  Block *block = nullptr;
  unsigned thread = 0;
  bool done = false;
};

static Fiber *now = nullptr;
static jmp_buf back;
static const std::function<void()> *body = nullptr;
static bool progress = false;

// setjmp and longjmp change stacks without the system call that swapcontext makes.
static inline void yield() {
  if (!_setjmp(now->at)) _longjmp(back, 1);
}

static void resume(Fiber *f) {
  now = f;
  if (_setjmp(back)) return;
  if (f->begun) _longjmp(f->at, 1);
  f->begun = true;
  setcontext(&f->context);
}

static void enter() {
  (*body)();
  now->done = true;
  progress = true;
  yield();
}

// Lanes write, wait for all 32, read. Two slots are enough: a lane can be one exchange ahead.
static inline uint32_t exchange(uint32_t mine, unsigned from) {
  const unsigned lane = now->thread % 32;
  Block *block = now->block;
  Warp &w = block->warps[now->thread / 32];
  const uint64_t n = ++w.count[lane];
  progress = true;
  w.value[n & 1][lane] = mine;
  const unsigned lanes = std::min(32u, block->size - now->thread / 32 * 32);
  for (;;) {
    unsigned ready = 0;
    while (ready < lanes && w.count[ready] >= n) ready++;
    if (ready == lanes) break;
    yield();
  }
  return w.value[n & 1][from];
}

// Runs blocks `together` at a time (all of them for a cooperative launch), threads in rising or
// falling order: a missing barrier shows as a difference between the two. False on a deadlock.
static bool launch(Index grid, unsigned threads, size_t shared_bytes, bool cooperative, bool falling,
                   const std::function<void()> &kernel) {
  const size_t total = static_cast<size_t>(grid.x) * grid.y * grid.z;
  const size_t together = cooperative ? total : 1;
  body = &kernel;
  for (size_t first = 0; first < total; first += together) {
    std::vector<Block> blocks(together);
    std::vector<Fiber> fibers(together * threads);
    for (size_t b = 0; b < together; b++) {
      const size_t i = first + b;
      blocks[b].at = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                      static_cast<unsigned>(i / grid.x / grid.y)};
      blocks[b].size = threads;
      // What a kernel doesn't write first must not look like zero.
      blocks[b].shared.assign(shared_bytes / 4 + 1, nanf(""));
      blocks[b].warps.resize((threads + 31) / 32);
      for (unsigned t = 0; t < threads; t++) {
        Fiber &f = fibers[b * threads + t];
        constexpr size_t kStack = 32768;
        f.stack.reset(new char[kStack]);
        f.block = &blocks[b];
        f.thread = t;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStack;
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
      }
    }
    for (size_t left = fibers.size(); left > 0;) {
      progress = false;
      for (size_t i = 0; i < fibers.size(); i++) {
        Fiber &f = fibers[falling ? fibers.size() - 1 - i : i];
        if (f.done) continue;
        threadIdx = {f.thread, 0, 0};
        blockIdx = f.block->at;
        blockDim = {threads, 1, 1};
        gridDim = grid;
        resume(&f);
        if (f.done) left--;
      }
      if (!progress) return false;  // some threads wait for others that never come
    }
  }
  return true;
}

}  // namespace emulation

static inline void __syncthreads() {
  emulation::Block *b = emulation::now->block;
  const unsigned round = b->rounds;
  emulation::progress = true;
  if (++b->arrived == b->size) {
    b->arrived = 0;
    b->rounds++;
  }
  while (b->rounds == round) emulation::yield();
}
static inline float half_bits_to_float(unsigned short bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, e = bits >> 10 & 31u, m = bits & 0x3ffu;
  uint32_t u = sign | (e == 31 ? 0x7f800000u : (e + 112u) << 23) | m << 13;
  if (e == 0) {
    const float sub = ldexpf(static_cast<float>(m), -24);
    return sign ? -sub : sub;
  }
  float v;
  memcpy(&v, &u, 4);
  return v;
}
static inline float __uint_as_float(unsigned u) {
  float v;
  memcpy(&v, &u, 4);
  return v;
}
static inline uint32_t bits_of(float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  return u;
}
static inline float __shfl_sync(unsigned, float v, int lane, int width) {
  const unsigned me = emulation::now->thread % 32;
  return __uint_as_float(emulation::exchange(bits_of(v), me / width * width + lane));
}
static inline float __shfl_xor_sync(unsigned, float v, int mask) {
  return __uint_as_float(emulation::exchange(bits_of(v), emulation::now->thread % 32 ^ mask));
}
static inline float __ldcg(const float *p) { return *p; }
static inline void __threadfence() {}
static inline void __nanosleep(unsigned) { emulation::yield(); }
static inline unsigned atomicAdd(unsigned *p, unsigned n) {
  const unsigned old = *p;
  *p += n;
  if (n) emulation::progress = true;
  return old;
}
using std::min;

#endif

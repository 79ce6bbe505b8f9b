// What one instruction set's translation unit offers the rest of the library.
//
// Each isa_*.cpp is compiled with its own flags. It must not instantiate templates of the standard
// library: the linker keeps one copy of each, and that copy might then hold AVX-512 code that an
// older processor would run into. Hence this header is plain structs and function pointers.
#ifndef MSE_ISA_H
#define MSE_ISA_H

#include <stddef.h>
#include <stdint.h>

namespace mse {

// A weight matrix [N, K] cut into panels of `panel` columns of its transpose: element (n, k) lies at
// [n / panel][k][n % panel]. Padding columns hold zeros, so that K needs no rounding and N does.
struct Packed {
  const void *data = nullptr;
  const float *bias = nullptr;  // [Np]
  int N = 0, K = 0, Np = 0;
  int storage = 0;
};

// Storage of a matrix whose values are each split into three bf16 (project_amx.h): tiles of 32 values
// of depth by 16 columns, [column pair][step of depth][part][2], zeros beyond K.
constexpr int kSplit = 3;
constexpr int kSplitStep = 32, kSplitColumns = 16;
constexpr int kSplitRows = 32, kSplitDepth = 64;  // a block of rows stays in the first-level cache
static inline int split_steps(int K) { return (K + kSplitStep - 1) / kSplitStep; }

constexpr int kChunk = 24;  // see Lstm; kSplitRows where the input's weights are split

struct Lstm {
  // Units are interleaved so that one panel is the four gates of `lanes` neighbouring units.
  Packed in;   // [4 Hp, d], bias b_ih + b_hh; f32 or split
  Packed rec;  // [4 Hp, H], always f32: it is read once per step, and 64 KB at most for H = 64
  int H = 0, Hp = 0, chunk = 0;  // chunk: steps whose gates are computed ahead of the recurrence
};

// Work that a recurrence of one sequence takes along, slice by slice.
struct Aside {
  const char *at = nullptr, *end = nullptr;  // of the slice's memory, what is not yet asked for
  void (*turn)(Aside *) = nullptr;           // all of it was: computes with it, and sets the next
  // Values of the recurrence's depth for one line asked for, 1 or 2. With 1, lines on their way hold up
  // the recurrent weights, since the first-level cache waits for so many at a time only.
  int every = 2;
};

struct Kernels {
  const char *name;
  int lanes, panel, group;  // group: sequences per recurrence
  int split_from;           // width of an LSTM's input from which its weights are split; 0: never

  // c [M, ldc] = x w^T + b for the panels first..last-1, written at their own columns.
  void (*linear)(const Packed &w, int first, int last, const float *x, size_t ldx, int M, float *c,
                 size_t ldc);
  // nb sequences by falling length, h_out [nb][Hp] (zeros for length 0). Returns the number of the
  // first sequence with a non-finite frame, or -1. aside: null, or what one sequence takes along.
  int (*lstm)(const Lstm &w, int nb, const float *const *x, const int64_t *len, float *scratch,
              float *const *h_out, Aside *aside);
  // out [D] += n rows of D, one after the other.
  void (*add_rows)(const float *rows, int64_t n, int D, float *out);
  // out [D] from the sum of n rows to their mean; false if a row was not finite.
  bool (*average)(int64_t n, int D, float *out);
  bool (*finite)(const float *x, size_t n);
  void (*gelu)(float *x, size_t n);
  void (*mix)(const float *k, const float *a, const float *v, float *z, size_t n);  // k a + k v
  // out[p * stride + i] = q[p] u[i] + r[p] for i < n.
  void (*spread)(const float *u, int n, const float *q, const float *r, int P, float *out,
                 size_t stride);
  void (*activate)(int what, const float *x, float *y, size_t n);
  int64_t (*probe_mac)(int64_t rounds);
  float (*probe_read)(const float *x, size_t n);
};

// Mean of n rows of D; false if one is not finite.
static inline bool mean(const Kernels &k, const float *rows, int64_t n, int D, float *out) {
  for (int d = 0; d < D; d++) out[d] = 0.0f;
  k.add_rows(rows, n, D, out);
  return k.average(n, D, out);
}

// Floats of scratch that `lstm` needs.
inline size_t lstm_scratch(const Lstm &w, int group) {
  const size_t rows = w.in.storage == kSplit ? 3 * kSplitRows * kSplitDepth / 2 : 0;
  return static_cast<size_t>(group) * (static_cast<size_t>(w.chunk) * w.in.Np + 3u * w.Hp) + rows;
}

extern const Kernels kScalar;
#if defined(MSE_X86)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif
#if defined(MSE_AMX)
extern const Kernels kAmx;
#endif
#if defined(MSE_NEON)
extern const Kernels kNeon;
#endif

}  // namespace mse
#endif

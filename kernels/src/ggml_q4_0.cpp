// llama.cpp's product of repacked Q4_0 weights with rows of Q8_0 activations, for processors with
// AVX-512 VNNI: most of the time of a prompt, at more than twice the speed of its own.
//
// It stands in for llama.cpp's function by name: this library is loaded before llama.cpp with its
// symbols global, so the dynamic linker finds it first. mse_kernels.ggml then compares the two on a
// sample, and where they do not agree, calls go on to llama.cpp's own.
//
// VNNI multiplies unsigned by signed bytes. ggml takes the signs apart for that, with three
// instructions for each product; here the weights are what Q4_0 stores, 0 .. 15 standing for
// -8 .. 7, and the sum of a row's activations makes up for the 8.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// ggml's layouts: blocks of 32 values of eight columns, or of four rows, interleaved by eight bytes.
struct Weights {
  uint16_t scale[8];  // float16
  uint8_t values[128];  // nibbles, as signed ones: value i below, value i + 16 above
};
struct Activations {
  uint16_t scale[4];
  int8_t values[128];
};
static_assert(sizeof(Weights) == 144 && sizeof(Activations) == 136, "no padding");

constexpr int kBlock = 32, kRows = 8, kColumns = 8;

// Of eight rows in one block: scales, and what their sums start from, half of it in either lane.
struct Rows {
  float scale[kRows];
  int32_t start[kRows];
};

inline __m512i repeated(const int8_t *eight) {
  int64_t bits;
  memcpy(&bits, eight, sizeof bits);
  return _mm512_set1_epi64(bits);
}

inline __m128 floats(const uint16_t *halfs) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(halfs)));
}

// -4 times the sum of each of four rows.
inline __m128i starts(const Activations &a) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, _mm512_loadu_si512(a.values));
  sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(a.values + 64));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
  const __m256i pairs = _mm256_add_epi32(half, _mm256_srli_epi64(half, 32));
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  const __m128i four = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(pairs, order));
  return _mm_sub_epi32(_mm_setzero_si128(), _mm_slli_epi32(four, 2));
}

void prepare(const Activations *a, int groups, int blocks, Rows *rows) {
  for (int g = 0; g < groups; g++)
    for (int b = 0; b < blocks; b++) {
      const Activations &from = a[static_cast<size_t>(g) * blocks + b];
      Rows &to = rows[static_cast<size_t>(g / 2) * blocks + b];
      _mm_storeu_ps(to.scale + g % 2 * 4, floats(from.scale));
      _mm_storeu_si128(reinterpret_cast<__m128i *>(to.start + g % 2 * 4), starts(from));
    }
}

// G groups of four rows by C groups of eight columns.
template <int G, int C>
inline void tile(const Weights *w, const Activations *a, const Rows *rows, int blocks, float *out,
                 size_t stride) {
  constexpr int M = 4 * G;
  const __m512i nibble = _mm512_set1_epi8(15), flip = _mm512_set1_epi8(8);
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  __m512 sums[M][C];
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) {
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) sums[r][c] = _mm512_setzero_ps();
  }
  for (int b = 0; b < blocks; b++) {
    __m512i v[C][4];
    __m512 scale[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const Weights &from = w[static_cast<size_t>(c) * blocks + b];
      const __m512i low = _mm512_loadu_si512(from.values);
      const __m512i high = _mm512_loadu_si512(from.values + 64);
      // (x & 15) ^ 8 in one instruction each.
      v[c][0] = _mm512_ternarylogic_epi32(low, nibble, flip, 0x6a);
      v[c][1] = _mm512_ternarylogic_epi32(high, nibble, flip, 0x6a);
      v[c][2] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(low, 4), nibble, flip, 0x6a);
      v[c][3] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(high, 4), nibble, flip, 0x6a);
      const __m128i halfs = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from.scale));
      scale[c] = _mm512_permutexvar_ps(twice, _mm512_castps256_ps512(_mm256_cvtph_ps(halfs)));
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; r++) {
      const int8_t *x = a[static_cast<size_t>(r / 4) * blocks + b].values + r % 4 * 8;
      __m512i dot[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) dot[c] = _mm512_set1_epi32(rows[b].start[r]);
#pragma GCC unroll 8
      for (int k = 0; k < 4; k++) {
        const __m512i eight = repeated(x + 32 * k);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) dot[c] = _mm512_dpbusd_epi32(dot[c], v[c][k], eight);
      }
      const __m512 row = _mm512_set1_ps(rows[b].scale[r]);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++)
        sums[r][c] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[c]), _mm512_mul_ps(scale[c], row), sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++) {
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {  // a column's two lanes
      const __m512 s = _mm512_add_ps(sums[r][c], _mm512_permute_ps(sums[r][c], 0xb1));
      _mm256_storeu_ps(out + r * stride + c * kColumns,
                       _mm512_castps512_ps256(_mm512_maskz_compress_ps(0x5555, s)));
    }
  }
}

template <int C>
void columns(const Weights *w, const Activations *a, const Rows *rows, int blocks, int groups,
             float *out, size_t stride) {
  int g = 0;
  for (; g + 2 <= groups; g += 2)
    tile<2, C>(w, a + static_cast<size_t>(g) * blocks, rows + static_cast<size_t>(g / 2) * blocks,
               blocks, out + 4 * g * stride, stride);
  if (g < groups)
    tile<1, C>(w, a + static_cast<size_t>(g) * blocks, rows + static_cast<size_t>(g / 2) * blocks,
               blocks, out + 4 * g * stride, stride);
}

using Gemm = void (*)(int, float *, size_t, const void *, const void *, int, int);
std::atomic<Gemm> theirs{nullptr};
std::atomic<bool> own{true};
std::atomic<uint64_t> calls{0};

// False without memory for the rows' scales: nothing was done.
bool ours(int n, float *out, size_t stride, const void *weights, const void *activations, int n_rows,
          int n_columns) {
  const int blocks = n / kBlock, groups = n_rows / 4;
  const auto *w = static_cast<const Weights *>(weights);
  const auto *a = static_cast<const Activations *>(activations);
  static thread_local std::vector<Rows> rows;
  try {
    rows.resize(static_cast<size_t>((groups + 1) / 2) * blocks);
  } catch (...) {
    return false;
  }
  prepare(a, groups, blocks, rows.data());
  int c = 0;
  // All rows by a few columns at a time: weights come from memory once, activations stay in a cache.
  for (; c + 2 * kColumns <= n_columns; c += 2 * kColumns, w += 2 * static_cast<size_t>(blocks))
    columns<2>(w, a, rows.data(), blocks, groups, out + c, stride);
  if (c < n_columns) columns<1>(w, a, rows.data(), blocks, groups, out + c, stride);
  return true;
}

}  // namespace

// n values of depth, a multiple of 32; n_rows one of 4, n_columns one of 8: out [n_rows, n_columns].
EXPORT void mse_ggml_gemm_q4_0(int n, float *out, size_t stride, const void *weights,
                               const void *activations, int n_rows, int n_columns) {
  ours(n, out, stride, weights, activations, n_rows, n_columns);
}

// llama.cpp's own function, and whether ours is called instead of it from now on.
EXPORT void mse_ggml_use(Gemm original, bool ours_instead) {
  theirs.store(original, std::memory_order_release);
  own.store(ours_instead, std::memory_order_release);
}

// How often ours was called by name.
EXPORT uint64_t mse_ggml_calls(void) { return calls.load(std::memory_order_relaxed); }

EXPORT void ggml_gemm_q4_0_8x8_q8_0(int n, float *out, size_t stride, const void *weights,
                                    const void *activations, int n_rows, int n_columns) {
  if (own.load(std::memory_order_acquire) &&
      ours(n, out, stride, weights, activations, n_rows, n_columns)) {
    calls.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  const Gemm original = theirs.load(std::memory_order_acquire);
  if (!original) abort();  // no memory for a few kilobytes, and nobody else to ask
  original(n, out, stride, weights, activations, n_rows, n_columns);
}

// What llama.cpp calls (src/ggml_q4_0.cpp, src/ggml_mapped.cpp, src/tap.cpp, src/reports.cpp) under the
// sanitizers: buffers of exactly the size that is needed, random shapes, against plain loops.
//
//   ggml ROUNDS SEED KERNEL...
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../src/abi.h"

extern "C" void ggml_gemm_q4_0_8x8_q8_0(int n, float *out, size_t stride, const void *weights,
                                        const void *activations, int n_rows, int n_columns);
extern "C" uint64_t mse_ggml_calls(void);
extern "C" int32_t mse_ggml_has(int32_t kernel);
extern "C" void mse_ggml_use(void *original, int32_t kernel);

extern "C" bool llamafile_sgemm(const void *params, int64_t m, int64_t n, int64_t k, const void *A,
                                int64_t lda, const void *B, int64_t ldb, void *C, int64_t ldc,
                                int a_type, int b_type, int c_type);
extern "C" int32_t mse_mapped_has(void);
extern "C" void mse_mapped_use(void *original, void *original_tiled, int32_t run, int64_t offset);

static std::mt19937 random_bits;

static int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }

// Float16 scales that are powers of two, so that the plain loop needs no conversion.
static const uint16_t kHalfs[] = {0x3c00, 0x3800, 0x3400, 0xbc00, 0x0000, 0x4000};
static const float kFloats[] = {1.0f, 0.5f, 0.25f, -1.0f, 0.0f, 2.0f};

static bool product() {
  const int blocks = 1 + below(9), groups = 1 + below(13), eights = 1 + below(6);
  const int rows = 4 * groups, columns = 8 * eights, stride = columns + below(5);
  const size_t nw = static_cast<size_t>(eights) * blocks, na = static_cast<size_t>(groups) * blocks;
  std::vector<uint8_t> w(nw * 144), a(na * 136);
  std::vector<float> ws(nw * 8), as(na * 4);
  for (auto &byte : w) byte = static_cast<uint8_t>(random_bits());
  for (auto &byte : a) byte = static_cast<uint8_t>(random_bits());
  for (size_t i = 0; i < ws.size(); i++) {
    const int s = below(6);
    memcpy(&w[i / 8 * 144 + i % 8 * 2], &kHalfs[s], 2);
    ws[i] = kFloats[s];
  }
  for (size_t i = 0; i < as.size(); i++) {
    const int s = below(6);
    memcpy(&a[i / 4 * 136 + i % 4 * 2], &kHalfs[s], 2);
    as[i] = kFloats[s];
  }
  const float untouched = 12345.0f;
  std::vector<float> out(static_cast<size_t>(stride) * (rows - 1) + columns, untouched);
  ggml_gemm_q4_0_8x8_q8_0(32 * blocks, out.data(), stride, w.data(), a.data(), rows, columns);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < stride && static_cast<size_t>(r) * stride + c < out.size(); c++) {
      const float found = out[static_cast<size_t>(r) * stride + c];
      if (c >= columns) {
        if (found != untouched) return printf("wrote beside row %d\n", r), false;
        continue;
      }
      double sum = 0, most = 1;
      for (int b = 0; b < blocks; b++) {
        const size_t i = static_cast<size_t>(c / 8) * blocks + b;
        const size_t j = static_cast<size_t>(r / 4) * blocks + b;
        int dot = 0;
        for (int k = 0; k < 32; k++) {
          const uint8_t byte = w[i * 144 + 16 + k % 16 / 8 * 64 + c % 8 * 8 + k % 8];
          const int nibble = (k < 16 ? byte : byte >> 4) & 15;
          const int weight = nibble < 8 ? nibble : nibble - 16;
          dot += weight * static_cast<int8_t>(a[j * 136 + 8 + k / 8 * 32 + r % 4 * 8 + k % 8]);
        }
        const double part = static_cast<double>(ws[i * 8 + c % 8]) * as[j * 4 + r % 4] * dot;
        sum += part;
        most += std::fabs(part);
      }
      if (!(std::fabs(found - sum) <= 1e-5 * most))
        return printf("row %d column %d: %g, not %g\n", r, c, found, sum), false;
    }
  return true;
}

// Of each type what a block of it and of its rows takes, and which the latter are. Values are compared
// in tests/test_kernels_mapped.py; here one share against three, and what lies beside the result.
static bool mapped() {
  static const int types[][4] = {{2, 18, 8, 34},    {6, 22, 8, 34},    {8, 34, 8, 34},
                                 {12, 144, 15, 292}, {13, 176, 15, 292}, {14, 210, 15, 292}};
  const int *type = types[below(6)];
  const int columns = 16 * (1 + below(5)), rows = 1 + below(90), blocks = 1 + below(5);
  const int stride = columns + below(5);
  std::vector<uint8_t> w(static_cast<size_t>(columns) * blocks * type[1]);
  std::vector<uint8_t> a(static_cast<size_t>(rows) * blocks * type[3]);
  for (auto *bytes : {&w, &a})
    for (auto &byte : *bytes) byte = static_cast<uint8_t>(random_bits()) & 0x3f;
  const float untouched = 12345.0f;
  std::vector<float> out[2];
  for (int threads : {1, 3}) {
    auto &to = out[threads > 1];
    to.assign(static_cast<size_t>(stride) * (rows - 1) + columns, untouched);
    for (int thread = 0; thread < threads; thread++) {
      const int params[] = {thread, threads};
      if (!llamafile_sgemm(params, columns, rows, blocks, w.data(), blocks, a.data(), blocks, to.data(),
                           stride, type[0], type[2], 0))
        return printf("type %d is not ours\n", type[0]), false;
    }
  }
  for (size_t i = 0; i < out[0].size(); i++)
    if (out[0][i] != out[1][i] || (out[0][i] == untouched) != (static_cast<int>(i % stride) >= columns))
      return printf("type %d: place %zu\n", type[0], i), false;
  return true;
}

struct Node {
  const char *name;
  std::vector<float> values;
};

static const char *name_of(const void *t) { return static_cast<const Node *>(t)->name; }
static size_t size_of(const void *t) { return static_cast<const Node *>(t)->values.size() * 4; }
static void read_of(const void *t, void *to, size_t offset, size_t size) {
  memcpy(to, reinterpret_cast<const char *>(static_cast<const Node *>(t)->values.data()) + offset, size);
}

static bool tap() {
  const Node wanted = {"last", std::vector<float>(1 + below(40), 7.0f)}, other = {"lasting", {1.0f}};
  std::vector<float> rows(1 + below(40));
  mse_tap t = {name_of, size_of, read_of, "last", rows.data(),
               static_cast<int64_t>(rows.size() * 4), 0, below(2)};
  if (mse_tap_node(&other, true, &t)) return printf("asked for another node\n"), false;
  if (mse_tap_node(&wanted, true, &t) != (t.armed != 0)) return printf("not asked for\n"), false;
  const bool fits = wanted.values.size() <= rows.size();
  if (mse_tap_node(&wanted, false, &t) == fits) return printf("did not end there\n"), false;
  return t.taken == (fits ? static_cast<int64_t>(wanted.values.size() * 4) : 0);
}

static bool reports() {
  const int n = 1 + below(700);
  std::string longest(below(9000), 'x');
  for (int i = 0; i < n; i++) mse_log_line(2, "line", nullptr);
  mse_log_line(1, "debug", nullptr);
  mse_log_line(5, "continued", nullptr);
  mse_log_line(4, longest.c_str(), nullptr);
  std::vector<char> text(1 + below(5000));
  int32_t level = 0;
  int found = 0;
  size_t length = 0;
  while (mse_log_take(&level, text.data(), static_cast<int64_t>(text.size()))) {
    found++;
    length = strlen(text.data());
  }
  const size_t whole = std::min({longest.size(), size_t{4096}, text.size() - 1});
  return found == std::min(n + 1, 600) && level == 4 && length == whole;
}

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 100;
  random_bits.seed(argc > 2 ? static_cast<unsigned>(atoi(argv[2])) : 0);
  const bool tiles = mse_mapped_has();
  mse_mapped_use(nullptr, nullptr, 1, 0);
  for (int k = 3; k < argc; k++) {
    if (!mse_ggml_has(atoi(argv[k]))) return printf("no kernel %s\n", argv[k]), 1;
    mse_ggml_use(nullptr, atoi(argv[k]));
    for (int i = 0; i < rounds; i++)
      if (!product() || (tiles && !mapped()) || !tap() || !reports()) return printf("kernel %s, round %d\n", argv[k], i), 1;
  }
  printf("%d products\n", static_cast<int>(mse_ggml_calls()));
  return 0;
}

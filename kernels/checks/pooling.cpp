// Would pooling the text straight from quantised embedding rows be faster than from the float rows?
//
//   g++ -O3 -march=native -std=c++17 kernels/checks/pooling.cpp -o pooling && ./pooling
//
// The float rows exist anyway: the language model's prefill takes them as its input. So the question
// is the mean alone: D = 4096, rows in cache (they were just dequantised, which read the quantised
// ones too). CPU time of this thread, median of many.
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <vector>

constexpr int D = 4096, kBlock = 32;

struct Q8 {
  _Float16 scale;
  int8_t q[kBlock];
};
struct Q4 {
  _Float16 scale;
  uint8_t q[kBlock / 2];
};

static void add(const float *row, float *sum) {
  for (int d = 0; d < D; d++) sum[d] += row[d];
}
static void add(const _Float16 *row, float *sum) {
  for (int d = 0; d < D; d++) sum[d] += static_cast<float>(row[d]);
}
static void add(const Q8 *row, float *sum) {
  for (int b = 0; b < D / kBlock; b++) {
    const float s = static_cast<float>(row[b].scale);
    for (int i = 0; i < kBlock; i++) sum[b * kBlock + i] += s * static_cast<float>(row[b].q[i]);
  }
}
static void add(const Q4 *row, float *sum) {
  for (int b = 0; b < D / kBlock; b++) {
    const float s = static_cast<float>(row[b].scale);
    float *o = sum + b * kBlock;
    for (int i = 0; i < kBlock / 2; i++) {
      o[i] += s * static_cast<float>((row[b].q[i] & 15) - 8);
      o[i + kBlock / 2] += s * static_cast<float>((row[b].q[i] >> 4) - 8);
    }
  }
}

template <class T> static double median_us(int rows, size_t per_row, float *check) {
  std::vector<T> data(rows * per_row);
  memset(static_cast<void *>(data.data()), 1, data.size() * sizeof(T));
  std::vector<float> sum(D);
  std::vector<double> times;
  for (int i = 0; i < 2000; i++) {
    timespec a, b;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int r = 0; r < rows; r++) add(data.data() + r * per_row, sum.data());
    for (auto &s : sum) s /= static_cast<float>(rows);
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
    times.push_back((b.tv_sec - a.tv_sec) * 1e6 + (b.tv_nsec - a.tv_nsec) * 1e-3);
    *check += sum[i % D];
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

int main() {
  float check = 0;
  for (int rows : {50, 65, 78})
    printf("%d rows: float32 %.1f us, F16 %.1f us, Q8_0 %.1f us, Q4_0 %.1f us\n", rows,
           median_us<float>(rows, D, &check), median_us<_Float16>(rows, D, &check),
           median_us<Q8>(rows, D / kBlock, &check), median_us<Q4>(rows, D / kBlock, &check));
  return check == 12345.0f;
}

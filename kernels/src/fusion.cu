// The adapter on CUDA in three launches, for any batch: input projections of both modalities, both
// recurrences, and mixer + experts + projector. No includes: NVRTC builds it alone.
//
// Memory: weights [out, in] row-major as published; the gates of unit u are columns 4 u + {0, 1, 2, 3}
// (i, f, g, o), so that the four threads of a unit are neighbours and a step reads one line.
// fp32 arithmetic throughout; no fast-math. The text below is also compiled as C++ by a test that
// runs it thread by thread on a CPU (kernels/checks), hence SHARED_MEMORY and half_bits_to_float.

#ifndef MSE_HOST_EMULATION
#define SHARED_MEMORY(name) extern __shared__ float name[]
static __device__ __forceinline__ float half_bits_to_float(unsigned short bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return v;
}
#endif

struct Modality {
  const float *x;           // [B, T, dim]
  const long long *length;  // [B]
  const float *w_ih;        // [4 H, dim], rows interleaved by unit
  const float *w_hh;        // [4 H, H], rows interleaved by unit
  const float *bias;        // [4 H], b_ih + b_hh, interleaved
  const float *linear;      // [mix, H]
  const float *linear_bias;
  float *gates;   // [B, T, 4 H]
  float *hidden;  // [B, H]
  int dim, H, T;
};

struct Fusion {
  const float *text;             // [B, Tt, D]
  const long long *text_length;  // [B]
  const void *know, *first, *second, *up;  // [mix, D], [S, mix], [mix, S], [D, mix]
  const float *know_bias, *first_bias, *second_bias, *up_bias;
  const float *slope, *shift;  // [P]
  float *mean, *mixed, *expert, *fused;  // [B, D], [B, mix], [B, S], [B, mix]
  float *out;                            // [B, P, D]
  unsigned *barrier;
  int B, Tt, D, mix, S, P;
};

// ---- 1. gates = x W_ih^T + b for every step that counts; a block is 64 steps by 64 columns.

constexpr int kTile = 64, kDepth = 16, kPad = 4;

extern "C" __global__ void __launch_bounds__(256)
mse_project(Modality audio, Modality video, unsigned *barrier) {
  SHARED_MEMORY(shared);
  if (blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0) *barrier = 0u;
  const Modality m = blockIdx.z ? video : audio;
  const int columns = 4 * m.H, across = (columns + kTile - 1) / kTile;
  const int t0 = static_cast<int>(blockIdx.x) / across * kTile;
  const int n0 = static_cast<int>(blockIdx.x) % across * kTile;
  const int length = static_cast<int>(m.length[blockIdx.y]);
  if (t0 >= length) return;  // the same for the whole block
  const float *x = m.x + static_cast<size_t>(blockIdx.y) * m.T * m.dim;
  float *xs = shared, *ws = shared + kDepth * (kTile + kPad);  // both [k][64 + pad]
  const int tid = static_cast<int>(threadIdx.x), row = tid / 16 * 4, column = tid % 16 * 4;
  float sum[4][4] = {};
  for (int k0 = 0; k0 < m.dim; k0 += kDepth) {
    for (int i = tid; i < kTile * kDepth; i += 256) {
      const int r = i / kDepth, k = i % kDepth, at = k * (kTile + kPad) + r;
      const bool inside = k0 + k < m.dim;
      xs[at] = inside && t0 + r < length ? x[static_cast<size_t>(t0 + r) * m.dim + k0 + k] : 0.0f;
      ws[at] = inside && n0 + r < columns ? m.w_ih[static_cast<size_t>(n0 + r) * m.dim + k0 + k] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; k++) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[i] = xs[k * (kTile + kPad) + row + i];
        b[i] = ws[k * (kTile + kPad) + column + i];
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
    }
    __syncthreads();
  }
  float *gates = m.gates + static_cast<size_t>(blockIdx.y) * m.T * columns;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (t0 + row + i < length && n0 + column + j < columns)
        gates[static_cast<size_t>(t0 + row + i) * columns + n0 + column + j] =
            sum[i][j] + m.bias[n0 + column + j];
}

// ---- 2. one block per sequence and modality; thread 4 u + g owns gate g of unit u.

// The gate's own function by one formula: tanh(z) = 2 sigmoid(2 z) - 1, so that no warp diverges.
static __device__ __forceinline__ float unit_step(float z, int g, float *cell) {
  const bool candidate = g == 2;
  const float s = 1.0f / (1.0f + expf(candidate ? -2.0f * z : -z));
  const float v = candidate ? 2.0f * s - 1.0f : s;
  const float i = __shfl_sync(0xffffffffu, v, 0, 4), f = __shfl_sync(0xffffffffu, v, 1, 4);
  const float c = __shfl_sync(0xffffffffu, v, 2, 4), o = __shfl_sync(0xffffffffu, v, 3, 4);
  *cell = f * *cell + i * c;
  return o * tanhf(*cell);
}

// Recurrent weights stay in registers for all steps. Every thread of the block takes part in the
// shuffles and barriers, those beyond 4 H with zeros.
template <int H> static __device__ void recur(const Modality &m, float *shared) {
  const int tid = static_cast<int>(threadIdx.x);
  const bool mine = tid < 4 * H;
  const int length = static_cast<int>(m.length[blockIdx.x]);
  const float *gates = m.gates + static_cast<size_t>(blockIdx.x) * m.T * 4 * H;
  float w[H];
#pragma unroll
  for (int k = 0; k < H; k++) w[k] = mine ? m.w_hh[tid * H + k] : 0.0f;
  if (tid < 2 * H) shared[tid] = 0.0f;
  float cell = 0.0f, z = mine && length > 0 ? gates[tid] : 0.0f;
  __syncthreads();
  for (int t = 0; t < length; t++) {
    // The next step's gates are on their way while this step computes.
    const float later = mine && t + 1 < length ? gates[static_cast<size_t>(t + 1) * 4 * H + tid] : 0.0f;
    const float *h = shared + (t & 1) * H;
    float a = z, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma unroll
    for (int k = 0; k < H; k += 4) {
      a = fmaf(w[k], h[k], a);
      b = fmaf(w[k + 1], h[k + 1], b);
      c = fmaf(w[k + 2], h[k + 2], c);
      d = fmaf(w[k + 3], h[k + 3], d);
    }
    const float next = unit_step((a + b) + (c + d), tid & 3, &cell);
    if (mine && (tid & 3) == 0) shared[((t + 1) & 1) * H + tid / 4] = next;
    z = later;
    __syncthreads();  // one is enough: the other buffer is written only after the next one
  }
  if (tid < H) m.hidden[static_cast<size_t>(blockIdx.x) * H + tid] = shared[(length & 1) * H + tid];
}

// Any H up to 256: the weights stay in the first-level cache or the second, not in registers.
static __device__ void recur_any(const Modality &m, float *shared) {
  const int H = m.H, tid = static_cast<int>(threadIdx.x);
  const bool mine = tid < 4 * H;
  const int length = static_cast<int>(m.length[blockIdx.x]);
  const float *gates = m.gates + static_cast<size_t>(blockIdx.x) * m.T * 4 * H;
  const float *w = m.w_hh + static_cast<size_t>(mine ? tid : 0) * H;
  for (int i = tid; i < 2 * H; i += static_cast<int>(blockDim.x)) shared[i] = 0.0f;
  float cell = 0.0f;
  __syncthreads();
  for (int t = 0; t < length; t++) {
    const float *h = shared + (t & 1) * H;
    float z = mine ? gates[static_cast<size_t>(t) * 4 * H + tid] : 0.0f;
#pragma unroll 8
    for (int k = 0; k < H; k++) z = fmaf(w[k], h[k], z);
    const float next = unit_step(z, tid & 3, &cell);
    if (mine && (tid & 3) == 0) shared[((t + 1) & 1) * H + tid / 4] = next;
    __syncthreads();
  }
  for (int i = tid; i < H; i += static_cast<int>(blockDim.x))
    m.hidden[static_cast<size_t>(blockIdx.x) * H + i] = shared[(length & 1) * H + i];
}

extern "C" __global__ void __launch_bounds__(256) mse_lstm(Modality audio, Modality video) {
  SHARED_MEMORY(shared);
  const Modality m = blockIdx.y ? video : audio;
  if (m.H == 64)
    recur<64>(m, shared);
  else if (m.H == 32)
    recur<32>(m, shared);
  else
    recur<16>(m, shared);
}

extern "C" __global__ void __launch_bounds__(1024) mse_lstm_any(Modality audio, Modality video) {
  SHARED_MEMORY(shared);
  const Modality m = blockIdx.y ? video : audio;
  recur_any(m, shared);
}

// ---- 3. text mean -> knowledge and mixer -> experts -> projector, one cooperative launch.

template <int S> struct Stored;
template <> struct Stored<0> {
  static __device__ __forceinline__ float at(const void *w, size_t i) {
    return static_cast<const float *>(w)[i];
  }
};
template <> struct Stored<1> {
  static __device__ __forceinline__ float at(const void *w, size_t i) {
    return half_bits_to_float(static_cast<const unsigned short *>(w)[i]);
  }
};
template <> struct Stored<2> {
  static __device__ __forceinline__ float at(const void *w, size_t i) {
    return __uint_as_float(static_cast<unsigned>(static_cast<const unsigned short *>(w)[i]) << 16);
  }
};

// All blocks are resident (cooperative launch). mse_project set the counter to 0 before.
static __device__ void grid_barrier(unsigned *counter, unsigned *passed) {
  *passed += gridDim.x;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while (atomicAdd(counter, 0u) < *passed) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

static __device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// Samples that share one reading of a weight row.
constexpr int kShare = 4;

// dot[j] = w[row, :] . x[b0 + j, :], in every lane. What another block wrote is read past the
// first-level cache, which is not coherent.
template <int S>
static __device__ __forceinline__ void dots(const void *w, int row, int K, const float *x, int b0,
                                            int count, float *dot) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
#pragma unroll
  for (int j = 0; j < kShare; j++) dot[j] = 0.0f;
#pragma unroll 4
  for (int k = lane; k < K; k += 32) {
    const float v = Stored<S>::at(w, static_cast<size_t>(row) * K + k);
#pragma unroll
    for (int j = 0; j < kShare; j++)
      if (j < count) dot[j] = fmaf(v, __ldcg(x + static_cast<size_t>(b0 + j) * K + k), dot[j]);
  }
#pragma unroll
  for (int j = 0; j < kShare; j++) dot[j] = warp_sum(dot[j]);
}

template <int S>
static __device__ void fuse(const Modality &audio, const Modality &video, const Fusion &f) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  const int warp = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / 32);
  const int warps = static_cast<int>(gridDim.x * blockDim.x / 32);
  const int groups = (f.B + kShare - 1) / kShare;
  unsigned passed = 0;
  float dot[kShare];

  const int across = (f.D + 31) / 32;
  for (int i = warp; i < f.B * across; i += warps) {
    const int b = i / across, d = i % across * 32 + lane;
    const int n = static_cast<int>(f.text_length[b]);
    if (d >= f.D) continue;
    const float *rows = f.text + static_cast<size_t>(b) * f.Tt * f.D + d;
    float sum = 0.0f;
#pragma unroll 8
    for (int t = 0; t < n; t++) sum += rows[static_cast<size_t>(t) * f.D];
    f.mean[static_cast<size_t>(b) * f.D + d] = n > 0 ? sum / static_cast<float>(n) : 0.0f;
  }
  grid_barrier(f.barrier, &passed);

  for (int i = warp; i < f.mix * groups; i += warps) {
    const int o = i / groups, b0 = i % groups * kShare, count = min(kShare, f.B - b0);
    float a[kShare], v[kShare];
    dots<S>(f.know, o, f.D, f.mean, b0, count, dot);
    dots<0>(audio.linear, o, audio.H, audio.hidden, b0, count, a);
    dots<0>(video.linear, o, video.H, video.hidden, b0, count, v);
    if (lane == 0)
      for (int j = 0; j < count; j++) {
        const float k = dot[j] + f.know_bias[o];
        f.mixed[static_cast<size_t>(b0 + j) * f.mix + o] =
            k * (a[j] + audio.linear_bias[o]) + k * (v[j] + video.linear_bias[o]);
      }
  }
  grid_barrier(f.barrier, &passed);

  for (int i = warp; i < f.S * groups; i += warps) {
    const int o = i / groups, b0 = i % groups * kShare, count = min(kShare, f.B - b0);
    dots<S>(f.first, o, f.mix, f.mixed, b0, count, dot);
    if (lane == 0)
      for (int j = 0; j < count; j++) {
        const float y = dot[j] + f.first_bias[o];
        f.expert[static_cast<size_t>(b0 + j) * f.S + o] =
            0.5f * y * (1.0f + erff(y * 0.70710678118654752f));
      }
  }
  grid_barrier(f.barrier, &passed);

  for (int i = warp; i < f.mix * groups; i += warps) {
    const int o = i / groups, b0 = i % groups * kShare, count = min(kShare, f.B - b0);
    dots<S>(f.second, o, f.S, f.expert, b0, count, dot);
    if (lane == 0)
      for (int j = 0; j < count; j++)
        f.fused[static_cast<size_t>(b0 + j) * f.mix + o] = dot[j] + f.second_bias[o];
  }
  grid_barrier(f.barrier, &passed);

  for (int i = warp; i < f.D * groups; i += warps) {
    const int o = i / groups, b0 = i % groups * kShare, count = min(kShare, f.B - b0);
    dots<S>(f.up, o, f.mix, f.fused, b0, count, dot);
#pragma unroll 1
    for (int p = lane; p < f.P; p += 32)
      for (int j = 0; j < count; j++)
        f.out[(static_cast<size_t>(b0 + j) * f.P + p) * f.D + o] =
            (dot[j] + f.up_bias[o]) * f.slope[p] + f.shift[p];
  }
}

extern "C" __global__ void __launch_bounds__(256)
mse_fuse_f32(Modality audio, Modality video, Fusion f) {
  fuse<0>(audio, video, f);
}
extern "C" __global__ void __launch_bounds__(256)
mse_fuse_f16(Modality audio, Modality video, Fusion f) {
  fuse<1>(audio, video, f);
}
extern "C" __global__ void __launch_bounds__(256)
mse_fuse_bf16(Modality audio, Modality video, Fusion f) {
  fuse<2>(audio, video, f);
}

#include <immintrin.h>
#include <math.h>

#include "ggml_attention.h"

#define MSE_UNROLL _Pragma("GCC unroll 16")

namespace mse_ggml {
namespace {
#include "simd_avx2.h"
#include "activations.h"
#include "attention.h"
}  // namespace

const Attend attend_avx2 = {kLanes, Tile::bytes, run};

}  // namespace mse_ggml

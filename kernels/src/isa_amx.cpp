#include <immintrin.h>

#include "amx.h"
#include "isa.h"

namespace mse {
namespace {
#include "simd_avx512.h"
#include "activations.h"
#include "gemm.h"
#include "fusion.h"
#include "project_amx.h"
#include "lstm.h"
}  // namespace

extern const Kernels kAmx = {
    "amx", W, kPanel, kGroup, kSplitFrom, linear, lstm, add_rows,
    average, finite, gelu, mix, spread, activate, probe_mac, probe_read};
}  // namespace mse

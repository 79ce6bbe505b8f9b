#include <arm_neon.h>

#include "isa.h"

namespace mse {
namespace {
#include "simd_neon.h"
#include "activations.h"
#include "gemm.h"
#include "fusion.h"
#include "project.h"
#include "lstm.h"
}  // namespace

extern const Kernels kNeon = {
    "neon", W, kPanel, kGroup, kSplitFrom, linear, lstm, add_rows,
    average, finite, gelu, mix, spread, activate, probe_mac, probe_read};
}  // namespace mse

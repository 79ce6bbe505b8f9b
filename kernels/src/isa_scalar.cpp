#include <math.h>
#include <string.h>

#include "isa.h"

namespace mse {
namespace {
#include "simd_scalar.h"
#include "activations.h"
#include "gemm.h"
#include "fusion.h"
#include "project.h"
#include "lstm.h"
}  // namespace

extern const Kernels kScalar = {
    "scalar", W, kPanel, kGroup, kSplitFrom, linear, lstm, add_rows,
    average, finite, gelu, mix, spread, activate, probe_mac, probe_read};
}  // namespace mse

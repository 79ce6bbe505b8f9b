// Which instruction sets this binary holds, and which of them this processor runs.
#include <string.h>

#if defined(MSE_AMX)
#include <cpuid.h>

#include "amx.h"
#endif

#include "isa.h"
#include "model.h"

namespace mse {

struct Choice {
  const Kernels *kernels;
  bool (*usable)();
};

#if defined(MSE_X86)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
static bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
// F16C came before AVX2 in every processor that has AVX2; older compilers can't ask for it by name.
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
#if defined(MSE_AMX)
static bool ask_for_amx() {
  constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kBf16)) return false;
  return has_avx512() && may_use_tiles();
}
static bool has_amx() {
  static const bool has = ask_for_amx();
  return has;
}
#endif
static bool always() { return true; }

static const Choice kChoices[] = {
#if defined(MSE_AMX)
    {&kAmx, has_amx},
#endif
#if defined(MSE_X86)
    {&kAvx512, has_avx512},
    {&kAvx2, has_avx2},
#endif
#if defined(MSE_NEON)
    {&kNeon, always},
#endif
    {&kScalar, always},
};

const Kernels *find_kernels(const char *isa) {
  if (!isa) return nullptr;
  for (const Choice &c : kChoices)
    if ((!*isa || !strcmp(isa, c.kernels->name)) && c.usable()) return c.kernels;
  return nullptr;
}

}  // namespace mse

extern "C" const char *mse_isas(void) {
#if defined(MSE_AMX)
  return "amx,avx512,avx2,scalar";
#elif defined(MSE_X86)
  return "avx512,avx2,scalar";
#elif defined(MSE_NEON)
  return "neon,scalar";
#else
  return "scalar";
#endif
}

extern "C" int32_t mse_isa_usable(const char *isa) {
  return isa && *isa && mse::find_kernels(isa) != nullptr;
}

// Intel's tiles: their configuration, their instructions, and the system's leave to use them.
#ifndef MSE_AMX_H
#define MSE_AMX_H

#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

// Eight tiles of up to 16 rows of up to 64 bytes. Whoever configures them puts back what was there:
// llama.cpp sets its own once for a thread.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "as the processor wants it");

// Intrinsics of GCC 12 do not tell what memory they read, and their tile configuration is optimised
// away; these do. stride: bytes from row to row.
#define MSE_CONFIGURATION(config) asm volatile("sttilecfg %0" : "=m"(config))
#define MSE_CONFIGURE(config) asm volatile("ldtilecfg %0" ::"m"(config))
#define MSE_LOAD(t, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"(static_cast<long>(stride)) : "memory")
#define MSE_STORE(t, to, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"(static_cast<long>(stride)) : "memory")

// Linux gives the tiles' registers to a process that asks, if the processor has them.
static inline bool may_use_tiles() {
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
}

#endif

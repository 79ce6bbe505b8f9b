// fusion.cu compiled as C++ and launched by name on the emulated device.
#include "device.h"

#include "../src/fusion.cu"

extern "C" int emulated_launch(const char *name, unsigned gx, unsigned gy, unsigned gz,
                               unsigned threads, uint64_t shared, int cooperative, int falling,
                               void *const *args) {
  const auto audio = *static_cast<const Modality *>(args[0]);
  const auto video = *static_cast<const Modality *>(args[1]);
  std::function<void()> kernel;
  if (!strcmp(name, "mse_project")) {
    unsigned *barrier = *static_cast<unsigned *const *>(args[2]);
    kernel = [=] { mse_project(audio, video, barrier); };
  } else if (!strcmp(name, "mse_lstm")) {
    kernel = [=] { mse_lstm(audio, video); };
  } else if (!strcmp(name, "mse_lstm_any")) {
    kernel = [=] { mse_lstm_any(audio, video); };
  } else if (!strncmp(name, "mse_fuse_", 9)) {
    const auto fusion = *static_cast<const Fusion *>(args[2]);
    const char *storage = name + 9;
    if (!strcmp(storage, "f32"))
      kernel = [=] { mse_fuse_f32(audio, video, fusion); };
    else if (!strcmp(storage, "f16"))
      kernel = [=] { mse_fuse_f16(audio, video, fusion); };
    else
      kernel = [=] { mse_fuse_bf16(audio, video, fusion); };
  } else {
    return 1;
  }
  return emulation::launch({gx, gy, gz}, threads, shared, cooperative, falling, kernel) ? 0 : 2;
}

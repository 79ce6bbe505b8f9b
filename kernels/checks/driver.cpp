// A CUDA driver on the host: the driver API's functions that mse_kernels calls, with the signatures of
// cuda.h, over the emulated device of host.cpp. For tests of the host side without a GPU.
//
// It is stricter than a driver: work that is queued runs only when its stream is waited for, memory is
// full of NaNs, and what a real driver might let pass (a missing context, freeing memory under queued
// work, a copy outside an allocation, what a capture forbids) is an error or a `fake_violation`.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

extern "C" int emulated_launch(const char *name, unsigned gx, unsigned gy, unsigned gz,
                               unsigned threads, uint64_t shared, int cooperative, int falling,
                               void *const *args);

typedef int CUresult, CUdevice, CUdevice_attribute;
typedef unsigned long long CUdeviceptr;
typedef struct Context *CUcontext;
typedef struct Module *CUmodule;
typedef struct Function *CUfunction;
typedef struct Stream *CUstream;
typedef struct Graph *CUgraph, *CUgraphExec;

enum { kInvalid = 1, kNoMemory = 2, kNoDevice = 100, kNoBinary = 209, kBadContext = 201,
       kBadHandle = 400, kNotFound = 500, kFailed = 719, kTooLarge = 720, kInCapture = 900,
       kCaptureInvalid = 901 };

struct Context {};
struct Module {
  std::string text;
};
struct Function {
  std::string name;
};
using Work = std::vector<std::function<CUresult()>>;
struct Graph {
  Work work;
};
struct Stream {
  Work queued;
  Graph *capture = nullptr;
  bool broken = false;
};

constexpr size_t kGuard = 1024;
static int cc_major = 8, cc_minor = 6, devices = 1, processors = 3, cooperative_ok = 1;
static int retained = 0;
static Context primary;
static thread_local std::vector<CUcontext> current;
static std::map<CUdeviceptr, size_t> memory;
static std::map<char *, size_t> pinned;
static std::map<std::string, std::unique_ptr<Function>> functions;
static std::map<Stream *, std::unique_ptr<Stream>> streams;
static std::map<Graph *, std::unique_ptr<Graph>> graphs;
static int modules = 0;
static std::string calls, violation, fail_name;
static int fail_code = 0, fail_after = 0;

// Notes the call; an error where the test asked for one.
static CUresult enter(const char *name, bool needs_context) {
  calls += std::string(calls.empty() ? "" : " ") + name;
  if (fail_name == name && fail_after-- == 0) return fail_code;
  if (needs_context && (current.empty() || !current.back())) return kBadContext;
  return 0;
}
#define ENTER(needs_context)                                               \
  do {                                                                     \
    if (const CUresult code = enter(__func__, needs_context)) return code; \
  } while (0)

static void complain(const std::string &what) { violation += what + "; "; }
static bool capturing() {
  for (auto &s : streams)
    if (s.second->capture) return true;
  return false;
}
static bool pending() {
  for (auto &s : streams)
    if (!s.second->queued.empty()) return true;
  return false;
}
template <class M> static bool holds(const M &blocks, uintptr_t from, size_t n) {
  for (auto &b : blocks)
    if (from >= (uintptr_t)b.first && from + n <= (uintptr_t)b.first + b.second) return true;
  return false;
}
static CUresult push(CUstream s, std::function<CUresult()> work) {
  if (!streams.count(s)) return kBadHandle;
  (s->capture ? s->capture->work : s->queued).push_back(std::move(work));
  return 0;
}

extern "C" {

// ---- for the tests

void fake_reset(int major, int minor, int count, int sms, int cooperative) {
  cc_major = major, cc_minor = minor, devices = count, processors = sms;
  cooperative_ok = cooperative;
  calls.clear(), violation.clear(), fail_name.clear();
}
// The call of that name after `after` others fails with `code`.
void fake_fail(const char *name, int code, int after) {
  fail_name = name, fail_code = code, fail_after = after;
}
const char *fake_calls() { return calls.c_str(); }
const char *fake_violation() { return violation.c_str(); }
// Everything that was taken and not given back.
int fake_live() {
  return retained + modules + static_cast<int>(memory.size() + pinned.size() + streams.size() +
                                               graphs.size() + current.size());
}

// ---- the driver API

CUresult cuGetErrorString(CUresult error, const char **text) {
  static std::string kept;
  kept = "error " + std::to_string(error) + " of the host driver";
  *text = kept.c_str();
  return 0;
}
CUresult cuInit(unsigned flags) {
  ENTER(false);
  return flags ? kInvalid : 0;
}
CUresult cuDeviceGetCount(int *count) {
  ENTER(false);
  *count = devices;
  return 0;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  ENTER(false);
  if (ordinal < 0 || ordinal >= devices) return kInvalid;
  *device = ordinal;
  return 0;
}
CUresult cuDeviceGetName(char *name, int length, CUdevice) {
  ENTER(false);
  snprintf(name, length, "Host driver (not a GPU)");
  return 0;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice) {
  ENTER(false);
  const std::map<int, int> known = {
      {75, cc_major}, {76, cc_minor}, {16, processors}, {95, cooperative_ok}};
  if (!known.count(what)) return kInvalid;
  *value = known.at(what);
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) {
  ENTER(false);
  retained++;
  *context = &primary;
  return 0;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
  ENTER(false);
  if (--retained < 0) complain("context released twice");
  return 0;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
  ENTER(false);
  if (context != &primary || !retained) return kBadContext;
  current.push_back(context);
  return 0;
}
CUresult cuCtxPopCurrent_v2(CUcontext *context) {
  ENTER(true);
  *context = current.back();
  current.pop_back();
  return 0;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  ENTER(true);
  const char *bytes = static_cast<const char *>(image);
  std::string text;
  if (!memcmp(bytes, "\177ELF", 4)) {
    uint64_t sections;
    uint16_t size, count;
    memcpy(&sections, bytes + 40, 8), memcpy(&size, bytes + 58, 2), memcpy(&count, bytes + 60, 2);
    text.assign(bytes, sections + static_cast<size_t>(size) * count);
  } else {
    text = bytes;  // PTX ends with a zero
    if (text.find(".target sm_") == std::string::npos) return kNoBinary;
  }
  modules++;
  *module = new Module{text};
  return 0;
}
CUresult cuModuleUnload(CUmodule module) {
  ENTER(true);
  if (pending()) complain("module unloaded under queued work");
  modules--;
  delete module;
  return 0;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  ENTER(true);
  if (module->text.find(name) == std::string::npos) return kNotFound;
  auto &f = functions[name];
  if (!f) f.reset(new Function{name});
  *function = f.get();
  return 0;
}
CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  ENTER(true);
  if (flags != 1) return kInvalid;
  auto own = std::make_unique<Stream>();
  *stream = own.get();
  streams[*stream] = std::move(own);
  return 0;
}
CUresult cuStreamDestroy_v2(CUstream stream) {
  ENTER(true);
  if (!streams.count(stream)) return kBadHandle;
  if (stream->capture) complain("stream destroyed while it captures");
  streams.erase(stream);
  return 0;
}
CUresult cuStreamSynchronize(CUstream stream) {
  ENTER(true);
  if (!streams.count(stream)) return kBadHandle;
  if (stream->capture) {
    stream->broken = true;
    return kInCapture;
  }
  Work work;
  work.swap(stream->queued);
  for (auto &w : work)
    if (const CUresult code = w()) return code;
  return 0;
}
CUresult cuStreamBeginCapture_v2(CUstream stream, int mode) {
  ENTER(true);
  if (mode < 0 || mode > 2 || !streams.count(stream) || stream->capture) return kInvalid;
  auto graph = std::make_unique<Graph>();
  stream->capture = graph.get();
  stream->broken = false;
  graphs[stream->capture] = std::move(graph);
  return 0;
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
  const CUresult asked = enter(__func__, true);
  if (!stream->capture) return kInvalid;
  *graph = stream->capture;
  stream->capture = nullptr;
  if (asked || stream->broken) {
    graphs.erase(*graph);
    *graph = nullptr;
    return asked ? asked : kCaptureInvalid;
  }
  return 0;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph, unsigned long long flags) {
  ENTER(true);
  if (flags || !graphs.count(graph)) return kInvalid;
  auto own = std::make_unique<Graph>(*graph);
  *exec = own.get();
  graphs[*exec] = std::move(own);
  return 0;
}
CUresult cuGraphDestroy(CUgraph graph) {
  ENTER(true);
  return graphs.erase(graph) ? 0 : kInvalid;
}
CUresult cuGraphExecDestroy(CUgraphExec exec) {
  ENTER(true);
  if (pending()) complain("graph destroyed under queued work");
  return graphs.erase(exec) ? 0 : kInvalid;
}
CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  ENTER(true);
  if (!graphs.count(exec)) return kInvalid;
  for (auto &w : exec->work)
    if (const CUresult code = push(stream, w)) return code;
  return 0;
}
CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
  ENTER(true);
  if (capturing()) return kInCapture;
  if (!bytes) return kInvalid;
  void *block = nullptr;
  if (posix_memalign(&block, 256, bytes + kGuard)) return kNoMemory;
  memset(block, 0xff, bytes + kGuard);
  *address = reinterpret_cast<CUdeviceptr>(block);
  memory[*address] = bytes;
  return 0;
}
CUresult cuMemFree_v2(CUdeviceptr address) {
  ENTER(true);
  const auto found = memory.find(address);
  if (found == memory.end()) return kInvalid;
  if (pending()) complain("device memory freed under queued work");
  const auto *end = reinterpret_cast<unsigned char *>(address) + found->second;
  for (size_t i = 0; i < kGuard; i++)
    if (end[i] != 0xff) complain("written beyond an allocation"), i = kGuard;
  free(reinterpret_cast<void *>(address));
  memory.erase(found);
  return 0;
}
CUresult cuMemAllocHost_v2(void **pointer, size_t bytes) {
  ENTER(true);
  if (capturing()) return kInCapture;
  if (!bytes || posix_memalign(pointer, 256, bytes)) return kNoMemory;
  memset(*pointer, 0xff, bytes);
  pinned[static_cast<char *>(*pointer)] = bytes;
  return 0;
}
CUresult cuMemFreeHost(void *pointer) {
  ENTER(true);
  if (!pinned.erase(static_cast<char *>(pointer))) return kInvalid;
  if (pending()) complain("host memory freed under queued work");
  free(pointer);
  return 0;
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
  ENTER(true);
  if (!holds(memory, to, bytes)) return kInvalid;
  if (holds(pinned, reinterpret_cast<uintptr_t>(from), bytes))  // read when its turn comes
    return push(stream, [=] {
      memcpy(reinterpret_cast<void *>(to), from, bytes);
      return 0;
    });
  if (stream->capture) complain("pageable memory in a capture");
  const std::string copy(static_cast<const char *>(from), bytes);
  return push(stream, [=] {
    memcpy(reinterpret_cast<void *>(to), copy.data(), bytes);
    return 0;
  });
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
  ENTER(true);
  if (!holds(memory, from, bytes)) return kInvalid;
  if (!holds(pinned, reinterpret_cast<uintptr_t>(to), bytes)) return kInvalid;
  return push(stream, [=] {
    memcpy(to, reinterpret_cast<void *>(from), bytes);
    return 0;
  });
}

static CUresult launch(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                       unsigned bz, unsigned shared, CUstream stream, void **args,
                       bool cooperative) {
  const unsigned limit = f->name == "mse_lstm_any" ? 1024 : 256;  // __launch_bounds__
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !bx || bx > limit || by != 1 || bz != 1 ||
      shared > 48 * 1024)
    return kInvalid;
  // As many blocks as surely fit at once: one per multiprocessor.
  if (cooperative && gx * gy * gz > static_cast<unsigned>(processors)) return kTooLarge;
  if (cooperative != (f->name.compare(0, 8, "mse_fuse") == 0)) complain("cooperative: " + f->name);
  // A driver copies the arguments at the call; 88 and 168 bytes: Modality and Fusion of fusion.cu.
  std::vector<size_t> sizes = {88, 88};
  if (f->name == "mse_project") sizes.push_back(8);
  if (f->name.compare(0, 8, "mse_fuse") == 0) sizes.push_back(168);
  auto kept = std::make_shared<std::vector<std::string>>();
  for (size_t i = 0; i < sizes.size(); i++)
    kept->emplace_back(static_cast<const char *>(args[i]), sizes[i]);
  const std::string name = f->name;
  return push(stream, [=] {
    std::vector<void *> pointers;
    for (auto &a : *kept) pointers.push_back(&a[0]);
    return emulated_launch(name.c_str(), gx, gy, gz, bx, shared, cooperative, 0, pointers.data())
               ? static_cast<int>(kFailed)
               : 0;
  });
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, CUstream stream, void **args,
                        void **extra) {
  ENTER(true);
  if (extra) return kInvalid;
  return launch(f, gx, gy, gz, bx, by, bz, shared, stream, args, false);
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                   unsigned by, unsigned bz, unsigned shared, CUstream stream,
                                   void **args) {
  ENTER(true);
  return launch(f, gx, gy, gz, bx, by, bz, shared, stream, args, true);
}
}

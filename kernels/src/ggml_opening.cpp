// What llama.cpp does to open a model, without the work that nobody needs. By name, as ggml_mapped.cpp's
// products do, ours stand in for two of its functions:
//
// `gguf_init_from_file` reads a file's header string by string, and formats all of it for the log. Where
// somebody else looks after the vocabulary, which is nearly all of a header, llama.cpp reads the same header
// with one text of zeros where those entries stood, so that the weights lie where the file has them.
//
// `ggml_backend_buffer_clear` fills a new cache with zeros, page after page, though fresh pages are zero and
// most of a cache's are never used. Ours gives the pages back: those that are touched later come as zeros.
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct File;    // gguf_context
struct Buffer;  // ggml_backend_buffer

struct Params {  // gguf_init_params
  bool no_alloc;
  void **tensors;
};

using Read = size_t (*)(void *, void *, uint64_t, size_t);

// Llama.cpp's own; what it has not is null.
struct Functions {
  File *(*from_file)(const char *, Params);
  File *(*from_callback)(Read, void *, size_t, uint64_t, Params);
  size_t (*data_offset)(const File *);
  void (*free)(File *);
  void (*free_tensors)(void *);
  void (*clear)(Buffer *, uint8_t);
  const char *(*name)(Buffer *);
  void *(*base)(Buffer *);
  size_t (*size)(Buffer *);
};

// Bytes [0, head_size) and [size - tail_size, size) of a header, zeros between; the data begin at `data`.
struct Header {
  const char *path;
  const char *head, *tail;
  uint64_t head_size, tail_size, size, data;
};

Functions theirs;
std::atomic<bool> known{false};
std::atomic<uint64_t> headers{0}, bytes{0};
thread_local const Header *header = nullptr;

// The function of that name for the library that calls at `caller`, while llama.cpp's are not known: another
// package's llama.cpp may be bound to ours, too. A library's handle finds what it is linked with, not ours.
template <typename Function>
Function find(const char *name, void *caller) {
  Dl_info about;
  void *library = dladdr(caller, &about) ? dlopen(about.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
  void *found = library ? dlsym(library, name) : nullptr;
  if (!found) {  // nothing that could be returned would be told from a result
    fprintf(stderr, "mse_ggml: %s is called before llama.cpp's own is known\n", name);
    abort();
  }
  dlclose(library);  // whoever calls keeps it
  return reinterpret_cast<Function>(found);
}

// What of [at, at + n) lies in [begin, begin + size), from `from`.
void copy(char *out, uint64_t at, size_t n, const char *from, uint64_t begin, uint64_t size) {
  const uint64_t first = at > begin ? at : begin;
  const uint64_t last = at + n < begin + size ? at + n : begin + size;
  if (first < last) memcpy(out + (first - at), from + (first - begin), last - first);
}

size_t read(void *user, void *out, uint64_t at, size_t n) {
  const auto &h = *static_cast<const Header *>(user);
  if (at >= h.size) return 0;
  if (n > h.size - at) n = h.size - at;
  memset(out, 0, n);
  copy(static_cast<char *>(out), at, n, h.head, 0, h.head_size);
  copy(static_cast<char *>(out), at, n, h.tail, h.size - h.tail_size, h.tail_size);
  return n;
}

}  // namespace

// For files that this thread opens from now on; null: as they are. It must live as long.
EXPORT void mse_opening_header(const void *wanted) { header = static_cast<const Header *>(wanted); }

EXPORT void mse_opening_use(const void *functions) {
  theirs = *static_cast<const Functions *>(functions);
  known.store(true, std::memory_order_release);
}

// Headers that were shortened, and bytes given back instead of written.
EXPORT uint64_t mse_opening_headers(void) { return headers.load(std::memory_order_relaxed); }
EXPORT uint64_t mse_opening_bytes(void) { return bytes.load(std::memory_order_relaxed); }

EXPORT File *gguf_init_from_file(const char *path, Params params) noexcept {
  if (!known.load(std::memory_order_acquire))
    return find<decltype(theirs.from_file)>("gguf_init_from_file", __builtin_return_address(0))(path, params);
  if (const Header *h = header; h && !strcmp(h->path, path)) {
    File *found = theirs.from_callback(&read, const_cast<Header *>(h), SIZE_MAX, h->data, params);
    if (found && theirs.data_offset(found) == h->data) {
      headers.fetch_add(1, std::memory_order_relaxed);
      return found;
    }
    if (found) {
      theirs.free(found);
      if (params.tensors) theirs.free_tensors(*params.tensors);
    }
  }
  return theirs.from_file(path, params);
}

EXPORT void ggml_backend_buffer_clear(Buffer *buffer, uint8_t value) noexcept {
  if (!known.load(std::memory_order_acquire))
    return find<decltype(theirs.clear)>("ggml_backend_buffer_clear", __builtin_return_address(0))(buffer, value);
  // "CPU" is memory from malloc, which no file and no other process shares.
  if (value == 0 && theirs.name && theirs.base && theirs.size && !strcmp(theirs.name(buffer), "CPU")) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = reinterpret_cast<uintptr_t>(theirs.base(buffer)), end = begin + theirs.size(buffer);
    const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
    if (first < last && !madvise(reinterpret_cast<void *>(first), last - first, MADV_DONTNEED)) {
      memset(reinterpret_cast<void *>(begin), 0, first - begin);
      memset(reinterpret_cast<void *>(last), 0, end - last);
      bytes.fetch_add(last - first, std::memory_order_relaxed);
      return;
    }
  }
  theirs.clear(buffer, value);
}

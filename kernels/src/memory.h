// Aligned memory; nothing is allocated after mse_open.
#ifndef MSE_MEMORY_H
#define MSE_MEMORY_H

#include <stddef.h>

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mse {

constexpr size_t kLine = 64;
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kHugeFrom = size_t{1} << 19;

template <class T> class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { release(); }

  // Zeroed; the old contents are gone. Throws std::bad_alloc.
  T *reset(size_t n) {
    release();
    size_t bytes = n * sizeof(T) + kLine;
    align_ = kLine;
#if defined(__linux__)
    // A wide matrix is streamed once per call, 1024 small pages of 4 MB: huge pages save the page
    // walks.
    if (bytes >= kHugeFrom) {
      align_ = kHugePage;
      bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    }
#endif
    data_ = static_cast<T *>(::operator new(bytes, std::align_val_t{align_}));
    size_ = n;
#if defined(__linux__)
    // Wishes; refusal is fine. Memory that malloc takes up again has small pages: they go first.
    if (align_ == kHugePage) {
      madvise(data_, bytes, MADV_DONTNEED);
      madvise(data_, bytes, MADV_HUGEPAGE);
    }
#endif
    for (size_t i = 0; i < n; i++) data_[i] = T();
    return data_;
  }
  T *get() const { return data_; }
  T *at(size_t i) const { return data_ + i; }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  void release() {
    ::operator delete(data_, std::align_val_t{align_});
    data_ = nullptr;
    size_ = 0;
  }

  T *data_ = nullptr;
  size_t size_ = 0, align_ = kLine;
};

}  // namespace mse
#endif

// Memory aligned to a cache line, counted; nothing is allocated after mse_open.
#ifndef MSE_MEMORY_H
#define MSE_MEMORY_H

#include <stdint.h>

#include <new>

namespace mse {

constexpr std::align_val_t kLine{64};

template <class T> class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;
  ~Buffer() { ::operator delete(data_, kLine); }

  // Zeroed; the old contents are gone. Throws std::bad_alloc.
  T *reset(size_t n) {
    ::operator delete(data_, kLine);
    data_ = nullptr;
    size_ = n;
    data_ = static_cast<T *>(::operator new(n * sizeof(T) + 64, kLine));
    for (size_t i = 0; i < n; i++) data_[i] = T();
    return data_;
  }
  T *get() const { return data_; }
  T *at(size_t i) const { return data_ + i; }
  int64_t bytes() const { return static_cast<int64_t>(size_ * sizeof(T)); }

 private:
  T *data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace mse
#endif

// The one long loop over a GGUF header: a large vocabulary has 300,000 strings, one after the other.
#include <cstring>

#include "abi.h"

extern "C" int64_t mse_skip_strings(const uint8_t *data, int64_t at, int64_t size, int64_t count) {
  for (; count > 0; count--) {
    uint64_t length;
    if (size - at < static_cast<int64_t>(sizeof length)) return -1;
    memcpy(&length, data + at, sizeof length);  // little-endian, as every machine we run on
    at += sizeof length;
    if (length > static_cast<uint64_t>(size - at)) return -1;
    at += static_cast<int64_t>(length);
  }
  return at;
}

// The long loops over a GGUF header: a large vocabulary has 300,000 strings, one after the other.
#include <algorithm>
#include <cstring>
#include <vector>

#include "abi.h"

namespace {

// The next string's bytes, and `at` moved past it; null where it would not end within `size`.
const uint8_t *next(const uint8_t *data, int64_t *at, int64_t size, int64_t *length) {
  uint64_t count;
  if (size - *at < static_cast<int64_t>(sizeof count)) return nullptr;
  memcpy(&count, data + *at, sizeof count);  // little-endian, as every machine we run on
  *at += sizeof count;
  if (count > static_cast<uint64_t>(size - *at)) return nullptr;
  *length = static_cast<int64_t>(count);
  *at += *length;
  return data + *at - *length;
}

// Which strings occur in a text: its suffixes, sorted, and a table of all two bytes in it, since most
// strings fail there.
class Text {
 public:
  Text(const uint8_t *text, int64_t length) : text_(text), length_(length), two_(1 << 16) {
    for (int64_t i = 0; i < length; i++) suffixes_.push_back(i);
    std::sort(suffixes_.begin(), suffixes_.end(),
              [this](int64_t a, int64_t b) { return compare(a, text_ + b, rest(b)) < 0; });
    for (int64_t i = 0; i + 1 < length; i++) two_[text[i] | text[i + 1] << 8] = true;
  }

  bool has(const uint8_t *string, int64_t length) const {
    if (length < 1 || length > length_ || (length > 1 && !two_[string[0] | string[1] << 8])) return false;
    const auto found = std::lower_bound(
        suffixes_.begin(), suffixes_.end(), 0,
        [&](int64_t suffix, int) { return compare(suffix, string, std::min(length, kDepth)) < 0; });
    if (length <= kDepth)
      return found != suffixes_.end() && rest(*found) >= length && !memcmp(text_ + *found, string, length);
    return std::search(text_, text_ + length_, string, string + length) != text_ + length_;
  }

 private:
  static constexpr int64_t kDepth = 64;  // bytes that are sorted: of one letter, all would take too long

  int64_t rest(int64_t suffix) const { return std::min(length_ - suffix, kDepth); }

  int compare(int64_t suffix, const uint8_t *string, int64_t length) const {
    const int64_t mine = rest(suffix);
    const int order = memcmp(text_ + suffix, string, std::min(mine, length));
    return order ? order : mine < length ? -1 : 0;
  }

  const uint8_t *text_;
  int64_t length_;
  std::vector<int64_t> suffixes_;
  std::vector<bool> two_;
};

}  // namespace

extern "C" int64_t mse_skip_strings(const uint8_t *data, int64_t at, int64_t size, int64_t count) {
  for (int64_t length; count > 0; count--)
    if (!next(data, &at, size, &length)) return -1;
  return at;
}

extern "C" int64_t mse_find_strings(const uint8_t *data, int64_t at, int64_t size, int64_t count,
                                    const uint8_t *text, int64_t text_length, const uint8_t *always,
                                    int32_t pairs, int64_t *found, int64_t room) {
  const Text within(text, text_length);
  std::vector<uint8_t> joined;
  int64_t n = 0;
  for (int64_t i = 0, length; i < count; i++) {
    const uint8_t *string = next(data, &at, size, &length);
    if (!string) return -1;
    const int64_t start = at - length;
    if (pairs) {
      const auto *space = length < 2 || length > text_length + 1
                              ? nullptr
                              : static_cast<const uint8_t *>(memchr(string + 1, ' ', length - 1));
      if (!space) continue;
      joined.assign(string, space);
      joined.insert(joined.end(), space + 1, string + length);
      if (!within.has(joined.data(), length - 1)) continue;
    } else if (!(always && always[i]) && !within.has(string, length)) {
      continue;
    }
    if (n == room) return -2;
    found[3 * n] = i, found[3 * n + 1] = start, found[3 * n + 2] = length;
    n++;
  }
  return n;
}

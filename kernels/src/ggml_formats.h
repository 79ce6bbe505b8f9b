// The formats of mapped weights, unpacked for tiles (ggml_mapped_amx.cpp): sixteen rows of the file at a
// time, a step of depth as far as one scale reaches.
#ifndef MSE_GGML_FORMATS_H
#define MSE_GGML_FORMATS_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MSE_UNROLL _Pragma("GCC unroll 16")

namespace mse_ggml {

constexpr int kTile = 16;

// Sixteen columns of weights in one step.
template <int D>
struct Columns {
  int8_t values[kTile][D];
  float scale[kTile];
  float low[kTile];  // what is taken off each value, times the scale
};

inline __m512i offsets(size_t stride) {
  const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_mullo_epi32(row, _mm512_set1_epi32(static_cast<int>(stride)));
}

// Four bytes of each of sixteen rows.
inline __m512i fours(const uint8_t *at, __m512i rows) { return _mm512_i32gather_epi32(rows, at, 1); }

inline __m512 halves(__m512i low) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(low)); }

// The formats: kBytes of a block of kSteps steps of kDepth values. unpack: of sixteen rows, `at` the
// first one's block.

struct Block32 {
  static constexpr int kSteps = 1, kDepth = 32, kRowBytes = 34;
  static constexpr bool kSuper = false, kLow = false;
};

struct Q8_0 : Block32 {
  static constexpr int kBytes = 34;
  static constexpr bool kAsItIs = true;
  static constexpr size_t kValues = 2;

  static void unpack(const uint8_t *at, size_t, __m512i rows, Columns<32> *to) {
    _mm512_storeu_ps(to->scale, halves(fours(at, rows)));
  }
};

struct Q4_0 : Block32 {
  static constexpr int kBytes = 18;
  static constexpr bool kAsItIs = false;

  static void unpack(const uint8_t *at, size_t stride, __m512i rows, Columns<32> *to) {
    const __m512 scale = _mm512_mul_ps(halves(fours(at, rows)), _mm512_set1_ps(1.0f / 16));
    _mm512_storeu_ps(to->scale, scale);
    // A nibble in the upper half of its byte, its sign flipped, is a signed one times 16.
    const __m512i up = _mm512_setr_epi64(0x4000400040004, 0x4000400040004, 0, 0, 0x4000400040004,
                                         0x4000400040004, 0, 0);
    const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xf0));
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    MSE_UNROLL
    for (int r = 0; r < kTile; r += 2) {
      const uint8_t *from = at + r * stride + 2;
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + stride));
      __m512i both = _mm512_broadcast_i32x4(a);
      both = _mm512_mask_broadcast_i32x4(both, 0xff00, b);
      both = _mm512_sllv_epi16(both, up);
      both = _mm512_ternarylogic_epi32(both, upper, sign, 0x6a);  // (both & upper) ^ sign
      _mm512_storeu_si512(to->values[r], both);
    }
  }
};

struct Q5_0 : Block32 {
  static constexpr int kBytes = 22;
  static constexpr bool kAsItIs = false;

  static void unpack(const uint8_t *at, size_t stride, __m512i rows, Columns<32> *to) {
    _mm512_storeu_ps(to->scale, halves(fours(at, rows)));
    const __m256i down = _mm256_setr_epi64x(0, 0, 0x4000400040004, 0x4000400040004);
    const __m256i nibble = _mm256_set1_epi8(0x0f), sixteen = _mm256_set1_epi8(16);
    MSE_UNROLL
    for (int r = 0; r < kTile; r++) {
      const uint8_t *from = at + r * stride;
      __mmask32 positive;  // the fifth bits
      memcpy(&positive, from + 2, sizeof positive);
      const __m128i fours = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 6));
      __m256i x = _mm256_srlv_epi16(_mm256_broadcastsi128_si256(fours), down);
      x = _mm256_and_si256(x, nibble);
      x = _mm256_mask_sub_epi8(x, ~positive, x, sixteen);
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(to->values[r]), x);
    }
  }
};

struct Block256 {
  static constexpr int kRowBytes = 292;
  static constexpr bool kSuper = true;
};

// Scales and lows of eight steps of sixteen rows, six bits each, in twelve bytes (ggml's
// get_scale_min_k4).
inline void six_bits(const uint8_t *at, __m512i rows, Columns<32> *to) {
  const __m512i both = fours(at, rows);
  const __m512 d = halves(both), dmin = halves(_mm512_srli_epi32(both, 16));
  const __m512i a = fours(at + 4, rows), b = fours(at + 8, rows), c = fours(at + 12, rows);
  const __m512i six = _mm512_set1_epi32(0x3f3f3f3f), four = _mm512_set1_epi32(0x0f0f0f0f);
  const __m512i top = _mm512_set1_epi32(0x30303030);
  const __m512i scale[] = {
      _mm512_and_si512(a, six),
      _mm512_or_si512(_mm512_and_si512(c, four), _mm512_and_si512(_mm512_srli_epi32(a, 2), top))};
  const __m512i low[] = {
      _mm512_and_si512(b, six),
      _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(c, 4), four),
                      _mm512_and_si512(_mm512_srli_epi32(b, 2), top))};
  const __m512i byte = _mm512_set1_epi32(0xff);
  MSE_UNROLL
  for (int s = 0; s < 8; s++) {
    const __m512i u = _mm512_and_si512(_mm512_srli_epi32(scale[s / 4], s % 4 * 8), byte);
    const __m512i v = _mm512_and_si512(_mm512_srli_epi32(low[s / 4], s % 4 * 8), byte);
    _mm512_storeu_ps(to[s].scale, _mm512_mul_ps(d, _mm512_cvtepi32_ps(u)));
    _mm512_storeu_ps(to[s].low, _mm512_mul_ps(dmin, _mm512_cvtepi32_ps(v)));
  }
}

// Two steps of one row, 32 values each.
inline void store_two(Columns<32> *first, Columns<32> *second, int row, __m512i values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(first->values[row]), _mm512_castsi512_si256(values));
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(second->values[row]),
                      _mm512_extracti64x4_epi64(values, 1));
}

struct Q4_K : Block256 {
  static constexpr int kSteps = 8, kDepth = 32, kBytes = 144;
  static constexpr bool kLow = true, kAsItIs = false;

  static void unpack(const uint8_t *at, size_t stride, __m512i rows, Columns<32> *to) {
    six_bits(at, rows, to);
    const __m512i nibble = _mm512_set1_epi8(0x0f);
    for (int r = 0; r < kTile; r++) {
      const uint8_t *from = at + r * stride + 16;
      MSE_UNROLL
      for (int half = 0; half < 2; half++) {
        const __m512i x = _mm512_loadu_si512(from + 64 * half);
        Columns<32> *step = to + 4 * half;
        store_two(step, step + 2, r, _mm512_and_si512(x, nibble));
        store_two(step + 1, step + 3, r, _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble));
      }
    }
  }
};

struct Q5_K : Block256 {
  static constexpr int kSteps = 8, kDepth = 32, kBytes = 176;
  static constexpr bool kLow = true, kAsItIs = false;

  static void unpack(const uint8_t *at, size_t stride, __m512i rows, Columns<32> *to) {
    six_bits(at, rows, to);
    const __m512i nibble = _mm512_set1_epi8(0x0f), fifth = _mm512_set1_epi8(0x10);
    for (int r = 0; r < kTile; r++) {
      const uint8_t *from = at + r * stride;
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + 16));
      const __m512i high = _mm512_broadcast_i64x4(bits);  // bit s is of step s
      MSE_UNROLL
      for (int half = 0; half < 2; half++) {
        const __m512i x = _mm512_loadu_si512(from + 48 + 64 * half);
        Columns<32> *step = to + 4 * half;
        // Steps 4 half and 4 half + 2: their bits to place 4; then those between.
        const int s = 4 * half;
        __m512i even = _mm512_mask_blend_epi64(0xf0, at_four(high, s), at_four(high, s + 2));
        __m512i odd = _mm512_mask_blend_epi64(0xf0, at_four(high, s + 1), at_four(high, s + 3));
        even = _mm512_or_si512(_mm512_and_si512(x, nibble), _mm512_and_si512(even, fifth));
        odd = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(x, 4), nibble),
                              _mm512_and_si512(odd, fifth));
        store_two(step, step + 2, r, even);
        store_two(step + 1, step + 3, r, odd);
      }
    }
  }

 private:
  static __m512i at_four(__m512i bits, int place) {
    return place > 4 ? _mm512_srli_epi16(bits, place - 4) : _mm512_slli_epi16(bits, 4 - place);
  }
};

struct Q6_K : Block256 {
  static constexpr int kSteps = 16, kDepth = 16, kBytes = 210;
  static constexpr bool kLow = false, kAsItIs = false;

  static void unpack(const uint8_t *at, size_t stride, __m512i rows, Columns<16> *to) {
    // The half scale is the block's last two bytes.
    const __m512 d = halves(_mm512_srli_epi32(fours(at + 206, rows), 16));
    MSE_UNROLL
    for (int s = 0; s < kSteps; s++) {
      const __m512i four = fours(at + 192 + s / 4 * 4, rows);
      const __m512i scale = _mm512_srai_epi32(_mm512_slli_epi32(four, 24 - s % 4 * 8), 24);
      _mm512_storeu_ps(to[s].scale, _mm512_mul_ps(d, _mm512_cvtepi32_ps(scale)));
    }
    const __m512i nibble = _mm512_set1_epi8(0x0f), top = _mm512_set1_epi8(0x30);
    const __m512i middle = _mm512_set1_epi8(32);
    for (int r = 0; r < kTile; r++) {
      const uint8_t *from = at + r * stride;
      MSE_UNROLL
      for (int half = 0; half < 2; half++) {
        const __m512i x = _mm512_loadu_si512(from + 64 * half);
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + 128 + 32 * half));
        const __m512i y = _mm512_broadcast_i64x4(bits);
        // Bits 0-1, 2-3, 4-5 and 6-7 are the upper ones of 32 values each.
        const __m512i first = _mm512_mask_blend_epi64(0xf0, _mm512_slli_epi16(y, 4), _mm512_slli_epi16(y, 2));
        const __m512i last = _mm512_mask_blend_epi64(0xf0, y, _mm512_srli_epi16(y, 2));
        const __m512i sixes[] = {
            _mm512_or_si512(_mm512_and_si512(x, nibble), _mm512_and_si512(first, top)),
            _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(x, 4), nibble),
                            _mm512_and_si512(last, top))};
        MSE_UNROLL
        for (int quarter = 0; quarter < 2; quarter++) {
          const __m512i v = _mm512_sub_epi8(sixes[quarter], middle);
          Columns<16> *step = to + 8 * half + 4 * quarter;
          store(step[0].values[r], _mm512_castsi512_si128(v));
          store(step[1].values[r], _mm512_extracti32x4_epi32(v, 1));
          store(step[2].values[r], _mm512_extracti32x4_epi32(v, 2));
          store(step[3].values[r], _mm512_extracti32x4_epi32(v, 3));
        }
      }
    }
  }

 private:
  static void store(int8_t *to, __m128i values) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), values);
  }
};

}  // namespace mse_ggml
#endif

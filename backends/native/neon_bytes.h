// Int8MatMul and Int4MatMul of both ARM variants, written over the instruction that multiplies and adds.
// Knows byte layouts and sums; in an unnamed namespace, so that each variant keeps its own copy.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "neon_tiles.h"

namespace microvlm {
namespace {

// packed[n, k] = q + 128. Turning the top bit makes the byte q itself.
template <class Mac>
struct Int8 {
  static constexpr int kAloneRows = 4, kMostTokens = 4;

  template <int kRows, int kTokens>
  __attribute__((noinline)) static void tile(const Tokens& tokens, const Matrix& matrix, int64_t n, int64_t m,
                                             int32_t* sums) {
    const int64_t columns = matrix.columns, whole = columns / 16 * 16;
    const uint8_t* packed = matrix.packed + n * columns;
    const int8_t* codes = tokens.codes + m * tokens.stride;
    int32x4_t total[kRows][kTokens];
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r)
    MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) total[r][t] = vdupq_n_s32(0);
    int64_t k = 0;
    for (; k + 32 <= whole; k += 32) {
      step(packed + k, columns, codes + k, tokens.stride, total);
      step(packed + k + 16, columns, codes + k + 16, tokens.stride, total);
    }
    for (; k < whole; k += 16) step(packed + k, columns, codes + k, tokens.stride, total);
    if (k < columns) {
      // Codes are padded with zeros, packed rows are not: the bytes behind the last one may be nobody's.
      uint8_t rest[kRows][16] = {};
      for (int r = 0; r < kRows; ++r) std::memcpy(rest[r], packed + r * columns + k, columns - k);
      step(rest[0], 16, codes + k, tokens.stride, total);
    }
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r)
    MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) sums[(m + t) * matrix.rows + n + r] = vaddvq_s32(total[r][t]);
  }

 private:
  template <int kRows, int kTokens>
  static MICROVLM_INLINE void step(const uint8_t* packed, int64_t packed_stride, const int8_t* codes, int64_t stride,
                                   int32x4_t (&total)[kRows][kTokens]) {
    const uint8x16_t top_bit = vdupq_n_u8(128);
    int8x16_t x[kTokens];
    MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) x[t] = vld1q_s8(codes + t * stride);
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) {
      const int8x16_t q = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(packed + r * packed_stride), top_bit));
      MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) Mac::add_wide_products(total[r][t], q, x[t]);
    }
  }
};

// packed[n, j] = (q[2j] + 8) | (q[2j + 1] + 8) << 4, 16 bytes a group; codes come split the same way. Products are
// made with q + 8, and 8 times the sum of the group's codes is taken off before the group's multiplier is applied.
template <class Mac>
struct Int4 {
  static constexpr int kAloneRows = 4, kMostTokens = 4;

  template <int kRows, int kTokens>
  __attribute__((noinline)) static void tile(const Tokens& tokens, const Matrix& matrix, int64_t n, int64_t m,
                                             int32_t* sums) {
    const int64_t groups = (matrix.columns + kGroup - 1) / kGroup;
    const uint8_t* packed = matrix.packed + n * groups * (kGroup / 2);
    const uint8_t* multiplier = matrix.multiplier + n * groups;
    const int8_t* codes = tokens.codes + m * tokens.stride;
    const int32_t* group_total = tokens.group_totals + m * groups;
    const uint8x16_t low_four = vdupq_n_u8(15);
    int32x4_t total[kRows][kTokens];
    // Unsigned: with q + 8 up to 15 the sum may pass 2^31 on its way to an exact result, and then wraps back.
    uint32_t offset[kRows][kTokens] = {};
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r)
    MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) total[r][t] = vdupq_n_s32(0);
    for (int64_t g = 0; g < groups; ++g) {
      int8x16_t even[kTokens], odd[kTokens];
      MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) {
        even[t] = vld1q_s8(codes + t * tokens.stride + g * kGroup);
        odd[t] = vld1q_s8(codes + t * tokens.stride + g * kGroup + kGroup / 2);
      }
      MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) {
        const uint8x16_t bytes = vld1q_u8(packed + (r * groups + g) * (kGroup / 2));
        const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(bytes, low_four));
        const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
        const int16_t factor = multiplier[r * groups + g];
        MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) {
          Mac::add_group(total[r][t], low, high, even[t], odd[t], factor);
          offset[r][t] += static_cast<uint32_t>(factor) * static_cast<uint32_t>(group_total[t * groups + g]);
        }
      }
    }
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r)
    MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) {
      const uint32_t digits = static_cast<uint32_t>(vaddvq_s32(total[r][t]));
      sums[(m + t) * matrix.rows + n + r] = static_cast<int32_t>(digits - 8 * offset[r][t]);
    }
  }
};

}  // namespace
}  // namespace microvlm

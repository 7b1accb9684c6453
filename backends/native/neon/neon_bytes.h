// Int8MatMul and Int4MatMul of both ARM variants, over the multiply-add instruction `Mac` of a variant. Handles byte
// layouts and sums. In an unnamed namespace, so that each variant keeps its own copy.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "neon_tiles.h"

namespace microvlm {
namespace {

// packed[n, k] = q + 128. Flipping the top bit makes the byte q itself.
template <class Mac, int kMany>
struct Int8 {
  static constexpr int kSingleTokenRows = 4, kManyTokenRows = kMany, kMaxTokens = 4;

  template <int kRows, int kTokens>
  __attribute__((noinline)) static void tile(const Tokens& tokens, const Matrix& matrix, int64_t n, int64_t m,
                                             int32_t* sums) {
    constexpr int64_t kStep = 64;
    const int64_t columns = matrix.columns, whole = columns / kStep * kStep;
    const uint8_t* packed[kRows];
    const int8_t* activations_q8[kTokens];
    int32x4_t total[kRows][kTokens];
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) packed[r] = matrix.packed + (n + r) * columns;
    MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) activations_q8[t] =
        tokens.activations_q8 + (m + t) * tokens.stride;
    MICROVLM_EACH_PAIR total[r][t] = vdupq_n_s32(0);
    for (int64_t k = 0; k < whole; k += kStep) {
      MICROVLM_UNROLL for (int64_t i = 0; i < kStep; i += 16) add_columns(packed, activations_q8, total);
    }
    if (whole < columns) {
      // Activations are padded with zeros, packed rows are not: bytes behind the last row may belong to others.
      uint8_t rest[kRows][kStep] = {};
      for (int r = 0; r < kRows; ++r) {
        std::memcpy(rest[r], packed[r], columns - whole);
        packed[r] = rest[r];
      }
      MICROVLM_UNROLL for (int64_t i = 0; i < kStep; i += 16) add_columns(packed, activations_q8, total);
    }
    MICROVLM_EACH_PAIR sums[(m + t) * matrix.rows + n + r] = vaddvq_s32(total[r][t]);
  }

 private:
  // Sixteen columns; advances the pointers.
  template <int kRows, int kTokens>
  static MICROVLM_INLINE void add_columns(const uint8_t* (&packed)[kRows], const int8_t* (&activations_q8)[kTokens],
                                          int32x4_t (&total)[kRows][kTokens]) {
    int8x16_t q[kRows], x[kTokens];
    MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t, activations_q8[t - 1] += 16) x[t] = vld1q_s8(activations_q8[t]);
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r, packed[r - 1] += 16) {
      q[r] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(packed[r]), vdupq_n_u8(128)));
    }
    Mac::add_wide_products(total, q, x);
  }
};

// packed[n, j] = (q[2j] + 8) | (q[2j + 1] + 8) << 4, 16 bytes a group; activations are split the same way. Products use
// q + 8, and multiplier * 8 times the sum of the group's activations is subtracted. With q + 8 up to 15 a sum may pass
// 2^31 on its way to an exact result, and then wraps back.
template <class Mac, int kSingle, int kMany, int kMax>
struct Int4 {
  static constexpr int kSingleTokenRows = kSingle, kManyTokenRows = kMany, kMaxTokens = kMax;

  template <int kRows, int kTokens>
  __attribute__((noinline)) static void tile(const Tokens& tokens, const Matrix& matrix, int64_t n, int64_t m,
                                             int32_t* sums) {
    const int64_t groups = (matrix.columns + kGroup - 1) / kGroup;
    const uint8_t* multiplier = matrix.multiplier + n * groups;
    const int32_t* group_total = tokens.group_totals + m * groups;
    Pointers<kRows, kTokens> pointers;
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) pointers.packed[r] =
        matrix.packed + (n + r) * groups * (kGroup / 2);
    MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) pointers.activations_q8[t] =
        tokens.activations_q8 + (m + t) * tokens.stride;
    int32x4_t total[kRows][kTokens];
    MICROVLM_EACH_PAIR total[r][t] = vdupq_n_s32(0);
    int64_t g = 0;
    for (; g + 8 <= groups; g += 8) {
      typename Mac::Factors factors[kRows];
      int32x4_t excess[kTokens][2];
      MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) {
        excess[t][0] = vshlq_n_s32(vld1q_s32(group_total + t * groups + g), 3);
        excess[t][1] = vshlq_n_s32(vld1q_s32(group_total + t * groups + g + 4), 3);
      }
      MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) {
        const int16x8_t eight = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(multiplier + r * groups + g)));
        factors[r] = Mac::factors(eight);
        MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) {
          total[r][t] = vmlsq_s32(total[r][t], vmovl_s16(vget_low_s16(eight)), excess[t][0]);
          total[r][t] = vmlsq_s32(total[r][t], vmovl_high_s16(eight), excess[t][1]);
        }
      }
      add_groups(pointers, factors, total, std::make_integer_sequence<int, 8>());
    }
    uint32_t excess[kRows][kTokens] = {};
    for (; g < groups; ++g) {
      typename Mac::Factors factors[kRows];
      MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) factors[r] =
          Mac::factors(vdupq_n_s16(multiplier[r * groups + g]));
      MICROVLM_EACH_PAIR excess[r][t] += 8u * multiplier[r * groups + g] * group_total[t * groups + g];
      add_groups(pointers, factors, total, std::make_integer_sequence<int, 1>());
    }
    MICROVLM_EACH_PAIR {
      const uint32_t digits = static_cast<uint32_t>(vaddvq_s32(total[r][t]));
      sums[(m + t) * matrix.rows + n + r] = static_cast<int32_t>(digits - excess[r][t]);
    }
  }

 private:
  template <int kRows, int kTokens>
  struct Pointers {
    const uint8_t* packed[kRows];
    const int8_t* activations_q8[kTokens];
  };

  // One group for each of kLanes, with that lane of the factors; advances the pointers.
  template <int kRows, int kTokens, int... kLanes>
  static MICROVLM_INLINE void add_groups(Pointers<kRows, kTokens>& pointers,
                                         const typename Mac::Factors (&factors)[kRows],
                                         int32x4_t (&total)[kRows][kTokens], std::integer_sequence<int, kLanes...>) {
    (add_group<kLanes>(pointers, factors, total), ...);
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) pointers.packed[r] += sizeof...(kLanes) * kGroup / 2;
    MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) pointers.activations_q8[t] += sizeof...(kLanes) * kGroup;
  }

  template <int kLane, int kRows, int kTokens>
  static MICROVLM_INLINE void add_group(const Pointers<kRows, kTokens>& pointers,
                                        const typename Mac::Factors (&factors)[kRows],
                                        int32x4_t (&total)[kRows][kTokens]) {
    int8x16_t low[kRows], high[kRows], even[kTokens], odd[kTokens];
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) {
      const uint8x16_t bytes = vld1q_u8(pointers.packed[r] + kLane * kGroup / 2);
      low[r] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
      high[r] = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
    }
    MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) {
      even[t] = vld1q_s8(pointers.activations_q8[t] + kLane * kGroup);
      odd[t] = vld1q_s8(pointers.activations_q8[t] + kLane * kGroup + kGroup / 2);
    }
    Mac::template add_group<kLane>(total, low, high, even, odd, factors);
  }
};

}  // namespace
}  // namespace microvlm

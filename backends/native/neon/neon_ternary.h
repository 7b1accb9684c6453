// Computes the ternary products (TernaryMatMul2x4, TernaryMatMul3x5) of both ARM variants, over the multiply-add
// instruction `Mac` of a variant. Handles byte layouts and sums, no floats and no threads. All of it is in an unnamed
// namespace: each variant keeps its own copy, compiled for its own instructions.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "neon_tiles.h"

namespace microvlm {
namespace {

// A `Base` splits 16 packed bytes into one vector of small integers a plane. Isolating a digit costs two instructions,
// a sum of neighbouring digits only one; `separate` recovers the digits' sums later, in integers.
//
// Four digits d + 4 e + 16 f + 64 g in a byte: vectors d, d + 4 e, f + 4 g, g; at most 2, 10, 10, 2.
struct Base4 {
  static constexpr int kPlanes = 4;
  static constexpr int64_t kStep = 64;
  // Columns of 16-bit sums: 192 columns are 24 products a lane, and 24 * 10 * 128 < 2^15.
  static constexpr int64_t kUnit = 192;
  static constexpr int kEagerPlanes = 0;

  const uint8x16_t low_one = vdupq_n_u8(3), low_two = vdupq_n_u8(15);

  MICROVLM_INLINE void split(uint8x16_t packed, int8x16_t (&part)[kPlanes]) const {
    part[0] = vreinterpretq_s8_u8(vandq_u8(packed, low_one));
    part[1] = vreinterpretq_s8_u8(vandq_u8(packed, low_two));
    part[2] = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4));
    part[3] = vreinterpretq_s8_u8(vshrq_n_u8(packed, 6));
  }

  // Works lane by lane, because all steps are linear and every lane of the differences is a multiple of 4.
  static MICROVLM_INLINE void separate(int32x4_t (&sum)[kPlanes]) {
    sum[1] = vshrq_n_s32(vsubq_s32(sum[1], sum[0]), 2);
    sum[2] = vsubq_s32(sum[2], vshlq_n_s32(sum[3], 2));
  }
};

// Digit f = i / 3 % 3 and digit g = i / 9 of i = e + 3 f + 9 g in 0..26, then digit d = i / 3 of i = c + 3 d in 0..8.
// Bytes 243 to 255 are invalid; their quotients 27 and 28 read a zero.
alignas(16) constexpr uint8_t kTables[80] = {
    0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0,  //
    0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0,  //
    0, 0, 0, 1, 1, 1, 2, 2, 2,
};

// Five digits c + 3 d + 9 e + 27 f + 81 g in a byte: with high = byte / 9 and low = byte - 9 high, vectors high = e + 3
// f + 9 g, low = c + 3 d, and f, g, d from tables of 27 and 9 entries; at most 26, 8, 2, 2, 2.
struct Base3 {
  static constexpr int kPlanes = 5;
  static constexpr int64_t kStep = 64;
  // 256 columns are 32 products a lane, and 32 * 8 * 128 = 2^15, reached on the negative side only.
  static constexpr int64_t kUnit = 256;
  // `high` fills 16 bits sooner: 64 columns are 8 products, and 8 * 26 * 128 < 2^15.
  static constexpr int kEagerPlanes = 1;

  // 57 / 512 = 1 / 9 + 1 / 4608: the floor is right for every byte up to 255.
  const uint8x16_t reciprocal = vdupq_n_u8(57), nine = vdupq_n_u8(9);
  uint8x16x2_t digit_f, digit_g;
  uint8x16_t digit_d;

  Base3() {
    // Hides the tables from the compiler, which would otherwise load them again for each use.
    const uint8_t* tables = kTables;
    __asm__("" : "+r"(tables));
    digit_f = vld1q_u8_x2(tables);
    digit_g = vld1q_u8_x2(tables + 32);
    digit_d = vld1q_u8(tables + 64);
  }

  MICROVLM_INLINE void split(uint8x16_t packed, int8x16_t (&part)[kPlanes]) const {
    const uint16x8_t lower = vmull_u8(vget_low_u8(packed), vget_low_u8(reciprocal));
    const uint16x8_t upper = vmull_high_u8(packed, reciprocal);
    const uint8x16_t by_256 = vuzp2q_u8(vreinterpretq_u8_u16(lower), vreinterpretq_u8_u16(upper));
    const uint8x16_t high = vshrq_n_u8(by_256, 1);
    const uint8x16_t low = vmlsq_u8(packed, high, nine);
    part[0] = vreinterpretq_s8_u8(high);
    part[1] = vreinterpretq_s8_u8(low);
    part[2] = vreinterpretq_s8_u8(vqtbl1q_u8(digit_d, low));
    part[3] = vreinterpretq_s8_u8(vqtbl2q_u8(digit_f, high));
    part[4] = vreinterpretq_s8_u8(vqtbl2q_u8(digit_g, high));
  }

  static MICROVLM_INLINE void separate(int32x4_t (&sum)[kPlanes]) {
    const int32x4_t high = sum[0], low = sum[1];
    sum[0] = vmlsq_n_s32(low, sum[2], 3);
    sum[1] = sum[2];
    sum[2] = vmlsq_n_s32(vmlsq_n_s32(high, sum[3], 3), sum[4], 9);
  }
};

// Running sums of kRows packed rows times kTokens tokens: `partial` in the instruction's width, `total` exact.
template <class Mac, class Base, int kRows, int kTokens>
struct Tile {
  static constexpr int kPlanes = Base::kPlanes;
  static constexpr int kEager = Mac::kNarrow ? Base::kEagerPlanes : 0;

  const Base base;
  typename Mac::Partial partial[kRows][kTokens][kPlanes];
  int32x4_t total[kRows][kTokens][kPlanes];

  MICROVLM_INLINE Tile() {
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t)
        MICROVLM_UNROLL for (int p = 0; p < kPlanes; ++p) total[r][t][p] = vdupq_n_s32(0);
  }

  MICROVLM_INLINE void clear(int first, int last) {
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t)
        MICROVLM_UNROLL for (int p = first; p < last; ++p) partial[r][t][p] = Mac::zero();
  }

  MICROVLM_INLINE void widen(int first, int last) {
    MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t)
        MICROVLM_UNROLL for (int p = first; p < last; ++p) Mac::widen(total[r][t][p], partial[r][t][p]);
  }

  // Multiplies kStep columns.
  MICROVLM_INLINE void step(const uint8_t* packed, int64_t packed_stride, const int8_t* activations_q8,
                            int64_t stride) {
    clear(0, kEager);
    MICROVLM_UNROLL for (int64_t k = 0; k < Base::kStep; k += 16) {
      int8x16_t x[kTokens];
      MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) x[t] = vld1q_s8(activations_q8 + t * stride + k);
      MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) {
        int8x16_t part[kPlanes];
        base.split(vld1q_u8(packed + r * packed_stride + k), part);
        MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) Mac::add_products(partial[r][t], part, x[t]);
      }
    }
    widen(0, kEager);
  }
};

// The ternary product of both packings. One token takes kSingle packed rows at a time, more tokens one row and up to
// kMax tokens.
template <class Mac, class Base, int kSingle, int kMax>
struct Ternary {
  static constexpr int kSingleTokenRows = kSingle, kManyTokenRows = 1, kMaxTokens = kMax;

  // Not inlined, so that its loop can be found and counted in a disassembly.
  template <int kRows, int kTokens>
  __attribute__((noinline)) static void tile(const Tokens& tokens, const Matrix& matrix, int64_t r, int64_t m,
                                             int32_t* sums) {
    using T = Tile<Mac, Base, kRows, kTokens>;
    constexpr int64_t kStep = Base::kStep, kUnit = Mac::kNarrow ? Base::kUnit : kMaxColumns;
    const int64_t columns = matrix.columns, whole = columns / kStep * kStep, stride = tokens.stride;
    const uint8_t* packed = matrix.packed + r * columns;
    const int8_t* activations_q8 = tokens.activations_q8 + m * stride;
    T tile;
    int64_t k = 0;
    while (k < whole) {
      const int64_t end = std::min(k + kUnit, whole);
      tile.clear(T::kEager, T::kPlanes);
      do {
        tile.step(packed + k, columns, activations_q8 + k, stride);
        k += kStep;
      } while (k < end);
      tile.widen(T::kEager, T::kPlanes);
    }
    if (k < columns) {
      // Activations are padded with zeros, packed rows are not: bytes behind the last row may belong to others.
      uint8_t rest[kRows][kStep] = {};
      for (int i = 0; i < kRows; ++i) std::memcpy(rest[i], packed + i * columns + k, columns - k);
      tile.clear(T::kEager, T::kPlanes);
      tile.step(rest[0], kStep, activations_q8 + k, stride);
      tile.widen(T::kEager, T::kPlanes);
    }
    MICROVLM_UNROLL for (int i = 0; i < kRows; ++i) MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t) {
      store(tile.total[i][t], tokens.totals[m + t], matrix, r + i, sums + (m + t) * matrix.rows);
    }
  }

 private:
  // Turns sums of digits into sums of trits and stores each in its plane's row; the last planes may lack the row.
  static MICROVLM_INLINE void store(int32x4_t (&total)[Base::kPlanes], int32_t token_total, const Matrix& matrix,
                                    int64_t r, int32_t* row) {
    constexpr int kPlanes = Base::kPlanes;
    Base::separate(total);
    const int32x4_t first_two = vpaddq_s32(total[0], total[1]), next_two = vpaddq_s32(total[2], total[3]);
    const int32x4_t four = vsubq_s32(vpaddq_s32(first_two, next_two), vdupq_n_s32(token_total));
    int32_t sum[8];
    vst1q_s32(sum, four);
    if (kPlanes == 5) sum[4] = vaddvq_s32(total[kPlanes - 1]) - token_total;
    const int64_t plane = matrix.packed_rows;
    if (r + (kPlanes - 1) * plane < matrix.rows) {
      MICROVLM_UNROLL for (int p = 0; p < kPlanes; ++p) row[r + p * plane] = sum[p];
    } else {
      for (int p = 0; p < kPlanes && r + p * plane < matrix.rows; ++p) row[r + p * plane] = sum[p];
    }
  }
};

}  // namespace
}  // namespace microvlm

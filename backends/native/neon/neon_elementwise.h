// The float steps of both ARM variants: quantise a token, scale sums, expand a row of a table. Every step is one IEEE
// operation in the order of op_table.py, so that all variants agree to the last bit.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "neon_tiles.h"

namespace microvlm {
namespace {

constexpr int64_t kLane = 16;  // Columns handled at once.

// Bits of max |x| and the floor. Bits of floats without a sign order as the floats do; a NaN or an infinity is at least
// kInfinityBits.
constexpr uint32_t kInfinityBits = 0x7f800000;

MICROVLM_INLINE uint32x4_t absmax_bits(const float* x, uint32x4_t absmax) {
  const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
  MICROVLM_UNROLL for (int i = 0; i < kLane; i += 4) {
    absmax = vmaxq_u32(absmax, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), magnitude));
  }
  return absmax;
}

// |x| <= absmax, so rint(x * (127 / absmax)) is at most 127, and the low byte of each integer is the int8 activation.
MICROVLM_INLINE int8x16_t quantize_lane(const float* x, float32x4_t inverse_scale) {
  int16x8_t word[4];
  MICROVLM_UNROLL for (int i = 0; i < 4; ++i) {
    word[i] = vreinterpretq_s16_s32(vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + 4 * i), inverse_scale)));
  }
  const int16x8_t low = vuzp1q_s16(word[0], word[1]), high = vuzp1q_s16(word[2], word[3]);
  return vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
}

void quantize(const float* x, int64_t columns, int8_t* activations_q8, float* activation_scale, int32_t* total) {
  const int64_t whole = columns / kLane * kLane;
  float rest[kLane] = {};
  std::memcpy(rest, x + whole, (columns - whole) * sizeof(float));

  uint32x4_t absmax_lanes = vreinterpretq_u32_f32(vdupq_n_f32(kAbsmaxFloor));
  for (int64_t k = 0; k < whole; k += kLane) absmax_lanes = absmax_bits(x + k, absmax_lanes);
  const uint32_t bits = vmaxvq_u32(absmax_bits(rest, absmax_lanes));
  *total = 0;
  if (bits >= kInfinityBits) {
    std::memset(activations_q8, 0, columns);
    *activation_scale = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  float absmax;
  std::memcpy(&absmax, &bits, sizeof absmax);

  const float32x4_t inverse_scale = vdupq_n_f32(127.0f / absmax);
  int32x4_t sums = vdupq_n_s32(0);
  for (int64_t k = 0; k < whole; k += kLane) {
    const int8x16_t lane = quantize_lane(x + k, inverse_scale);
    vst1q_s8(activations_q8 + k, lane);
    sums = vpadalq_s16(sums, vpaddlq_s8(lane));
  }
  int8_t rest_q8[kLane];
  vst1q_s8(rest_q8, quantize_lane(rest, inverse_scale));
  std::memcpy(activations_q8 + whole, rest_q8, columns - whole);
  *total = vaddvq_s32(vpadalq_s16(sums, vpaddlq_s8(vld1q_s8(rest_q8))));
  *activation_scale = absmax / 127.0f;
}

void scale_sums(void* sums_then_floats, int64_t count, float activation_scale, const float* scale, bool one_scale) {
  char* place = static_cast<char*>(sums_then_floats);
  const float32x4_t one_factor = vdupq_n_f32(activation_scale * scale[0]);
  int64_t i = 0;
  for (; i + 4 <= count; i += 4, place += 16) {
    int32x4_t sum;
    std::memcpy(&sum, place, sizeof sum);
    const float32x4_t factor = one_scale ? one_factor : vmulq_n_f32(vld1q_f32(scale + i), activation_scale);
    const float32x4_t y = vmulq_f32(vcvtq_f32_s32(sum), factor);
    std::memcpy(place, &y, sizeof y);
  }
  for (; i < count; ++i, place += sizeof(float)) {
    int32_t sum;
    std::memcpy(&sum, place, sizeof sum);
    const float y = static_cast<float>(sum) * (activation_scale * scale[one_scale ? 0 : i]);
    std::memcpy(place, &y, sizeof y);
  }
}

// Stores eight integers times the scale.
MICROVLM_INLINE void store_scaled(float* y, int16x8_t q, float scale) {
  vst1q_f32(y, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(q))), scale));
  vst1q_f32(y + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(q)), scale));
}

void dequantize_int8(const uint8_t* packed, int64_t columns, float scale, float* y) {
  int64_t k = 0;
  for (; k + kLane <= columns; k += kLane) {
    const int8x16_t q = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(packed + k), vdupq_n_u8(128)));
    store_scaled(y + k, vmovl_s8(vget_low_s8(q)), scale);
    store_scaled(y + k + 8, vmovl_high_s8(q), scale);
  }
  for (; k < columns; ++k) y[k] = static_cast<float>(packed[k] - 128) * scale;
}

void dequantize_int4(const uint8_t* packed, const uint8_t* multiplier, int64_t columns, float scale, float* y) {
  for (int64_t k = 0; k < columns; k += kGroup, packed += kGroup / 2, ++multiplier) {
    const uint8x16_t bytes = vld1q_u8(packed);
    const int8x16_t eight = vdupq_n_s8(8);
    const int8x16_t even = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))), eight);
    const int8x16_t odd = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4)), eight);
    const int8x16_t first = vzip1q_s8(even, odd), second = vzip2q_s8(even, odd);
    const int16_t factor = *multiplier;
    // The padding of a last group belongs to no output.
    float rest[kGroup];
    float* group = columns - k < kGroup ? rest : y + k;
    store_scaled(group, vmulq_n_s16(vmovl_s8(vget_low_s8(first)), factor), scale);
    store_scaled(group + 8, vmulq_n_s16(vmovl_high_s8(first), factor), scale);
    store_scaled(group + 16, vmulq_n_s16(vmovl_s8(vget_low_s8(second)), factor), scale);
    store_scaled(group + 24, vmulq_n_s16(vmovl_high_s8(second), factor), scale);
    if (group == rest) std::memcpy(y + k, rest, (columns - k) * sizeof(float));
  }
}

}  // namespace
}  // namespace microvlm

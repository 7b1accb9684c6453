// The float steps of the fused layers. Included by the table's file of every variant and compiled for its instructions;
// no step depends on how wide these are: each float operation rounds once, in the order of layer_table.py.
#pragma once

#include <cstring>

#include "kernels.h"

namespace microvlm {
namespace {

void normalize(const float* x, const float* weight, int64_t columns, float epsilon, float* y) {
  float lanes[kNormLanes] = {};
  for (int64_t k = 0; k < columns; k += kNormLanes) {
    for (int64_t j = 0; j < kNormLanes; ++j) lanes[j] += x[k + j] * x[k + j];
  }
  float total = lanes[0];
  for (int64_t j = 1; j < kNormLanes; ++j) total += lanes[j];
  const float factor = __builtin_sqrtf(1.0f / (total / static_cast<float>(columns) + epsilon));
  for (int64_t k = 0; k < columns; ++k) y[k] = x[k] * factor * weight[k];
}

// exp(x) of x in -87 .. 88, by Cephes' polynomial (Moshier 1989, expf): 2^n exp(r), x = n ln 2 + r. A NaN gives some
// number. Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in the low bits.
inline float exponential(float x) {
  x = x < 88.0f ? x : 88.0f;
  x = x > -87.0f ? x : -87.0f;
  const float shifted = x * 1.44269502f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194442e-4f;
  float p = 1.98756912e-4f * r + 1.39819994e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 5.00000000e-1f;
  p = p * (r * r) + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;  // 2^n
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

void gate(float* gate, const float* up, int64_t count) {
#if defined(__aarch64__) && defined(__clang__)
  // Each step waits for the one before: a core that issues in order needs several vectors to work on by turns.
#pragma clang loop interleave_count(4)
#endif
  for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void rotate(float* x, const float* cosine, const float* sine, int64_t heads, int64_t half) {
  for (int64_t h = 0; h < heads; ++h, x += 2 * half) {
    for (int64_t i = 0; i < half; ++i) {
      const float first = x[i], second = x[half + i];
      x[i] = first * cosine[i] - second * sine[i];
      x[half + i] = second * cosine[i] + first * sine[i];
    }
  }
}

void rotate_blocks(const float* x, int64_t blocks, int64_t width, float* y) {
  float scale = 1.0f;
  for (int64_t size = width; size > 1; size /= 4) scale *= 0.5f;
  float even[kMaxRotation], odd[kMaxRotation];  // values before a step, and after it
  for (int64_t block = 0; block < blocks; ++block, x += width, y += width) {
    float *before = even, *after = odd;
    std::memcpy(before, x, static_cast<size_t>(width) * sizeof *x);
    for (int64_t stride = 1; stride < width; stride *= 2) {
      for (int64_t pair = 0; pair < width; pair += 2 * stride) {
        for (int64_t i = pair; i < pair + stride; ++i) {
          const float first = before[i], second = before[i + stride];
          after[i] = first + second;
          after[i + stride] = first - second;
        }
      }
      float* const swapped = before;
      before = after;
      after = swapped;
    }
    for (int64_t i = 0; i < width; ++i) y[i] = before[i] * scale;
  }
}

constexpr FloatSteps kFloatSteps = {normalize, gate, rotate, rotate_blocks};

}  // namespace
}  // namespace microvlm

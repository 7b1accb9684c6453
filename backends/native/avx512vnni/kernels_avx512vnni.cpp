// The avx512vnni variant: AVX-512 with VNNI (vpdpbusd) and VBMI (vpermi2b), 512 bits wide. This file has the float
// steps and the table; the products are in avx512vnni_ternary.cpp and avx512vnni_wide.cpp.

#include <limits>

#include "avx512vnni.h"
#include "cpu_x86.h"
#include "layers/float_steps.h"

namespace microvlm {
namespace {

int score() { return has_avx512_vnni_vbmi() ? 300 : 0; }

void quantize(const float* x, int64_t columns, int8_t* activations_q8, float* activation_scale, int32_t* total) {
  // Magnitudes order as their bits do, with NaN and infinity above all numbers.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i top[2] = {_mm512_castps_si512(_mm512_set1_ps(kAbsmaxFloor)), _mm512_setzero_si512()};
  int64_t k = 0;
  for (; k + 32 <= columns; k += 32) {
    top[0] = _mm512_max_epi32(top[0], _mm512_and_si512(_mm512_loadu_si512(x + k), magnitude));
    top[1] = _mm512_max_epi32(top[1], _mm512_and_si512(_mm512_loadu_si512(x + k + 16), magnitude));
  }
  for (; k < columns; k += 16) {
    const __m512i bits = _mm512_maskz_loadu_epi32(avx512vnni::first_lanes(columns - k), x + k);
    top[0] = _mm512_max_epi32(top[0], _mm512_and_si512(bits, magnitude));
  }
  const int32_t absmax_bits = _mm512_reduce_max_epi32(_mm512_max_epi32(top[0], top[1]));
  if (absmax_bits >= 0x7f800000) {
    std::memset(activations_q8, 0, columns);
    *activation_scale = std::numeric_limits<float>::quiet_NaN();
    *total = 0;
    return;
  }
  float absmax;
  std::memcpy(&absmax, &absmax_bits, sizeof absmax);
  const __m512 inverse_scale = _mm512_set1_ps(127.0f / absmax);
  __m512i sum = _mm512_setzero_si512();
  for (k = 0; k < columns; k += 16) {
    const __mmask16 lanes = avx512vnni::first_lanes(columns - k);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + k), inverse_scale);
    const __m512i rounded = _mm512_cvt_roundps_epi32(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    sum = _mm512_add_epi32(sum, rounded);
    _mm512_mask_cvtepi32_storeu_epi8(activations_q8 + k, lanes, rounded);
  }
  *total = _mm512_reduce_add_epi32(sum);
  *activation_scale = absmax / 127.0f;
}

void scale_sums(void* sums_then_floats, int64_t count, float activation_scale, const float* scale, bool one_scale) {
  char* place = static_cast<char*>(sums_then_floats);
  const __m512 activation_scales = _mm512_set1_ps(activation_scale);
  __m512 factor = _mm512_mul_ps(activation_scales, _mm512_set1_ps(scale[0]));
  for (int64_t i = 0; i < count; i += 16, place += 64) {
    const __mmask16 lanes = avx512vnni::first_lanes(count - i);
    if (!one_scale) factor = _mm512_mul_ps(activation_scales, _mm512_maskz_loadu_ps(lanes, scale + i));
    const __m512 sum = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(lanes, place));
    _mm512_mask_storeu_ps(place, lanes, _mm512_mul_ps(sum, factor));
  }
}

// The largest user is a strip of an int8 product: 64 rows of whole cache lines.
int64_t scratch_bytes(int64_t columns, bool) { return (columns + 63) / 64 * 64 * 64; }

void dequantize_int8(const uint8_t* packed, int64_t columns, float scale, float* y) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t k = 0; k < columns; k += 16) {
    const __mmask16 lanes = avx512vnni::first_lanes(columns - k);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, packed + k));
    const __m512 q = _mm512_cvtepi32_ps(_mm512_sub_epi32(bytes, _mm512_set1_epi32(128)));
    _mm512_mask_storeu_ps(y + k, lanes, _mm512_mul_ps(q, factor));
  }
}

void dequantize_int4(const uint8_t* packed, const uint8_t* multiplier, int64_t columns, float scale, float* y) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t k = 0; k < columns; k += 16) {
    const __mmask16 lanes = avx512vnni::first_lanes(columns - k);
    // Eight bytes, each twice: an even lane keeps the low nibble, an odd one the high nibble.
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + k / 2));
    const __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
    const __m512i shift = _mm512_set1_epi64(4ll << 32);
    const __m512i nibble = _mm512_and_si512(_mm512_srlv_epi32(twice, shift), _mm512_set1_epi32(15));
    const __m512i q = _mm512_sub_epi32(nibble, _mm512_set1_epi32(8));
    const __m512i weight = _mm512_mullo_epi32(q, _mm512_set1_epi32(multiplier[k / kGroup]));
    _mm512_mask_storeu_ps(y + k, lanes, _mm512_mul_ps(_mm512_cvtepi32_ps(weight), factor));
  }
}

}  // namespace

const Kernels kAvx512Vnni = {
    "avx512vnni",
    score,
    quantize,
    scale_sums,
    scratch_bytes,
    avx512vnni::ternary_2x4,
    avx512vnni::ternary_3x5,
    avx512vnni::int8,
    avx512vnni::int4,
    dequantize_int8,
    dequantize_int4,
    kFloatSteps,
    kTaskWork,
    nullptr,
    2,
};

}  // namespace microvlm

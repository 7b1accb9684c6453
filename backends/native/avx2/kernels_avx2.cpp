// The avx2 variant: AVX2 only, 256 bits wide. This file has the float steps and the table; the products are in
// avx2_*.cpp.

#include <sched.h>

#include <atomic>
#include <limits>

#include "avx2.h"
#include "cpu_x86.h"
#include "layers/float_steps.h"

namespace microvlm {
namespace {

int score() { return has_avx2() ? 200 : 0; }

inline __m256i load_magnitudes(const float* x) {
  return _mm256_and_si256(avx2::load(x), _mm256_set1_epi32(0x7fffffff));
}

// The bits of the absmax. Magnitudes order as their bits do, with NaN and infinity above all numbers.
int32_t absmax_bits(const float* x, int64_t columns) {
  __m256i top = _mm256_castps_si256(_mm256_set1_ps(kAbsmaxFloor));
  int64_t k = 0;
  for (; k + 8 <= columns; k += 8) top = _mm256_max_epi32(top, load_magnitudes(x + k));
  alignas(32) int32_t lanes[8];
  avx2::store_aligned(lanes, top);
  int32_t bits = 0;
  for (const int32_t lane : lanes) bits = lane > bits ? lane : bits;
  for (; k < columns; ++k) {
    int32_t one;
    std::memcpy(&one, x + k, sizeof one);
    one &= 0x7fffffff;
    bits = one > bits ? one : bits;
  }
  return bits;
}

void quantize(const float* x, int64_t columns, int8_t* activations_q8, float* activation_scale, int32_t* total) {
  const int32_t bits = absmax_bits(x, columns);
  if (bits >= 0x7f800000) {
    std::memset(activations_q8, 0, static_cast<size_t>(columns));
    *activation_scale = std::numeric_limits<float>::quiet_NaN();
    *total = 0;
    return;
  }
  float absmax;
  std::memcpy(&absmax, &bits, sizeof absmax);
  const float inverse_scale = 127.0f / absmax;
  const __m256 factor = _mm256_set1_ps(inverse_scale);
  __m256i sum = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 32 <= columns; k += 32) {
    __m256i rounded[4];
    for (int i = 0; i < 4; ++i) {
      rounded[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 8 * i), factor));
      sum = _mm256_add_epi32(sum, rounded[i]);
    }
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]), _mm256_packs_epi32(rounded[2], rounded[3]));
    // Packing works within 128-bit lanes: dwords 0 4 1 5 2 6 3 7 are the order of columns.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(activations_q8 + k), _mm256_permutevar8x32_epi32(bytes, order));
  }
  *total = avx2::reduce(sum);
  for (; k < columns; ++k) {
    const int32_t rounded = _mm_cvtss_si32(_mm_set_ss(x[k] * inverse_scale));
    activations_q8[k] = static_cast<int8_t>(rounded);
    *total += rounded;
  }
  *activation_scale = absmax / 127.0f;
}

void scale_sums(void* sums_then_floats, int64_t count, float activation_scale, const float* scale, bool one_scale) {
  char* place = static_cast<char*>(sums_then_floats);
  const __m256 activation_scales = _mm256_set1_ps(activation_scale);
  __m256 factor = _mm256_mul_ps(activation_scales, _mm256_set1_ps(scale[0]));
  int64_t i = 0;
  for (; i + 8 <= count; i += 8, place += 32) {
    if (!one_scale) factor = _mm256_mul_ps(activation_scales, _mm256_loadu_ps(scale + i));
    const __m256 sum = _mm256_cvtepi32_ps(avx2::load(place));
    _mm256_storeu_ps(reinterpret_cast<float*>(place), _mm256_mul_ps(sum, factor));
  }
  for (; i < count; ++i, place += 4) {
    int32_t sum;
    std::memcpy(&sum, place, sizeof sum);
    const float y = static_cast<float>(sum) * (activation_scale * scale[one_scale ? 0 : i]);
    std::memcpy(place, &y, sizeof y);
  }
}

// Ternary: the larger of the tables with their sums and offsets, and a strip of trit codes, which is eight packed rows
// of five planes in whole blocks of 32 columns.
int64_t scratch_bytes(int64_t columns, bool is_ternary) {
  if (!is_ternary) return avx2::panels_scratch_bytes(columns);
  const int64_t strip = (columns + 31) / 32 * 32 * 8 * 5, tables = avx2::tables_scratch_bytes();
  return strip < tables ? tables : strip;
}

void dequantize_int8(const uint8_t* packed, int64_t columns, float scale, float* y) {
  int64_t k = 0;
  for (; k + 8 <= columns; k += 8) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + k)));
    const __m256 q = _mm256_cvtepi32_ps(_mm256_sub_epi32(bytes, _mm256_set1_epi32(128)));
    _mm256_storeu_ps(y + k, _mm256_mul_ps(q, _mm256_set1_ps(scale)));
  }
  for (; k < columns; ++k) y[k] = static_cast<float>(packed[k] - 128) * scale;
}

void dequantize_int4(const uint8_t* packed, const uint8_t* multiplier, int64_t columns, float scale, float* y) {
  int64_t k = 0;
  for (; k + 8 <= columns; k += 8) {
    int32_t four;
    std::memcpy(&four, packed + k / 2, sizeof four);
    // Lane i holds the nibble at bit 4 i.
    const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(four), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    const __m256i nibble = _mm256_and_si256(shifted, _mm256_set1_epi32(15));
    const __m256i q = _mm256_sub_epi32(nibble, _mm256_set1_epi32(8));
    const __m256i weight = _mm256_mullo_epi32(q, _mm256_set1_epi32(multiplier[k / kGroup]));
    _mm256_storeu_ps(y + k, _mm256_mul_ps(_mm256_cvtepi32_ps(weight), _mm256_set1_ps(scale)));
  }
  for (; k < columns; ++k) {
    const int q = (packed[k / 2] >> (k % 2 * 4) & 15) - 8;
    y[k] = static_cast<float>(q * multiplier[k / kGroup]) * scale;
  }
}

// Measured on two cores of a Zen 3: a product of 896 x 896 is worth sharing.
constexpr int64_t kSmallTask = 1 << 18;

int64_t processors() {
  cpu_set_t usable;
  return sched_getaffinity(0, sizeof usable, &usable) == 0 ? CPU_COUNT(&usable) : 1;
}

// At most as many tasks as this process has processors; a session may have fewer threads.
// Few tokens: every task opens two streams and waits for their first lines. Measured on two cores with spinning
// threads, 2 tasks instead of 16: 6 % faster from memory, 14 % from a cache; inside ONNX Runtime a product of 896 x 896
// is 14 % faster, a layer is equal. Splitting each into a long and a short task, so that threads end together, is 4 %
// faster from a cache and 1 % slower from memory.
// Many tokens: every task fills its own tables, which costs as much as 90 rows, so a task has at least about 56 packed
// rows.
int64_t max_tasks(int64_t tokens, int64_t packed_rows) {
  // Not a guarded static: its guard needs the C++ runtime, which the library does without.
  static std::atomic<int64_t> cached{0};
  int64_t at_once = cached.load(std::memory_order_relaxed);
  if (at_once == 0) {
    at_once = processors();
    cached.store(at_once, std::memory_order_relaxed);
  }
  return avx2::tokens_of_tables(tokens) == 0 ? at_once : avx2::smaller(at_once, packed_rows / 56);
}

}  // namespace

const Kernels kAvx2 = {
    "avx2",     score,      quantize,        scale_sums,      scratch_bytes, avx2::ternary_2x4, avx2::ternary_3x5,
    avx2::int8, avx2::int4, dequantize_int8, dequantize_int4, kFloatSteps,   kSmallTask,        max_tasks,         2,
};

}  // namespace microvlm

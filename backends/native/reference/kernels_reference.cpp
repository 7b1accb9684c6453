// The reference variant: scalar loops that read like op_table.py. Every other variant must equal it bit for bit.

#include <cmath>
#include <cstring>
#include <limits>

#include "layers/float_steps.h"

namespace microvlm {
namespace {

int score() { return 1; }

void quantize(const float* x, int64_t columns, int8_t* activations_q8, float* activation_scale, int32_t* total) {
  float absmax = kAbsmaxFloor;
  bool finite = true;
  for (int64_t k = 0; k < columns; ++k) {
    absmax = std::fmax(absmax, std::fabs(x[k]));
    finite = finite && std::isfinite(x[k]);
  }
  *total = 0;
  if (!finite) {
    std::memset(activations_q8, 0, columns);
    *activation_scale = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const float inverse_scale = 127.0f / absmax;
  for (int64_t k = 0; k < columns; ++k) {
    activations_q8[k] = static_cast<int8_t>(std::nearbyint(x[k] * inverse_scale));
    *total += activations_q8[k];
  }
  *activation_scale = absmax / 127.0f;
}

void scale_sums(void* sums_then_floats, int64_t count, float activation_scale, const float* scale, bool one_scale) {
  char* place = static_cast<char*>(sums_then_floats);
  for (int64_t i = 0; i < count; ++i, place += sizeof(float)) {
    int32_t sum;
    std::memcpy(&sum, place, sizeof sum);
    const float factor = activation_scale * scale[one_scale ? 0 : i];
    const float y = static_cast<float>(sum) * factor;
    std::memcpy(place, &y, sizeof y);
  }
}

int64_t scratch_bytes(int64_t, bool) { return 0; }

// Ternary weights of any base: the digit of plane p is packed / base^p % base.
template <int kBase, int kPlanes>
void ternary(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t*) {
  for (int64_t m = 0; m < tokens.count; ++m) {
    const int8_t* activations_q8 = tokens.activations_q8 + m * tokens.stride;
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* packed = matrix.packed + r * matrix.columns;
      for (int p = 0, power = 1; p < kPlanes; ++p, power *= kBase) {
        const int64_t n = p * matrix.packed_rows + r;
        if (n >= matrix.rows) break;
        int32_t sum = 0;
        for (int64_t k = 0; k < matrix.columns; ++k) sum += (packed[k] / power % kBase - 1) * activations_q8[k];
        sums[m * matrix.rows + n] = sum;
      }
    }
  }
}

void int8(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t*) {
  for (int64_t m = 0; m < tokens.count; ++m) {
    const int8_t* activations_q8 = tokens.activations_q8 + m * tokens.stride;
    for (int64_t n = begin; n < end; ++n) {
      const uint8_t* packed = matrix.packed + n * matrix.columns;
      int32_t sum = 0;
      for (int64_t k = 0; k < matrix.columns; ++k) sum += (packed[k] - 128) * activations_q8[k];
      sums[m * matrix.rows + n] = sum;
    }
  }
}

void int4(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t*) {
  const int64_t groups = (matrix.columns + kGroup - 1) / kGroup;
  for (int64_t m = 0; m < tokens.count; ++m) {
    for (int64_t n = begin; n < end; ++n) {
      const int8_t* activations_q8 = tokens.activations_q8 + m * tokens.stride;
      const uint8_t* packed = matrix.packed + n * groups * (kGroup / 2);
      int32_t sum = 0;
      for (int64_t g = 0; g < groups; ++g, activations_q8 += kGroup, packed += kGroup / 2) {
        int32_t group_sum = 0;
        for (int j = 0; j < kGroup / 2; ++j) {
          group_sum +=
              ((packed[j] & 15) - 8) * activations_q8[j] + ((packed[j] >> 4) - 8) * activations_q8[kGroup / 2 + j];
        }
        sum += group_sum * matrix.multiplier[n * groups + g];
      }
      sums[m * matrix.rows + n] = sum;
    }
  }
}

void dequantize_int8(const uint8_t* packed, int64_t columns, float scale, float* y) {
  for (int64_t k = 0; k < columns; ++k) y[k] = static_cast<float>(packed[k] - 128) * scale;
}

void dequantize_int4(const uint8_t* packed, const uint8_t* multiplier, int64_t columns, float scale, float* y) {
  for (int64_t k = 0; k < columns; ++k) {
    const int q = (packed[k / 2] >> (k % 2 * 4) & 15) - 8;
    y[k] = static_cast<float>(q * multiplier[k / kGroup]) * scale;
  }
}

}  // namespace

const Kernels kReference = {
    "reference",   score, quantize, scale_sums,      scratch_bytes,   ternary<4, 4>,
    ternary<3, 5>, int8,  int4,     dequantize_int8, dequantize_int4, kFloatSteps,   kTaskWork,
};

}  // namespace microvlm

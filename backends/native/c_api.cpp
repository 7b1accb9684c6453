// Plain C exports over every variant: for the Python loader, for tests, and for benchmarks without ONNX Runtime.

#include <cstring>

#include "operators.h"

#define MICROVLM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using microvlm::Matrix;
using microvlm::Product;

struct Call {
  const microvlm::Kernels* kernels;
  Product product;
  Matrix matrix;
};

const char* find_call(const char* variant, const char* op, const uint8_t* packed, const uint8_t* multiplier,
                      int64_t rows, int64_t columns, Call* call) {
  static const char* const kNames[] = {"TernaryMatMul2x4", "TernaryMatMul3x5", "Int8MatMul", "Int4MatMul"};
  call->kernels = microvlm::find_variant(variant);
  if (call->kernels == nullptr) return "no such variant runs here";
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(op, kNames[i]) != 0) continue;
    call->product = static_cast<Product>(i);
    const int64_t packed_rows = microvlm::packed_rows_of(call->product, rows);
    call->matrix = {packed, multiplier, rows, packed_rows, columns};
    const int64_t bytes = call->product == Product::kInt4 ? (columns + 31) / 32 * 16 : columns;
    return microvlm::product_problem(call->product, packed_rows, bytes, rows, columns, rows);
  }
  return "no such product";
}

constexpr const char* kNoMemory = "not enough memory";

}  // namespace

MICROVLM_EXPORT int64_t microvlm_variant_count() { return microvlm::variant_count(); }

// Best first.
MICROVLM_EXPORT const char* microvlm_variant_name(int64_t i) { return microvlm::variant(i).name; }

// The variant in use, or null with a sentence in *problem.
MICROVLM_EXPORT const char* microvlm_active_variant(const char** problem) {
  const microvlm::Kernels* kernels = microvlm::active_variant(problem);
  return kernels == nullptr ? nullptr : kernels->name;
}

// float32 x [tokens, columns] -> y [tokens, rows]. Returns null, or a sentence that says what is wrong.
MICROVLM_EXPORT const char* microvlm_multiply(const char* variant, const char* op, const float* x, int64_t tokens,
                                              int64_t columns, const uint8_t* packed, const uint8_t* multiplier,
                                              const float* scale, int64_t scales, int64_t rows, float* y) {
  Call call;
  const char* problem = find_call(variant, op, packed, multiplier, rows, columns, &call);
  if (problem != nullptr) return problem;
  if (scales != rows && scales != 1) return "scale has neither one value nor one a row";
  const bool done = microvlm::multiply(*call.kernels, call.product, call.matrix, scale, scales == 1, x, tokens, y,
                                       microvlm::kCallerOnly);
  return done ? nullptr : kNoMemory;
}

// int8 activations_q8 [tokens, columns] -> exact int32 sums [tokens, rows]. Returns null, or a sentence.
MICROVLM_EXPORT const char* microvlm_multiply_q8(const char* variant, const char* op, const int8_t* activations_q8,
                                                 int64_t tokens, int64_t columns, const uint8_t* packed,
                                                 const uint8_t* multiplier, int64_t rows, int32_t* sums) {
  Call call;
  const char* problem = find_call(variant, op, packed, multiplier, rows, columns, &call);
  if (problem != nullptr) return problem;
  const bool done = microvlm::multiply_q8(*call.kernels, call.product, call.matrix, activations_q8, tokens, sums,
                                          microvlm::kCallerOnly);
  return done ? nullptr : kNoMemory;
}

// One token: float32 x [columns] -> activations_q8 [columns], *activation_scale, *total. Returns null, or a sentence.
MICROVLM_EXPORT const char* microvlm_quantize(const char* variant, const float* x, int64_t columns,
                                              int8_t* activations_q8, float* activation_scale, int32_t* total) {
  const microvlm::Kernels* kernels = microvlm::find_variant(variant);
  if (kernels == nullptr) return "no such variant runs here";
  kernels->quantize(x, columns, activations_q8, activation_scale, total);
  return nullptr;
}

// One row of a table -> y [columns]; int8 when `multiplier` is null, else int4. Returns null, or a sentence.
MICROVLM_EXPORT const char* microvlm_dequantize(const char* variant, const uint8_t* packed, const uint8_t* multiplier,
                                                int64_t columns, float scale, float* y) {
  const microvlm::Kernels* kernels = microvlm::find_variant(variant);
  if (kernels == nullptr) return "no such variant runs here";
  if (multiplier == nullptr) {
    kernels->dequantize_int8(packed, columns, scale, y);
  } else {
    kernels->dequantize_int4(packed, multiplier, columns, scale, y);
  }
  return nullptr;
}

// Plain C exports over every variant: for the Python loader, for tests, and for benchmarks without ONNX Runtime.

#include <cstring>

#include "declarations.h"
#include "operators.h"

#define MICROVLM_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using microvlm::Declaration;
using microvlm::kDeclarations;

// Counts up with every change of the exports below, of an operator or of its operands.
constexpr int64_t kInterface = 2;

constexpr const char* kNoMemory = "not enough memory";
constexpr const char* kNoVariant = "no such variant runs here";

// Callers read a sentence before their thread's next call.
thread_local microvlm::Problem problem;

const Declaration* find_product(const char* name) {
  for (const Declaration& op : kDeclarations) {
    if (!op.gathers && std::strcmp(op.name, name) == 0) return &op;
  }
  return nullptr;
}

struct Call {
  const microvlm::Kernels* kernels;
  const Declaration* op;
  int64_t rows, columns;

  microvlm::Matrix matrix(const uint8_t* packed, const uint8_t* multiplier) const {
    return {packed, multiplier, rows, microvlm::packed_rows_of(op->product, rows), columns};
  }
};

// `bytes`: lengths of x, packed, multiplier and scale; that of multiplier is ignored where the operator has none.
const char* find_call(const char* variant, const char* op, int64_t tokens, int64_t rows, int64_t columns,
                      const int64_t* bytes, Call* call) {
  call->kernels = microvlm::find_variant(variant);
  if (call->kernels == nullptr) return kNoVariant;
  call->op = find_product(op);
  if (call->op == nullptr) return "no such product";
  int64_t own[microvlm::kMaxInputs] = {bytes[0], bytes[1], bytes[2], bytes[3]};
  own[call->op->input_count() - 1] = bytes[3];
  call->rows = rows;
  call->columns = columns;
  return microvlm::lengths_fit(*call->op, tokens, rows, columns, own, &problem) ? nullptr : problem.text;
}

}  // namespace

MICROVLM_EXPORT int64_t microvlm_interface() { return kInterface; }

MICROVLM_EXPORT int64_t microvlm_variant_count() { return microvlm::variant_count(); }

// Best first; null from microvlm_variant_count() on.
MICROVLM_EXPORT const char* microvlm_variant_name(int64_t i) {
  return i < 0 || i >= microvlm::variant_count() ? nullptr : microvlm::variant(i).name;
}

// The variant in use, or null with a sentence in *problem.
MICROVLM_EXPORT const char* microvlm_active_variant(const char** problem) {
  const microvlm::Kernels* kernels = microvlm::active_variant(problem);
  return kernels == nullptr ? nullptr : kernels->name;
}

// Below, every array is followed by its length in bytes, and is not touched unless the length is what the operator
// declares. Returned is null, or a sentence that says what is wrong.

// float32 x [tokens, columns] -> y [tokens, rows].
MICROVLM_EXPORT const char* microvlm_multiply(const char* variant, const char* op, int64_t tokens, int64_t rows,
                                              int64_t columns, const float* x, int64_t x_bytes, const uint8_t* packed,
                                              int64_t packed_bytes, const uint8_t* multiplier, int64_t multiplier_bytes,
                                              const float* scale, int64_t scale_bytes, float* y, int64_t y_bytes) {
  const int64_t bytes[] = {x_bytes, packed_bytes, multiplier_bytes, scale_bytes};
  Call call;
  const char* mismatch = find_call(variant, op, tokens, rows, columns, bytes, &call);
  if (mismatch != nullptr) return mismatch;
  if (y_bytes != tokens * rows * static_cast<int64_t>(sizeof(float))) return "y has another length than the output";
  const bool done = microvlm::multiply(*call.kernels, call.op->product, call.matrix(packed, multiplier), scale,
                                       scale_bytes == sizeof(float), x, tokens, y, microvlm::kCallerOnly);
  return done ? nullptr : kNoMemory;
}

// int8 activations_q8 [tokens, columns] -> exact int32 sums [tokens, rows].
MICROVLM_EXPORT const char* microvlm_multiply_q8(const char* variant, const char* op, int64_t tokens, int64_t rows,
                                                 int64_t columns, const int8_t* activations_q8,
                                                 int64_t activations_bytes, const uint8_t* packed, int64_t packed_bytes,
                                                 const uint8_t* multiplier, int64_t multiplier_bytes, int32_t* sums,
                                                 int64_t sums_bytes) {
  // As if the activations were floats and there was one scale.
  int64_t bytes[] = {0, packed_bytes, multiplier_bytes, sizeof(float)};
  if (__builtin_mul_overflow(activations_bytes, int64_t{sizeof(float)}, &bytes[0])) return "activations are too long";
  Call call;
  const char* mismatch = find_call(variant, op, tokens, rows, columns, bytes, &call);
  if (mismatch != nullptr) return mismatch;
  if (sums_bytes != tokens * rows * static_cast<int64_t>(sizeof(int32_t))) return "sums have another length";
  const bool done = microvlm::multiply_q8(*call.kernels, call.op->product, call.matrix(packed, multiplier),
                                          activations_q8, tokens, sums, microvlm::kCallerOnly);
  return done ? nullptr : kNoMemory;
}

// One token: float32 x [columns] -> int8 activations_q8 [columns], *activation_scale, *total.
MICROVLM_EXPORT const char* microvlm_quantize(const char* variant, const float* x, int64_t x_bytes,
                                              int8_t* activations_q8, int64_t activations_bytes,
                                              float* activation_scale, int32_t* total) {
  const microvlm::Kernels* kernels = microvlm::find_variant(variant);
  if (kernels == nullptr) return kNoVariant;
  if (activations_bytes < 0 || activations_bytes > microvlm::kMaxColumns) return "x is too wide for exact 32-bit sums";
  if (x_bytes != activations_bytes * static_cast<int64_t>(sizeof(float))) return "x and activations differ in length";
  kernels->quantize(x, activations_bytes, activations_q8, activation_scale, total);
  return nullptr;
}

// One row of a table -> y [columns]; int8 when `multiplier` is null, else int4.
MICROVLM_EXPORT const char* microvlm_dequantize(const char* variant, const uint8_t* packed, int64_t packed_bytes,
                                                const uint8_t* multiplier, int64_t multiplier_bytes, float scale,
                                                float* y, int64_t y_bytes) {
  const microvlm::Kernels* kernels = microvlm::find_variant(variant);
  if (kernels == nullptr) return kNoVariant;
  const int64_t columns = y_bytes / static_cast<int64_t>(sizeof(float));
  const Declaration& op = kDeclarations[multiplier == nullptr ? 4 : 5];
  static_assert(kDeclarations[4].gathers && kDeclarations[5].gathers);
  // A table of one row, looked up once.
  int64_t bytes[] = {sizeof(int64_t), packed_bytes, multiplier_bytes, sizeof(float)};
  bytes[op.input_count() - 1] = sizeof(float);
  if (!microvlm::lengths_fit(op, 1, 1, columns, bytes, &problem)) return problem.text;
  if (multiplier == nullptr) {
    kernels->dequantize_int8(packed, columns, scale, y);
  } else {
    kernels->dequantize_int4(packed, multiplier, columns, scale, y);
  }
  return nullptr;
}

// Reads and writes shapes and bytes of ONNX Runtime's values, through the interface that ort_abi.h declares. What a
// value is comes from the value, not from what the graph says of it.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "declarations.h"
#include "ort_abi.h"

namespace {

using microvlm::fits_declaration;
using microvlm::kMaxDimensions;
using microvlm::Operand;
using microvlm::Problem;
using microvlm::Tensor;

constexpr int kInvalidArgument = 2, kRuntimeException = 6;  // OrtErrorCode

Status fail(const OrtApi* api, int code, const char* message) { return call<kCreateStatus>(api, code, message); }

struct Shape {
  int64_t dimensions[kMaxDimensions];
  size_t rank = 0;
};

// Works for a Shape and for a Tensor.
template <class Shaped>
Status read_shape(const OrtApi* api, void* info, Shaped* shape) {
  Status status = call<kGetDimensionCount>(api, static_cast<const void*>(info), &shape->rank);
  if (status != nullptr) return status;
  if (shape->rank > kMaxDimensions) return fail(api, kInvalidArgument, "a tensor has more than 16 dimensions");
  return call<kGetDimensions>(api, static_cast<const void*>(info), &shape->dimensions[0], shape->rank);
}

// Memory of a value whose address its elements do not divide: ONNX Runtime maps external data at any offset of a file.
class AlignedCopy {
 public:
  AlignedCopy() = default;
  ~AlignedCopy() { std::free(memory_); }
  AlignedCopy(const AlignedCopy&) = delete;
  AlignedCopy& operator=(const AlignedCopy&) = delete;

  // Replaces tensor->data where it must be. False when there is not enough memory.
  bool align(Tensor* tensor) {
    const size_t size = microvlm::bytes_of(tensor->type);
    if ((reinterpret_cast<uintptr_t>(tensor->data) & (size - 1)) == 0 || tensor->count == 0) return true;
    const size_t bytes = tensor->count * size;
    memory_ = std::malloc(bytes);
    if (memory_ == nullptr) return false;
    std::memcpy(memory_, tensor->data, bytes);
    tensor->data = memory_;
    return true;
  }

 private:
  void* memory_ = nullptr;
};

// The operand that a value is. A status for whatever does not fit the operand's declaration; nothing of the value's
// bytes is read before.
Status read_operand(const OrtApi* api, const Operand& operand, const void* value, Tensor* tensor, AlignedCopy* copy) {
  int is_tensor = 0;
  Status status = value == nullptr ? nullptr : call<kIsTensor>(api, value, &is_tensor);
  if (status != nullptr) return status;
  Problem problem;
  if (is_tensor == 0) {
    std::snprintf(problem.text, sizeof problem.text, "%s is missing or not a tensor", operand.name);
    return fail(api, kInvalidArgument, problem.text);
  }
  void *info = nullptr, *data = nullptr;
  status = call<kGetShapeInfo>(api, value, &info);
  if (status != nullptr) return status;
  status = call<kGetElementType>(api, static_cast<const void*>(info), &tensor->type);
  if (status == nullptr) status = read_shape(api, info, tensor);
  call<kReleaseShapeInfo, void>(api, info);
  if (status == nullptr) status = call<kGetTensorMutableData>(api, const_cast<void*>(value), &data);
  if (status != nullptr) return status;
  tensor->data = data;
  if (!fits_declaration(operand, tensor, &problem)) return fail(api, kInvalidArgument, problem.text);
  return copy->align(tensor) ? nullptr : fail(api, kRuntimeException, "not enough memory for an operand");
}

Status get_input(const OrtApi* api, void* context, size_t index, const void** value) {
  return call<kGetInput>(api, static_cast<const void*>(context), index, value);
}

Status make_output(const OrtApi* api, void* context, const int64_t* dimensions, size_t rank, float** data) {
  void *value = nullptr, *bytes = nullptr;
  Status status = call<kGetOutput>(api, context, size_t{0}, dimensions, rank, &value);
  if (status != nullptr) return status;
  if (value == nullptr) return fail(api, kRuntimeException, "there is no output");
  status = call<kGetTensorMutableData>(api, value, &bytes);
  if (status == nullptr && reinterpret_cast<uintptr_t>(bytes) % alignof(float) != 0) {
    return fail(api, kInvalidArgument, "the memory for the output is at an address that is no multiple of 4");
  }
  *data = static_cast<float*>(bytes);
  return status;
}

}  // namespace

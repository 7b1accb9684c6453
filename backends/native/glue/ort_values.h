// Reads and writes shapes and bytes of ONNX Runtime's values, through the interface that ort_abi.h declares. What a
// value is comes from the value, not from what the graph says of it.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "declarations.h"
#include "operators.h"
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

inline Status get_input(const OrtApi* api, void* context, size_t index, const void** value) {
  return call<kGetInput>(api, static_cast<const void*>(context), index, value);
}

template <class T>
Status make_output(const OrtApi* api, void* context, size_t index, const int64_t* dimensions, size_t rank, T** data) {
  void *value = nullptr, *bytes = nullptr;
  Status status = call<kGetOutput>(api, context, index, dimensions, rank, &value);
  if (status != nullptr) return status;
  if (value == nullptr) return fail(api, kRuntimeException, "there is no output");
  status = call<kGetTensorMutableData>(api, value, &bytes);
  if (status == nullptr && reinterpret_cast<uintptr_t>(bytes) % alignof(T) != 0) {
    return fail(api, kInvalidArgument, "the memory for the output is at an address that is no multiple of 4");
  }
  *data = static_cast<T*>(bytes);
  return status;
}

// The shape of an input and the names of its dimensions, as ONNX Runtime infers it. Rank 0 is what it returns for a
// shape that it could not infer.
struct InferredShape : Shape {
  const char* names[kMaxDimensions] = {};
};

inline Status infer_input(const OrtApi* api, void* context, size_t index, InferredShape* shape) {
  void* info = nullptr;
  Status status = call<kGetInputTypeShape>(api, static_cast<const void*>(context), index, &info);
  if (status != nullptr || info == nullptr) return status;
  status = read_shape(api, info, shape);
  if (status != nullptr) return status;
  return call<kGetSymbolicDimensions>(api, static_cast<const void*>(info), &shape->names[0], shape->rank);
}

// Sets the shape of an output with this width as its last dimension. Where a dimension has neither a value nor a name,
// it stays unknown.
inline Status infer_output(const OrtApi* api, void* context, size_t index, InferredShape shape, int64_t width) {
  shape.dimensions[shape.rank - 1] = width;
  shape.names[shape.rank - 1] = "";
  for (size_t i = 0; i < shape.rank; ++i) {
    if (shape.names[i] == nullptr) shape.names[i] = "";
    if (shape.dimensions[i] < 0 && *shape.names[i] == '\0') return nullptr;
  }
  void* info = nullptr;
  Status status = call<kCreateShapeInfo>(api, &info);
  if (status != nullptr) return status;
  status = call<kSetElementType>(api, info, microvlm::kFloat);
  if (status == nullptr) {
    status = call<kSetDimensions>(api, info, static_cast<const int64_t*>(shape.dimensions), shape.rank);
  }
  if (status == nullptr) status = call<kSetSymbolicDimensions>(api, info, &shape.names[0], shape.rank);
  if (status == nullptr) status = call<kSetOutputTypeShape>(api, context, index, static_cast<const void*>(info));
  call<kReleaseShapeInfo, void>(api, info);
  return status;
}

inline Status infer_attribute(const OrtApi* api, const void* context, const char* name, int64_t* value) {
  const void* attribute = nullptr;
  size_t read = 0;
  Status status = call<kGetShapeAttribute>(api, context, name, &attribute);
  if (status != nullptr) return status;
  return call<kReadAttribute>(api, attribute, kAttributeInt, static_cast<void*>(value), sizeof *value, &read);
}

// Runs tasks on the session's own threads.
struct Threads {
  const OrtApi* api;
  const void* context;
};

inline void run_in_session(void* handle, void (*task)(void*, size_t), size_t tasks, void* state) {
  const auto& threads = *static_cast<const Threads*>(handle);
  // 0 lets the session choose the number of batches.
  Status status = call<kParallelFor>(threads.api, threads.context, task, tasks, size_t{0}, state);
  if (status == nullptr) return;
  call<kReleaseStatus, void>(threads.api, status);
  for (size_t i = 0; i < tasks; ++i) task(state, i);
}

// The interface does not tell how many threads a session has: enough tasks for eight to share evenly.
constexpr int64_t kSessionTasks = 16;

}  // namespace

// Reads and writes shapes and bytes of ONNX Runtime's values, through the interface that ort_abi.h declares.
#pragma once

#include "ort_abi.h"

namespace {

constexpr int kInvalidArgument = 2, kRuntimeException = 6;  // OrtErrorCode

Status fail(const OrtApi* api, int code, const char* message) { return call<kCreateStatus>(api, code, message); }

struct Shape {
  int64_t dimension[kMaxDimensions] = {};
  size_t rank = 0;

  int64_t last() const { return rank == 0 ? 0 : dimension[rank - 1]; }
  int64_t first() const { return rank == 0 ? 0 : dimension[0]; }
  // Product of the first `count` dimensions.
  int64_t lead(size_t count) const {
    int64_t product = 1;
    for (size_t i = 0; i < count; ++i) product *= dimension[i];
    return product;
  }
};

Status read_shape(const OrtApi* api, void* info, Shape* shape) {
  Status status = call<kGetDimensionCount>(api, static_cast<const void*>(info), &shape->rank);
  if (status == nullptr && shape->rank > kMaxDimensions) status = fail(api, kInvalidArgument, "too many dimensions");
  if (status == nullptr)
    status = call<kGetDimensions>(api, static_cast<const void*>(info), shape->dimension, shape->rank);
  return status;
}

template <class T>
Status read_value(const OrtApi* api, const void* value, const T** data, Shape* shape) {
  void *info = nullptr, *bytes = nullptr;
  Status status = call<kGetShapeInfo>(api, value, &info);
  if (status == nullptr) status = read_shape(api, info, shape);
  call<kReleaseShapeInfo, void>(api, info);
  if (status == nullptr) status = call<kGetTensorMutableData>(api, const_cast<void*>(value), &bytes);
  *data = static_cast<const T*>(bytes);
  return status;
}

Status get_input(const OrtApi* api, void* context, size_t index, const void** value) {
  return call<kGetInput>(api, static_cast<const void*>(context), index, value);
}

template <class T>
Status read_input(const OrtApi* api, void* context, size_t index, const T** data, Shape* shape) {
  const void* value = nullptr;
  Status status = get_input(api, context, index, &value);
  return status == nullptr ? read_value(api, value, data, shape) : status;
}

Status make_output(const OrtApi* api, void* context, const Shape& shape, float** data) {
  void *value = nullptr, *bytes = nullptr;
  Status status =
      call<kGetOutput>(api, context, size_t{0}, static_cast<const int64_t*>(shape.dimension), shape.rank, &value);
  if (status == nullptr) status = call<kGetTensorMutableData>(api, value, &bytes);
  *data = static_cast<float*>(bytes);
  return status;
}

}  // namespace

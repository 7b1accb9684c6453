// The part of ONNX Runtime's C interface that the glue uses, declared here: its headers are not needed to build.
//
// The interface is a table of function pointers to which releases only append. All slots below exist since 1.17, and so
// does the part of OrtCustomOp that ONNX Runtime reads when its version field is 17.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtApi;
struct OrtApiBase {
  const OrtApi* (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};
using Status = void*;  // null: success

struct OrtCustomOp {
  uint32_t version;
  void* (*create_kernel_v1)(const OrtCustomOp*, const OrtApi*, const void* info);
  const char* (*get_name)(const OrtCustomOp*);
  const char* (*get_execution_provider)(const OrtCustomOp*);
  int (*get_input_type)(const OrtCustomOp*, size_t index);
  size_t (*get_input_count)(const OrtCustomOp*);
  int (*get_output_type)(const OrtCustomOp*, size_t index);
  size_t (*get_output_count)(const OrtCustomOp*);
  void (*compute_v1)(void* kernel, void* context);
  void (*destroy_kernel)(void* kernel);
  int (*get_input_characteristic)(const OrtCustomOp*, size_t index);
  int (*get_output_characteristic)(const OrtCustomOp*, size_t index);
  int (*get_input_memory_type)(const OrtCustomOp*, size_t index);
  int (*get_variadic[4])(const OrtCustomOp*);
  Status (*create_kernel)(const OrtCustomOp*, const OrtApi*, const void* info, void** kernel);
  Status (*compute)(void* kernel, void* context);
  Status (*infer_shape)(const OrtCustomOp*, void* context);
  int (*get_start_version)(const OrtCustomOp*);
  int (*get_end_version)(const OrtCustomOp*);
};
}

namespace {

constexpr uint32_t kApiVersion = 17;
constexpr uint32_t kOldestApiVersion = 1;  // of which every ONNX Runtime has the table
constexpr int kAttributeInt = 1;           // OrtOpAttrType

enum Slot {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kIsTensor = 50,
  kGetTensorMutableData = 51,
  kCreateShapeInfo = 57,
  kSetElementType = 58,
  kSetDimensions = 59,
  kGetElementType = 60,
  kGetDimensionCount = 61,
  kGetDimensions = 62,
  kGetSymbolicDimensions = 63,
  kGetShapeInfo = 65,
  kGetAttributeFloat = 85,
  kGetAttributeInt64 = 86,
  kGetInput = 90,
  kGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseShapeInfo = 99,
  kReleaseCustomOpDomain = 101,
  kGetConstantInput = 249,
  kGetInputTypeShape = 268,
  kGetShapeAttribute = 269,
  kSetOutputTypeShape = 270,
  kSetSymbolicDimensions = 271,
  kReadAttribute = 272,
  kParallelFor = 274,
};

// Calls a slot. Arguments must have exactly the types of the C interface.
template <Slot kSlot, class Result = Status, class... Arguments>
Result call(const OrtApi* api, Arguments... arguments) {
  void* const slot = reinterpret_cast<void* const*>(api)[kSlot];
  return reinterpret_cast<Result (*)(Arguments...)>(slot)(arguments...);
}

}  // namespace

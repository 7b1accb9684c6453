// The glue of RotateBlocks: each block of a row's columns times a Hadamard matrix.

#include "ort_layer.h"
#include "ort_node.h"

namespace {

using namespace microvlm;

constexpr Operand kRotated = {"x", kFloat, {kLeading, kColumns}};

struct RotationKernel {
  const OrtApi* api;
  const Kernels* kernels;
  int64_t width;
};

Status compute(void* handle, void* context) {
  const auto& kernel = *static_cast<const RotationKernel*>(handle);
  const void* value = nullptr;
  Tensor x;
  AlignedCopy copy;
  Status status = get_input(kernel.api, context, 0, &value);
  if (status == nullptr) status = read_operand(kernel.api, kRotated, value, &x, &copy);
  if (status != nullptr) return status;
  if (x.dimensions[x.rank - 1] % kernel.width != 0) {
    return fail(kernel.api, kInvalidArgument, "the columns of x are no multiple of the rotation's width");
  }
  float* y = nullptr;
  status = make_output(kernel.api, context, 0, x.dimensions, x.rank, &y);
  if (status == nullptr) kernel.kernels->steps.rotate_blocks(x.as<float>(), x.count / kernel.width, kernel.width, y);
  return status;
}

Status create(const OrtCustomOp*, const OrtApi* api, const void* info, void** kernel) {
  const char* problem = nullptr;
  const Kernels* kernels = active_variant(&problem);
  if (kernels == nullptr) return fail(api, kInvalidArgument, problem);
  int64_t width = 0;
  Status status = call<kGetAttributeInt64>(api, info, "width", &width);
  if (status != nullptr) return status;
  if (width != 4 && width != 16 && width != kMaxRotation) {
    return fail(api, kInvalidArgument, "the width of a rotation is 4, 16 or 64");
  }
  void* memory = std::malloc(sizeof(RotationKernel));
  if (memory == nullptr) return fail(api, kRuntimeException, "not enough memory");
  *kernel = new (memory) RotationKernel{api, kernels, width};
  return nullptr;
}

Status infer_shape(const OrtCustomOp*, void* context) {
  const OrtApi* api = first_api.load(std::memory_order_relaxed);
  InferredShape shape;
  Status status = infer_input(api, context, 0, &shape);
  if (status != nullptr || shape.rank == 0 || shape.dimensions[shape.rank - 1] < 0) return status;
  return infer_output(api, context, 0, shape, shape.dimensions[shape.rank - 1]);
}

OrtCustomOp make_op() {
  OrtCustomOp op = {};
  answer_as_every_op(&op);
  op.get_name = [](const OrtCustomOp*) { return "RotateBlocks"; };
  op.get_input_type = op.get_output_type = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.get_input_count = op.get_output_count = [](const OrtCustomOp*) -> size_t { return 1; };
  op.destroy_kernel = destroy_kernel<RotationKernel>;
  op.create_kernel = create;
  op.compute = compute;
  op.infer_shape = infer_shape;
  return op;
}

// Constructed while the library loads, before anyone can register it.
const OrtCustomOp op = make_op();

}  // namespace

const OrtCustomOp* rotation_op() { return &op; }

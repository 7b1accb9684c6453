// The glue that makes the operators custom operators of ONNX Runtime: SessionOptions.register_custom_ops_library
// registers it. Handles shapes and pointers, no arithmetic.

#include <atomic>
#include <cstddef>

#include "declarations.h"
#include "operators.h"
#include "ort_layer.h"
#include "ort_node.h"

std::atomic<const OrtApi*> first_api{nullptr};

namespace {

using namespace microvlm;

struct Op : OrtCustomOp {
  const Declaration* declaration;
};

struct Kernel {
  const OrtApi* api;
  const Declaration* op;
  const Kernels* kernels;
  int64_t attribute = 0;
  // Weights that are initializers are looked up and checked once. Each look-up touches a dozen of ONNX Runtime's
  // objects, which are out of the cache again when a model comes back to this node.
  bool has_weights = false;
  struct Weights {
    Tensor tensor[kMaxInputs - 1];  // inputs from 1 on
    WeightSizes sizes;
    AlignedCopy copies[kMaxInputs - 1];
  } weights;
};

// Looks up and checks every weight. `values`: of inputs 1, 2, and, where there is a multiplier, 3.
Status read_weights(const Kernel& kernel, const void* const* values, Kernel::Weights* weights) {
  const Declaration& op = *kernel.op;
  for (size_t i = 1; i < op.input_count(); ++i) {
    Status status =
        read_operand(kernel.api, op.inputs[i], values[i - 1], &weights->tensor[i - 1], &weights->copies[i - 1]);
    if (status != nullptr) return status;
  }
  Problem problem;
  if (find_weight_sizes(op, weights->tensor, kernel.attribute, &weights->sizes, &problem)) return nullptr;
  return fail(kernel.api, kInvalidArgument, problem.text);
}

Status gather(const Kernel& kernel, const Kernel::Weights& weights, const int64_t* ids, int64_t count, float* y) {
  const Tensor *packed = weights.tensor, *scale = &weights.tensor[kernel.op->input_count() - 2];
  const bool is_int4 = kernel.op->product == Product::kInt4;
  const int64_t rows = weights.sizes.rows, columns = weights.sizes.most_columns, row_bytes = packed->dimensions[1];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = ids[i] < 0 ? ids[i] + rows : ids[i];
    if (id < 0 || id >= rows) return fail(kernel.api, kInvalidArgument, "an id is outside the table");
    if (columns == 0) continue;
    const uint8_t* row = packed->as<uint8_t>() + id * row_bytes;
    if (is_int4) {
      const Tensor& multiplier = weights.tensor[1];
      kernel.kernels->dequantize_int4(row, multiplier.as<uint8_t>() + id * multiplier.dimensions[1], columns,
                                      scale->as<float>()[id], y);
    } else {
      kernel.kernels->dequantize_int8(row, columns, scale->as<float>()[id], y);
    }
    y += columns;
  }
  return nullptr;
}

// Nothing of an operand is read, and no output made, before all operands are checked: each against its declaration
// where it is looked up, the weights against each other, and the first input against the weights.
Status run_node(const Kernel& kernel, void* context, const Kernel::Weights& weights, Tensor* first) {
  const Declaration& op = *kernel.op;
  int64_t leading = 0, columns = 0;
  Problem problem;
  if (!fits_weights(op, *first, weights.sizes, &leading, &columns, &problem)) {
    return fail(kernel.api, kInvalidArgument, problem.text);
  }
  if (op.gathers) ++first->rank;  // fits_declaration leaves room
  first->dimensions[first->rank - 1] = op.gathers ? columns : weights.sizes.rows;
  float* y = nullptr;
  Status status = make_output(kernel.api, context, 0, &first->dimensions[0], first->rank, &y);
  if (status != nullptr) return status;
  if (op.gathers) return gather(kernel, weights, first->as<int64_t>(), leading, y);

  const Tensor* tensor = weights.tensor;
  const bool has_multiplier = op.input_count() == kMaxInputs;
  const Matrix matrix = {tensor[0].as<uint8_t>(), has_multiplier ? tensor[1].as<uint8_t>() : nullptr,
                         weights.sizes.rows, tensor[0].dimensions[0], columns};
  Threads threads = {kernel.api, context};
  const bool done =
      multiply(*kernel.kernels, op.product, matrix, tensor[has_multiplier ? 2 : 1].as<float>(), weights.sizes.one_scale,
               first->as<float>(), leading, y, Pool{run_in_session, &threads, kSessionTasks});
  return done ? nullptr : fail(kernel.api, kRuntimeException, "not enough memory for the int8 activations of x");
}

// A node whose weights the graph computes, or is given: they are looked up and checked at every call.
__attribute__((noinline)) Status run_with_inputs(const Kernel& kernel, void* context, Tensor* first) {
  const void* values[kMaxInputs - 1] = {};
  for (size_t i = 1; i < kernel.op->input_count(); ++i) {
    Status status = get_input(kernel.api, context, i, &values[i - 1]);
    if (status != nullptr) return status;
  }
  Kernel::Weights weights;
  Status status = read_weights(kernel, values, &weights);
  return status == nullptr ? run_node(kernel, context, weights, first) : status;
}

Status compute(void* handle, void* context) {
  const auto& kernel = *static_cast<const Kernel*>(handle);
  const void* value = nullptr;
  Tensor first;
  AlignedCopy copy;
  Status status = get_input(kernel.api, context, 0, &value);
  if (status == nullptr) status = read_operand(kernel.api, kernel.op->inputs[0], value, &first, &copy);
  if (status != nullptr) return status;
  if (!kernel.has_weights) return run_with_inputs(kernel, context, &first);
  return run_node(kernel, context, kernel.weights, &first);
}

// Looks up the attribute, and the weights where all are initializers.
Status find_operands(const void* info, Kernel* kernel) {
  if (kernel->op->attribute != nullptr) {
    Status status = call<kGetAttributeInt64>(kernel->api, info, kernel->op->attribute, &kernel->attribute);
    if (status != nullptr) return status;
  }
  const void* values[kMaxInputs - 1] = {};
  for (size_t i = 1; i < kernel->op->input_count(); ++i) {
    int is_constant = 0;
    Status status = call<kGetConstantInput>(kernel->api, info, i, &is_constant, &values[i - 1]);
    if (status != nullptr || is_constant == 0) return status;
  }
  kernel->has_weights = true;
  return read_weights(*kernel, values, &kernel->weights);
}

// Width of the output: the attribute, or a side of packed, or -1.
Status infer_width(const OrtApi* api, const Declaration& op, void* context, int64_t* width) {
  if (op.attribute != nullptr) return infer_attribute(api, context, op.attribute, width);
  InferredShape packed;
  Status status = infer_input(api, context, 1, &packed);
  if (status == nullptr) *width = packed.rank != 2 ? -1 : packed.dimensions[op.gathers ? 1 : 0];
  return status;
}

// y is x with N for K, or a row of the table for every id.
Status infer_shape(const OrtCustomOp* self, void* context) {
  const Declaration& op = *static_cast<const Op*>(self)->declaration;
  const OrtApi* api = first_api.load(std::memory_order_relaxed);
  InferredShape shape;
  Status status = infer_input(api, context, 0, &shape);
  int64_t width = -1;
  if (status == nullptr && shape.rank > 0) status = infer_width(api, op, context, &width);
  if (status != nullptr || shape.rank == 0 || shape.rank == kMaxDimensions || width < 0) return status;
  if (op.gathers) ++shape.rank;
  return infer_output(api, context, 0, shape, width);
}

Op make_op(const Declaration& declaration) {
  Op op = {};
  answer_as_every_op(&op);
  op.get_name = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->declaration->name; };
  op.get_input_type = [](const OrtCustomOp* self, size_t i) {
    return static_cast<const Op*>(self)->declaration->inputs[i].type;
  };
  op.get_input_count = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->declaration->input_count(); };
  op.get_output_type = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.get_output_count = [](const OrtCustomOp*) -> size_t { return 1; };
  op.destroy_kernel = destroy_kernel<Kernel>;
  op.create_kernel = create_kernel<Op, Kernel, find_operands>;
  op.compute = compute;
  op.infer_shape = infer_shape;
  op.declaration = &declaration;
  return op;
}

struct Ops {
  Op op[kDeclarationCount];
  Ops() {
    for (size_t i = 0; i < kDeclarationCount; ++i) op[i] = make_op(kDeclarations[i]);
  }
};

// Constructed while the library loads, before anyone can register it.
const Ops ops;

// One domain for the life of the process: sessions may outlive the code that registered it.
std::atomic<void*> domain{nullptr};

Status make_domain(const OrtApi* api, void** made) {
  Status status = call<kCreateCustomOpDomain>(api, "ai.microvlm", made);
  for (const Op& op : ops.op) {
    if (status == nullptr) status = call<kCustomOpDomainAdd>(api, *made, static_cast<const OrtCustomOp*>(&op));
  }
  for (size_t i = 0; i < kLayerCount; ++i) {
    if (status == nullptr) status = call<kCustomOpDomainAdd>(api, *made, layer_op(i));
  }
  if (status == nullptr) status = call<kCustomOpDomainAdd>(api, *made, mask_op());
  if (status == nullptr) status = call<kCustomOpDomainAdd>(api, *made, rotation_op());
  return status;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Status RegisterCustomOps(void* options, const OrtApiBase* base) {
  const OrtApi* api = base->get_api(kApiVersion);
  if (api == nullptr) {
    const OrtApi* oldest = base->get_api(kOldestApiVersion);
    return oldest == nullptr ? nullptr : fail(oldest, kInvalidArgument, "ONNX Runtime is older than 1.17: upgrade it");
  }
  const char* problem = nullptr;
  if (active_variant(&problem) == nullptr) return fail(api, kInvalidArgument, problem);
  const OrtApi* none = nullptr;
  first_api.compare_exchange_strong(none, api);
  void* current = domain.load();
  if (current == nullptr) {
    void* made = nullptr;
    Status status = make_domain(api, &made);
    if (status != nullptr) {
      if (made != nullptr) call<kReleaseCustomOpDomain, void>(api, made);
      return status;
    }
    if (domain.compare_exchange_strong(current, made)) {
      current = made;
    } else {
      call<kReleaseCustomOpDomain, void>(api, made);
    }
  }
  return call<kAddCustomOpDomain>(api, options, current);
}

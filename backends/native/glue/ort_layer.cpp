// The glue of the fused layers: reads a node's operands, calls layers.cpp. Handles shapes and pointers, no arithmetic.

#include "ort_layer.h"

#include "ort_node.h"

namespace {

using namespace microvlm;

struct LayerOp : OrtCustomOp {
  const LayerDeclaration* declaration;
};

// A node. Its weights are initializers, looked up and checked when the session is made.
struct LayerKernel {
  const OrtApi* api;
  const LayerDeclaration* op;
  const Kernels* kernels;
  Layer layer = {};
  Tensor weights[kMaxLayerInputs];
  AlignedCopy copies[kMaxLayerInputs];
};

Status run_layer(const LayerKernel& kernel, void* context, const Tensor* activations) {
  Layer layer = kernel.layer;
  int64_t tokens = 0;
  Problem problem;
  if (!fits_layer(*kernel.op, activations, &layer, &tokens, &problem)) {
    return fail(kernel.api, kInvalidArgument, problem.text);
  }
  float* outputs[kMaxLayerOutputs] = {};
  for (size_t i = 0; i < kernel.op->outputs; ++i) {
    const int64_t dimensions[] = {activations[0].dimensions[0], activations[0].dimensions[1],
                                  layer.output_width(kernel.op->is_feed_forward, i)};
    Status status = make_output(kernel.api, context, i, dimensions, 3, &outputs[i]);
    if (status != nullptr) return status;
  }
  Threads threads = {kernel.api, context};
  const Pool pool = {run_in_session, &threads, kSessionTasks};
  const float *first = activations[0].as<float>(), *second = activations[1].as<float>();
  const bool done = kernel.op->is_feed_forward
                        ? feed_forward(*kernel.kernels, layer.feed_forward, first, second, tokens, outputs[0], pool)
                        : attention_inputs(*kernel.kernels, layer.attention_inputs, first, second,
                                           activations[2].as<float>(), tokens, outputs, pool);
  return done ? nullptr : fail(kernel.api, kRuntimeException, "not enough memory between the steps of this layer");
}

Status compute(void* handle, void* context) {
  const auto& kernel = *static_cast<const LayerKernel*>(handle);
  Tensor activations[kMaxLayerInputs];
  AlignedCopy copies[kMaxLayerInputs];
  for (size_t i = 0; i < kernel.op->activations; ++i) {
    const void* value = nullptr;
    Status status = get_input(kernel.api, context, i, &value);
    if (status == nullptr) status = read_operand(kernel.api, kernel.op->inputs[i], value, &activations[i], &copies[i]);
    if (status != nullptr) return status;
  }
  return run_layer(kernel, context, activations);
}

size_t input_count(const LayerDeclaration& op) {
  size_t count = kMaxLayerInputs;
  while (op.inputs[count - 1].name == nullptr) --count;
  return count;
}

Status find_weights(const void* info, LayerKernel* kernel) {
  const LayerDeclaration& op = *kernel->op;
  int64_t attributes[2] = {};
  float epsilon = 0;
  Status status = call<kGetAttributeFloat>(kernel->api, info, "epsilon", &epsilon);
  for (size_t i = 0; i < 2 && status == nullptr; ++i) {
    status = call<kGetAttributeInt64>(kernel->api, info, op.attributes[i], &attributes[i]);
  }
  Problem problem;
  for (size_t i = op.activations; i < input_count(op) && status == nullptr; ++i) {
    int is_constant = 0;
    const void* value = nullptr;
    status = call<kGetConstantInput>(kernel->api, info, i, &is_constant, &value);
    if (status != nullptr) break;
    if (is_constant == 0) {
      refuse(&problem, "%s is not an initializer", op.inputs[i].name);
      return fail(kernel->api, kInvalidArgument, problem.text);
    }
    const size_t place = i - op.activations;
    status = read_operand(kernel->api, op.inputs[i], value, &kernel->weights[place], &kernel->copies[place]);
  }
  if (status != nullptr) return status;
  if (find_layer(op, kernel->weights, attributes, epsilon, &kernel->layer, &problem)) return nullptr;
  return fail(kernel->api, kInvalidArgument, problem.text);
}

// Outputs are the first input with their own widths; that of a feed-forward layer is the second input.
Status infer_shape(const OrtCustomOp* self, void* context) {
  const LayerDeclaration& op = *static_cast<const LayerOp*>(self)->declaration;
  const OrtApi* api = first_api.load(std::memory_order_relaxed);
  InferredShape shape;
  Status status = infer_input(api, context, op.is_feed_forward, &shape);
  for (size_t i = 0; i < op.outputs && status == nullptr && shape.rank == 3; ++i) {
    int64_t width = shape.dimensions[2];
    if (!op.is_feed_forward) status = infer_attribute(api, context, op.attributes[i > 0], &width);
    if (status == nullptr && width >= 0) status = infer_output(api, context, i, shape, width);
  }
  return status;
}

const LayerDeclaration& declaration_of(const OrtCustomOp* op) { return *static_cast<const LayerOp*>(op)->declaration; }

LayerOp make_op(const LayerDeclaration& declaration) {
  LayerOp op = {};
  answer_as_every_op(&op);
  op.get_name = [](const OrtCustomOp* self) { return declaration_of(self).name; };
  op.get_input_type = [](const OrtCustomOp* self, size_t i) { return declaration_of(self).inputs[i].type; };
  op.get_input_count = [](const OrtCustomOp* self) { return input_count(declaration_of(self)); };
  op.get_output_type = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.get_output_count = [](const OrtCustomOp* self) { return declaration_of(self).outputs; };
  op.destroy_kernel = destroy_kernel<LayerKernel>;
  op.create_kernel = create_kernel<LayerOp, LayerKernel, find_weights>;
  op.compute = compute;
  op.infer_shape = infer_shape;
  op.declaration = &declaration;
  return op;
}

struct LayerOps {
  LayerOp op[kLayerCount];
  LayerOps() {
    for (size_t i = 0; i < kLayerCount; ++i) op[i] = make_op(kLayers[i]);
  }
};

// Constructed while the library loads, before anyone can register it.
const LayerOps ops;

}  // namespace

const OrtCustomOp* layer_op(size_t i) { return &ops.op[i]; }

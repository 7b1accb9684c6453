// The glue of DecoderMask, and what it computes: which positions a token of a decoder sees.

#include <cstring>

#include "ort_layer.h"
#include "ort_node.h"

namespace {

using namespace microvlm;

constexpr int kBool = 9;  // as in ONNX: TensorProto.DataType
constexpr Operand kMaskOperands[] = {{"attention_mask", kInt64, {kRows, kColumns}},
                                     {"position_ids", kInt64, {kRows, kColumns}}};

// visible[b, 0, s, t]: a token sees what is not masked up to itself, and itself.
void fill_mask(const int64_t* mask, int64_t batch, int64_t queries, int64_t total, bool* visible) {
  for (int64_t b = 0; b < batch; ++b, mask += total) {
    for (int64_t s = 0; s < queries; ++s, visible += total) {
      const int64_t own = s + total - queries;
      for (int64_t t = 0; t < total; ++t) visible[t] = mask[t] != 0 && t <= own;
      if (own >= 0) visible[own] = true;
    }
  }
}

Status compute(void* handle, void* context) {
  const auto* api = static_cast<const OrtApi*>(handle);
  Tensor operands[2];
  AlignedCopy copies[2];
  for (size_t i = 0; i < 2; ++i) {
    const void* value = nullptr;
    Status status = get_input(api, context, i, &value);
    if (status == nullptr) status = read_operand(api, kMaskOperands[i], value, &operands[i], &copies[i]);
    if (status != nullptr) return status;
  }
  const int64_t *mask = operands[0].dimensions, *positions = operands[1].dimensions;
  int64_t bytes = operands[0].limit;
  if (mask[0] != positions[0]) return fail(api, kInvalidArgument, "attention_mask and position_ids differ in batch");
  if (positions[1] > 0 && __builtin_mul_overflow(bytes, positions[1], &bytes)) {
    return fail(api, kInvalidArgument, "the mask of so many positions is too large");
  }
  const int64_t dimensions[] = {mask[0], 1, positions[1], mask[1]};
  bool* visible = nullptr;
  Status status = make_output(api, context, 0, dimensions, 4, &visible);
  if (status == nullptr) fill_mask(operands[0].as<int64_t>(), mask[0], positions[1], mask[1], visible);
  return status;
}

OrtCustomOp make_op() {
  OrtCustomOp op = {};
  answer_as_every_op(&op);
  op.get_name = [](const OrtCustomOp*) { return "DecoderMask"; };
  op.get_input_type = [](const OrtCustomOp*, size_t i) { return kMaskOperands[i].type; };
  op.get_input_count = [](const OrtCustomOp*) -> size_t { return 2; };
  op.get_output_type = [](const OrtCustomOp*, size_t) { return kBool; };
  op.get_output_count = [](const OrtCustomOp*) -> size_t { return 1; };
  op.destroy_kernel = [](void*) {};
  // The interface is all that a node needs.
  op.create_kernel = [](const OrtCustomOp*, const OrtApi* api, const void*, void** kernel) -> Status {
    *kernel = const_cast<OrtApi*>(api);
    return nullptr;
  };
  op.compute = compute;
  op.infer_shape = [](const OrtCustomOp*, void*) -> Status { return nullptr; };
  return op;
}

// Constructed while the library loads, before anyone can register it.
const OrtCustomOp op = make_op();

}  // namespace

const OrtCustomOp* mask_op() { return &op; }

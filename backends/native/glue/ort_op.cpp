// The glue that makes the operators custom operators of ONNX Runtime: SessionOptions.register_custom_ops_library
// registers it. Handles shapes and pointers, no arithmetic.

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

#include "operators.h"
#include "ort_values.h"

namespace {

using namespace microvlm;

constexpr size_t kMaxWeights = 3;  // inputs after x or the ids

// A row of op_table.py.
struct Op : OrtCustomOp {
  const OrtApi* api;
  const char* name;
  int first_type;  // of input 0; the next inputs are packed, multiplier (where there is one), scale
  bool has_multiplier;
  const char* attribute;  // the width of the output; null where the shape of packed has it
  Product product;        // meaningless for gathers

  bool gathers() const { return first_type == kInt64; }
  size_t inputs() const { return has_multiplier ? 4 : 3; }
};

struct Operands {
  const uint8_t *packed = nullptr, *multiplier = nullptr;
  const float* scale = nullptr;
  int64_t packed_rows = 0, packed_columns = 0, multiplier_rows = 0, multiplier_columns = 0, scales = 0;
};

struct Kernel {
  const OrtApi* api;
  const Op* op;
  const Kernels* kernels;
  int64_t attribute;
  // Weights that are initializers are looked up once. Each lookup touches a dozen of ONNX Runtime's objects, which are
  // out of the cache again when a model comes back to this node.
  bool has_weights;
  Operands weights;
};

// The interface does not tell how many threads a session has: enough tasks for eight to share evenly.
constexpr int64_t kSessionTasks = 16;

struct Threads {
  const OrtApi* api;
  const void* context;
};

// Runs tasks in batches on the session's own threads; 0 lets the session choose the number of batches.
void run_in_session(void* handle, void (*task)(void*, size_t), size_t tasks, void* state) {
  const auto& threads = *static_cast<const Threads*>(handle);
  Status status = call<kParallelFor>(threads.api, threads.context, task, tasks, size_t{0}, state);
  if (status == nullptr) return;
  call<kReleaseStatus, void>(threads.api, status);
  for (size_t i = 0; i < tasks; ++i) task(state, i);
}

// `values`: those of inputs 1, 2 and, where there is a multiplier, 3.
Status read_weights(const OrtApi* api, const Op& op, const void* const* values, Operands* operands) {
  Shape packed, multiplier, scale;
  Status status = read_value(api, *values++, &operands->packed, &packed);
  if (status == nullptr && op.has_multiplier) status = read_value(api, *values++, &operands->multiplier, &multiplier);
  if (status == nullptr) status = read_value(api, *values, &operands->scale, &scale);
  if (status == nullptr && (packed.rank != 2 || scale.rank != 1)) {
    status = fail(api, kInvalidArgument, "packed is not a matrix or scale not a vector");
  }
  if (status == nullptr && op.has_multiplier && multiplier.rank != 2) {
    status = fail(api, kInvalidArgument, "multiplier is not a matrix");
  }
  operands->packed_rows = packed.first();
  operands->packed_columns = packed.last();
  operands->multiplier_rows = multiplier.first();
  operands->multiplier_columns = multiplier.last();
  operands->scales = scale.first();
  return status;
}

// The weights of a call: those of the kernel, or inputs that the graph computes.
Status find_weights(const Kernel& kernel, void* context, Operands* operands) {
  if (kernel.has_weights) {
    *operands = kernel.weights;
    return nullptr;
  }
  const void* values[kMaxWeights] = {};
  for (size_t i = 1; i < kernel.op->inputs(); ++i) {
    Status status = get_input(kernel.api, context, i, &values[i - 1]);
    if (status != nullptr) return status;
  }
  return read_weights(kernel.api, *kernel.op, values, operands);
}

Status multiply_node(const Kernel& kernel, void* context) {
  const float* x = nullptr;
  Shape shape;
  Operands in;
  Status status = read_input(kernel.api, context, 0, &x, &shape);
  if (status == nullptr) status = find_weights(kernel, context, &in);
  if (status != nullptr) return status;
  if (shape.rank == 0) return fail(kernel.api, kInvalidArgument, "x is a scalar");
  const int64_t columns = shape.last();
  const int64_t rows = kernel.op->attribute != nullptr ? kernel.attribute : in.packed_rows;
  const char* problem =
      product_problem(kernel.op->product, in.packed_rows, in.packed_columns, rows, columns, in.scales);
  // Decided by what the operator declares: an empty tensor's pointer is null too.
  if (problem == nullptr && kernel.op->has_multiplier &&
      (in.multiplier_rows != rows || in.multiplier_columns != (columns + kGroup - 1) / kGroup)) {
    problem = "multiplier does not fit packed";
  }
  if (problem != nullptr) return fail(kernel.api, kInvalidArgument, problem);

  const int64_t tokens = shape.lead(shape.rank - 1);
  shape.dimension[shape.rank - 1] = rows;
  float* y = nullptr;
  status = make_output(kernel.api, context, shape, &y);
  if (status != nullptr) return status;
  Threads threads = {kernel.api, context};
  const Matrix matrix = {in.packed, in.multiplier, rows, in.packed_rows, columns};
  const bool done = multiply(*kernel.kernels, kernel.op->product, matrix, in.scale, in.scales == 1, x, tokens, y,
                             Pool{run_in_session, &threads, kSessionTasks});
  return done ? nullptr : fail(kernel.api, kRuntimeException, "not enough memory for the int8 activations of x");
}

Status gather_node(const Kernel& kernel, void* context) {
  const int64_t* ids = nullptr;
  Shape shape;
  Operands in;
  Status status = read_input(kernel.api, context, 0, &ids, &shape);
  if (status == nullptr) status = find_weights(kernel, context, &in);
  if (status != nullptr) return status;
  const int64_t vocabulary = in.packed_rows, row_bytes = in.packed_columns;
  const int64_t columns = kernel.op->has_multiplier ? kernel.attribute : row_bytes;
  const int64_t groups = columns / kGroup + (columns % kGroup != 0);
  // Refuses widths that no row can have before anything is multiplied by them.
  const bool fits = in.scales == vocabulary && columns >= 0 && columns <= 2 * row_bytes &&
                    (!kernel.op->has_multiplier || (row_bytes == groups * kGroup / 2 &&
                                                    in.multiplier_rows == vocabulary &&
                                                    in.multiplier_columns == groups));
  if (!fits || shape.rank == kMaxDimensions) {
    return fail(kernel.api, kInvalidArgument, "the table's operands do not fit each other");
  }
  const int64_t count = shape.lead(shape.rank);
  shape.dimension[shape.rank++] = columns;
  float* y = nullptr;
  status = make_output(kernel.api, context, shape, &y);
  if (status != nullptr) return status;
  for (int64_t i = 0; i < count; ++i, y += columns) {
    const int64_t id = ids[i] < 0 ? ids[i] + vocabulary : ids[i];
    if (id < 0 || id >= vocabulary) return fail(kernel.api, kInvalidArgument, "an id is outside the table");
    const uint8_t* packed = in.packed + id * row_bytes;
    if (!kernel.op->has_multiplier) {
      kernel.kernels->dequantize_int8(packed, columns, in.scale[id], y);
    } else {
      kernel.kernels->dequantize_int4(packed, in.multiplier + id * groups, columns, in.scale[id], y);
    }
  }
  return nullptr;
}

Status compute(void* kernel, void* context) {
  const auto& self = *static_cast<const Kernel*>(kernel);
  return self.op->gathers() ? gather_node(self, context) : multiply_node(self, context);
}

Status create_kernel(const OrtCustomOp* op, const OrtApi* api, const void* info, void** kernel) {
  const auto* self = static_cast<const Op*>(op);
  const char* problem = nullptr;
  const Kernels* kernels = active_variant(&problem);
  if (kernels == nullptr) return fail(api, kInvalidArgument, problem);
  int64_t attribute = 0;
  if (self->attribute != nullptr) {
    Status status = call<kGetAttributeInt64>(api, info, self->attribute, &attribute);
    if (status != nullptr) return status;
  }
  Operands weights;
  int are_constant = 1;
  const void* values[kMaxWeights] = {};
  for (size_t i = 1; i < self->inputs() && are_constant != 0; ++i) {
    Status status = call<kGetConstantInput>(api, info, i, &are_constant, &values[i - 1]);
    if (status != nullptr) return status;
  }
  if (are_constant != 0) {
    Status status = read_weights(api, *self, values, &weights);
    if (status != nullptr) return status;
  }
  void* memory = std::malloc(sizeof(Kernel));
  if (memory == nullptr) return fail(api, kRuntimeException, "not enough memory");
  *kernel = new (memory) Kernel{api, self, kernels, attribute, are_constant != 0, weights};
  return nullptr;
}

// Width of the output: the attribute, or a side of packed, or -1.
Status infer_width(const Op& op, void* context, int64_t* width) {
  const void* node = context;
  if (op.attribute != nullptr) {
    const void* attribute = nullptr;
    size_t read = 0;
    Status status = call<kGetShapeAttribute>(op.api, node, op.attribute, &attribute);
    if (status != nullptr) return status;
    return call<kReadAttribute>(op.api, attribute, kAttributeInt, static_cast<void*>(width), sizeof *width, &read);
  }
  void* info = nullptr;
  Shape packed;
  Status status = call<kGetInputTypeShape>(op.api, node, size_t{1}, &info);
  if (status == nullptr) status = read_shape(op.api, info, &packed);
  *width = packed.rank != 2 ? -1 : op.gathers() ? packed.last() : packed.first();
  return status;
}

// y is x with N for K, or a row of the table for every id. Where a dimension has neither a value nor a name, y's shape
// stays unknown. Rank 0 is what ONNX Runtime returns for a shape that it could not infer itself.
Status infer_shape(const OrtCustomOp* self, void* context) {
  const Op& op = *static_cast<const Op*>(self);
  const OrtApi* api = op.api;
  void *info = nullptr, *y_info = nullptr;
  Shape shape;
  const char* names[kMaxDimensions] = {};
  Status status = call<kGetInputTypeShape>(api, static_cast<const void*>(context), size_t{0}, &info);
  if (status == nullptr) status = read_shape(api, info, &shape);
  if (status == nullptr) {
    status = call<kGetSymbolicDimensions>(api, static_cast<const void*>(info), &names[0], shape.rank);
  }
  int64_t width = -1;
  if (status == nullptr) status = infer_width(op, context, &width);
  if (status != nullptr || shape.rank == 0 || shape.rank == kMaxDimensions || width < 0) return status;
  if (op.gathers()) ++shape.rank;
  shape.dimension[shape.rank - 1] = width;
  names[shape.rank - 1] = "";
  for (size_t i = 0; i < shape.rank; ++i) {
    if (shape.dimension[i] < 0 && *names[i] == '\0') return nullptr;
  }
  status = call<kCreateShapeInfo>(api, &y_info);
  if (status != nullptr) return status;
  status = call<kSetElementType>(api, y_info, kFloat);
  if (status == nullptr) {
    status = call<kSetDimensions>(api, y_info, static_cast<const int64_t*>(shape.dimension), shape.rank);
  }
  if (status == nullptr) status = call<kSetSymbolicDimensions>(api, y_info, &names[0], shape.rank);
  if (status == nullptr) status = call<kSetOutputTypeShape>(api, context, size_t{0}, static_cast<const void*>(y_info));
  call<kReleaseShapeInfo, void>(api, y_info);
  return status;
}

int input_type(const OrtCustomOp* op, size_t index) {
  const auto* self = static_cast<const Op*>(op);
  return index == 0 ? self->first_type : index + 1 == self->inputs() ? kFloat : kUint8;
}

Op make_op(const char* name, int first_type, bool has_multiplier, const char* attribute, Product product) {
  Op op = {};
  op.version = kApiVersion;
  op.get_name = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->name; };
  op.get_execution_provider = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.get_input_type = input_type;
  op.get_input_count = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->inputs(); };
  op.get_output_type = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.get_output_count = [](const OrtCustomOp*) -> size_t { return 1; };
  op.get_input_characteristic = op.get_output_characteristic = op.get_input_memory_type =
      [](const OrtCustomOp*, size_t) { return 0; };  // required; required; the provider's own memory
  op.get_start_version = op.get_end_version = [](const OrtCustomOp*) { return 1; };
  op.destroy_kernel = std::free;
  op.create_kernel = create_kernel;
  op.compute = compute;
  op.infer_shape = infer_shape;
  op.name = name;
  op.first_type = first_type;
  op.has_multiplier = has_multiplier;
  op.attribute = attribute;
  op.product = product;
  return op;
}

Op ops[] = {
    make_op("TernaryMatMul2x4", kFloat, false, "rows", Product::kTernary2x4),
    make_op("TernaryMatMul3x5", kFloat, false, "rows", Product::kTernary3x5),
    make_op("Int8MatMul", kFloat, false, nullptr, Product::kInt8),
    make_op("Int4MatMul", kFloat, true, nullptr, Product::kInt4),
    make_op("Int8Gather", kInt64, false, nullptr, Product::kInt8),
    make_op("Int4Gather", kInt64, true, "columns", Product::kInt4),
};

// One domain for the life of the process: sessions may outlive the code that registered it.
std::atomic<void*> domain{nullptr};

Status make_domain(const OrtApi* api, void** made) {
  Status status = call<kCreateCustomOpDomain>(api, "ai.microvlm", made);
  for (Op& op : ops) {
    op.api = api;
    if (status == nullptr) status = call<kCustomOpDomainAdd>(api, *made, static_cast<const OrtCustomOp*>(&op));
  }
  return status;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Status RegisterCustomOps(void* options, const OrtApiBase* base) {
  const OrtApi* api = base->get_api(kApiVersion);
  if (api == nullptr) std::abort();  // older than 1.17: without its table no error can be returned
  const char* problem = nullptr;
  if (active_variant(&problem) == nullptr) return fail(api, kInvalidArgument, problem);
  void* current = domain.load();
  if (current == nullptr) {
    void* made = nullptr;
    Status status = make_domain(api, &made);
    if (status != nullptr) return status;
    if (domain.compare_exchange_strong(current, made)) {
      current = made;
    } else {
      call<kReleaseCustomOpDomain, void>(api, made);
    }
  }
  return call<kAddCustomOpDomain>(api, options, current);
}

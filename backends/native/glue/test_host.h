// A small host for the glue: the functions of ONNX Runtime's C interface that ort_abi.h names, over values whose memory
// ends where their last element ends. Sanitizers see one byte too many here; in ONNX Runtime's arena they would not.
#pragma once

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "declarations.h"
#include "ort_abi.h"

extern "C" Status RegisterCustomOps(void* options, const OrtApiBase* base);

namespace host {

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::_Exit(1);                                                       \
    }                                                                      \
  } while (false)

struct StatusObject {
  int code;
  std::string message;
};

using Dimensions = std::vector<int64_t>;

// Type and shape of a value.
struct Info {
  int type = 0;
  Dimensions dimensions;
  std::vector<std::string> names;  // where a dimension has no value
};

// A value of `bytes` bytes, `offset` bytes behind an address that every element divides. Null where it is empty.
struct Value {
  bool is_tensor = true, has_memory = true;
  Info info;
  std::vector<uint8_t> content;  // what the memory holds, for comparisons
  size_t offset = 0;
  uint8_t* memory = nullptr;

  Value() = default;
  Value(const Value& other) { *this = other; }
  Value& operator=(const Value& other) {
    is_tensor = other.is_tensor;
    has_memory = other.has_memory;
    info = other.info;
    content = other.content;
    offset = other.offset;
    return *this;
  }
  ~Value() { std::free(memory); }
  void* data() const { return content.empty() || !has_memory ? nullptr : memory + offset; }
  void allocate() {
    std::free(memory);
    memory = static_cast<uint8_t*>(std::malloc(content.size() + offset));
    if (!content.empty()) std::memcpy(memory + offset, content.data(), content.size());
  }
};

// A node, as create_kernel and infer_shape see it. An input of null is missing.
struct Node {
  std::vector<Value*> inputs;
  std::vector<bool> are_constant;
  std::map<std::string, int64_t> attributes;
  std::map<std::string, float> numbers;  // attributes too

  bool has_constant_weights() const {
    for (size_t i = 1; i < are_constant.size(); ++i) {
      if (!are_constant[i]) return false;
    }
    return true;
  }
};

// One run of a node.
struct Context {
  const Node* node;
  size_t threads;  // of ParallelFor; 0: it returns an error
  size_t output_offset = 0;
  Value output;
  Value others[2] = {};         // outputs from 1 on
  size_t element = sizeof(float);  // bytes of an output's element
};

struct ShapeContext {
  const Node* node;
  bool has_output = false;
  Info output;
};

struct Domain {
  std::string name;
  std::vector<const OrtCustomOp*> ops;
};

struct Options {
  std::vector<Domain*> domains;
};

inline std::atomic<int64_t> live_objects{0};  // statuses, infos and domains that nobody released
// Calls until one returns an error; negative: none does.
inline thread_local int64_t calls_to_failure = -1;

inline Status create_status(int code, const char* message) {
  ++live_objects;
  return new StatusObject{code, message};
}

inline void release_status(Status status) {
  --live_objects;
  delete static_cast<StatusObject*>(status);
}

// True when this call is the one that fails.
inline bool fails_now() { return calls_to_failure >= 0 && calls_to_failure-- == 0; }
#define MAY_FAIL \
  if (fails_now()) return create_status(1, "injected")

inline Status create_domain(const char* name, void** domain) {
  MAY_FAIL;
  ++live_objects;
  *domain = new Domain{name, {}};
  return nullptr;
}
inline void release_domain(void* domain) {
  --live_objects;
  delete static_cast<Domain*>(domain);
}
inline Status add_op(void* domain, const OrtCustomOp* op) {
  MAY_FAIL;
  static_cast<Domain*>(domain)->ops.push_back(op);
  return nullptr;
}
inline Status add_domain(void* options, void* domain) {
  MAY_FAIL;
  static_cast<Options*>(options)->domains.push_back(static_cast<Domain*>(domain));
  return nullptr;
}

inline Status is_tensor(const void* value, int* result) {
  MAY_FAIL;
  *result = static_cast<const Value*>(value)->is_tensor;
  return nullptr;
}
inline Status get_data(void* value, void** data) {
  MAY_FAIL;
  CHECK(static_cast<Value*>(value)->is_tensor, "bytes of a value that is no tensor");
  *data = static_cast<Value*>(value)->data();
  return nullptr;
}
inline Status create_info(void** info) {
  MAY_FAIL;
  ++live_objects;
  *info = new Info;
  return nullptr;
}
inline void release_info(void* info) {
  if (info == nullptr) return;
  --live_objects;
  delete static_cast<Info*>(info);
}
inline Status get_info(const void* value, void** info) {
  MAY_FAIL;
  CHECK(static_cast<const Value*>(value)->is_tensor, "the shape of a value that is no tensor");
  ++live_objects;
  *info = new Info(static_cast<const Value*>(value)->info);
  return nullptr;
}
inline Status set_type(void* info, int type) {
  MAY_FAIL;
  static_cast<Info*>(info)->type = type;
  return nullptr;
}
inline Status get_type(const void* info, int* type) {
  MAY_FAIL;
  *type = static_cast<const Info*>(info)->type;
  return nullptr;
}
inline Status set_dimensions(void* info, const int64_t* dimensions, size_t count) {
  MAY_FAIL;
  static_cast<Info*>(info)->dimensions.assign(dimensions, dimensions + count);
  return nullptr;
}
inline Status count_dimensions(const void* info, size_t* count) {
  MAY_FAIL;
  *count = static_cast<const Info*>(info)->dimensions.size();
  return nullptr;
}
inline Status get_dimensions(const void* info, int64_t* dimensions, size_t count) {
  MAY_FAIL;
  const Dimensions& own = static_cast<const Info*>(info)->dimensions;
  for (size_t i = 0; i < count && i < own.size(); ++i) dimensions[i] = own[i];
  return nullptr;
}
// As ONNX Runtime's: writes no more names than the shape has.
inline Status get_names(const void* info, const char** names, size_t count) {
  MAY_FAIL;
  const std::vector<std::string>& own = static_cast<const Info*>(info)->names;
  for (size_t i = 0; i < count && i < own.size(); ++i) names[i] = own[i].c_str();
  return nullptr;
}
inline Status set_names(void* info, const char** names, size_t count) {
  MAY_FAIL;
  static_cast<Info*>(info)->names.assign(names, names + count);
  return nullptr;
}

inline Status get_attribute(const void* node, const char* name, int64_t* value) {
  MAY_FAIL;
  const auto& attributes = static_cast<const Node*>(node)->attributes;
  const auto found = attributes.find(name);
  if (found == attributes.end()) return create_status(1, "no attribute of that name");
  *value = found->second;
  return nullptr;
}
inline Status get_number(const void* node, const char* name, float* value) {
  MAY_FAIL;
  const auto& numbers = static_cast<const Node*>(node)->numbers;
  const auto found = numbers.find(name);
  if (found == numbers.end()) return create_status(1, "no attribute of that name");
  *value = found->second;
  return nullptr;
}
inline Status get_constant(const void* node, size_t index, int* is_constant, const void** value) {
  MAY_FAIL;
  const auto& self = *static_cast<const Node*>(node);
  *is_constant = self.are_constant[index];
  *value = self.are_constant[index] ? self.inputs[index] : nullptr;
  return nullptr;
}
inline Status get_input(const void* context, size_t index, const void** value) {
  MAY_FAIL;
  const Node& node = *static_cast<const Context*>(context)->node;
  CHECK(index == 0 || !node.has_constant_weights(), "an initializer is looked up at a call");
  *value = node.inputs[index];
  return nullptr;
}
inline Status get_output(void* context, size_t index, const int64_t* dimensions, size_t count, void** value) {
  MAY_FAIL;
  auto& self = *static_cast<Context*>(context);
  Value& output = index == 0 ? self.output : self.others[index - 1];
  output.info = {microvlm::kFloat, Dimensions(dimensions, dimensions + count), {}};
  size_t bytes = self.element;
  for (int64_t size : output.info.dimensions) bytes *= size;
  if (bytes > size_t{1} << 28) return create_status(1, "not enough memory for the output");
  output.content.assign(bytes, 0xee);
  output.offset = self.output_offset;
  output.allocate();
  *value = &output;
  return nullptr;
}
inline Status parallel_for(const void* context, void (*task)(void*, size_t), size_t tasks, size_t, void* state) {
  const size_t count = static_cast<const Context*>(context)->threads;
  if (count == 0) return create_status(1, "no threads");
  std::vector<std::thread> threads;
  for (size_t t = 0; t < count; ++t) {
    threads.emplace_back([=] {
      for (size_t i = t; i < tasks; i += count) task(state, i);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return nullptr;
}

inline Status get_input_shape(const void* context, size_t index, void** info) {
  MAY_FAIL;
  Value* value = static_cast<const ShapeContext*>(context)->node->inputs[index];
  *info = value == nullptr ? nullptr : &value->info;
  return nullptr;
}
inline Status get_shape_attribute(const void* context, const char* name, const void** attribute) {
  MAY_FAIL;
  const auto& attributes = static_cast<const ShapeContext*>(context)->node->attributes;
  const auto found = attributes.find(name);
  if (found == attributes.end()) return create_status(1, "no attribute of that name");
  *attribute = &found->second;
  return nullptr;
}
inline Status read_attribute(const void* attribute, int type, void* data, size_t bytes, size_t* read) {
  MAY_FAIL;
  CHECK(type == kAttributeInt && bytes == sizeof(int64_t), "an attribute is read as another type");
  std::memcpy(data, attribute, bytes);
  *read = bytes;
  return nullptr;
}
inline Status set_output_shape(void* context, size_t, const void* info) {
  MAY_FAIL;
  static_cast<ShapeContext*>(context)->has_output = true;
  static_cast<ShapeContext*>(context)->output = *static_cast<const Info*>(info);
  return nullptr;
}

inline void unexpected() { CHECK(false, "a slot of the interface that ort_abi.h does not name"); }

struct Table {
  void* slots[300];
  Table() {
    for (void*& slot : slots) slot = reinterpret_cast<void*>(unexpected);
    const std::pair<Slot, void*> known[] = {
        {kCreateStatus, reinterpret_cast<void*>(create_status)},
        {kCreateCustomOpDomain, reinterpret_cast<void*>(create_domain)},
        {kCustomOpDomainAdd, reinterpret_cast<void*>(add_op)},
        {kAddCustomOpDomain, reinterpret_cast<void*>(add_domain)},
        {kIsTensor, reinterpret_cast<void*>(is_tensor)},
        {kGetTensorMutableData, reinterpret_cast<void*>(get_data)},
        {kCreateShapeInfo, reinterpret_cast<void*>(create_info)},
        {kSetElementType, reinterpret_cast<void*>(set_type)},
        {kSetDimensions, reinterpret_cast<void*>(set_dimensions)},
        {kGetElementType, reinterpret_cast<void*>(get_type)},
        {kGetDimensionCount, reinterpret_cast<void*>(count_dimensions)},
        {kGetDimensions, reinterpret_cast<void*>(get_dimensions)},
        {kGetSymbolicDimensions, reinterpret_cast<void*>(get_names)},
        {kGetShapeInfo, reinterpret_cast<void*>(get_info)},
        {kGetAttributeFloat, reinterpret_cast<void*>(get_number)},
        {kGetAttributeInt64, reinterpret_cast<void*>(get_attribute)},
        {kGetInput, reinterpret_cast<void*>(get_input)},
        {kGetOutput, reinterpret_cast<void*>(get_output)},
        {kReleaseStatus, reinterpret_cast<void*>(release_status)},
        {kReleaseShapeInfo, reinterpret_cast<void*>(release_info)},
        {kReleaseCustomOpDomain, reinterpret_cast<void*>(release_domain)},
        {kGetConstantInput, reinterpret_cast<void*>(get_constant)},
        {kGetInputTypeShape, reinterpret_cast<void*>(get_input_shape)},
        {kGetShapeAttribute, reinterpret_cast<void*>(get_shape_attribute)},
        {kSetOutputTypeShape, reinterpret_cast<void*>(set_output_shape)},
        {kSetSymbolicDimensions, reinterpret_cast<void*>(set_names)},
        {kReadAttribute, reinterpret_cast<void*>(read_attribute)},
        {kParallelFor, reinterpret_cast<void*>(parallel_for)},
    };
    for (const auto& [slot, function] : known) slots[slot] = function;
  }
};

inline const Table table;

inline const OrtApi* as_api() { return reinterpret_cast<const OrtApi*>(&table); }
inline const OrtApi* get_api(uint32_t) { return as_api(); }
inline const OrtApi* get_old_api(uint32_t version) { return version == kOldestApiVersion ? as_api() : nullptr; }
inline const OrtApi* get_no_api(uint32_t) { return nullptr; }

// Message of a status, which is released; empty for success.
inline std::string take(Status status) {
  if (status == nullptr) return "";
  std::string message = static_cast<StatusObject*>(status)->message;
  release_status(status);
  CHECK(!message.empty(), "an error without a message");
  return message;
}

}  // namespace host

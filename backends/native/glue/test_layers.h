// Fused layers and the mask for test_glue.cpp: right nodes against the reference variant on one thread, and hostile ones,
// of which the sanitizers see what they touch.
#pragma once

#include "layers/layer_declarations.h"
#include "ort_values.h"
#include "test_cases.h"

namespace host {

struct LayerCase {
  const LayerDeclaration* op;
  Value values[kMaxLayerInputs];
  bool is_missing[kMaxLayerInputs] = {};
  std::map<std::string, int64_t> attributes;
  float epsilon = 1e-6f;
  size_t inputs = kMaxLayerInputs;

  Node node() {
    Node node;
    for (size_t i = 0; i < inputs; ++i) {
      node.inputs.push_back(is_missing[i] ? nullptr : &values[i]);
      node.are_constant.push_back(i >= op->activations && !is_missing[i]);
    }
    node.attributes = attributes;
    node.numbers = {{"epsilon", epsilon}};
    return node;
  }
};

// Fills a value of its shape; the memory of one that is too large is one byte, which nobody may read.
inline bool fill_layer(LayerCase* c, size_t input, Random& random) {
  Value& value = c->values[input];
  __int128 count = 1;
  for (int64_t size : value.info.dimensions) count = count > (1 << 22) || size < 0 ? -1 : count * size;
  if (count > (1 << 22)) return false;
  const size_t element = value.info.type == kFloat ? 4 : value.info.type == kUint8 ? 1 : 8;
  value.content.assign(count < 0 ? 1 : static_cast<size_t>(count) * element, 0);
  for (size_t i = 0; count > 0 && value.info.type == kFloat && i < value.content.size(); i += 4) {
    const float number = static_cast<float>(below(random, 2001) - 1000) / 500.0f;
    std::memcpy(&value.content[i], &number, sizeof number);
  }
  const int base = c->op->product == Product::kTernary2x4 ? 4 : 3, digits = base == 4 ? 4 : 5;
  for (uint8_t& byte : value.content) {
    if (value.info.type != kUint8) break;
    int packed = 0;
    for (int p = 0; p < digits; ++p) packed = packed * base + static_cast<int>(below(random, 3));
    byte = static_cast<uint8_t>(packed);
  }
  value.allocate();
  return true;
}

inline std::unique_ptr<LayerCase> right_layer(const LayerDeclaration& op, int64_t batch, int64_t tokens, bool optional,
                                              Random& random) {
  auto c = std::make_unique<LayerCase>();
  c->op = &op;
  const int64_t a = 64, h = 32 * (1 + below(random, 3)), f = 32 * (1 + below(random, 4)), half = 4;
  const int64_t q = 2 * half * (1 + below(random, 5)), k = 2 * half * (1 + below(random, 3));
  const auto packed = [&](int64_t rows) { return packed_rows_of(op.product, rows); };
  std::vector<Dimensions> shapes;
  const auto matrix = [&](int64_t rows, int64_t columns) {
    shapes.push_back({packed(rows), columns});
    shapes.push_back({below(random, 2) == 0 ? 1 : rows});
  };
  if (op.is_feed_forward) {
    shapes = {{batch, tokens, a}, {batch, tokens, h}, {optional ? a : 0}};
    matrix(h, a);
    shapes.push_back({h});
    matrix(f, h);
    matrix(f, h);
    shapes.push_back({optional ? f : 0});
    matrix(h, f);
    c->attributes = {{"rows", h}, {"inner_rows", f}};
  } else {
    shapes = {{batch, tokens, h}, {batch, tokens, half}, {batch, tokens, half}, {h}};
    for (int64_t rows : {q, k, k}) {
      matrix(rows, h);
      shapes.push_back({optional ? rows : 0});
    }
    c->attributes = {{"query_rows", q}, {"key_rows", k}};
  }
  c->inputs = shapes.size();
  for (size_t i = 0; i < c->inputs; ++i) {
    c->values[i].info = {op.inputs[i].type, shapes[i], {}};
    c->values[i].offset = below(random, 3) == 0 ? below(random, 9) : 0;
    CHECK(fill_layer(c.get(), i, random), "too large");
  }
  return c;
}

struct LayerResult {
  std::string message;
  std::vector<uint8_t> outputs;
};

inline LayerResult run_layer(const OrtCustomOp* op, LayerCase* c, size_t threads) {
  const Node node = c->node();
  void* kernel = nullptr;
  LayerResult result;
  result.message = take(op->create_kernel(op, as_api(), &node, &kernel));
  if (!result.message.empty()) return result;
  Context context = {&node, threads, 0, {}, {}};
  result.message = take(op->compute(kernel, &context));
  op->destroy_kernel(kernel);
  for (const Value* output : {&context.output, &context.others[0], &context.others[1]}) {
    const auto* bytes = static_cast<const uint8_t*>(output->data());
    if (bytes != nullptr) result.outputs.insert(result.outputs.end(), bytes, bytes + output->content.size());
  }
  return result;
}

inline std::vector<uint8_t> expected_layer(LayerCase* c) {
  Tensor tensors[kMaxLayerInputs];
  AlignedCopy copies[kMaxLayerInputs];
  Problem problem;
  for (size_t i = 0; i < c->inputs; ++i) {
    const std::string message = take(read_operand(as_api(), c->op->inputs[i], &c->values[i], &tensors[i], &copies[i]));
    CHECK(message.empty(), "%s", message.c_str());
  }
  const int64_t attributes[2] = {c->attributes.at(c->op->attributes[0]), c->attributes.at(c->op->attributes[1])};
  Layer layer = {};
  int64_t tokens = 0;
  CHECK(find_layer(*c->op, tensors + c->op->activations, attributes, c->epsilon, &layer, &problem) &&
            fits_layer(*c->op, tensors, &layer, &tokens, &problem),
        "%s", problem.text);
  std::vector<float> outputs[kMaxLayerOutputs];
  float* places[kMaxLayerOutputs];
  for (size_t i = 0; i < c->op->outputs; ++i) {
    outputs[i].resize(tokens * layer.output_width(c->op->is_feed_forward, i) + 1);
    places[i] = outputs[i].data();
  }
  const float *first = tensors[0].as<float>(), *second = tensors[1].as<float>();
  CHECK(c->op->is_feed_forward
            ? feed_forward(kReference, layer.feed_forward, first, second, tokens, places[0], kCallerOnly)
            : attention_inputs(kReference, layer.attention_inputs, first, second, tensors[2].as<float>(), tokens,
                               places, kCallerOnly),
        "no memory");
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < c->op->outputs; ++i) {
    const auto* begin = reinterpret_cast<const uint8_t*>(outputs[i].data());
    bytes.insert(bytes.end(), begin, begin + (outputs[i].size() - 1) * sizeof(float));
  }
  return bytes;
}

inline void mutate_layer(LayerCase* c, Random& random) {
  const size_t input = below(random, c->inputs);
  Value& value = c->values[input];
  Dimensions& shape = value.info.dimensions;
  switch (below(random, 8)) {
    case 0:
    case 1:
    case 2:
      if (!shape.empty()) {
        int64_t& size = shape[below(random, shape.size())];
        size = hostile_number(size, random);
      }
      break;
    case 3:
      shape.insert(shape.begin() + below(random, shape.size() + 1), below(random, 3));
      break;
    case 4:
      if (!shape.empty()) shape.erase(shape.begin() + below(random, shape.size()));
      break;
    case 5:
      value.info.type = static_cast<int>(below(random, 9));
      break;
    case 6:
      (below(random, 2) == 0 ? value.is_tensor : c->is_missing[input]) ^= true;
      break;
    case 7: {
      auto attribute = c->attributes.begin();
      if (below(random, 2) == 0) ++attribute;
      attribute->second = hostile_number(attribute->second, random);
      if (below(random, 4) == 0) c->epsilon = -1.0f;
      break;
    }
  }
}

// `ops`: of kLayers. Returns how many nodes ran.
inline int64_t check_layers(const OrtCustomOp* const* ops, int64_t cases, Random& random) {
  int64_t done = 0;
  for (const LayerDeclaration& declaration : kLayers) {
    const OrtCustomOp* op = ops[&declaration - kLayers];
    CHECK(std::strcmp(op->get_name(op), declaration.name) == 0, "another order");
    for (int i = 0; i < 40; ++i, ++done) {
      auto c = right_layer(declaration, 1 + below(random, 2), i % 8 == 0 ? 70 : below(random, 4), i % 2 == 0, random);
      const LayerResult result = run_layer(op, c.get(), below(random, 5));
      CHECK(result.message.empty(), "%s: %s", declaration.name, result.message.c_str());
      CHECK(result.outputs == expected_layer(c.get()), "%s: not the reference's output", declaration.name);
    }
    for (int64_t calls = 0;; ++calls) {
      auto c = right_layer(declaration, 1, 2, true, random);
      const int64_t before = live_objects;
      calls_to_failure = calls;
      const LayerResult result = run_layer(op, c.get(), 2);
      const bool failed = calls_to_failure < 0;
      calls_to_failure = -1;
      CHECK(live_objects == before, "%s leaves something behind", declaration.name);
      CHECK(failed == (result.message == "injected"), "%s: %s", declaration.name, result.message.c_str());
      if (!failed) break;
    }
  }
  for (int64_t i = 0; i < cases; ++i) {
    const LayerDeclaration& declaration = kLayers[below(random, kLayerCount)];
    auto c = right_layer(declaration, 1, below(random, 3), below(random, 2) == 0, random);
    for (int64_t changes = 1 + below(random, 3); changes > 0; --changes) mutate_layer(c.get(), random);
    bool is_small = true;
    for (size_t k = 0; k < c->inputs; ++k) is_small = is_small && fill_layer(c.get(), k, random);
    if (!is_small) continue;
    const LayerResult result = run_layer(ops[&declaration - kLayers], c.get(), 1 + below(random, 3));
    CHECK(result.message.size() < sizeof(Problem), "a sentence that does not end");
    // What is accepted is right: the reference takes it too.
    if (result.message.empty()) CHECK(result.outputs == expected_layer(c.get()), "%s differs", declaration.name);
    ++done;
  }
  return done;
}

inline void check_mask(const OrtCustomOp* op, int64_t cases, Random& random) {
  for (int64_t i = 0; i < cases; ++i) {
    const int64_t batch = below(random, 3), queries = below(random, 4), total = below(random, 6);
    Value mask, positions;
    mask.info = {kInt64, {batch, total}, {}};
    positions.info = {kInt64, {i % 7 == 0 ? batch + 1 : batch, queries}, {}};
    if (i % 5 == 0) mask.info.dimensions[1] = hostile_number(total, random);
    const int64_t size = mask.info.dimensions[1];
    const bool is_possible = size >= 0 && size < 1 << 16;
    if (!is_possible && size > 0 && size < int64_t{1} << 40) continue;  // it could exist, but is too large for a test
    mask.content.assign(is_possible ? batch * size * 8 : 8, 1);
    mask.offset = below(random, 9);
    mask.allocate();
    positions.content.assign(positions.info.dimensions[0] * queries * 8, 0);
    positions.allocate();
    Node node;
    node.inputs = {&mask, &positions};
    node.are_constant = {false, false};
    void* kernel = nullptr;
    CHECK(take(op->create_kernel(op, as_api(), &node, &kernel)).empty(), "a mask without a kernel");
    Context context = {&node, 1, 0, {}, {}};
    context.element = 1;
    const std::string message = take(op->compute(kernel, &context));
    op->destroy_kernel(kernel);
    const bool fits = is_possible && i % 7 != 0;
    CHECK(fits ? message.empty() : !message.empty() || batch * queries == 0, "%s", message.c_str());
    for (size_t place = 0; fits && place < context.output.content.size(); ++place) {
      const int64_t t = place % size, own = place / size % queries + size - queries;
      const bool visible = static_cast<const uint8_t*>(context.output.data())[place] != 0;
      CHECK(visible == (t <= own), "a mask that shows another position");
    }
  }
}

// The sum over a block with the signs of the matrix, in double precision; and widths and columns that do not fit.
inline void check_rotation(const OrtCustomOp* op, int64_t cases, Random& random) {
  for (int64_t i = 0; i < cases; ++i) {
    const int64_t width = i % 9 == 0 ? hostile_number(64, random) : int64_t{4} << 2 * below(random, 3);
    const bool is_width = width == 4 || width == 16 || width == 64;
    const int64_t rows = below(random, 4), columns = (is_width ? width : 16) * below(random, 4) + (i % 7 == 0);
    Value x;
    x.info = {kFloat, {rows, columns}, {}};
    x.content.assign(static_cast<size_t>(rows * columns) * 4, 0);
    for (size_t byte = 0; byte < x.content.size(); byte += 4) {
      const float number = static_cast<float>(below(random, 2001) - 1000) / 500.0f;
      std::memcpy(&x.content[byte], &number, sizeof number);
    }
    x.offset = below(random, 9);
    x.allocate();
    Node node;
    node.inputs.push_back(&x);
    node.are_constant.push_back(false);
    node.attributes["width"] = width;
    void* kernel = nullptr;
    const bool is_made = take(op->create_kernel(op, as_api(), &node, &kernel)).empty();
    CHECK(is_made == is_width, "a rotation of %lld columns", static_cast<long long>(width));
    if (!is_made) continue;
    Context context = {&node, 1, 0, {}, {}};
    const std::string message = take(op->compute(kernel, &context));
    op->destroy_kernel(kernel);
    const bool fits = columns % width == 0;
    CHECK(message.empty() == fits, "%s", message.c_str());
    if (!fits) continue;
    const float* values = reinterpret_cast<const float*>(x.content.data());
    const float* y = static_cast<const float*>(context.output.data());
    for (int64_t place = 0; place < rows * columns; ++place) {
      const int64_t begin = place / width * width;
      double expected = 0;
      for (int64_t k = 0; k < width; ++k) {
        const bool is_negative = __builtin_parityll(static_cast<uint64_t>((place - begin) & k));
        expected += is_negative ? -values[begin + k] : values[begin + k];
      }
      expected /= __builtin_sqrt(static_cast<double>(width));
      CHECK(__builtin_fabs(y[place] - expected) < 1e-5, "a rotation that is another one");
    }
  }
}

}  // namespace host

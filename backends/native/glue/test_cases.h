// Nodes for test_glue.cpp: right ones, and changes that make them hostile; what is right, written down a second time.
#pragma once

#include <limits>
#include <memory>
#include <random>

#include "test_host.h"

namespace host {

using namespace microvlm;

using Random = std::mt19937_64;

inline int64_t below(Random& random, int64_t limit) { return static_cast<int64_t>(random() % limit); }

struct Case {
  const Declaration* op;
  Value values[kMaxInputs];
  bool is_missing[kMaxInputs] = {};
  bool is_constant[kMaxInputs] = {};
  std::map<std::string, int64_t> attributes;
  size_t threads = 1, output_offset = 0;
  bool has_valid_bytes = true;  // else variants may differ

  bool is_int4() const { return op->product == Product::kInt4; }
  int planes() const { return op->product == Product::kTernary2x4 ? 4 : op->product == Product::kTernary3x5 ? 5 : 1; }
  const Dimensions& shape(size_t input) const { return values[input].info.dimensions; }
  const Value& scale() const { return values[op->input_count() - 1]; }
  std::string describe() const {
    std::string text = op->name;
    for (size_t i = 0; i < op->input_count(); ++i) {
      text += std::string(" ") + op->inputs[i].name + ":" + std::to_string(values[i].info.type) + "[";
      for (int64_t size : shape(i)) text += std::to_string(size) + ",";
      text += is_missing[i] ? "] missing" : values[i].is_tensor ? "]" : "] no tensor";
    }
    for (const auto& [name, value] : attributes) text += " " + name + "=" + std::to_string(value);
    return text;
  }
};

// Bytes that a bundle may hold: every trit code of a packed byte is 0, 1 or 2.
inline uint8_t valid_byte(const Case& c, Random& random) {
  if (c.planes() == 1) return static_cast<uint8_t>(random());
  int byte = 0;
  for (int p = 0; p < c.planes(); ++p) byte = byte * (c.planes() == 4 ? 4 : 3) + static_cast<int>(below(random, 3));
  return static_cast<uint8_t>(byte);
}

// Fills a value of this type and shape and allocates it. Where no address space could hold the shape, it gets one byte,
// which nobody may read. False for a shape that could exist, but is too large for a test. `rows`: of the table that ids
// are for.
inline bool fill(Case* c, size_t input, int64_t rows, Random& random) {
  Value& value = c->values[input];
  __int128 count = 1;
  bool is_possible = true;
  for (int64_t size : value.info.dimensions) {
    is_possible = is_possible && size >= 0 && (size == 0 || count < std::numeric_limits<int64_t>::max() / 8);
    if (is_possible && size > 0) count *= size;
  }
  is_possible = is_possible && count <= std::numeric_limits<int64_t>::max() / 8;
  for (int64_t size : value.info.dimensions) count = size == 0 ? 0 : count;
  const bool has_memory = is_possible && count <= 1 << 22;
  if (is_possible && !has_memory) return false;
  const size_t element = value.info.type == kFloat ? 4 : value.info.type == kUint8 ? 1 : 8;
  value.content.assign(has_memory ? static_cast<size_t>(count) * element : 1, 0);
  if (has_memory && value.info.type == kFloat) {
    for (size_t i = 0; i < value.content.size(); i += 4) {
      const float number = static_cast<float>(below(random, 2001) - 1000) / 64.0f;
      std::memcpy(&value.content[i], &number, sizeof number);
    }
  } else if (has_memory && value.info.type == kInt64) {
    for (size_t i = 0; i < value.content.size(); i += 8) {
      const int64_t id = rows > 0 ? below(random, 2 * rows) - rows : 0;
      std::memcpy(&value.content[i], &id, sizeof id);
    }
  } else {
    for (uint8_t& byte : value.content) {
      byte = input == 1 && c->has_valid_bytes ? valid_byte(*c, random) : static_cast<uint8_t>(random());
    }
  }
  value.allocate();
  return true;
}

inline std::unique_ptr<Case> right_case(const Declaration& op, Dimensions lead, int64_t rows, int64_t columns,
                                        bool one_scale, Random& random) {
  auto c = std::make_unique<Case>();
  c->op = &op;
  if (op.attribute != nullptr) c->attributes[op.attribute] = op.gathers ? columns : rows;
  if (!op.gathers) lead.push_back(columns);
  const int64_t groups = (columns + 31) / 32, packed_rows = (rows + c->planes() - 1) / c->planes();
  std::vector<Dimensions> shapes = {lead, {packed_rows, c->is_int4() ? groups * 16 : columns}};
  if (c->is_int4()) shapes.push_back({rows, groups});
  shapes.push_back({one_scale && !op.gathers ? 1 : rows});
  for (size_t i = 0; i < op.input_count(); ++i) {
    c->values[i].info = {op.inputs[i].type, shapes[i], {}};
    c->values[i].offset = below(random, 3) == 0 ? below(random, 9) : 0;
    c->is_constant[i] = i > 0;
    fill(c.get(), i, rows, random);
  }
  return c;
}

inline int64_t hostile_number(int64_t number, Random& random) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max(), kLeast = std::numeric_limits<int64_t>::min();
  if (number < -1 || number > int64_t{1} << 40) return number;  // it is hostile already
  const int64_t numbers[] = {
      0,     1,    -1,   number - 1,       number + 1,       number + 31,      2 * number, 4 * number, 65536,
      65537, 9399, 9400, int64_t{1} << 31, int64_t{1} << 32, int64_t{1} << 62, kMost,      kMost - 31, kLeast};
  return numbers[below(random, sizeof numbers / sizeof numbers[0])];
}

// Changes one thing.
inline void mutate(Case* c, Random& random) {
  const size_t input = below(random, c->op->input_count());
  Value& value = c->values[input];
  Dimensions& shape = value.info.dimensions;
  switch (below(random, 13)) {
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
      shape.insert(shape.begin(), below(random, 20), 1);
      break;
    case 6:
      value.info.type = static_cast<int>(below(random, 17));
      break;
    case 7:
      (below(random, 3) == 0   ? value.is_tensor
       : below(random, 2) == 0 ? value.has_memory
                               : c->is_missing[input]) ^= true;
      break;
    case 8:
      for (bool& is_constant : c->is_constant) is_constant = below(random, 2) == 0;
      c->is_constant[0] = false;
      break;
    case 9:
      c->has_valid_bytes = false;
      break;
    case 10:
      if (c->op->attribute != nullptr) {
        int64_t& attribute = c->attributes[c->op->attribute];
        attribute = hostile_number(attribute, random);
      }
      break;
    case 11:
      if (below(random, 4) == 0) c->attributes.clear();
      if (below(random, 4) == 0) c->output_offset = below(random, 4);
      break;
    case 12:
      c->threads = 0;
      break;
  }
}

// A sentence of op_table.py each; in 128 bits, where no product of two sizes overflows.
inline bool is_right(const Case& c) {
  using Wide = __int128;
  const Wide most = std::numeric_limits<int64_t>::max();
  const size_t weights = c.op->input_count();
  for (size_t i = 0; i < weights; ++i) {
    if (c.is_missing[i] || !c.values[i].is_tensor || c.values[i].info.type != c.op->inputs[i].type) return false;
    Wide bytes = c.values[i].info.type == kUint8 ? 1 : c.values[i].info.type == kFloat ? 4 : 8;
    for (int64_t size : c.shape(i)) {
      if (size < 0 || bytes > most) return false;
      bytes *= size == 0 ? 1 : size;
    }
    if (bytes > most || (c.values[i].data() == nullptr && !c.values[i].content.empty())) return false;
  }
  const Dimensions &first = c.shape(0), &packed = c.shape(1), &scale = c.scale().info.dimensions;
  if (first.size() > 16 || packed.size() != 2 || scale.size() != 1 || (c.is_int4() && c.shape(2).size() != 2))
    return false;
  if (c.op->gathers ? first.size() == 16 : first.empty()) return false;
  if (c.op->attribute != nullptr && c.attributes.count(c.op->attribute) == 0) return false;
  const Wide attribute = c.op->attribute == nullptr ? 0 : c.attributes.at(c.op->attribute);
  const Wide rows = c.planes() > 1 ? attribute : packed[0];
  const Wide columns = !c.op->gathers ? first.back() : c.is_int4() ? attribute : packed[1];
  if (rows < 0 || rows > most / 16 || columns < 0 || columns > most / 16) return false;
  if (!c.op->gathers && (columns == 0 || columns > (c.is_int4() ? 9399 : 65536))) return false;
  const Wide groups = (columns + 31) / 32;
  if (packed[0] != (rows + c.planes() - 1) / c.planes() || packed[1] != (c.is_int4() ? groups * 16 : columns))
    return false;
  if (c.is_int4() && (c.shape(2)[0] != rows || c.shape(2)[1] != groups)) return false;
  if (scale[0] != rows && (c.op->gathers || scale[0] != 1)) return false;
  // Bytes of the first input for every value of a row of the output.
  Wide product = c.op->gathers ? 8 : 4;
  for (int64_t size : first) product *= size == 0 ? 1 : size;
  const Wide width = c.op->gathers ? columns : rows;
  if (product * (width == 0 ? 1 : width) > most) return false;
  for (size_t i = 0; c.op->gathers && i < c.values[0].content.size(); i += 8) {
    int64_t id;
    std::memcpy(&id, &c.values[0].content[i], sizeof id);
    if (id < -rows || id >= rows) return false;
  }
  return true;
}

// The output of the reference, over aligned copies.
inline std::vector<uint8_t> expected_output(const Case& c) {
  const Declaration& op = *c.op;
  const Dimensions& first = c.shape(0);
  const int64_t rows = c.planes() > 1 ? c.attributes.at("rows") : c.shape(1)[0];
  const int64_t columns = !op.gathers ? first.back() : c.is_int4() ? c.attributes.at("columns") : c.shape(1)[1];
  int64_t leading = 1;
  for (size_t i = 0; i + !op.gathers < first.size(); ++i) leading *= first[i];
  std::vector<uint8_t> bytes(leading * (op.gathers ? columns : rows) * sizeof(float));
  std::vector<float> scale(c.scale().content.size() / 4), x(c.values[0].content.size() / 4), y(bytes.size() / 4);
  if (bytes.empty()) return bytes;
  std::memcpy(scale.data(), c.scale().content.data(), c.scale().content.size());
  std::memcpy(x.data(), c.values[0].content.data(), x.size() * 4);
  const uint8_t *packed = c.values[1].content.data(), *multiplier = c.is_int4() ? c.values[2].content.data() : nullptr;
  if (!op.gathers) {
    const Matrix matrix = {packed, multiplier, rows, packed_rows_of(op.product, rows), columns};
    CHECK(multiply(kReference, op.product, matrix, scale.data(), scale.size() == 1, x.data(), leading, y.data(),
                   kCallerOnly),
          "no memory");
  }
  for (int64_t i = 0; op.gathers && i < leading; ++i) {
    int64_t id;
    std::memcpy(&id, &c.values[0].content[i * 8], sizeof id);
    if (id < 0) id += rows;
    if (c.is_int4()) {
      const int64_t groups = c.shape(2)[1];
      kReference.dequantize_int4(packed + id * groups * 16, multiplier + id * groups, columns, scale[id],
                                 &y[i * columns]);
    } else {
      kReference.dequantize_int8(packed + id * columns, columns, scale[id], &y[i * columns]);
    }
  }
  std::memcpy(bytes.data(), y.data(), bytes.size());
  return bytes;
}

}  // namespace host

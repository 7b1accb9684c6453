// What every operator of op_table.py takes, and the check of operands against it. Callers are the glue of ONNX Runtime,
// which appears here only by its numbers of element types, and the plain C interface.
#pragma once

#include <cstddef>
#include <cstdint>

#include "operators.h"

namespace microvlm {

constexpr int kFloat = 1, kUint8 = 2, kInt64 = 7;  // as in ONNX: TensorProto.DataType
constexpr size_t kMaxDimensions = 16;
constexpr size_t kMaxInputs = 4;

// A dimension of an operand in terms of N, the rows of a matrix or table, and K, its columns.
enum Size : uint8_t {
  kNone,        // the operand has no such dimension
  kLeading,     // any number of dimensions of any size
  kColumns,     // K
  kRows,        // N
  kPackedRows,  // R = ceil(N / the rows in a byte)
  kOneOrRows,   // 1 or N
  kGroups,      // G = ceil(K / 32)
  kGroupBytes,  // 16 G, which is Kp / 2
};

struct Operand {
  const char* name;
  int type;
  Size dimensions[2];
};

// A row of op_table.py. Where there is no attribute, N is the number of packed rows, and the K of a table is the number
// of packed columns. The K of a product is the last dimension of x.
struct Declaration {
  const char* name;
  Product product;  // of the same bytes
  bool gathers;
  const char* attribute;  // an integer, or null
  Size attribute_size;    // what it is: kRows or kColumns
  Operand inputs[kMaxInputs];

  size_t input_count() const { return inputs[kMaxInputs - 1].name == nullptr ? kMaxInputs - 1 : kMaxInputs; }
};

// clang-format off
constexpr Declaration kDeclarations[] = {
    {"TernaryMatMul2x4", Product::kTernary2x4, false, "rows", kRows,
     {{"x", kFloat, {kLeading, kColumns}},
      {"packed", kUint8, {kPackedRows, kColumns}},
      {"scale", kFloat, {kOneOrRows}}}},
    {"TernaryMatMul3x5", Product::kTernary3x5, false, "rows", kRows,
     {{"x", kFloat, {kLeading, kColumns}},
      {"packed", kUint8, {kPackedRows, kColumns}},
      {"scale", kFloat, {kOneOrRows}}}},
    {"Int8MatMul", Product::kInt8, false, nullptr, kNone,
     {{"x", kFloat, {kLeading, kColumns}},
      {"packed", kUint8, {kRows, kColumns}},
      {"scale", kFloat, {kOneOrRows}}}},
    {"Int4MatMul", Product::kInt4, false, nullptr, kNone,
     {{"x", kFloat, {kLeading, kColumns}},
      {"packed", kUint8, {kRows, kGroupBytes}},
      {"multiplier", kUint8, {kRows, kGroups}},
      {"scale", kFloat, {kOneOrRows}}}},
    {"Int8Gather", Product::kInt8, true, nullptr, kNone,
     {{"input_ids", kInt64, {kLeading}},
      {"packed", kUint8, {kRows, kColumns}},
      {"scale", kFloat, {kRows}}}},
    {"Int4Gather", Product::kInt4, true, "columns", kColumns,
     {{"input_ids", kInt64, {kLeading}},
      {"packed", kUint8, {kRows, kGroupBytes}},
      {"multiplier", kUint8, {kRows, kGroups}},
      {"scale", kFloat, {kRows}}}},
};
// clang-format on
constexpr size_t kDeclarationCount = sizeof kDeclarations / sizeof kDeclarations[0];

// An operand as the caller has it. `data` may be null where there are no elements.
struct Tensor {
  const void* data;
  int type;
  size_t rank;
  int64_t dimensions[kMaxDimensions];  // the first `rank` are set
  int64_t count;                       // of elements; fits_declaration sets it
  int64_t limit;                       // bytes, had no dimension the size 0; fits_declaration sets it

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// What the weights of a node say together.
struct WeightSizes {
  int64_t rows;                         // N of a product, V of a table
  int64_t least_columns, most_columns;  // K of a product is within; both are H of a table
  bool one_scale;
};

// A sentence without its full stop.
struct Problem {
  char text[192];
};

// Writes the problem; returns false.
__attribute__((format(printf, 2, 3), cold)) bool refuse(Problem* problem, const char* format, ...);

// `number` for a printf format.
constexpr long long wide(int64_t number) { return number; }

constexpr size_t bytes_of(int type) { return type == kUint8 ? 1 : type == kFloat ? 4 : 8; }

// The checks below return true, or false with the problem. After all three no kernel reads or writes outside of the
// operands and the output, whatever their bytes are. Ids are not looked at.

// An operand alone is what its operator declares: element type, number of dimensions, a number of bytes that fits 63
// bits, and memory.
bool fits_declaration(const Operand& operand, Tensor* tensor, Problem* problem);

// `weights`: the inputs from 1 on, each of which fits its declaration. They fit each other, the attribute where there
// is one, and the limits of exact sums.
bool find_weight_sizes(const Declaration& op, const Tensor* weights, int64_t attribute, WeightSizes* sizes,
                       Problem* problem);

// The first input, which fits its declaration, fits weights of these sizes, and the size of the output fits 63 bits. A
// product has `leading` tokens of `columns` values, a look-up `leading` ids.
bool fits_weights(const Declaration& op, const Tensor& first, const WeightSizes& sizes, int64_t* leading,
                  int64_t* columns, Problem* problem);

// The same for operands of which only lengths in bytes are known, in the operator's order, for a call with so many
// tokens, rows and columns.
bool lengths_fit(const Declaration& op, int64_t tokens, int64_t rows, int64_t columns, const int64_t* bytes,
                 Problem* problem);

}  // namespace microvlm

#include "declarations.h"

#include <cstdarg>
#include <cstdio>

namespace microvlm {
namespace {

// Sizes up to here can be rounded up without overflow.
constexpr int64_t kLargestSize = INT64_MAX / 16;

__attribute__((format(printf, 2, 3), cold)) bool refuse(Problem* problem, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(problem->text, sizeof problem->text, format, arguments);
  va_end(arguments);
  return false;
}

// `number` for a printf format.
long long wide(int64_t number) { return number; }

const char* name_of(int type) {
  switch (type) {
    case kFloat:
      return "float32";
    case kUint8:
      return "uint8";
    case kInt64:
      return "int64";
    default:
      return "another type";
  }
}

// Multiplies *product by a factor that counts as 1 where it is 0: sizes of an empty tensor are limited too, so that any
// order of multiplication fits. False on overflow and for a negative factor.
bool multiply_size(int64_t* product, int64_t factor) {
  return factor >= 0 && (factor == 0 || !__builtin_mul_overflow(*product, factor, product));
}

int64_t value_of(Size size, Product product, int64_t rows, int64_t columns) {
  switch (size) {
    case kColumns:
      return columns;
    case kPackedRows:
      return packed_rows_of(product, rows);
    case kGroups:
      return (columns + kGroup - 1) / kGroup;
    case kGroupBytes:
      return (columns + kGroup - 1) / kGroup * (kGroup / 2);
    default:
      return rows;
  }
}

bool is_within_limits(const Declaration& op, int64_t rows, int64_t columns, Problem* problem) {
  if (rows < 0) return refuse(problem, "the number of rows is negative: %lld", wide(rows));
  if (rows > kLargestSize) return refuse(problem, "%lld rows are too many", wide(rows));
  if (op.gathers) {
    if (columns >= 0 && columns <= kLargestSize) return true;
    return refuse(problem, "the table's operands do not fit each other: it cannot have %lld columns", wide(columns));
  }
  const int64_t most = op.product == Product::kInt4 ? kInt4MaxColumns : kMaxColumns;
  if (columns < 1) return refuse(problem, "x has no columns");
  if (columns <= most) return true;
  return refuse(problem, "x is too wide for exact 32-bit sums: it has %lld columns, and %lld are the most",
                wide(columns), wide(most));
}

__attribute__((cold)) bool refuse_dimension(const Declaration& op, size_t input, size_t place, int64_t actual,
                                            int64_t expected, Problem* problem) {
  const Operand& operand = op.inputs[input];
  if (operand.dimensions[place] == kOneOrRows) {
    return refuse(problem, "scale has neither one value nor one a row: it has %lld, and there are %lld rows",
                  wide(actual), wide(expected));
  }
  const char* relation = op.gathers    ? "the table's operands do not fit each other"
                         : input == 2  ? "multiplier does not fit packed"
                         : place == 0  ? "packed does not hold that many rows"
                                       : "x and packed differ in columns";
  return refuse(problem, "%s: dimension %d of %s is %lld, not %lld", relation, static_cast<int>(place), operand.name,
                wide(actual), wide(expected));
}

// Fills in what follows from rows, columns and leading.
bool finish_sizes(const Declaration& op, Sizes* sizes, Problem* problem) {
  sizes->width = op.gathers ? sizes->columns : sizes->rows;
  int64_t output_bytes = sizeof(float), multiply_adds = 1;
  if (multiply_size(&output_bytes, sizes->leading) && multiply_size(&output_bytes, sizes->width) &&
      multiply_size(&multiply_adds, sizes->leading) && multiply_size(&multiply_adds, sizes->rows) &&
      (op.gathers || multiply_size(&multiply_adds, sizes->columns))) {
    return true;
  }
  return refuse(problem, "an output of %lld rows of %lld values is too large", wide(sizes->leading),
                wide(sizes->width));
}

}  // namespace

size_t bytes_of(int type) { return type == kUint8 ? 1 : type == kFloat ? 4 : 8; }

bool fits_declaration(const Operand& operand, const Tensor& tensor, Problem* problem) {
  if (tensor.type != operand.type) {
    return refuse(problem, "%s is of %s, not of %s", operand.name, name_of(tensor.type), name_of(operand.type));
  }
  const bool any_rank = operand.dimensions[0] == kLeading;
  // The output of a look-up has a dimension more than its ids.
  const size_t most = !any_rank ? (operand.dimensions[1] == kNone ? 1 : 2) : kMaxDimensions - (operand.type == kInt64);
  const size_t least = any_rank ? (operand.dimensions[1] == kNone ? 0 : 1) : most;
  if (tensor.rank < least || tensor.rank > most) {
    return refuse(problem, "%s has %lld dimensions, and %lld to %lld are possible", operand.name, wide(tensor.rank),
                  wide(least), wide(most));
  }
  int64_t bytes = bytes_of(operand.type);
  bool is_empty = false;
  for (size_t i = 0; i < tensor.rank; ++i) {
    is_empty = is_empty || tensor.dimensions[i] == 0;
    if (!multiply_size(&bytes, tensor.dimensions[i])) {
      return refuse(problem, "%s has a size of %lld, which no memory holds", operand.name, wide(tensor.dimensions[i]));
    }
  }
  if (!is_empty && tensor.data == nullptr) return refuse(problem, "%s has no memory", operand.name);
  return true;
}

bool find_sizes(const Declaration& op, const Tensor* const* inputs, int64_t attribute, Sizes* sizes, Problem* problem) {
  const Tensor &first = *inputs[0], &packed = *inputs[1];
  const int64_t rows = op.attribute_size == kRows ? attribute : packed.dimensions[0];
  const int64_t columns = !op.gathers                       ? first.dimensions[first.rank - 1]
                          : op.attribute_size == kColumns ? attribute
                                                          : packed.dimensions[1];
  if (!is_within_limits(op, rows, columns, problem)) return false;
  for (size_t i = 1; i < op.input_count(); ++i) {
    for (size_t place = 0; place < inputs[i]->rank; ++place) {
      const Size size = op.inputs[i].dimensions[place];
      const int64_t actual = inputs[i]->dimensions[place], expected = value_of(size, op.product, rows, columns);
      if (actual != expected && (size != kOneOrRows || actual != 1)) {
        return refuse_dimension(op, i, place, actual, expected, problem);
      }
    }
  }
  sizes->leading = 1;
  for (size_t i = 0; i + !op.gathers < first.rank; ++i) sizes->leading *= first.dimensions[i];
  sizes->rows = rows;
  sizes->columns = columns;
  sizes->one_scale = inputs[op.input_count() - 1]->dimensions[0] == 1;
  return finish_sizes(op, sizes, problem);
}

bool find_sizes(const Declaration& op, int64_t tokens, int64_t rows, int64_t columns, const int64_t* bytes,
                Sizes* sizes, Problem* problem) {
  if (tokens < 0) return refuse(problem, "the number of tokens is negative: %lld", wide(tokens));
  if (!is_within_limits(op, rows, columns, problem)) return false;
  for (size_t i = 0; i < op.input_count(); ++i) {
    const Operand& operand = op.inputs[i];
    int64_t expected = bytes_of(operand.type);
    bool fits = true;
    for (Size size : operand.dimensions) {
      if (size == kNone) continue;
      const int64_t factor = size == kLeading ? tokens : value_of(size, op.product, rows, columns);
      fits = fits && !__builtin_mul_overflow(expected, factor, &expected);
    }
    const bool is_one = operand.dimensions[0] == kOneOrRows && bytes[i] == static_cast<int64_t>(sizeof(float));
    if ((!fits || bytes[i] != expected) && !is_one) {
      return refuse(problem, "%s has %lld bytes, which is not what %lld tokens, %lld rows and %lld columns need",
                    operand.name, wide(bytes[i]), wide(tokens), wide(rows), wide(columns));
    }
  }
  sizes->leading = tokens;
  sizes->rows = rows;
  sizes->columns = columns;
  sizes->one_scale = bytes[op.input_count() - 1] == static_cast<int64_t>(sizeof(float));
  return finish_sizes(op, sizes, problem);
}

}  // namespace microvlm

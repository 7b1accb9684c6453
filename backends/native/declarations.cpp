#include "declarations.h"

#include <cstdarg>
#include <cstdio>

namespace microvlm {
namespace {

// Sizes up to here can be rounded up without overflow.
constexpr int64_t kLargestSize = INT64_MAX / 16;

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

int64_t most_columns(const Declaration& op) { return op.product == Product::kInt4 ? kInt4MaxColumns : kMaxColumns; }

bool is_within_limits(const Declaration& op, int64_t rows, int64_t columns, Problem* problem) {
  if (rows < 0) return refuse(problem, "the number of rows is negative: %lld", wide(rows));
  if (rows > kLargestSize) return refuse(problem, "%lld rows are too many", wide(rows));
  if (op.gathers) {
    if (columns >= 0 && columns <= kLargestSize) return true;
    return refuse(problem, "the table's operands do not fit each other: it cannot have %lld columns", wide(columns));
  }
  const int64_t most = most_columns(op);
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
  const char* relation = op.gathers  ? "the table's operands do not fit each other"
                         : input > 1 ? "multiplier does not fit packed"
                         : place > 0 ? "packed does not hold whole groups of columns"
                                     : "packed does not hold that many rows";
  return refuse(problem, "%s: dimension %d of %s is %lld, not %lld", relation, static_cast<int>(place), operand.name,
                wide(actual), wide(expected));
}

__attribute__((cold, noinline)) bool refuse_first(const Declaration& op, const Tensor& first, const WeightSizes& sizes,
                                                  Problem* problem) {
  const int64_t columns = first.rank == 0 ? 0 : first.dimensions[first.rank - 1];
  if (!op.gathers && (columns < sizes.least_columns || columns > sizes.most_columns)) {
    return refuse(problem, "x and packed differ in columns: x has %lld, and packed holds %lld to %lld", wide(columns),
                  wide(sizes.least_columns), wide(sizes.most_columns));
  }
  return refuse(problem, "the output of this %s is too large", op.gathers ? "look-up" : "product");
}

}  // namespace

bool refuse(Problem* problem, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(problem->text, sizeof problem->text, format, arguments);
  va_end(arguments);
  return false;
}

bool fits_declaration(const Operand& operand, Tensor* tensor, Problem* problem) {
  if (tensor->type != operand.type) {
    return refuse(problem, "%s is of %s, not of %s", operand.name, name_of(tensor->type), name_of(operand.type));
  }
  const bool any_rank = operand.dimensions[0] == kLeading, has_second = operand.dimensions[1] != kNone;
  // The output of a look-up has a dimension more than its ids.
  const size_t most = any_rank ? kMaxDimensions - !has_second : 1 + has_second;
  const size_t least = any_rank ? has_second : most;
  if (tensor->rank < least || tensor->rank > most) {
    return refuse(problem, "%s has %lld dimensions, and %lld to %lld are possible", operand.name, wide(tensor->rank),
                  wide(least), wide(most));
  }
  int64_t limit = bytes_of(operand.type);
  bool is_empty = false;
  for (size_t i = 0; i < tensor->rank; ++i) {
    const int64_t size = tensor->dimensions[i];
    is_empty = is_empty || size == 0;
    if (!multiply_size(&limit, size)) {
      return refuse(problem, "%s has a size of %lld, which no memory holds", operand.name, wide(size));
    }
  }
  if (!is_empty && tensor->data == nullptr) return refuse(problem, "%s has no memory", operand.name);
  tensor->limit = limit;
  tensor->count = is_empty ? 0 : limit / static_cast<int64_t>(bytes_of(operand.type));
  return true;
}

bool find_weight_sizes(const Declaration& op, const Tensor* weights, int64_t attribute, WeightSizes* sizes,
                       Problem* problem) {
  const Tensor& packed = weights[0];
  const int64_t rows = op.attribute_size == kRows ? attribute : packed.dimensions[0];
  // Without the attribute a matrix has as many columns as its packed bytes have room for.
  const bool in_groups = op.inputs[1].dimensions[1] == kGroupBytes;
  const int64_t room =
      packed.dimensions[1] <= kLargestSize && in_groups ? 2 * packed.dimensions[1] : packed.dimensions[1];
  const int64_t most = op.gathers ? kLargestSize : most_columns(op);
  int64_t columns = op.attribute_size == kColumns ? attribute : room;
  if (!op.gathers && in_groups && columns > most && columns <= (most + kGroup - 1) / kGroup * kGroup) columns = most;
  if (!is_within_limits(op, rows, columns, problem)) return false;
  for (size_t i = 1; i < op.input_count(); ++i) {
    for (size_t place = 0; place < weights[i - 1].rank; ++place) {
      const Size size = op.inputs[i].dimensions[place];
      const int64_t actual = weights[i - 1].dimensions[place], expected = value_of(size, op.product, rows, columns);
      if (actual != expected && (size != kOneOrRows || actual != 1)) {
        return refuse_dimension(op, i, place, actual, expected, problem);
      }
    }
  }
  sizes->rows = rows;
  sizes->most_columns = columns;
  sizes->least_columns = in_groups && !op.gathers ? (columns - 1) / kGroup * kGroup + 1 : columns;
  sizes->one_scale = weights[op.input_count() - 2].dimensions[0] == 1;
  return true;
}

bool fits_weights(const Declaration& op, const Tensor& first, const WeightSizes& sizes, int64_t* leading,
                  int64_t* columns, Problem* problem) {
  int64_t product = first.limit;
  if (op.gathers) {
    *columns = sizes.most_columns;
    *leading = first.count;
    if (multiply_size(&product, sizes.most_columns)) return true;
    return refuse_first(op, first, sizes, problem);
  }
  const int64_t width = first.dimensions[first.rank - 1];
  // tokens * K * N * sizeof(float) bounds the output, and what is counted to divide the work.
  if (width < sizes.least_columns || width > sizes.most_columns || !multiply_size(&product, sizes.rows)) {
    return refuse_first(op, first, sizes, problem);
  }
  *columns = width;
  *leading = first.count / width;
  return true;
}

bool lengths_fit(const Declaration& op, int64_t tokens, int64_t rows, int64_t columns, const int64_t* bytes,
                 Problem* problem) {
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
  int64_t product = sizeof(float);
  if (multiply_size(&product, tokens) && multiply_size(&product, rows) && multiply_size(&product, columns)) return true;
  return refuse(problem, "the output of this call is too large");
}

}  // namespace microvlm

#include "layers/layer_declarations.h"

namespace microvlm {
namespace {

constexpr int64_t kMaxSize = kMaxColumns;

bool is_size(const char* name, int64_t size, int64_t multiple, Problem* problem) {
  if (size > 0 && size <= kMaxSize && size % multiple == 0) return true;
  return refuse(problem, "%s is %lld, which is no multiple of %lld from 1 to %lld", name, wide(size), wide(multiple),
                wide(kMaxSize));
}

bool find_vector(const Operand& operand, const Tensor& tensor, int64_t length, bool may_be_empty, const float** values,
                 Problem* problem) {
  const bool is_empty = tensor.dimensions[0] == 0 && may_be_empty;
  *values = is_empty ? nullptr : tensor.as<float>();
  if (is_empty || tensor.dimensions[0] == length) return true;
  return refuse(problem, "%s has %lld elements, not %lld", operand.name, wide(tensor.dimensions[0]), wide(length));
}

// `operands` and `tensors`: of packed and scale.
bool find_matrix(Product product, const Operand* operands, const Tensor* tensors, int64_t rows, int64_t columns,
                 Weights* weights, Problem* problem) {
  const int64_t packed_rows = packed_rows_of(product, rows), scales = tensors[1].dimensions[0];
  if (tensors[0].dimensions[0] != packed_rows || tensors[0].dimensions[1] != columns) {
    return refuse(problem, "%s is [%lld, %lld], not [%lld, %lld]", operands[0].name, wide(tensors[0].dimensions[0]),
                  wide(tensors[0].dimensions[1]), wide(packed_rows), wide(columns));
  }
  if (scales != 1 && scales != rows) {
    return refuse(problem, "%s has %lld values, and there are %lld rows", operands[1].name, wide(scales), wide(rows));
  }
  *weights = {{tensors[0].as<uint8_t>(), nullptr, rows, packed_rows, columns}, tensors[1].as<float>(), scales == 1};
  return true;
}

bool find_attention_inputs(const LayerDeclaration& op, const Tensor* weights, const int64_t (&attributes)[2],
                           AttentionInputs* layer, Problem* problem) {
  const Operand* const operands = op.inputs + op.activations;
  const int64_t columns = weights[0].dimensions[0];
  if (!is_size("the length of norm", columns, kNormLanes, problem) ||
      !find_vector(operands[0], weights[0], columns, false, &layer->norm, problem)) {
    return false;
  }
  for (int i = 0; i < 3; ++i) {
    const int64_t rows = attributes[i > 0];
    const int first = 1 + 3 * i;
    if (!is_size(op.attributes[i > 0], rows, 2, problem) ||
        !find_matrix(op.product, operands + first, weights + first, rows, columns, &layer->projections[i], problem) ||
        !find_vector(operands[first + 2], weights[first + 2], rows, true, &layer->biases[i], problem)) {
      return false;
    }
  }
  return true;
}

bool find_feed_forward(const LayerDeclaration& op, const Tensor* weights, const int64_t (&attributes)[2],
                       FeedForward* layer, Problem* problem) {
  const Operand* const operands = op.inputs + op.activations;
  const int64_t columns = weights[1].dimensions[1], width = attributes[0], inner = attributes[1];
  const auto matrix = [&](int first, int64_t rows, int64_t row_columns, Weights* into) {
    return find_matrix(op.product, operands + first, weights + first, rows, row_columns, into, problem);
  };
  return is_size("the width of out", columns, kNormLanes, problem) &&
         is_size(op.attributes[0], width, kNormLanes, problem) &&
         is_size(op.attributes[1], inner, kNormLanes, problem) &&
         find_vector(operands[0], weights[0], columns, true, &layer->mixed_norm, problem) &&
         matrix(1, width, columns, &layer->out) &&
         find_vector(operands[3], weights[3], width, false, &layer->norm, problem) &&
         matrix(4, inner, width, &layer->gate) && matrix(6, inner, width, &layer->up) &&
         find_vector(operands[8], weights[8], inner, true, &layer->inner_norm, problem) &&
         matrix(9, width, inner, &layer->down);
}

// Three dimensions, of which the first two are those of `first` and the last is `width`, where that is not negative.
bool fits_activation(const Operand& operand, const Tensor& tensor, const Tensor& first, int64_t width,
                     Problem* problem) {
  if (tensor.rank != 3) {
    return refuse(problem, "%s has %lld dimensions, not 3", operand.name, wide(static_cast<int64_t>(tensor.rank)));
  }
  for (int i = 0; i < 3; ++i) {
    const int64_t size = i < 2 ? first.dimensions[i] : width;
    if (size >= 0 && tensor.dimensions[i] != size) {
      return refuse(problem, "dimension %d of %s is %lld, not %lld", i, operand.name, wide(tensor.dimensions[i]),
                    wide(size));
    }
  }
  return true;
}

}  // namespace

bool find_layer(const LayerDeclaration& op, const Tensor* weights, const int64_t (&attributes)[2], float epsilon,
                Layer* layer, Problem* problem) {
  if (!(epsilon >= 0)) return refuse(problem, "epsilon is negative or not a number");
  if (op.is_feed_forward) {
    layer->feed_forward.product = op.product;
    layer->feed_forward.epsilon = epsilon;
    return find_feed_forward(op, weights, attributes, &layer->feed_forward, problem);
  }
  layer->attention_inputs.product = op.product;
  layer->attention_inputs.epsilon = epsilon;
  return find_attention_inputs(op, weights, attributes, &layer->attention_inputs, problem);
}

bool fits_layer(const LayerDeclaration& op, const Tensor* activations, Layer* layer, int64_t* tokens,
                Problem* problem) {
  const Tensor& first = activations[0];
  const int64_t columns = op.is_feed_forward ? layer->feed_forward.out.matrix.columns
                                             : layer->attention_inputs.projections[0].matrix.columns;
  if (!fits_activation(op.inputs[0], first, first, columns, problem)) return false;
  const int64_t own = op.is_feed_forward ? layer->feed_forward.out.matrix.rows : -1;
  if (!fits_activation(op.inputs[1], activations[1], first, own, problem)) return false;
  const int64_t most = first.limit / (columns * static_cast<int64_t>(sizeof(float)));
  if (most > kMaxLayerTokens) return refuse(problem, "%lld tokens are too many", wide(most));
  *tokens = first.count / columns;
  if (op.is_feed_forward) return true;
  const int64_t half = activations[1].dimensions[2];
  if (!fits_activation(op.inputs[2], activations[2], first, half, problem)) return false;
  for (int i = 0; i < 2; ++i) {
    const int64_t rows = layer->attention_inputs.projections[i].matrix.rows;
    if (half < 1 || rows % (2 * half) != 0) {
      return refuse(problem, "%lld rows of %s are no whole number of heads of twice %lld values", wide(rows),
                    i == 0 ? "query" : "key", wide(half));
    }
  }
  layer->attention_inputs.half = half;
  return true;
}

}  // namespace microvlm

// What the fused layers of layer_table.py take, and the check of operands against it, as in declarations.h.
#pragma once

#include "declarations.h"
#include "layers/layers.h"

namespace microvlm {

constexpr size_t kMaxLayerInputs = 13, kMaxLayerOutputs = 3;
// Sizes of every dimension but tokens, and tokens of one call: no product of them overflows 63 bits.
constexpr int64_t kMaxLayerTokens = 1 << 28;

// A row of layer_table.py. Activations are [batch, tokens, width]; the other inputs are initializers.
struct LayerDeclaration {
  const char* name;
  Product product;
  bool is_feed_forward;  // else attention inputs
  size_t activations, outputs;
  const char* attributes[2];  // integers
  Operand inputs[kMaxLayerInputs];
};

// clang-format off
#define MICROVLM_MATRIX(name) {name "_packed", kUint8, {kPackedRows, kColumns}}, {name "_scale", kFloat, {kOneOrRows}}
#define MICROVLM_ATTENTION_INPUTS \
  {{"x", kFloat, {kLeading, kColumns}}, {"cosine", kFloat, {kLeading, kColumns}}, \
   {"sine", kFloat, {kLeading, kColumns}}, {"norm", kFloat, {kColumns}}, \
   MICROVLM_MATRIX("query"), {"query_bias", kFloat, {kRows}}, MICROVLM_MATRIX("key"), {"key_bias", kFloat, {kRows}}, \
   MICROVLM_MATRIX("value"), {"value_bias", kFloat, {kRows}}}
#define MICROVLM_FEED_FORWARD \
  {{"mixed", kFloat, {kLeading, kColumns}}, {"x", kFloat, {kLeading, kColumns}}, {"mixed_norm", kFloat, {kColumns}}, \
   MICROVLM_MATRIX("out"), {"norm", kFloat, {kColumns}}, MICROVLM_MATRIX("gate"), MICROVLM_MATRIX("up"), \
   {"inner_norm", kFloat, {kColumns}}, MICROVLM_MATRIX("down")}

constexpr LayerDeclaration kLayers[] = {
    {"AttentionInputs2x4", Product::kTernary2x4, false, 3, 3, {"query_rows", "key_rows"}, MICROVLM_ATTENTION_INPUTS},
    {"AttentionInputs3x5", Product::kTernary3x5, false, 3, 3, {"query_rows", "key_rows"}, MICROVLM_ATTENTION_INPUTS},
    {"FeedForward2x4", Product::kTernary2x4, true, 2, 1, {"rows", "inner_rows"}, MICROVLM_FEED_FORWARD},
    {"FeedForward3x5", Product::kTernary3x5, true, 2, 1, {"rows", "inner_rows"}, MICROVLM_FEED_FORWARD},
};
// clang-format on
constexpr size_t kLayerCount = sizeof kLayers / sizeof kLayers[0];

// A node's layer; which of the two its declaration says.
struct Layer {
  AttentionInputs attention_inputs;
  FeedForward feed_forward;

  int64_t output_width(bool is_feed_forward, size_t output) const {
    return is_feed_forward ? feed_forward.out.matrix.rows : attention_inputs.projections[output].matrix.rows;
  }
};

// `weights`: the inputs behind the activations, each of which fits its declaration. They fit each other and the
// attributes. A bias or an optional norm of no elements is none.
bool find_layer(const LayerDeclaration& op, const Tensor* weights, const int64_t (&attributes)[2], float epsilon,
                Layer* layer, Problem* problem);

// The activations, each of which fits its declaration, fit each other and the layer, whose `half` this sets.
bool fits_layer(const LayerDeclaration& op, const Tensor* activations, Layer* layer, int64_t* tokens,
                Problem* problem);

}  // namespace microvlm

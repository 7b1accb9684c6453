// The two fused halves of a decoder layer, over raw pointers: microvlm/formats/layer_table.py says what they compute, and
// in which order. A node is one call of the pool: its threads share every step of it.
#pragma once

#include "operators.h"

namespace microvlm {

// query, key, value = x' W + bias of the norm x' of x; query and key are rotated.
struct AttentionInputs {
  Product product;
  const float* norm;  // [K]
  float epsilon;
  Weights projections[3];  // of query, key and value: [N, K]
  const float* biases[3];  // [N], or null
  int64_t half;            // of a head
};

// y = x + out(mixed), y + down(silu(gate(y')) * up(y')) of the norm y' of y.
struct FeedForward {
  Product product;
  const float* mixed_norm;  // [A], or null
  Weights out;              // [H, A]
  const float* norm;        // [H]
  Weights gate, up;         // [F, H]
  const float* inner_norm;  // [F], or null
  Weights down;             // [H, F]
  float epsilon;
};

// float32 x [tokens, K], cosine and sine [tokens, half] -> outputs [tokens, N] each. False, and no outputs, when there is
// not enough memory for what lies between the steps; so below.
bool attention_inputs(const Kernels& kernels, const AttentionInputs& layer, const float* x, const float* cosine,
                      const float* sine, int64_t tokens, float* const (&outputs)[3], const Pool& pool);

// float32 mixed [tokens, A], x [tokens, H] -> y [tokens, H].
bool feed_forward(const Kernels& kernels, const FeedForward& layer, const float* mixed, const float* x, int64_t tokens,
                  float* y, const Pool& pool);

}  // namespace microvlm

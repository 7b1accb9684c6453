// The table of functions that one instruction-set variant of the `ai.microvlm` operators fills in.
// Kernels work on raw pointers and exact integers. ONNX Runtime, threads and ownership of memory are the caller's.
//
// Byte layouts are those of microvlm/formats/packing.py, which describes them; kernels read them in place, unaligned:
//
//   ternary 2x4   packed[r, k] = c(r, k) | c(R + r, k) << 2 | c(2R + r, k) << 4 | c(3R + r, k) << 6    [R, K]
//   ternary 3x5   packed[r, k] = c(r, k) + 3 c(R + r, k) + 9 c(2R + r, k) + 27 c(3R + r, k) + 81 c(4R + r, k)
//                 with trit codes c = trit + 1 in 0..2, R = ceil(N / 4) or ceil(N / 5); rows from N on are padding
//   int8          packed[n, k] = q + 128                                                               [N, K]
//   int4          packed[n, j] = (q[2j] + 8) | (q[2j + 1] + 8) << 4, weight = q multiplier[n, k / 32]  [N, Kp / 2]
#pragma once

#include <cstdint>

namespace microvlm {

// A token's activations start on a cache line, and each token's row is a whole number of lines.
constexpr int64_t kActivationAlignment = 64;
// Up to this many columns every sum, and every 64-fold or 255-fold of it that a kernel may hold on the way, fits int32.
constexpr int64_t kMaxColumns = 65536;
constexpr int64_t kInt4MaxColumns = 9399;
constexpr int64_t kGroup = 32;
constexpr float kAbsmaxFloor = 1e-5f;
// Partial sums of squares of a norm; widths of a fused layer are multiples of it.
constexpr int64_t kNormLanes = 32;
constexpr int64_t kMaxRotation = 64;  // columns of a rotated block
// The value of Kernels::task_work where none was measured.
constexpr int64_t kTaskWork = 1 << 20;

// Quantised activations of `count` tokens.
struct Tokens {
  // int8 [count, stride], 64-byte aligned; bytes [columns, stride) of a row are 0. For int4 products alone, each group
  // of 32 columns is split into its 16 even columns and its 16 odd ones, in the order of the low and high nibbles of 16
  // packed bytes.
  const int8_t* activations_q8;
  int64_t stride;
  // [count]: the sum of a token's activations, which corrects products with trit + 1 or q + 128 to trit or q.
  const int32_t* totals;
  // [count, groups]: the same sum by group of 32 columns; null unless the product is int4.
  const int32_t* group_totals;
  int64_t count;
  int64_t columns;
};

// One weight matrix [rows, columns].
struct Matrix {
  const uint8_t* packed;
  const uint8_t* multiplier;  // [rows, groups]; null unless int4
  int64_t rows;               // N
  int64_t packed_rows;        // R for ternary, N otherwise
  int64_t columns;            // K
};

// Writes sums[m * matrix.rows + n] for every token m and every row n that lies in packed rows [begin, end): rows p * R
// + r < N for r in [begin, end) and every plane p. Leaves other sums alone, because several threads write one array.
// `scratch` is 64-byte aligned, `scratch_bytes` long, and belongs to this call.
using MatrixSums = void (*)(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
                            uint8_t* scratch);

// Float steps of the fused layers, in the order of operations of layer_table.py. Every variant has those of
// float_steps.h, compiled for its instructions.
struct FloatSteps {
  // y float32 [columns] = x * sqrt(1 / (mean of x^2 + epsilon)) * weight.
  void (*normalize)(const float* x, const float* weight, int64_t columns, float epsilon, float* y);
  // gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i], in place.
  void (*gate)(float* gate, const float* up, int64_t count);
  // Rotates the two halves of each head of one token against each other, in place: x float32 [heads, 2, half], cosine
  // and sine [half].
  void (*rotate)(float* x, const float* cosine, const float* sine, int64_t heads, int64_t half);
  // y float32 [blocks, width] = each block of x times Sylvester's Hadamard matrix / sqrt(width); a power of four of at
  // most kMaxRotation.
  void (*rotate_blocks)(const float* x, int64_t blocks, int64_t width, float* y);
};

struct Kernels {
  const char* name;
  // 0: cannot run on this processor. The runnable variant with the highest score is the one used.
  int (*score)();
  // float32 [columns] -> activations_q8 int8 [columns], *activation_scale = absmax / 127, *total = sum of
  // activations_q8. A row with a NaN or an infinity gets activations 0 and activation scale NaN.
  void (*quantize)(const float* x, int64_t columns, int8_t* activations_q8, float* activation_scale, int32_t* total);
  // In place over `count` outputs of one token: float(sum) * (activation_scale * scale[i]), or scale[0] when one_scale.
  // The same 4 bytes are an int32 before and a float after.
  void (*scale_sums)(void* sums_then_floats, int64_t count, float activation_scale, const float* scale, bool one_scale);
  // The bytes of scratch that one call of a MatrixSums below may use; 0 is fine.
  int64_t (*scratch_bytes)(int64_t columns, bool is_ternary);
  MatrixSums ternary_2x4;
  MatrixSums ternary_3x5;
  MatrixSums int8;
  MatrixSums int4;
  // One row of a table -> y float32 [columns] = float(q) * scale, or float(q * multiplier) * scale.
  void (*dequantize_int8)(const uint8_t* packed, int64_t columns, float scale, float* y);
  void (*dequantize_int4)(const uint8_t* packed, const uint8_t* multiplier, int64_t columns, float scale, float* y);
  FloatSteps steps;
  // Multiply-adds of one task: enough to pay for waking another thread.
  int64_t task_work;
#if defined(__x86_64__)
  // The most tasks that pay for a ternary product, because a task has costs that do not depend on its rows. Null: any.
  int64_t (*max_tasks)(int64_t tokens, int64_t packed_rows) = nullptr;
  // The fewest tokens for which a MatrixSums uses its scratch: a decoding step then allocates nothing.
  int64_t scratch_tokens = 1;
#endif
};

// Every variant in this library; the reference scores 1.
extern const Kernels kReference;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
#elif defined(__aarch64__)
extern const Kernels kNeon;
extern const Kernels kNeonDot;
#endif

}  // namespace microvlm

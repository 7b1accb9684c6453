// The table of functions that one instruction-set variant of the `ai.microvlm` operators fills in.
// Raw pointers and exact integers only: no file here knows of ONNX Runtime, of threads or of who owns the memory.
//
// Byte layouts are those of microvlm/formats/op_table.py and are read where they lie, unaligned:
//
//   ternary 2x4   packed[r, k] = c(r, k) | c(R + r, k) << 2 | c(2R + r, k) << 4 | c(3R + r, k) << 6    [R, K]
//   ternary 3x5   packed[r, k] = c(r, k) + 3 c(R + r, k) + 9 c(2R + r, k) + 27 c(3R + r, k) + 81 c(4R + r, k)
//                 with codes c = trit + 1 in 0..2, R = ceil(N / 4) or ceil(N / 5); rows from N on are padding
//   int8          packed[n, k] = q + 128                                                               [N, K]
//   int4          packed[n, j] = (q[2j] + 8) | (q[2j + 1] + 8) << 4, weight = q multiplier[n, k / 32]  [N, Kp / 2]
#pragma once

#include <cstdint>

namespace microvlm {

// Codes of a token start on a cache line, and each token's row is a whole number of them.
constexpr int64_t kCodeAlignment = 64;
// Every sum, and every 64-fold or 255-fold of it that a kernel may hold on the way, stays inside int32 up to here.
constexpr int64_t kMaxColumns = 65536;
constexpr int64_t kInt4MaxColumns = 9399;
constexpr int64_t kGroup = 32;
constexpr float kPeakFloor = 1e-5f;
// Kernels::task_work where nothing else was measured.
constexpr int64_t kTaskWork = 1 << 20;

// Quantised activations of `count` tokens.
struct Tokens {
  // int8 [count, stride], 64-byte aligned; bytes [columns, stride) of a row are 0.
  // For int4 products alone the codes of each group of 32 columns are split: its 16 even columns, then its 16 odd
  // ones, as the low and high nibbles of 16 packed bytes meet them.
  const int8_t* codes;
  int64_t stride;
  // [count]: the sum of a token's codes, which turns products with c = trit + 1 or q + 128 into products with trit, q.
  const int32_t* totals;
  // [count, groups]: the same by group of 32 columns; null unless the product is int4.
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

// Writes sums[m * matrix.rows + n] for every token m and every row n that lies in packed rows [begin, end), which is
// rows p * R + r < N for r in [begin, end) and every plane p. Other sums are left alone: several threads write one
// array. `scratch` is 64-byte aligned and this call's own, `scratch_bytes` long.
using MatrixSums = void (*)(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
                            uint8_t* scratch);

struct Kernels {
  const char* name;
  // 0: cannot run on this processor. The runnable variant of the highest score is the one used.
  int (*score)();
  // float32 [columns] -> codes int8 [columns], *step = peak / 127, *total = sum of codes. A row with a NaN or an
  // infinity has codes 0 and step NaN.
  void (*quantize)(const float* x, int64_t columns, int8_t* codes, float* step, int32_t* total);
  // In place over `count` outputs of one token: float(sum) * (step * scale[i]), or scale[0] when one_scale.
  // The same 4 bytes are an int32 before and a float after.
  void (*scale_sums)(void* sums_then_floats, int64_t count, float step, const float* scale, bool one_scale);
  // What one call of a MatrixSums below may use; 0 is fine.
  int64_t (*scratch_bytes)(int64_t columns, bool is_ternary);
  MatrixSums ternary_2x4;
  MatrixSums ternary_3x5;
  MatrixSums int8;
  MatrixSums int4;
  // One row of a table -> y float32 [columns] = float(q) * scale, float(q * multiplier) * scale.
  void (*dequantize_int8)(const uint8_t* packed, int64_t columns, float scale, float* y);
  void (*dequantize_int4)(const uint8_t* packed, const uint8_t* multiplier, int64_t columns, float scale, float* y);
  // Multiply-adds that make a task: as many as another thread must get for waking it to pay.
  int64_t task_work;
#if defined(__x86_64__)
  // The most tasks that a ternary product is worth: what a task does once, whatever its rows, counts here. Null: any.
  int64_t (*most_tasks)(int64_t tokens, int64_t packed_rows) = nullptr;
  // The fewest tokens of which a MatrixSums uses its scratch: a decoding step then allocates nothing.
  int64_t scratch_tokens = 1;
#endif
};

// Every variant that this library was built with; the reference is the first and scores 1.
extern const Kernels kReference;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;
#elif defined(__aarch64__)
extern const Kernels kNeon;
extern const Kernels kNeonDot;
#endif

}  // namespace microvlm

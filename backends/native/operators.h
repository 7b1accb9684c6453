// The operators of op_table.py over raw pointers: quantise, split the work, sum integers, scale.
// Knows threads only as a pool that it is given; knows nothing of ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace microvlm {

enum class Product { kTernary2x4, kTernary3x5, kInt8, kInt4 };

// run(handle, task, tasks, state) calls task(state, i) once for each i < tasks, from any threads, and returns when
// all are done.
struct Pool {
  void (*run)(void* handle, void (*task)(void* state, size_t i), size_t tasks, void* state);
  void* handle;
  int64_t most_tasks;  // at most 64
};
extern const Pool kCallerOnly;

// The variants that can run here, best first; the reference is the last.
int64_t variant_count();
const Kernels& variant(int64_t i);
const Kernels* find_variant(const char* name);
// The one in use: MICROVLM_KERNELS by name, else the best. Null, with a sentence in *problem, when that name is
// unknown or cannot run here.
const Kernels* active_variant(const char** problem);

// Null when the sizes fit each other and the kernels' limits, else a sentence.
const char* product_problem(Product product, int64_t packed_rows, int64_t packed_columns, int64_t rows, int64_t columns,
                            int64_t scales);
// float32 x [tokens, K] -> y [tokens, N]. False when memory for codes cannot be had: then y is not written.
bool multiply(const Kernels& kernels, Product product, const Matrix& matrix, const float* scale, bool one_scale,
              const float* x, int64_t tokens, float* y, const Pool& pool);
// The integer half alone, over codes [tokens, K] given as they are: exact sums [tokens, N].
bool multiply_codes(const Kernels& kernels, Product product, const Matrix& matrix, const int8_t* codes, int64_t tokens,
                    int32_t* sums, const Pool& pool);

// Number of packed rows that hold N rows of a product.
int64_t packed_rows_of(Product product, int64_t rows);

}  // namespace microvlm

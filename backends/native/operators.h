// The operators of op_table.py over raw pointers: quantise, split the work, sum integers, scale. Threads are behind a
// Pool; ONNX Runtime does not appear here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace microvlm {

enum class Product { kTernary2x4, kTernary3x5, kInt8, kInt4 };

// run(handle, task, tasks, state) calls task(state, i) once for each i < tasks, from any threads, and returns when all
// are done.
struct Pool {
  void (*run)(void* handle, void (*task)(void* state, size_t i), size_t tasks, void* state);
  void* handle;
  int64_t max_tasks;  // at most 64
};
extern const Pool kCallerOnly;

// The variants that can run here, best first; the reference is the last.
int64_t variant_count();
const Kernels& variant(int64_t i);
const Kernels* find_variant(const char* name);
// The variant in use: the one that MICROVLM_KERNELS names, else the best. Null, with a sentence in *problem, when that
// name is unknown or cannot run here.
const Kernels* active_variant(const char** problem);

// float32 x [tokens, K] -> y [tokens, N]. Returns false, and writes no y, when there is not enough memory for the
// activations.
bool multiply(const Kernels& kernels, Product product, const Matrix& matrix, const float* scale, bool one_scale,
              const float* x, int64_t tokens, float* y, const Pool& pool);
// The integer half alone: int8 activations_q8 [tokens, K] -> exact sums [tokens, N].
bool multiply_q8(const Kernels& kernels, Product product, const Matrix& matrix, const int8_t* activations_q8,
                 int64_t tokens, int32_t* sums, const Pool& pool);

// Number of packed rows that hold N rows of a product.
int64_t packed_rows_of(Product product, int64_t rows);

}  // namespace microvlm

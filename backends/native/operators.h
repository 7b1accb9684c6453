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
// A matrix and its scales: [rows], or [1] where there is one.
struct Weights {
  Matrix matrix;
  const float* scale;
  bool one_scale;
};

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

// Below, the parts of a product that the fused layers of layers.h use.

// Tasks of equal size over packed rows.
struct Division {
  int64_t tasks, rows_per_task;
};
// `task_work`: the fewest multiply-adds of a task.
Division divide(const Kernels& kernels, Product product, const Matrix& matrix, int64_t tokens, int64_t max_tasks,
                int64_t task_work);

// Calls body(first, count) for every range of the rows that lie in packed rows [begin, end): one a plane.
template <class Body>
void each_range(Product product, const Matrix& matrix, int64_t begin, int64_t end, const Body& body) {
  const int64_t planes = product == Product::kTernary2x4 ? 4 : product == Product::kTernary3x5 ? 5 : 1;
  for (int64_t p = 0; p < planes; ++p) {
    const int64_t first = p * matrix.packed_rows + begin, last = p * matrix.packed_rows + end;
    if (first >= matrix.rows) break;
    body(first, (last < matrix.rows ? last : matrix.rows) - first);
  }
}

// The rows of y float32 [tokens, N] that lie in packed rows [begin, end); y's memory holds their exact sums before.
void multiply_rows(const Kernels& kernels, Product product, const Tokens& tokens, const float* activation_scales,
                   const Weights& weights, int64_t begin, int64_t end, float* y, uint8_t* scratch);

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
// Bytes of scratch of one task of a product; a whole number of cache lines.
int64_t scratch_bytes_of(const Kernels& kernels, Product product, int64_t tokens, int64_t columns);

}  // namespace microvlm

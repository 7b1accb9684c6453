// Computes one product: quantises all tokens, sums by ranges of packed rows, scales in the float order of op_table.py.

#include "operators.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace microvlm {
namespace {

constexpr int64_t kRowsPerBlock = 16;

int planes_of(Product product) { return product == Product::kTernary2x4 ? 4 : product == Product::kTernary3x5 ? 5 : 1; }

MatrixSums sums_of(const Kernels& kernels, Product product) {
  switch (product) {
    case Product::kTernary2x4:
      return kernels.ternary_2x4;
    case Product::kTernary3x5:
      return kernels.ternary_3x5;
    case Product::kInt8:
      return kernels.int8;
    default:
      return kernels.int4;
  }
}

// Reorders a token's activations for an int4 product: each group's even columns, then its odd ones; sums each group.
void split_groups(int8_t* activations_q8, int64_t groups, int32_t* group_totals) {
  for (int64_t g = 0; g < groups; ++g, activations_q8 += kGroup) {
    int8_t even_odd[kGroup];
    int32_t total = 0;
    for (int j = 0; j < kGroup / 2; ++j) {
      even_odd[j] = activations_q8[2 * j];
      even_odd[kGroup / 2 + j] = activations_q8[2 * j + 1];
      total += activations_q8[2 * j] + activations_q8[2 * j + 1];
    }
    std::memcpy(activations_q8, even_odd, sizeof even_odd);
    group_totals[g] = total;
  }
}

// The activations of few tokens lie in memory that the thread keeps, instead of a new block for every product: measured
// faster on a decoding step. A thread runs one product at a time.
constexpr int64_t kSmallBufferBytes = 16384;
alignas(kActivationAlignment) thread_local uint8_t small_buffer[kSmallBufferBytes];

// Sums of the rows in packed rows [begin, end) -> floats, in place.
void scale_rows(const Kernels& kernels, Product product, int64_t tokens, const float* activation_scales,
                const Weights& weights, int64_t begin, int64_t end, float* y) {
  for (int64_t m = 0; m < tokens; ++m, y += weights.matrix.rows) {
    each_range(product, weights.matrix, begin, end, [&](int64_t first, int64_t count) {
      kernels.scale_sums(y + first, count, activation_scales[m],
                         weights.one_scale ? weights.scale : weights.scale + first, weights.one_scale);
    });
  }
}

// What the tasks of one product share, and the memory it lies in.
class Job {
 public:
  Job(const Kernels& kernels, Product product, const Matrix& matrix, int64_t tokens, int64_t max_tasks)
      : kernels_(kernels), product_(product), matrix_(matrix), groups_((matrix.columns + kGroup - 1) / kGroup) {
    tokens_.count = tokens;
    tokens_.columns = matrix.columns;
    tokens_.stride = round_up(matrix.columns, kActivationAlignment);
    const Division division = divide(kernels, product, matrix, tokens, max_tasks, kernels.task_work);
    tasks_ = division.tasks;
    rows_per_task_ = division.rows_per_task;
    scratch_bytes_ = scratch_bytes_of(kernels, product, tokens, matrix.columns);
    const int64_t group_count = product == Product::kInt4 ? groups_ : 0;
    const int64_t activation_bytes = tokens * tokens_.stride, words = tokens * (2 + group_count);
    const int64_t operand_bytes = activation_bytes + round_up(words * 4, kActivationAlignment);
    const int64_t own_bytes = operand_bytes <= kSmallBufferBytes ? 0 : operand_bytes;
    const int64_t bytes = own_bytes + tasks_ * scratch_bytes_;
    if (bytes > 0) memory_ = std::malloc(bytes + kActivationAlignment);
    if (bytes > 0 && memory_ == nullptr) return;
    ready_ = true;
    const uintptr_t block = round_up(reinterpret_cast<uintptr_t>(memory_), kActivationAlignment);
    const uintptr_t start = own_bytes > 0 ? block : reinterpret_cast<uintptr_t>(small_buffer);
    activations_q8_ = reinterpret_cast<int8_t*>(start);
    totals_ = reinterpret_cast<int32_t*>(start + activation_bytes);
    group_totals_ = totals_ + tokens;
    activation_scales_ = reinterpret_cast<float*>(group_totals_ + tokens * group_count);
    scratch_ = reinterpret_cast<uint8_t*>(block + own_bytes);
    tokens_.activations_q8 = activations_q8_;
    tokens_.totals = totals_;
    tokens_.group_totals = product == Product::kInt4 ? group_totals_ : nullptr;
  }
  ~Job() { std::free(memory_); }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  bool ready() const { return ready_; }

  void quantize(const float* x) {
    for (int64_t m = 0; m < tokens_.count; ++m) {
      kernels_.quantize(x + m * tokens_.columns, tokens_.columns, row(m), activation_scales_ + m, totals_ + m);
      finish_row(m);
    }
  }

  void copy(const int8_t* activations_q8) {
    for (int64_t m = 0; m < tokens_.count; ++m) {
      std::memcpy(row(m), activations_q8 + m * tokens_.columns, tokens_.columns);
      totals_[m] = 0;
      for (int64_t k = 0; k < tokens_.columns; ++k) totals_[m] += row(m)[k];
      finish_row(m);
    }
  }

  // Sums go to the memory of `y`; with a scale they become floats there.
  void run(void* y, const float* scale, bool one_scale, const Pool& pool) {
    y_ = static_cast<int32_t*>(y);
    scale_ = scale;
    one_scale_ = one_scale;
    if (tasks_ == 1) return task(this, 0);
    pool.run(pool.handle, task, static_cast<size_t>(tasks_), this);
  }

 private:
  int8_t* row(int64_t m) { return activations_q8_ + m * tokens_.stride; }

  void finish_row(int64_t m) {
    std::memset(row(m) + tokens_.columns, 0, tokens_.stride - tokens_.columns);
    if (product_ == Product::kInt4) split_groups(row(m), groups_, group_totals_ + m * groups_);
  }

  // A task takes the lowest free scratch, so that a thread keeps reusing one that is in its cache.
  int64_t take_scratch() {
    uint64_t taken = scratch_in_use_.load();
    uint64_t lowest;
    do {
      lowest = ~taken & (taken + 1);
    } while (!scratch_in_use_.compare_exchange_weak(taken, taken | lowest));
    return __builtin_ctzll(lowest);
  }

  static void task(void* state, size_t i) {
    auto& job = *static_cast<Job*>(state);
    const int64_t begin = static_cast<int64_t>(i) * job.rows_per_task_;
    const int64_t end = std::min(begin + job.rows_per_task_, job.matrix_.packed_rows);
    const int64_t scratch = job.take_scratch();
    sums_of(job.kernels_, job.product_)(job.tokens_, job.matrix_, begin, end, job.y_,
                                        job.scratch_ + scratch * job.scratch_bytes_);
    job.scratch_in_use_.fetch_and(~(uint64_t{1} << scratch));
    if (job.scale_ == nullptr) return;
    scale_rows(job.kernels_, job.product_, job.tokens_.count, job.activation_scales_,
               {job.matrix_, job.scale_, job.one_scale_}, begin, end, reinterpret_cast<float*>(job.y_));
  }

  const Kernels& kernels_;
  const Product product_;
  const Matrix& matrix_;
  const int64_t groups_;
  Tokens tokens_ = {};
  int64_t tasks_ = 1, rows_per_task_ = 0, scratch_bytes_ = 0;
  void* memory_ = nullptr;
  bool ready_ = false;
  int8_t* activations_q8_ = nullptr;
  int32_t *totals_ = nullptr, *group_totals_ = nullptr;
  float* activation_scales_ = nullptr;
  uint8_t* scratch_ = nullptr;
  std::atomic<uint64_t> scratch_in_use_{0};
  int32_t* y_ = nullptr;
  const float* scale_ = nullptr;
  bool one_scale_ = false;
};

void run_on_caller(void*, void (*task)(void*, size_t), size_t tasks, void* state) {
  for (size_t i = 0; i < tasks; ++i) task(state, i);
}

}  // namespace

const Pool kCallerOnly = {run_on_caller, nullptr, 1};

int64_t packed_rows_of(Product product, int64_t rows) {
  const int64_t planes = planes_of(product);
  return (rows + planes - 1) / planes;
}

Division divide([[maybe_unused]] const Kernels& kernels, [[maybe_unused]] Product product, const Matrix& matrix,
                int64_t tokens, int64_t max_tasks, int64_t task_work) {
  const int64_t work = tokens * matrix.columns * matrix.rows;
  const int64_t blocks = (matrix.packed_rows + kRowsPerBlock - 1) / kRowsPerBlock;
#if defined(__x86_64__)
  if (planes_of(product) > 1 && kernels.max_tasks != nullptr) {
    max_tasks = std::min(max_tasks, kernels.max_tasks(tokens, matrix.packed_rows));
  }
#endif
  const int64_t tasks = std::max<int64_t>(1, std::min({max_tasks, blocks, work / task_work}));
  const int64_t rows_per_task = (blocks + tasks - 1) / tasks * kRowsPerBlock;
  return {(matrix.packed_rows + rows_per_task - 1) / rows_per_task, rows_per_task};
}

void multiply_rows(const Kernels& kernels, Product product, const Tokens& tokens, const float* activation_scales,
                   const Weights& weights, int64_t begin, int64_t end, float* y, uint8_t* scratch) {
  sums_of(kernels, product)(tokens, weights.matrix, begin, end, reinterpret_cast<int32_t*>(y), scratch);
  scale_rows(kernels, product, tokens.count, activation_scales, weights, begin, end, y);
}

int64_t scratch_bytes_of(const Kernels& kernels, Product product, [[maybe_unused]] int64_t tokens, int64_t columns) {
#if defined(__x86_64__)
  if (tokens < kernels.scratch_tokens) return 0;
#endif
  return round_up(kernels.scratch_bytes(columns, planes_of(product) > 1), kActivationAlignment);
}

bool multiply(const Kernels& kernels, Product product, const Matrix& matrix, const float* scale, bool one_scale,
              const float* x, int64_t tokens, float* y, const Pool& pool) {
  if (tokens == 0 || matrix.rows == 0) return true;
  Job job(kernels, product, matrix, tokens, pool.max_tasks);
  if (!job.ready()) return false;
  job.quantize(x);
  job.run(y, scale, one_scale, pool);
  return true;
}

bool multiply_q8(const Kernels& kernels, Product product, const Matrix& matrix, const int8_t* activations_q8,
                 int64_t tokens, int32_t* sums, const Pool& pool) {
  if (tokens == 0 || matrix.rows == 0) return true;
  Job job(kernels, product, matrix, tokens, pool.max_tasks);
  if (!job.ready()) return false;
  job.copy(activations_q8);
  job.run(sums, nullptr, true, pool);
  return true;
}

}  // namespace microvlm

// Runs the fused layers step by step: the tasks of a step wait for the step before, threads take tasks as they come.

#include "layers/layers.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace microvlm {
namespace {

constexpr int64_t kMaxThreads = 16;
constexpr int kMaxSteps = 6;
// Multiply-adds of a task, and the fewest for which a node asks for another thread: 64 KiB of two-bit weights a token.
// A session's threads stay awake while it runs, so that a node wakes none.
constexpr int64_t kLayerTaskWork = 1 << 18;
// Looks at the others' work before a waiting thread gives its processor away.
constexpr int kPolls = 4096;

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Steps whose tasks any number of threads share. A thread that takes a task has started it, and waits for nothing before
// it is done: so threads may come late or never, as ONNX Runtime's do.
class Steps {
 public:
  // Does tasks [begin, end); `thread` is below the number of threads of `run`.
  using Task = void (*)(void* state, int64_t begin, int64_t end, int64_t thread);

  void add(Task task, int64_t tasks) {
    steps_[count_].task = task;
    steps_[count_++].tasks = tasks;
  }

  // Returns when all is done.
  void run(void* state, int64_t threads, const Pool& pool) {
    state_ = state;
    if (threads == 1) {
      for (int s = 0; s < count_; ++s) {
        steps_[s].task(state, 0, steps_[s].tasks, 0);
      }
      return;
    }
    pool.run(pool.handle, [](void* self, size_t) { static_cast<Steps*>(self)->work(); }, static_cast<size_t>(threads),
             this);
  }

 private:
  struct Step {
    Task task = nullptr;
    int64_t tasks = 0;
    alignas(kActivationAlignment) std::atomic<int64_t> next{0};
    alignas(kActivationAlignment) std::atomic<int64_t> done{0};
  };

  void work() {
    const int64_t thread = joined_.fetch_add(1, std::memory_order_relaxed);
    for (int s = 0; s < count_; ++s) {
      Step& step = steps_[s];
      for (;;) {
        // Half of its share of what is left: long streams of weights first, short ones so that all end together.
        const int64_t left = step.tasks - step.next.load(std::memory_order_relaxed);
        const int64_t count = std::max<int64_t>(1, left / (2 * joined_.load(std::memory_order_relaxed)));
        const int64_t begin = step.next.fetch_add(count, std::memory_order_relaxed);
        if (begin >= step.tasks) break;
        const int64_t end = std::min(begin + count, step.tasks);
        step.task(state_, begin, end, thread);
        step.done.fetch_add(end - begin, std::memory_order_release);
      }
      for (int polls = 0; step.done.load(std::memory_order_acquire) < step.tasks; ++polls) {
        polls < kPolls ? pause_briefly() : static_cast<void>(sched_yield());
      }
    }
  }

  Step steps_[kMaxSteps];
  int count_ = 0;
  void* state_ = nullptr;
  std::atomic<int64_t> joined_{0};
};

// Memory between the steps: measured first, then handed out from one block.
class Block {
 public:
  ~Block() { std::free(memory_); }
  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // False when there is not enough memory.
  bool allocate() {
    memory_ = std::malloc(size_ + kActivationAlignment);
    next_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(memory_), kActivationAlignment));
    return memory_ != nullptr;
  }
  // Once before `allocate` and once after it, in one order. Null before.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)), kActivationAlignment);
    uint8_t* const place = next_;
    if (memory_ == nullptr) {
      size_ += bytes;
    } else {
      next_ += bytes;
    }
    return reinterpret_cast<T*>(place);
  }

 private:
  int64_t size_ = 0;
  void* memory_ = nullptr;
  uint8_t* next_ = nullptr;
};

// The quantised input of a step's products.
struct Activations {
  int8_t* activations_q8;
  int32_t* totals;
  float* scales;
  int64_t columns, stride;

  void take(Block* block, int64_t tokens, int64_t width) {
    columns = width;
    stride = round_up(width, kActivationAlignment);
    activations_q8 = block->take<int8_t>(tokens * stride);
    totals = block->take<int32_t>(tokens);
    scales = block->take<float>(tokens);
  }
  Tokens tokens(int64_t count) const { return {activations_q8, stride, totals, nullptr, count, columns}; }
};

// What both layers need of a call.
struct Call {
  const Kernels& kernels;
  Product product;
  int64_t tokens, threads = 1, token_tasks = 1;
  int64_t scratch_bytes = 0, row_floats = 0;
  uint8_t* scratch = nullptr;
  float* rows = nullptr;  // a normalised token of each thread

  // `work`: multiply-adds of a token; `columns`: of the widest product.
  void plan(int64_t work, int64_t columns, const Pool& pool) {
    threads = std::max<int64_t>(1, std::min({kMaxThreads, pool.max_tasks, work * tokens / kLayerTaskWork}));
    token_tasks = std::min(tokens, threads);
    scratch_bytes = scratch_bytes_of(kernels, product, tokens, columns);
    row_floats = round_up(columns, kNormLanes);
  }
  void take(Block* block) {
    scratch = block->take<uint8_t>(threads * scratch_bytes);
    rows = block->take<float>(threads * row_floats);
  }
  Division division_of(const Matrix& matrix) const {
    return divide(kernels, product, matrix, tokens, threads == 1 ? 1 : kMaxThreads, kLayerTaskWork);
  }
  int64_t first_token(int64_t task) const { return tokens * task / token_tasks; }

  // Quantises the tokens of tasks [begin, end), normalised where there is a norm.
  void quantize(const float* x, const float* norm, float epsilon, const Activations& into, int64_t begin, int64_t end,
                int64_t thread) const {
    const int64_t columns = into.columns;
    for (int64_t m = first_token(begin); m < first_token(end); ++m) {
      const float* row = x + m * columns;
      if (norm != nullptr) {
        float* const normalised = rows + thread * row_floats;
        kernels.steps.normalize(row, norm, columns, epsilon, normalised);
        row = normalised;
      }
      int8_t* const activations_q8 = into.activations_q8 + m * into.stride;
      kernels.quantize(row, columns, activations_q8, into.scales + m, into.totals + m);
      std::memset(activations_q8 + columns, 0, into.stride - columns);
    }
  }
  // The rows of tasks [begin, end) of `weights` -> y, and then body(place in y, first row, count) for every token's
  // ranges of them.
  template <class Body>
  void multiply(const Activations& input, const Weights& weights, const Division& division, int64_t begin, int64_t end,
                int64_t thread, float* y, const Body& body) const {
    const Matrix& matrix = weights.matrix;
    const int64_t first_row = begin * division.rows_per_task;
    const int64_t last_row = std::min(end * division.rows_per_task, matrix.packed_rows);
    multiply_rows(kernels, product, input.tokens(tokens), input.scales, weights, first_row, last_row, y,
                  scratch + thread * scratch_bytes);
    for (int64_t m = 0; m < tokens; ++m) {
      each_range(product, matrix, first_row, last_row,
                 [&](int64_t first, int64_t count) { body(m * matrix.rows + first, first, count); });
    }
  }
};

int64_t work_of(const Weights& weights) { return weights.matrix.rows * weights.matrix.columns; }

void add(float* y, const float* other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += other[i];
}

struct AttentionInputsRun {
  Call call;
  const AttentionInputs& layer;
  const float *x, *cosine, *sine;
  float* const* outputs;
  Division divisions[3];
  Activations input;

  static AttentionInputsRun& of(void* state) { return *static_cast<AttentionInputsRun*>(state); }

  static void normalise(void* state, int64_t begin, int64_t end, int64_t thread) {
    auto& run = of(state);
    run.call.quantize(run.x, run.layer.norm, run.layer.epsilon, run.input, begin, end, thread);
  }
  static void project(void* state, int64_t begin, int64_t end, int64_t thread) {
    auto& run = of(state);
    for (int i = 0; i < 3 && end > 0; ++i) {
      const int64_t tasks = run.divisions[i].tasks;
      const float* const bias = run.layer.biases[i];
      float* const y = run.outputs[i];
      if (begin < tasks) {
        run.call.multiply(run.input, run.layer.projections[i], run.divisions[i], begin, std::min(end, tasks), thread, y,
                          [&](int64_t place, int64_t first, int64_t count) {
                            if (bias != nullptr) add(y + place, bias + first, count);
                          });
      }
      begin = std::max<int64_t>(0, begin - tasks);
      end -= tasks;
    }
  }
  static void rotate(void* state, int64_t begin, int64_t end, int64_t) {
    auto& run = of(state);
    const int64_t half = run.layer.half;
    for (int64_t m = run.call.first_token(begin); m < run.call.first_token(end); ++m) {
      for (int i = 0; i < 2; ++i) {
        const int64_t rows = run.layer.projections[i].matrix.rows;
        run.call.kernels.steps.rotate(run.outputs[i] + m * rows, run.cosine + m * half, run.sine + m * half,
                                      rows / (2 * half), half);
      }
    }
  }
};

struct FeedForwardRun {
  Call call;
  const FeedForward& layer;
  const float *mixed, *x;
  float* y;
  Division out, wide, down;
  Activations mixed_input, input, inner_input;
  float *gate = nullptr, *up = nullptr, *last = nullptr;

  static FeedForwardRun& of(void* state) { return *static_cast<FeedForwardRun*>(state); }

  static void quantize_mixed(void* state, int64_t begin, int64_t end, int64_t thread) {
    auto& run = of(state);
    run.call.quantize(run.mixed, run.layer.mixed_norm, run.layer.epsilon, run.mixed_input, begin, end, thread);
  }
  static void multiply_out(void* state, int64_t begin, int64_t end, int64_t thread) {
    auto& run = of(state);
    run.call.multiply(run.mixed_input, run.layer.out, run.out, begin, end, thread, run.y,
                      [&](int64_t place, int64_t, int64_t count) { add(run.y + place, run.x + place, count); });
  }
  static void normalise(void* state, int64_t begin, int64_t end, int64_t thread) {
    auto& run = of(state);
    run.call.quantize(run.y, run.layer.norm, run.layer.epsilon, run.input, begin, end, thread);
  }
  static void multiply_wide(void* state, int64_t begin, int64_t end, int64_t thread) {
    auto& run = of(state);
    run.call.multiply(run.input, run.layer.up, run.wide, begin, end, thread, run.up, [](int64_t, int64_t, int64_t) {});
    run.call.multiply(run.input, run.layer.gate, run.wide, begin, end, thread, run.gate,
                      [&](int64_t place, int64_t, int64_t count) {
                        run.call.kernels.steps.gate(run.gate + place, run.up + place, count);
                      });
  }
  static void quantize_inner(void* state, int64_t begin, int64_t end, int64_t thread) {
    auto& run = of(state);
    run.call.quantize(run.gate, run.layer.inner_norm, run.layer.epsilon, run.inner_input, begin, end, thread);
  }
  static void multiply_down(void* state, int64_t begin, int64_t end, int64_t thread) {
    auto& run = of(state);
    run.call.multiply(run.inner_input, run.layer.down, run.down, begin, end, thread, run.last,
                      [&](int64_t place, int64_t, int64_t count) { add(run.y + place, run.last + place, count); });
  }
};

}  // namespace

bool attention_inputs(const Kernels& kernels, const AttentionInputs& layer, const float* x, const float* cosine,
                      const float* sine, int64_t tokens, float* const (&outputs)[3], const Pool& pool) {
  if (tokens == 0) return true;
  AttentionInputsRun run = {{kernels, layer.product, tokens}, layer, x, cosine, sine, outputs, {}, {}};
  const int64_t columns = layer.projections[0].matrix.columns;
  run.call.plan(work_of(layer.projections[0]) + work_of(layer.projections[1]) + work_of(layer.projections[2]), columns,
                pool);
  int64_t tasks = 0;
  for (int i = 0; i < 3; ++i) {
    run.divisions[i] = run.call.division_of(layer.projections[i].matrix);
    tasks += run.divisions[i].tasks;
  }
  Block block;
  for (bool is_allocated : {false, true}) {
    if (is_allocated && !block.allocate()) return false;
    run.call.take(&block);
    run.input.take(&block, tokens, columns);
  }
  Steps steps;
  steps.add(AttentionInputsRun::normalise, run.call.token_tasks);
  steps.add(AttentionInputsRun::project, tasks);
  steps.add(AttentionInputsRun::rotate, run.call.token_tasks);
  steps.run(&run, run.call.threads, pool);
  return true;
}

bool feed_forward(const Kernels& kernels, const FeedForward& layer, const float* mixed, const float* x, int64_t tokens,
                  float* y, const Pool& pool) {
  if (tokens == 0) return true;
  FeedForwardRun run = {{kernels, layer.product, tokens}, layer, mixed, x, y, {}, {}, {}, {}, {}, {}};
  const int64_t columns = layer.out.matrix.columns, width = layer.out.matrix.rows, inner = layer.gate.matrix.rows;
  run.call.plan(work_of(layer.out) + 3 * work_of(layer.gate), std::max({columns, width, inner}), pool);
  run.out = run.call.division_of(layer.out.matrix);
  run.wide = run.call.division_of(layer.gate.matrix);
  run.down = run.call.division_of(layer.down.matrix);
  Block block;
  for (bool is_allocated : {false, true}) {
    if (is_allocated && !block.allocate()) return false;
    run.call.take(&block);
    run.mixed_input.take(&block, tokens, columns);
    run.input.take(&block, tokens, width);
    run.inner_input.take(&block, tokens, inner);
    run.gate = block.take<float>(tokens * inner);
    run.up = block.take<float>(tokens * inner);
    run.last = block.take<float>(tokens * width);
  }
  Steps steps;
  steps.add(FeedForwardRun::quantize_mixed, run.call.token_tasks);
  steps.add(FeedForwardRun::multiply_out, run.out.tasks);
  steps.add(FeedForwardRun::normalise, run.call.token_tasks);
  steps.add(FeedForwardRun::multiply_wide, run.wide.tasks);
  steps.add(FeedForwardRun::quantize_inner, run.call.token_tasks);
  steps.add(FeedForwardRun::multiply_down, run.down.tasks);
  steps.run(&run, run.call.threads, pool);
  return true;
}

}  // namespace microvlm

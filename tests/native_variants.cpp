// Compares one variant of the kernels with the reference, bit for bit, on random and on adversarial input.
// Usage: native_variants            prints the variants that run here, best first
//        native_variants NAME       exit status 0 when all is equal, 1 with a line for the first difference
// Every array ends where a page without access begins, so that a read or a write behind it ends the program.

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include "operators.h"

namespace {

using microvlm::Kernels;
using microvlm::Matrix;
using microvlm::Product;

const Kernels* variant;
const Kernels& reference = microvlm::kReference;
std::mt19937 random_bits(20260);
int64_t cases = 0;

int64_t uniform(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(high - low + 1));
}

// An array whose end is the end of its pages.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : count_(count) {
    const size_t page = sysconf(_SC_PAGESIZE), bytes = count * sizeof(T), used = (bytes + page - 1) / page * page;
    size_ = used + page;
    memory_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_ + used, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(memory_ + used - bytes);
  }
  ~Guarded() { munmap(memory_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t count() const { return count_; }
  bool same_bytes(Guarded& other) { return std::memcmp(data_, other.data_, count_ * sizeof(T)) == 0; }
  void fill(T value) {
    for (int64_t i = 0; i < count_; ++i) data_[i] = value;
  }

 private:
  int64_t count_;
  size_t size_;
  char* memory_;
  T* data_;
};

struct Shape {
  Product product;
  int64_t tokens, columns, rows;
};

[[noreturn]] void fail(const char* what, const Shape& shape) {
  static const char* const kNames[] = {"2x4", "3x5", "int8", "int4"};
  std::printf("%s differ: %s, %s, %lld tokens, K %lld, N %lld\n", what, variant->name,
              kNames[static_cast<int>(shape.product)], static_cast<long long>(shape.tokens),
              static_cast<long long>(shape.columns), static_cast<long long>(shape.rows));
  std::exit(1);
}

// A matrix whose weights are all `sign` (-1, 0 or 1) times the largest magnitude, or random when sign is kRandom.
constexpr int kRandom = 2;

struct Weights {
  int64_t packed_rows, row_bytes, groups;
  Guarded<uint8_t> packed, multiplier;

  Weights(const Shape& shape, int sign)
      : packed_rows(microvlm::packed_rows_of(shape.product, shape.rows)),
        row_bytes(shape.product == Product::kInt4 ? (shape.columns + 31) / 32 * 16 : shape.columns),
        groups((shape.columns + 31) / 32),
        packed(packed_rows * row_bytes),
        multiplier(shape.product == Product::kInt4 ? packed_rows * groups : 1) {
    for (int64_t i = 0; i < packed.count(); ++i) packed[i] = sign == kRandom ? any(shape) : same(shape, sign);
    for (int64_t i = 0; i < multiplier.count(); ++i) multiplier[i] = sign == kRandom ? uniform(0, 255) : 255;
  }

  static uint8_t any(const Shape& shape) {
    switch (shape.product) {
      case Product::kTernary2x4:
        return uniform(0, 2) | uniform(0, 2) << 2 | uniform(0, 2) << 4 | uniform(0, 2) << 6;
      case Product::kTernary3x5:
        return uniform(0, 242);
      case Product::kInt8:
        return uniform(1, 255);
      default:
        return uniform(1, 15) | uniform(1, 15) << 4;
    }
  }

  static uint8_t same(const Shape& shape, int sign) {
    switch (shape.product) {
      case Product::kTernary2x4:
        return 85 * (sign + 1);
      case Product::kTernary3x5:
        return 121 * (sign + 1);
      case Product::kInt8:
        return 128 + 127 * sign;
      default:
        return 17 * (8 + 7 * sign);
    }
  }

  Matrix matrix(const Shape& shape) {
    return {packed.data(), shape.product == Product::kInt4 ? multiplier.data() : nullptr, shape.rows, packed_rows,
            shape.columns};
  }
};

// Runs tasks last to first, as threads might.
void run_backwards(void*, void (*task)(void*, size_t), size_t tasks, void* state) {
  for (size_t i = tasks; i > 0; --i) task(state, i - 1);
}
const microvlm::Pool kBackwards = {run_backwards, nullptr, 12};

void compare_sums(const Shape& shape, Weights& weights, Guarded<int8_t>& activations_q8) {
  const Matrix matrix = weights.matrix(shape);
  Guarded<int32_t> expected(shape.tokens * shape.rows), sums(shape.tokens * shape.rows);
  sums.fill(-1);
  microvlm::multiply_q8(reference, shape.product, matrix, activations_q8.data(), shape.tokens, expected.data(),
                        microvlm::kCallerOnly);
  microvlm::multiply_q8(*variant, shape.product, matrix, activations_q8.data(), shape.tokens, sums.data(), kBackwards);
  if (!sums.same_bytes(expected)) fail("integer sums", shape);
  ++cases;
}

void compare_random_sums(const Shape& shape) {
  Weights weights(shape, kRandom);
  Guarded<int8_t> activations_q8(shape.tokens * shape.columns);
  for (int64_t i = 0; i < activations_q8.count(); ++i) activations_q8[i] = uniform(-128, 127);
  compare_sums(shape, weights, activations_q8);
}

// These sums are also known without any reference.
void compare_extreme_sums(const Shape& shape, int sign, int8_t activation) {
  Weights weights(shape, sign);
  Guarded<int8_t> activations_q8(shape.tokens * shape.columns);
  activations_q8.fill(activation);
  compare_sums(shape, weights, activations_q8);
  Guarded<int32_t> sums(shape.tokens * shape.rows);
  microvlm::multiply_q8(*variant, shape.product, weights.matrix(shape), activations_q8.data(), shape.tokens,
                        sums.data(), microvlm::kCallerOnly);
  const int64_t weight = sign * (shape.product == Product::kInt8 ? 127 : shape.product == Product::kInt4 ? 7 * 255 : 1);
  for (int64_t i = 0; i < sums.count(); ++i) {
    if (sums[i] != weight * activation * shape.columns) fail("extreme sums", shape);
  }
}

// Rows of x: small, large, zero, ties between two int8 values, and some with one value that is not finite.
void fill_activations(Guarded<float>& x, int64_t tokens, int64_t columns) {
  std::normal_distribution<float> normal;
  static const float kNotFinite[] = {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN(),
                                     std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()};
  for (int64_t m = 0; m < tokens; ++m) {
    float* row = x.data() + m * columns;
    const int kind = uniform(0, 6);
    const float size = std::ldexp(1.0f, uniform(-140, 120));
    for (int64_t k = 0; k < columns; ++k) {
      row[k] = kind == 0   ? 0.0f
               : kind == 1 ? uniform(-254, 254) / 2.0f
               : kind == 2 ? normal(random_bits) * size
                           : normal(random_bits);
    }
    if (kind == 1) row[uniform(0, columns - 1)] = 127.0f;
    if (kind >= 5) row[uniform(0, columns - 1)] = kNotFinite[uniform(0, 3)];
  }
}

bool is_finite_row(const float* row, int64_t columns) {
  for (int64_t k = 0; k < columns; ++k) {
    if (!std::isfinite(row[k])) return false;
  }
  return true;
}

void compare_floats(const Shape& shape, bool one_scale) {
  Weights weights(shape, kRandom);
  const Matrix matrix = weights.matrix(shape);
  Guarded<float> x(shape.tokens * shape.columns), scale(one_scale ? 1 : shape.rows);
  Guarded<float> expected(shape.tokens * shape.rows), y(shape.tokens * shape.rows);
  fill_activations(x, shape.tokens, shape.columns);
  for (int64_t i = 0; i < scale.count(); ++i) scale[i] = uniform(1, 1 << 20) * 1e-7f;
  microvlm::multiply(reference, shape.product, matrix, scale.data(), one_scale, x.data(), shape.tokens, expected.data(),
                     microvlm::kCallerOnly);
  microvlm::multiply(*variant, shape.product, matrix, scale.data(), one_scale, x.data(), shape.tokens, y.data(),
                     kBackwards);
  for (int64_t m = 0; m < shape.tokens; ++m) {
    const bool finite = is_finite_row(x.data() + m * shape.columns, shape.columns);
    for (int64_t i = m * shape.rows; i < (m + 1) * shape.rows; ++i) {
      const bool equal = finite ? std::memcmp(&y[i], &expected[i], sizeof(float)) == 0 : std::isnan(y[i]);
      if (!equal) fail("products", shape);
    }
  }
  ++cases;
}

void compare_quantize(int64_t columns) {
  Guarded<float> x(columns);
  Guarded<int8_t> activations_q8(columns), expected_q8(columns);
  fill_activations(x, 1, columns);
  float activation_scale, expected_scale;
  int32_t total, expected_total;
  reference.quantize(x.data(), columns, expected_q8.data(), &expected_scale, &expected_total);
  variant->quantize(x.data(), columns, activations_q8.data(), &activation_scale, &total);
  const bool same_scale = std::memcmp(&activation_scale, &expected_scale, sizeof activation_scale) == 0 ||
                          (std::isnan(activation_scale) && std::isnan(expected_scale));
  if (!activations_q8.same_bytes(expected_q8) || total != expected_total || !same_scale) {
    fail("int8 activations", {Product::kInt8, 1, columns, 0});
  }
  ++cases;
}

void compare_dequantize(Product product, int64_t columns) {
  const Shape shape = {product, 1, columns, 1};
  Weights weights(shape, kRandom);
  Guarded<float> y(columns), expected(columns);
  const float scale = uniform(1, 1 << 20) * 1e-7f;
  for (const Kernels* kernels : {&reference, variant}) {
    float* out = kernels == variant ? y.data() : expected.data();
    if (product == Product::kInt8) {
      kernels->dequantize_int8(weights.packed.data(), columns, scale, out);
    } else {
      kernels->dequantize_int4(weights.packed.data(), weights.multiplier.data(), columns, scale, out);
    }
  }
  if (!y.same_bytes(expected)) fail("rows of a table", shape);
  ++cases;
}

void compare_all() {
  for (const Product product : {Product::kTernary2x4, Product::kTernary3x5, Product::kInt8, Product::kInt4}) {
    const int64_t widest = product == Product::kInt4 ? microvlm::kInt4MaxColumns : microvlm::kMaxColumns;
    for (int i = 0; i < 150; ++i) {
      compare_random_sums({product, uniform(1, 9), uniform(1, 400), uniform(1, 60)});
      compare_floats({product, uniform(1, 9), uniform(1, 400), uniform(1, 60)}, i % 2 == 0);
    }
    for (const int64_t tokens : {1, 2, 3, 8, 31, 32, 33, 64, 257}) {
      compare_random_sums({product, tokens, uniform(100, 300), uniform(20, 50)});
      compare_floats({product, tokens, uniform(100, 300), uniform(20, 50)}, false);
    }
    compare_random_sums({product, 1, 896, 4864});
    compare_random_sums({product, 7, 4864, 301});
    compare_random_sums({product, 8, 900, 1237});
    compare_floats({product, 2, 4864, 130}, true);
    for (const int64_t columns : {int64_t{4864}, widest - 1, widest}) {
      for (const int64_t tokens : {1, 7}) {
        for (const int sign : {-1, 0, 1}) {
          compare_extreme_sums({product, tokens, columns, 13}, sign, 127);
          compare_extreme_sums({product, tokens, columns, 13}, sign, -128);
        }
      }
    }
  }
  for (int i = 0; i < 500; ++i) compare_quantize(uniform(1, 300));
  for (int i = 0; i < 200; ++i) {
    compare_dequantize(Product::kInt8, uniform(1, 300));
    compare_dequantize(Product::kInt4, uniform(1, 300));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    for (int64_t i = 0; i < microvlm::variant_count(); ++i) std::printf("%s\n", microvlm::variant(i).name);
    return 0;
  }
  variant = microvlm::find_variant(argv[1]);
  if (variant == nullptr) {
    std::printf("%s does not run here\n", argv[1]);
    return 2;
  }
  compare_all();
  std::printf("%s: %lld cases equal\n", variant->name, static_cast<long long>(cases));
  return 0;
}

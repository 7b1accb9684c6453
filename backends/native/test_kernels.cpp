// Compares every runnable variant with the reference, on threads and on exact heap blocks: for the sanitizers, which
// see what a test from Python cannot. Exit status 1 at the first difference.

#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "operators.h"

namespace {

using namespace microvlm;

// Starts its own threads and joins them in every call.
void run_threads(void* handle, void (*task)(void*, size_t), size_t tasks, void* state) {
  const size_t count = *static_cast<const size_t*>(handle);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < count; ++t) {
    threads.emplace_back([=] {
      for (size_t i = t; i < tasks; i += count) task(state, i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A block of exactly `count` values at an address `offset` bytes off the allocator's alignment.
template <class T>
class Block {
 public:
  Block(size_t count, size_t offset) : bytes_(count * sizeof(T) + offset), offset_(offset) {}
  T* data() { return reinterpret_cast<T*>(bytes_.data() + offset_); }

 private:
  std::vector<unsigned char> bytes_;
  size_t offset_;
};

struct Case {
  Product product;
  int64_t tokens, columns, rows;
  int extreme;  // 0: random; else all activations have this value and all weights are at their limit
};

int planes_of(Product product) { return product == Product::kTernary2x4 ? 4 : product == Product::kTernary3x5 ? 5 : 1; }

// A random packed byte of a product that a bundle may hold.
uint8_t random_byte(Product product, std::mt19937& random) {
  if (product != Product::kTernary2x4 && product != Product::kTernary3x5) return static_cast<uint8_t>(random());
  int byte = 0;
  for (int p = 0; p < planes_of(product); ++p) {
    byte = byte * (product == Product::kTernary2x4 ? 4 : 3) + static_cast<int>(random() % 3);
  }
  return static_cast<uint8_t>(byte);
}

uint8_t largest_byte(Product product) {
  return product == Product::kTernary2x4 ? 0xaa : product == Product::kTernary3x5 ? 242 : 255;
}

bool check(const Case& c, std::mt19937& random) {
  const bool int4 = c.product == Product::kInt4;
  const int64_t groups = (c.columns + kGroup - 1) / kGroup;
  const int64_t packed_rows = packed_rows_of(c.product, c.rows), row_bytes = int4 ? groups * kGroup / 2 : c.columns;
  Block<uint8_t> packed(packed_rows * row_bytes, 1), multiplier(int4 ? c.rows * groups : 0, 3);
  Block<float> x(c.tokens * c.columns, 4), scale(c.rows, 4);
  Block<int8_t> activations_q8(c.tokens * c.columns, 1);
  for (int64_t i = 0; i < packed_rows * row_bytes; ++i) {
    packed.data()[i] = c.extreme != 0 ? largest_byte(c.product) : random_byte(c.product, random);
  }
  for (int64_t i = 0; int4 && i < c.rows * groups; ++i) {
    multiplier.data()[i] = c.extreme != 0 ? 255 : static_cast<uint8_t>(random());
  }
  for (int64_t i = 0; i < c.tokens * c.columns; ++i) {
    activations_q8.data()[i] = static_cast<int8_t>(c.extreme != 0 ? c.extreme : static_cast<int>(random() % 256) - 128);
    x.data()[i] = static_cast<float>(activations_q8.data()[i]) * 0.37f;
  }
  for (int64_t n = 0; n < c.rows; ++n) scale.data()[n] = 0.5f + static_cast<float>(n % 7);
  const Matrix matrix = {packed.data(), int4 ? multiplier.data() : nullptr, c.rows, packed_rows, c.columns};

  std::vector<int32_t> expected(c.tokens * c.rows), sums(c.tokens * c.rows);
  std::vector<float> expected_y(c.tokens * c.rows), y(c.tokens * c.rows);
  multiply_q8(kReference, c.product, matrix, activations_q8.data(), c.tokens, expected.data(), kCallerOnly);
  multiply(kReference, c.product, matrix, scale.data(), false, x.data(), c.tokens, expected_y.data(), kCallerOnly);
  for (int64_t v = 0; v < variant_count(); ++v) {
    size_t threads = 1 + random() % 8;
    const Pool pool = {run_threads, &threads, 16};
    multiply_q8(variant(v), c.product, matrix, activations_q8.data(), c.tokens, sums.data(), pool);
    multiply(variant(v), c.product, matrix, scale.data(), false, x.data(), c.tokens, y.data(), pool);
    if (sums != expected || std::memcmp(y.data(), expected_y.data(), y.size() * sizeof(float)) != 0) {
      std::printf("%s differs from the reference: product %d, %lld tokens, %lld columns, %lld rows, extreme %d\n",
                  variant(v).name, static_cast<int>(c.product), static_cast<long long>(c.tokens),
                  static_cast<long long>(c.columns), static_cast<long long>(c.rows), c.extreme);
      return false;
    }
  }
  return true;
}

bool check_tables(std::mt19937& random) {
  for (int64_t columns = 1; columns < 140; ++columns) {
    const int64_t groups = (columns + kGroup - 1) / kGroup;
    Block<uint8_t> wide(columns, 1), nibbles(groups * kGroup / 2, 1), multiplier(groups, 1);
    for (int64_t i = 0; i < columns; ++i) wide.data()[i] = static_cast<uint8_t>(random());
    for (int64_t i = 0; i < groups * kGroup / 2; ++i) nibbles.data()[i] = static_cast<uint8_t>(random());
    for (int64_t g = 0; g < groups; ++g) multiplier.data()[g] = static_cast<uint8_t>(random());
    std::vector<float> expected(columns), y(columns);
    for (int64_t v = 0; v < variant_count(); ++v) {
      kReference.dequantize_int8(wide.data(), columns, 0.3f, expected.data());
      variant(v).dequantize_int8(wide.data(), columns, 0.3f, y.data());
      if (y != expected) return false;
      kReference.dequantize_int4(nibbles.data(), multiplier.data(), columns, 0.3f, expected.data());
      variant(v).dequantize_int4(nibbles.data(), multiplier.data(), columns, 0.3f, y.data());
      if (y != expected) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  int64_t cases = 0;
  for (int product = 0; product < 4; ++product) {
    const auto kind = static_cast<Product>(product);
    for (int i = 0; i < 150; ++i, ++cases) {
      const auto tokens = static_cast<int64_t>(1 + random() % (i % 10 == 0 ? 257 : 12));
      if (!check({kind, tokens, static_cast<int64_t>(1 + random() % 300), static_cast<int64_t>(1 + random() % 150), 0},
                 random)) {
        return 1;
      }
    }
    // Enough work for several tasks, and sums at their limits.
    const int64_t largest = kind == Product::kInt4 ? kInt4MaxColumns : kMaxColumns;
    for (const Case& c :
         {Case{kind, 2, 1000, 1500, 0}, Case{kind, 9, 4864, 300, 0}, Case{kind, 78, 300, 4900, 0},
          Case{kind, 1, largest, 9, 127}, Case{kind, 9, largest, 9, -128}, Case{kind, 16, largest, 9, -128}}) {
      ++cases;
      if (!check(c, random)) return 1;
    }
  }
  if (!check_tables(random)) {
    std::printf("a row of a table differs from the reference\n");
    return 1;
  }
  std::printf("%lld products and every table row equal in %lld variants\n", static_cast<long long>(cases),
              static_cast<long long>(variant_count()));
  return 0;
}

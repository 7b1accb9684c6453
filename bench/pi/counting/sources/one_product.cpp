// Runs one product of one variant between two marks that instruction_count.c understands.
// Usage: one_product VARIANT OP K N TOKENS, with OP an operator's name as op_table.py has it.

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "operators.h"

namespace {

using microvlm::Product;

// The kernel takes any number, says that it is not a policy, and the plugin sees it pass.
void mark(long region) { syscall(SYS_sched_get_priority_max, 0x7e570000 | region); }

int run(const microvlm::Kernels& kernels, Product product, int64_t columns, int64_t rows, int64_t tokens) {
  const int64_t packed_rows = microvlm::packed_rows_of(product, rows), groups = (columns + 31) / 32;
  const int64_t row_bytes = product == Product::kInt4 ? groups * 16 : columns;
  std::vector<uint8_t> packed(packed_rows * row_bytes), multiplier(rows * groups, 1);
  std::vector<float> x(tokens * columns), scale(1, 1.0f), y(tokens * rows);
  // Bytes that all formats know; counts do not depend on values.
  for (size_t i = 0; i < packed.size(); ++i) packed[i] = 85 * (i % 3);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 251) - 125;
  const microvlm::Matrix matrix = {packed.data(), multiplier.data(), rows, packed_rows, columns};
  // The first run settles what happens once, such as binding symbols and asking for memory.
  for (long region = 2; region > 0; --region) {
    mark(region);
    const bool done = microvlm::multiply(kernels, product, matrix, scale.data(), true, x.data(), tokens, y.data(),
                                         microvlm::kCallerOnly);
    mark(0);
    if (!done) return 1;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  static const char* const kNames[] = {"TernaryMatMul2x4", "TernaryMatMul3x5", "Int8MatMul", "Int4MatMul"};
  if (argc != 6) return 2;
  const microvlm::Kernels* kernels = microvlm::find_variant(argv[1]);
  if (kernels == nullptr) {
    std::fprintf(stderr, "%s does not run here\n", argv[1]);
    return 2;
  }
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(argv[2], kNames[i]) != 0) continue;
    return run(*kernels, static_cast<Product>(i), std::atoll(argv[3]), std::atoll(argv[4]), std::atoll(argv[5]));
  }
  return 2;
}

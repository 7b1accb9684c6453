// The order in which both ARM variants pass over a product: blocks of packed rows, tiles of tokens, tiles of rows. Does
// not depend on a byte layout. In an unnamed namespace, like everything that files for different instruction sets
// share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

// Arrays of vectors live in registers only when every loop over them is unrolled.
#define MICROVLM_UNROLL _Pragma("GCC unroll 16")
#define MICROVLM_EACH_PAIR \
  MICROVLM_UNROLL for (int r = 0; r < kRows; ++r) MICROVLM_UNROLL for (int t = 0; t < kTokens; ++t)
#define MICROVLM_INLINE __attribute__((always_inline)) inline

namespace microvlm {
namespace {

// Packed rows that stay in a second-level cache of 256 KB while all tokens pass over them.
constexpr int64_t kRowsInCache = 16;

// A `Product` has tile<kRows, kTokens>(tokens, matrix, r, m, sums), which writes the sums of packed rows r, r + 1, ...
// with tokens m, m + 1, ...; kSingleTokenRows and kManyTokenRows, the rows of a tile for one token and for more; and
// kMaxTokens, 2 or 4.
template <class Product, int kRows, int kTokens>
MICROVLM_INLINE void rows_by_tiles(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int64_t m,
                                   int32_t* sums) {
  int64_t r = begin;
  for (; r + kRows <= end; r += kRows) Product::template tile<kRows, kTokens>(tokens, matrix, r, m, sums);
  if (kRows == 1) return;
  for (; r < end; ++r) Product::template tile<1, kTokens>(tokens, matrix, r, m, sums);
}

template <class Product>
void by_tiles(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t*) {
  constexpr int kSingle = Product::kSingleTokenRows, kMany = Product::kManyTokenRows, kMax = Product::kMaxTokens;
  for (int64_t block = begin; block < end; block += kRowsInCache) {
    const int64_t last = std::min(block + kRowsInCache, end);
    int64_t m = 0;
    for (; m + kMax <= tokens.count; m += kMax) {
      rows_by_tiles<Product, kMany, kMax>(tokens, matrix, block, last, m, sums);
    }
    if (kMax > 2 && m + 2 <= tokens.count) {
      rows_by_tiles<Product, kMany, 2>(tokens, matrix, block, last, m, sums);
      m += 2;
    }
    if (m < tokens.count) rows_by_tiles<Product, kSingle, 1>(tokens, matrix, block, last, m, sums);
  }
}

}  // namespace
}  // namespace microvlm

// Int8 products of the avx2 variant: one token reads two streams, a few tokens go in blocks, more of them in panels
// (avx2_panels.cpp). A product of two bytes needs 16 bits and a pair of products 17, so both sides are widened.

#include "avx2_streams.h"

namespace microvlm {
namespace avx2 {
namespace {

// From this many tokens on, transposing the weights once is faster than reducing every sum across lanes.
constexpr int64_t kPanelTokens = 5;
constexpr int64_t kBlockRows = 4;

// Two rows of bytes q + 128 times one token.
inline void int8_row_pair(const Tokens& tokens, const Matrix& matrix, const int64_t (&n)[2], __m256i (&acc)[2]) {
  const int64_t columns = matrix.columns;
  const uint8_t* row[2] = {matrix.packed + n[0] * columns, matrix.packed + n[1] * columns};
  acc[0] = acc[1] = _mm256_setr_epi32(-128 * tokens.totals[0], 0, 0, 0, 0, 0, 0, 0);
  const auto add = [&](int64_t k, __m256i first, __m256i second) __attribute__((always_inline)) {
    const __m256i activations = _mm256_cvtepi8_epi16(load_half(tokens.activations_q8 + k));
    acc[0] = add_32(acc[0], _mm256_madd_epi16(first, activations));
    acc[1] = add_32(acc[1], _mm256_madd_epi16(second, activations));
  };
  int64_t k = 0;
  for (; k + 64 <= columns; k += 64) {
    for (const uint8_t* bytes : row) _mm_prefetch(line_ahead(bytes + k), _MM_HINT_T0);
    for (int64_t j = k; j < k + 64; j += 16) {
      add(j, _mm256_cvtepu8_epi16(load_half(row[0] + j)), _mm256_cvtepu8_epi16(load_half(row[1] + j)));
    }
  }
  for (; k < columns; k += 16) {
    add(k, _mm256_cvtepu8_epi16(load_half_first(row[0] + k, columns - k)),
        _mm256_cvtepu8_epi16(load_half_first(row[1] + k, columns - k)));
  }
}

// kBlockRows rows of bytes q + 128 times kTokens tokens. Rows from `count` on repeat the last row.
template <int kTokens>
inline void int8_block(const Tokens& tokens, const Matrix& matrix, int64_t n, int64_t count, int64_t m, int32_t* sums) {
  __m256i acc[kTokens][kBlockRows] = {};
  for (int64_t k = 0; k < matrix.columns; k += 16) {
    __m256i weight[kBlockRows];
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const uint8_t* bytes = matrix.packed + (n + smaller(i, count - 1)) * matrix.columns + k;
      weight[i] = _mm256_cvtepu8_epi16(load_half_first(bytes, matrix.columns - k));
    }
    for (int64_t t = 0; t < kTokens; ++t) {
      const __m256i activations = _mm256_cvtepi8_epi16(load_half(tokens.activations_q8 + (m + t) * tokens.stride + k));
      for (int64_t i = 0; i < kBlockRows; ++i) {
        acc[t][i] = add_32(acc[t][i], _mm256_madd_epi16(weight[i], activations));
      }
    }
  }
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t i = 0; i < count; ++i) {
      sums[(m + t) * matrix.rows + n + i] = reduce(acc[t][i]) - 128 * tokens.totals[m + t];
    }
  }
}

}  // namespace

void int8(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch) {
  if (tokens.count >= kPanelTokens) return int8_panels(tokens, matrix, begin, end, sums, scratch);
  if (tokens.count == 1) {
    const auto multiply = [&](const int64_t(&n)[2], __m256i(&acc)[2]) { int8_row_pair(tokens, matrix, n, acc); };
    return multiply_in_two_streams(begin, end, sums, multiply);
  }
  for (int64_t n = begin; n < end; n += kBlockRows) {
    const int64_t count = smaller(end - n, kBlockRows);
    int64_t m = 0;
    for (; m + 2 <= tokens.count; m += 2) int8_block<2>(tokens, matrix, n, count, m, sums);
    if (m < tokens.count) int8_block<1>(tokens, matrix, n, count, m, sums);
  }
}

}  // namespace avx2
}  // namespace microvlm

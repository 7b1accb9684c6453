// Int8 products of the avx2 variant with several tokens: panels of 16 rows, one row a lane.
//
// A product of two bytes needs 16 bits and a pair of products 17, so both sides are widened: the weights of a panel
// once, while they are transposed; the activations of a block of tokens once for kPanels panels. A step then multiplies
// one pair of columns of 16 rows by the same pair of every token of the block. Nothing is summed across lanes.

#include "avx2.h"

namespace microvlm {
namespace avx2 {
namespace {

constexpr int64_t kPanels = 4, kPanelRows = 2 * kLanes;
// Twelve registers of sums, two of weights and one of activations.
constexpr int64_t kBlockTokens = 6;
constexpr int64_t kWidened = 16;  // columns widened together

int64_t padded(int64_t columns) { return (columns + kWidened - 1) / kWidened * kWidened; }

// Rows [n, n + count), at most 16 -> panel[pair of columns][row]; a pair is 32 bits. Rows from `count` on repeat the
// last row.
void fill_panel(const Matrix& matrix, int64_t n, int64_t count, int32_t* panel) {
  for (int64_t k = 0; k < matrix.columns; k += kWidened, panel += kWidened / 2 * kPanelRows) {
    for (int64_t half = 0; half < 2; ++half) {
      __m256i row[kLanes], pair[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t r = n + smaller(half * kLanes + i, count - 1);
        row[i] = _mm256_cvtepu8_epi16(load_half_first(matrix.packed + r * matrix.columns + k, matrix.columns - k));
      }
      transpose_8(row, pair);
      for (int64_t q = 0; q < kLanes; ++q) store_aligned(panel + q * kPanelRows + half * kLanes, pair[q]);
    }
  }
}

// The activations of `count` tokens from m on -> [token][column], 16 bits each.
void widen_activations(const Tokens& tokens, int64_t m, int64_t count, int16_t* wide) {
  const int64_t columns = padded(tokens.columns);
  for (int64_t t = 0; t < count; ++t, wide += columns) {
    const int8_t* activations_q8 = tokens.activations_q8 + (m + t) * tokens.stride;
    for (int64_t k = 0; k < columns; k += kWidened) {
      store_aligned(wide + k, _mm256_cvtepi8_epi16(load_half(activations_q8 + k)));
    }
  }
}

// A panel times kTokens tokens -> sums of rows [n, n + count) for tokens from m on.
template <int kTokens>
void multiply_panel(const Tokens& tokens, const Matrix& matrix, const int32_t* panel, const int16_t* wide, int64_t n,
                    int64_t count, int64_t m, int32_t* sums) {
  const int64_t columns = padded(matrix.columns);
  __m256i acc[kTokens][2] = {};
  for (int64_t k = 0; k < columns; k += 2, panel += kPanelRows) {
    const __m256i low = load_aligned(panel), high = load_aligned(panel + kLanes);
    for (int t = 0; t < kTokens; ++t) {
      int32_t pair;
      std::memcpy(&pair, wide + t * columns + k, sizeof pair);
      const __m256i activations = _mm256_set1_epi32(pair);
      acc[t][0] = add_32(acc[t][0], _mm256_madd_epi16(low, activations));
      acc[t][1] = add_32(acc[t][1], _mm256_madd_epi16(high, activations));
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    const __m256i excess = _mm256_set1_epi32(128 * tokens.totals[m + t]);
    int32_t* y = sums + (m + t) * matrix.rows + n;
    store_first(y, count, _mm256_sub_epi32(acc[t][0], excess));
    store_first(y + kLanes, count - kLanes, _mm256_sub_epi32(acc[t][1], excess));
  }
}

using MultiplyPanel = decltype(&multiply_panel<1>);
constexpr MultiplyPanel kMultiply[kBlockTokens] = {multiply_panel<1>, multiply_panel<2>, multiply_panel<3>,
                                                   multiply_panel<4>, multiply_panel<5>, multiply_panel<6>};

}  // namespace

int64_t panels_scratch_bytes(int64_t columns) {
  return (kPanels * kPanelRows + kBlockTokens) * padded(columns) * static_cast<int64_t>(sizeof(int16_t));
}

void int8_panels(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
                 uint8_t* scratch) {
  const int64_t pairs = padded(matrix.columns) / 2;
  auto* panels = reinterpret_cast<int32_t*>(scratch);
  auto* wide = reinterpret_cast<int16_t*>(panels + kPanels * kPanelRows * pairs);
  for (int64_t first = begin; first < end; first += kPanels * kPanelRows) {
    const int64_t last = smaller(first + kPanels * kPanelRows, end);
    for (int64_t n = first; n < last; n += kPanelRows) {
      fill_panel(matrix, n, smaller(last - n, kPanelRows), panels + (n - first) * pairs);
    }
    for (int64_t m = 0; m < tokens.count; m += kBlockTokens) {
      const int64_t count = smaller(tokens.count - m, kBlockTokens);
      widen_activations(tokens, m, count, wide);
      for (int64_t n = first; n < last; n += kPanelRows) {
        kMultiply[count - 1](tokens, matrix, panels + (n - first) * pairs, wide, n, smaller(last - n, kPanelRows), m,
                             sums);
      }
    }
  }
}

}  // namespace avx2
}  // namespace microvlm

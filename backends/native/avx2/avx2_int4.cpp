// Int4 products of the avx2 variant: one token reads two streams, several tokens go in blocks.

#include "avx2_streams.h"

namespace microvlm {
namespace avx2 {
namespace {

constexpr int64_t kHalfGroup = kGroup / 2;
constexpr int64_t kBlockRows = 2;

// Two groups of one row: nibbles q + 8, low and high, and the groups' multipliers in 16 bits.
struct NibblePair {
  __m256i low, high, multiplier;
  NibblePair(const uint8_t* bytes, const uint8_t* factor) : NibblePair(load(bytes), two_bytes(factor)) {}
  // `groups` groups are left; a missing second one is zeros.
  NibblePair(const uint8_t* bytes, const uint8_t* factor, int64_t groups)
      : NibblePair(groups > 1 ? load(bytes) : _mm256_zextsi128_si256(load_half(bytes)),
                   groups > 1 ? two_bytes(factor) : factor[0]) {}

 private:
  NibblePair(__m256i both, int16_t factors) {
    const __m256i mask = _mm256_set1_epi8(15);
    low = _mm256_and_si256(both, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    // Every word of a 128-bit lane is one factor: byte 0 in the lower lane, byte 1 in the upper one.
    const __m256i pointers =
        _mm256_set_m128i(_mm_set1_epi16(static_cast<int16_t>(0x8001)), _mm_set1_epi16(static_cast<int16_t>(0x8000)));
    multiplier = _mm256_shuffle_epi8(_mm256_set1_epi16(factors), pointers);
  }
  static int16_t two_bytes(const uint8_t* factor) {
    int16_t both;
    std::memcpy(&both, factor, sizeof both);
    return both;
  }
};

// The activations of one token in the order of a row's two groups: even columns, odd columns, and each group's total in
// its eight words. Nibbles q + 8 add eight times the total too much. A word of products is at most 4 * 15 * 128, so it
// has room for that.
struct ActivationPair {
  __m256i even, odd, total;
};

constexpr int64_t kMaxPairs = (kInt4MaxColumns + 2 * kGroup - 1) / (2 * kGroup);

// `groups` groups of the first token -> pair[i] = groups 2 i and 2 i + 1. A missing last group has total 0.
void pair_activations(const Tokens& tokens, int64_t groups, ActivationPair* pair) {
  for (int64_t g = 0; g < groups; g += 2, ++pair) {
    const int8_t* activations_q8 = tokens.activations_q8 + g * kGroup;
    const __m256i first = load_aligned(activations_q8), second = load_aligned(activations_q8 + kGroup);
    const int32_t* totals = tokens.group_totals + g;
    pair->even = _mm256_permute2x128_si256(first, second, 0x20);
    pair->odd = _mm256_permute2x128_si256(first, second, 0x31);
    pair->total = _mm256_set_m128i(_mm_set1_epi16(static_cast<int16_t>(g + 1 < groups ? totals[1] : 0)),
                                   _mm_set1_epi16(static_cast<int16_t>(totals[0])));
  }
}

// Two rows of nibbles q + 8 times one token.
inline void int4_row_pair(const Matrix& matrix, const ActivationPair* activations_q8, const int64_t (&n)[2],
                          __m256i (&acc)[2]) {
  const int64_t groups = (matrix.columns + kGroup - 1) / kGroup, row_bytes = groups * kHalfGroup;
  const uint8_t* row[2] = {matrix.packed + n[0] * row_bytes, matrix.packed + n[1] * row_bytes};
  const uint8_t* multiplier[2] = {matrix.multiplier + n[0] * groups, matrix.multiplier + n[1] * groups};
  acc[0] = acc[1] = _mm256_setzero_si256();
  const auto add = [&](int i, const NibblePair& weight) __attribute__((always_inline)) {
    const __m256i products = _mm256_add_epi16(_mm256_maddubs_epi16(weight.low, activations_q8->even),
                                              _mm256_maddubs_epi16(weight.high, activations_q8->odd));
    acc[i] = add_32(acc[i], _mm256_madd_epi16(_mm256_sub_epi16(products, activations_q8->total), weight.multiplier));
  };
  int64_t g = 0;
  for (; g + 2 <= groups; g += 2, ++activations_q8) {
    for (int i = 0; i < 2; ++i) {
      // Half a line: every line is prefetched twice, which costs less than a longer step.
      _mm_prefetch(line_ahead(row[i] + g * kHalfGroup), _MM_HINT_T0);
      add(i, NibblePair(row[i] + g * kHalfGroup, multiplier[i] + g));
    }
  }
  if (g < groups) {
    for (int i = 0; i < 2; ++i) add(i, NibblePair(row[i] + g * kHalfGroup, multiplier[i] + g, 1));
  }
}

// 8 times the sum over groups of multiplier . group total: the excess of nibbles q + 8. Unsigned, because it may pass
// 2^31 where the sum that it is subtracted from does too.
inline uint32_t int4_excess(const uint8_t* multiplier, const int32_t* group_totals, int64_t groups) {
  uint32_t sum = 0;
  for (int64_t g = 0; g < groups; ++g) sum += multiplier[g] * static_cast<uint32_t>(group_totals[g]);
  return 8 * sum;
}

// kBlockRows rows times kTokens tokens. A pair of nibble products is at most 15 * 128 * 2, so two pairs fit 16 bits,
// and vpmaddwd widens their product with a multiplier. Rows from `count` on repeat the last row.
template <int kTokens>
inline void int4_block(const Tokens& tokens, const Matrix& matrix, int64_t n, int64_t count, int64_t m, int32_t* sums) {
  const int64_t groups = (matrix.columns + kGroup - 1) / kGroup, row_bytes = groups * kHalfGroup;
  __m256i acc[kTokens][kBlockRows] = {};
  for (int64_t g = 0; g < groups; g += 2) {
    __m256i even[kTokens], odd[kTokens];
    for (int64_t t = 0; t < kTokens; ++t) {
      const int8_t* activations_q8 = tokens.activations_q8 + (m + t) * tokens.stride + g * kGroup;
      const __m256i first = load_aligned(activations_q8), second = load_aligned(activations_q8 + kGroup);
      even[t] = _mm256_permute2x128_si256(first, second, 0x20);
      odd[t] = _mm256_permute2x128_si256(first, second, 0x31);
    }
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const int64_t row = n + smaller(i, count - 1);
      const uint8_t* bytes = matrix.packed + row * row_bytes + g * kHalfGroup;
      const NibblePair pair(bytes, matrix.multiplier + row * groups + g, groups - g);
      for (int t = 0; t < kTokens; ++t) {
        const __m256i products =
            _mm256_add_epi16(_mm256_maddubs_epi16(pair.low, even[t]), _mm256_maddubs_epi16(pair.high, odd[t]));
        acc[t][i] = add_32(acc[t][i], _mm256_madd_epi16(products, pair.multiplier));
      }
    }
  }
  for (int64_t t = 0; t < kTokens; ++t) {
    const int32_t* group_totals = tokens.group_totals + (m + t) * groups;
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t excess = int4_excess(matrix.multiplier + (n + i) * groups, group_totals, groups);
      sums[(m + t) * matrix.rows + n + i] = static_cast<int32_t>(static_cast<uint32_t>(reduce(acc[t][i])) - excess);
    }
  }
}

}  // namespace

void int4(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t*) {
  if (tokens.count == 1) {
    ActivationPair activations_q8[kMaxPairs];
    pair_activations(tokens, (matrix.columns + kGroup - 1) / kGroup, activations_q8);
    const auto multiply = [&](const int64_t(&n)[2], __m256i(&acc)[2]) {
      int4_row_pair(matrix, activations_q8, n, acc);
    };
    return multiply_in_two_streams(begin, end, sums, multiply);
  }
  for (int64_t n = begin; n < end; n += kBlockRows) {
    const int64_t count = smaller(end - n, kBlockRows);
    int64_t m = 0;
    for (; m + 3 <= tokens.count; m += 3) int4_block<3>(tokens, matrix, n, count, m, sums);
    for (; m < tokens.count; ++m) int4_block<1>(tokens, matrix, n, count, m, sums);
  }
}

}  // namespace avx2
}  // namespace microvlm

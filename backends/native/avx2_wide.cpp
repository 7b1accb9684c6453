// Products of the avx2 variant with int8 and int4 weights: rows along K, a few rows and tokens at once.

#include "avx2.h"

namespace microvlm {
namespace avx2 {
namespace {

constexpr int64_t kHalfGroup = kGroup / 2;
// From this many tokens on, transposing weights once beats reducing every sum across lanes.
constexpr int64_t kPanelTokens = 5;

inline __m128i load_half(const void* bytes) { return _mm_loadu_si128(static_cast<const __m128i*>(bytes)); }
inline __m128i load_half_first(const uint8_t* bytes, int64_t count) {
  if (count >= 16) return load_half(bytes);
  uint8_t block[16] = {};
  std::memcpy(block, bytes, static_cast<size_t>(count));
  return load_half(block);
}

// kRows rows of bytes q + 128 times kTokens tokens. A product of two bytes needs 16 bits and a pair of them 17, so
// both sides are widened first. Rows from `count` on repeat the last.
template <int kRows, int kTokens>
inline void int8_block(const Tokens& tokens, const Matrix& matrix, int64_t n, int64_t count, int64_t m, int32_t* sums) {
  __m256i acc[kTokens][kRows] = {};
  for (int64_t k = 0; k < matrix.columns; k += 16) {
    __m256i weight[kRows];
    for (int64_t i = 0; i < kRows; ++i) {
      const uint8_t* bytes = matrix.packed + (n + smaller(i, count - 1)) * matrix.columns + k;
      weight[i] = _mm256_cvtepu8_epi16(load_half_first(bytes, matrix.columns - k));
    }
    for (int64_t t = 0; t < kTokens; ++t) {
      const __m256i code = _mm256_cvtepi8_epi16(load_half(tokens.codes + (m + t) * tokens.stride + k));
      for (int i = 0; i < kRows; ++i) {
        acc[t][i] = add_32(acc[t][i], _mm256_madd_epi16(weight[i], code));
      }
    }
  }
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t i = 0; i < count; ++i) {
      sums[(m + t) * matrix.rows + n + i] = reduce(acc[t][i]) - 128 * tokens.totals[m + t];
    }
  }
}

// Two groups of one row as nibbles q + 8, low and high, with the groups' multipliers in 16 bits. Zeros for a second
// group that is not there.
struct NibblePair {
  __m256i low, high, multiplier;
  NibblePair(const uint8_t* bytes, const uint8_t* factor, int64_t groups) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i both = groups > 1 ? load(bytes) : _mm256_zextsi128_si256(load_half(bytes));
    low = _mm256_and_si256(both, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
    multiplier = _mm256_set_m128i(_mm_set1_epi16(groups > 1 ? factor[1] : 0), _mm_set1_epi16(factor[0]));
  }
};

// 8 times the sum over groups of multiplier . group total: what nibbles q + 8 add too much. Unsigned, because it may
// pass 2^31 where the sum that it is taken from does too.
inline uint32_t int4_excess(const uint8_t* multiplier, const int32_t* group_totals, int64_t groups) {
  uint32_t sum = 0;
  for (int64_t g = 0; g < groups; ++g) sum += multiplier[g] * static_cast<uint32_t>(group_totals[g]);
  return 8 * sum;
}

// kRows rows times kTokens tokens. A pair of nibble products is at most 15 * 128 * 2, two of them fit 16 bits, and
// their product with a multiplier is widened by vpmaddwd. Rows from `count` on repeat the last.
template <int kRows, int kTokens>
inline void int4_block(const Tokens& tokens, const Matrix& matrix, int64_t n, int64_t count, int64_t m, int32_t* sums) {
  const int64_t groups = (matrix.columns + kGroup - 1) / kGroup, row_bytes = groups * kHalfGroup;
  __m256i acc[kTokens][kRows] = {};
  for (int64_t g = 0; g < groups; g += 2) {
    __m256i even[kTokens], odd[kTokens];
    for (int64_t t = 0; t < kTokens; ++t) {
      const int8_t* codes = tokens.codes + (m + t) * tokens.stride + g * kGroup;
      const __m256i first = load_aligned(codes), second = load_aligned(codes + kGroup);
      even[t] = _mm256_permute2x128_si256(first, second, 0x20);
      odd[t] = _mm256_permute2x128_si256(first, second, 0x31);
    }
    for (int64_t i = 0; i < kRows; ++i) {
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

// A single token reads row after row, as one stream.
void int8(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
          uint8_t* scratch) {
  if (tokens.count >= kPanelTokens) return int8_panels(tokens, matrix, begin, end, sums, scratch);
  if (tokens.count == 1) {
    for (int64_t n = begin; n < end; ++n) int8_block<1, 1>(tokens, matrix, n, 1, 0, sums);
    return;
  }
  for (int64_t n = begin; n < end; n += 4) {
    const int64_t count = smaller(end - n, 4);
    int64_t m = 0;
    for (; m + 2 <= tokens.count; m += 2) int8_block<4, 2>(tokens, matrix, n, count, m, sums);
    if (m < tokens.count) int8_block<4, 1>(tokens, matrix, n, count, m, sums);
  }
}

void int4(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t*) {
  if (tokens.count == 1) {
    for (int64_t n = begin; n < end; ++n) int4_block<1, 1>(tokens, matrix, n, 1, 0, sums);
    return;
  }
  for (int64_t n = begin; n < end; n += 2) {
    const int64_t count = smaller(end - n, 2);
    int64_t m = 0;
    for (; m + 3 <= tokens.count; m += 3) int4_block<2, 3>(tokens, matrix, n, count, m, sums);
    for (; m < tokens.count; ++m) int4_block<2, 1>(tokens, matrix, n, count, m, sums);
  }
}

}  // namespace avx2
}  // namespace microvlm

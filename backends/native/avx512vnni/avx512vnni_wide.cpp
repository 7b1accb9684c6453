// Int8 and int4 products of the avx512vnni variant: by rows for few tokens, by strips for many.

#include "avx512vnni.h"

namespace microvlm {
namespace avx512vnni {
namespace {

// From this many tokens on, transposing the weights once and tiling registers is faster than reducing every sum across
// lanes.
constexpr int64_t kStripTokens = 4;
constexpr int64_t kHalfGroup = kGroup / 2;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Sixteen rows of bytes q + 128 times one token, one row after the other -> lane i is row i's sum. Rows from `count` on
// repeat the last row.
inline __m512i int8_rows(const uint8_t* packed, int64_t count, int64_t columns, const int8_t* activations_q8) {
  __m512i sums[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const uint8_t* row = packed + smaller(i, count - 1) * columns;
    __m512i acc[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t k = 0;
    for (; k + 128 <= columns; k += 128) {
      acc[0] = dot(acc[0], load(row + k), _mm512_load_si512(activations_q8 + k));
      acc[1] = dot(acc[1], load(row + k + 64), _mm512_load_si512(activations_q8 + k + 64));
    }
    for (; k < columns; k += 64)
      acc[0] = dot(acc[0], load_first(row + k, columns - k), _mm512_load_si512(activations_q8 + k));
    sums[i] = _mm512_add_epi32(acc[0], acc[1]);
  }
  return reduce_16(sums);
}

// Four vectors of 16 rows each, transposed, beside each other.
struct Int8Strip {
  static constexpr int kVectors = 4;
  static constexpr int64_t kQuadBytes = 4 * 64;
  static void load(const uint8_t* quad, __m512i* weights) {
    for (int w = 0; w < kVectors; ++w) weights[w] = _mm512_load_si512(quad + w * 64);
  }
};

struct Int8Tile {
  const Tokens& tokens;
  const Matrix& matrix;
  const uint8_t* strip;
  int64_t row;
  int64_t end;
  int32_t* sums;

  template <int kTokens>
  void run(int64_t m) const {
    __m512i acc[Int8Strip::kVectors][kTokens];
    tile<Int8Strip, kTokens>(strip, (matrix.columns + 3) / 4, tokens.activations_q8 + m * tokens.stride, tokens.stride,
                             acc);
    for (int t = 0; t < kTokens; ++t) {
      const __m512i offset = _mm512_set1_epi32(128 * tokens.totals[m + t]);
      for (int64_t w = 0; w < Int8Strip::kVectors; ++w) {
        const int64_t n = row + w * kLanes;
        _mm512_mask_storeu_epi32(sums + (m + t) * matrix.rows + n, first_lanes(end - n),
                                 _mm512_sub_epi32(acc[w][t], offset));
      }
    }
  }
};

// The bytes of four groups -> their multipliers, each in its group's four int32 lanes; 0 past `groups`.
inline __m512i spread_multipliers(const uint8_t* multiplier, int64_t groups) {
  const __m512i place =
      _mm512_set_epi32(-253, -253, -253, -253, -254, -254, -254, -254, -255, -255, -255, -255, -256, -256, -256, -256);
  const __m128i four = _mm_maskz_loadu_epi8(first_lanes(groups >= 4 ? 4 : groups), multiplier);
  return _mm512_shuffle_epi8(_mm512_broadcastd_epi32(four), place);
}

// 128 columns of one row times one token: nibbles q + 8 of four groups, four int32 lanes a group, times multipliers.
inline __m512i int4_block(__m512i bytes, __m512i multiplier, __m512i even, __m512i odd) {
  const __m512i mask = _mm512_set1_epi8(15);
  const __m512i low = _mm512_and_si512(bytes, mask), high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
  __m512i sum = dot(_mm512_setzero_si512(), low, even);
  sum = dot(sum, high, odd);
  return _mm512_mullo_epi32(sum, multiplier);
}

// 64 activations each of two groups, even columns before odd ones -> the even and the odd ones of four groups.
inline void even_and_odd(const int8_t* activations_q8, int64_t groups, __m512i* even, __m512i* odd) {
  const __m512i first = _mm512_load_si512(activations_q8);
  const __m512i second = groups > 2 ? _mm512_load_si512(activations_q8 + 64) : _mm512_setzero_si512();
  *even = _mm512_shuffle_i32x4(first, second, 0x88);
  *odd = _mm512_shuffle_i32x4(first, second, 0xdd);
}

// 8 times the sum over groups of multiplier . group total, 16 groups one a lane: the excess of nibbles q + 8.
inline __m512i int4_excess(const uint8_t* multiplier, const int32_t* group_totals, int64_t groups) {
  __m512i excess = _mm512_setzero_si512();
  for (int64_t g = 0; g < groups; g += 16) {
    const __mmask16 lanes = first_lanes(groups - g);
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, multiplier + g));
    excess = _mm512_add_epi32(excess, _mm512_mullo_epi32(wide, _mm512_maskz_loadu_epi32(lanes, group_totals + g)));
  }
  return _mm512_slli_epi32(excess, 3);
}

// One row times token m -> lanes that sum to the product.
inline __m512i int4_row(const Tokens& tokens, const Matrix& matrix, int64_t row, int64_t m) {
  const int64_t groups = (matrix.columns + kGroup - 1) / kGroup;
  const int8_t* activations_q8 = tokens.activations_q8 + m * tokens.stride;
  const uint8_t *bytes = matrix.packed + row * groups * kHalfGroup, *multiplier = matrix.multiplier + row * groups;
  __m512i acc = _mm512_setzero_si512(), even, odd;
  int64_t g = 0;
  const char* ahead = lines_ahead(bytes, kStreamAhead);
  for (; g + 4 <= groups; g += 4) {
    if ((g & 4) == 0) _mm_prefetch(ahead + g * kHalfGroup, _MM_HINT_T1);
    even_and_odd(activations_q8 + g * kGroup, 4, &even, &odd);
    const __m512i block = load(bytes + g * kHalfGroup);
    acc = _mm512_add_epi32(acc, int4_block(block, spread_multipliers(multiplier + g, 4), even, odd));
  }
  if (g < groups) {
    even_and_odd(activations_q8 + g * kGroup, groups - g, &even, &odd);
    const __m512i block = load_first(bytes + g * kHalfGroup, (groups - g) * kHalfGroup);
    acc = _mm512_add_epi32(acc, int4_block(block, spread_multipliers(multiplier + g, groups - g), even, odd));
  }
  return _mm512_sub_epi32(acc, int4_excess(multiplier, tokens.group_totals + m * groups, groups));
}

// Four rows times token m, one row after the other -> lanes 0..3. Rows from `count` on repeat the last row.
inline __m128i int4_rows(const Tokens& tokens, const Matrix& matrix, int64_t n, int64_t count, int64_t m) {
  __m512i sums[4];
  for (int64_t i = 0; i < 4; ++i) sums[i] = int4_row(tokens, matrix, n + smaller(i, count - 1), m);
  return reduce_4(sums[0], sums[1], sums[2], sums[3]);
}

// Sixteen rows: transposed quads of packed bytes, four quads a group, then the groups' multipliers as int32.
struct Int4Tile {
  const Tokens& tokens;
  const Matrix& matrix;
  const uint8_t* strip;
  const uint8_t* multipliers;
  int64_t row;
  int64_t end;
  int32_t* sums;

  template <int kTokens>
  void run(int64_t m) const {
    const int64_t groups = (matrix.columns + kGroup - 1) / kGroup;
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i acc[kTokens];
    for (__m512i& sum : acc) sum = _mm512_setzero_si512();
    for (int64_t g = 0; g < groups; ++g) {
      const int8_t* activations_q8 = tokens.activations_q8 + m * tokens.stride + g * kGroup;
      __m512i group[kTokens];
      for (int64_t t = 0; t < kTokens; ++t) {
        group[t] = _mm512_set1_epi32(-8 * tokens.group_totals[(m + t) * groups + g]);
      }
      for (int64_t q = 0; q < 4; ++q) {
        const __m512i bytes = _mm512_load_si512(strip + (g * 4 + q) * 64);
        const __m512i low = _mm512_and_si512(bytes, mask);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
        for (int64_t t = 0; t < kTokens; ++t) {
          int32_t even, odd;
          std::memcpy(&even, activations_q8 + t * tokens.stride + q * 4, sizeof even);
          std::memcpy(&odd, activations_q8 + t * tokens.stride + kHalfGroup + q * 4, sizeof odd);
          group[t] = dot(group[t], low, _mm512_set1_epi32(even));
          group[t] = dot(group[t], high, _mm512_set1_epi32(odd));
        }
      }
      const __m512i multiplier = _mm512_load_si512(multipliers + g * 64);
      for (int t = 0; t < kTokens; ++t) {
        acc[t] = _mm512_add_epi32(acc[t], _mm512_mullo_epi32(group[t], multiplier));
      }
    }
    for (int64_t t = 0; t < kTokens; ++t) {
      _mm512_mask_storeu_epi32(sums + (m + t) * matrix.rows + row, first_lanes(end - row), acc[t]);
    }
  }
};

}  // namespace

void int8(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch) {
  if (tokens.count >= kStripTokens) {
    constexpr int64_t kRows = Int8Strip::kVectors * kLanes;
    for (int64_t n = begin; n < end; n += kRows) {
      for (int64_t w = 0; w < Int8Strip::kVectors; ++w) {
        const int64_t row = n + w * kLanes;
        const int64_t first = smaller(row, end);
        transpose_strip(matrix.packed + first * matrix.columns, matrix.columns, end - first, scratch + w * 64,
                        Int8Strip::kQuadBytes);
      }
      by_token_groups<4>(tokens.count, Int8Tile{tokens, matrix, scratch, n, end, sums});
    }
    return;
  }
  for (int64_t n = begin; n < end; n += kLanes) {
    const int64_t count = smaller(end - n, kLanes);
    for (int64_t m = 0; m < tokens.count; ++m) {
      const __m512i sum = int8_rows(matrix.packed + n * matrix.columns, count, matrix.columns,
                                    tokens.activations_q8 + m * tokens.stride);
      _mm512_mask_storeu_epi32(sums + m * matrix.rows + n, first_lanes(count),
                               _mm512_sub_epi32(sum, _mm512_set1_epi32(128 * tokens.totals[m])));
    }
  }
}

void int4(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch) {
  const int64_t groups = (matrix.columns + kGroup - 1) / kGroup, row_bytes = groups * kHalfGroup;
  if (tokens.count < kStripTokens) {
    for (int64_t n = begin; n < end; n += 4) {
      const int64_t count = smaller(end - n, 4);
      for (int64_t m = 0; m < tokens.count; ++m) {
        _mm_mask_storeu_epi32(sums + m * matrix.rows + n, static_cast<__mmask8>((1 << count) - 1),
                              int4_rows(tokens, matrix, n, count, m));
      }
    }
    return;
  }
  uint8_t* multipliers = scratch + (row_bytes + 63) / 64 * 64 * kLanes;
  for (int64_t n = begin; n < end; n += kLanes) {
    transpose_strip(matrix.packed + n * row_bytes, row_bytes, end - n, scratch, 64);
    for (int64_t g = 0; g < groups; ++g) {
      int32_t column[kLanes] = {};
      for (int64_t i = 0; i < smaller(end - n, kLanes); ++i) column[i] = matrix.multiplier[(n + i) * groups + g];
      std::memcpy(multipliers + g * 64, column, sizeof column);
    }
    by_token_groups<8>(tokens.count, Int4Tile{tokens, matrix, scratch, multipliers, n, end, sums});
  }
}

}  // namespace avx512vnni
}  // namespace microvlm

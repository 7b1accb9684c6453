// Ternary products of the avx2 variant, two bits and base 3.
//
// Few tokens: packed rows are read as two streams of lines far from each other, and the lanes of eight rows are reduced
// together. Measured on Zen 3, one layer from memory: one stream takes 1.13 times as long, two streams without prefetch
// 1.22 times.
// Base 3 from two tokens on, where unpacking takes longer than multiplying: strips of 8 packed rows are unpacked to
// trit codes once and transposed, one row a lane. Two bits would be 1.04 to 1.38 times slower that way.
// Many tokens: blocks of 16 go to avx2_tables.cpp; the remaining tokens come here.

#include "avx2_layouts.h"

namespace microvlm {
namespace avx2 {
namespace {

constexpr int64_t kStripTokens = 2;

// The lanes of eight rows by plane: lanes[p][i] sums to the fields of plane p of row i.
template <class Layout>
using GroupLanes = __m256i[Layout::kPlanes][kLanes];

// Multiplies columns [k, stop), at most Layout::kSteps vectors, of two packed rows by one token, and adds the results
// to lane vector `place` of their groups. Two rows share a load of activations. The wide sums stay in memory: in
// registers they would displace the narrow ones. Inlined, so that the loop over a whole span has a constant end.
template <class Layout>
inline __attribute__((always_inline)) void add_span(const uint8_t* const (&packed)[2], int64_t k, int64_t stop,
                                                    int64_t columns, const int8_t* activations_q8, int64_t ahead,
                                                    int64_t place, GroupLanes<Layout> (&lanes)[2]) {
  constexpr int kPlanes = Layout::kPlanes;
  __m256i acc[2][kPlanes];
  for (auto& row : acc) {
    for (__m256i& sum : row) sum = _mm256_setzero_si256();
  }
  const auto add = [&](int64_t at, __m256i first, __m256i second) __attribute__((always_inline)) {
    const __m256i activations = load_aligned(activations_q8 + at), bytes[2] = {first, second};
    for (int i = 0; i < 2; ++i) {
      __m256i field[kPlanes];
      Layout::fields(bytes[i], field);
      for (int p = 0; p < kPlanes; ++p) acc[i][p] = add_16(acc[i][p], _mm256_maddubs_epi16(field[p], activations));
    }
  };
  for (; k + 64 <= stop; k += 64) {
    _mm_prefetch(line_ahead(packed[0] + k, ahead), _MM_HINT_T0);
    _mm_prefetch(line_ahead(packed[1] + k, ahead), _MM_HINT_T0);
    add(k, load(packed[0] + k), load(packed[1] + k));
    add(k + 32, load(packed[0] + k + 32), load(packed[1] + k + 32));
  }
  for (; k < stop; k += 32) add(k, load_first(packed[0] + k, columns - k), load_first(packed[1] + k, columns - k));
  for (int i = 0; i < 2; ++i) {
    for (int p = 0; p < kPlanes; ++p) {
      __m256i& wide = lanes[i][p][place];
      wide = _mm256_add_epi32(wide, widen_pairs(acc[i][p]));
    }
  }
}

template <class Layout>
inline void row_lanes(const uint8_t* const (&packed)[2], int64_t columns, const int8_t* activations_q8, int64_t ahead,
                      int64_t place, GroupLanes<Layout> (&lanes)[2]) {
  constexpr int64_t kSpan = 32 * Layout::kSteps;
  for (auto& group : lanes) {
    for (auto& plane : group) plane[place] = _mm256_setzero_si256();
  }
  int64_t k = 0;
  for (; k + kSpan <= columns; k += kSpan)
    add_span<Layout>(packed, k, k + kSpan, columns, activations_q8, ahead, place, lanes);
  if (k < columns) add_span<Layout>(packed, k, columns, columns, activations_q8, ahead, place, lanes);
}

// Adjacent packed rows, at most kLanes.
struct Group {
  int64_t row;
  int64_t count;
};

template <class Layout>
inline void store_group(const GroupLanes<Layout>& lanes, const Group& group, const Matrix& matrix, int32_t total,
                        int32_t* sums) {
  for (int p = 0; p < Layout::kPlanes; ++p) {
    const int64_t n = p * matrix.packed_rows + group.row, count = smaller(group.count, matrix.rows - n);
    const __m256i plane = _mm256_srai_epi32(reduce_8(lanes[p]), Layout::shift(p));
    const __m256i exact = _mm256_sub_epi32(plane, _mm256_set1_epi32(total));
    if (count >= kLanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + n), exact);
    } else if (count > 0) {
      store_first(sums + n, count, exact);
    }
  }
}

// Row path, for few tokens. Reads the first half of the rows beside the second. Past its count, a group repeats its
// last row; an empty group repeats the other group's.
// The first lines of both halves are prefetched at the start, because the loop prefetches only lines behind them. The
// distance is a variable, so that the compiler does not fold it into more address registers. Measured on Zen 3, 896 x
// 896 on one thread: 6 % faster from memory (2 of them by the first lines), 4 % from a cache.
template <class Layout>
void rows(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums) {
  const int64_t half = (end - begin + 2 * kLanes - 1) / (2 * kLanes) * kLanes, middle = smaller(begin + half, end);
  const int64_t ahead = smaller(kAhead, (middle - begin) * matrix.columns);
  for (int64_t k = 0; k < ahead; k += 64) {
    _mm_prefetch(line_ahead(matrix.packed + begin * matrix.columns, k), _MM_HINT_T0);
    _mm_prefetch(line_ahead(matrix.packed + middle * matrix.columns, k), _MM_HINT_T0);
  }
  for (int64_t r = begin, second = middle; r < middle; r += kLanes, second += kLanes) {
    const Group group[2] = {{r, smaller(middle - r, kLanes)}, {second, smaller(end - second, kLanes)}};
    for (int64_t m = 0; m < tokens.count; ++m) {
      GroupLanes<Layout> lanes[2];
      const uint8_t* packed[2];
      for (int g = 0; g < 2; ++g) packed[g] = matrix.packed + group[group[g].count > 0 ? g : 0].row * matrix.columns;
      for (int64_t i = 0; i < kLanes; ++i) {
        row_lanes<Layout>(packed, matrix.columns, tokens.activations_q8 + m * tokens.stride, ahead, i, lanes);
        for (int g = 0; g < 2; ++g) packed[g] += i + 1 < group[g].count ? matrix.columns : 0;
      }
      for (int g = 0; g < 2; ++g) {
        store_group<Layout>(lanes[g], group[g], matrix, tokens.totals[m], sums + m * matrix.rows);
      }
    }
  }
}

// Eight packed rows -> trit_codes[(quad * kPlanes + p) * 32 + 4 i ..] of row i, in whole blocks of eight quads.
void unpack_strip(const uint8_t* packed, int64_t count, int64_t columns, uint8_t* trit_codes) {
  for (int64_t k = 0; k < columns; k += 32) {
    __m256i row[8], quad[8];
    for (int64_t i = 0; i < 8; ++i) {
      row[i] = i < count ? load_first(packed + i * columns + k, columns - k) : _mm256_setzero_si256();
    }
    transpose_8(row, quad);
    for (const __m256i& packed_quad : quad) {
      __m256i trit_code[BaseThree::kPlanes];
      BaseThree::fields(packed_quad, trit_code);
      for (int p = 0; p < BaseThree::kPlanes; ++p, trit_codes += 32) store_aligned(trit_codes, trit_code[p]);
    }
  }
}

// A strip times kTokens tokens from m on.
template <int kTokens>
inline void strip_times_tokens(const Tokens& tokens, const Matrix& matrix, const uint8_t* strip, int64_t row,
                               int64_t count, int64_t m, int32_t* sums) {
  constexpr int kPlanes = BaseThree::kPlanes;
  const int64_t quads = (matrix.columns + 3) / 4;
  __m256i wide[kTokens][kPlanes] = {};
  for (int64_t q = 0; q < quads;) {
    const int64_t stop = smaller(quads, q + kStepsOfTritCodes);
    __m256i acc[kTokens][kPlanes];
    for (auto& token : acc) {
      for (__m256i& sum : token) sum = _mm256_setzero_si256();
    }
    for (; q < stop; ++q, strip += 32 * kPlanes) {
      for (int t = 0; t < kTokens; ++t) {
        int32_t quad;
        std::memcpy(&quad, tokens.activations_q8 + (m + t) * tokens.stride + 4 * q, sizeof quad);
        const __m256i activations = _mm256_set1_epi32(quad);
        for (int p = 0; p < kPlanes; ++p) {
          acc[t][p] = add_16(acc[t][p], _mm256_maddubs_epi16(load_aligned(strip + 32 * p), activations));
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int p = 0; p < kPlanes; ++p) wide[t][p] = _mm256_add_epi32(wide[t][p], widen_pairs(acc[t][p]));
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    const __m256i total = _mm256_set1_epi32(tokens.totals[m + t]);
    for (int p = 0; p < kPlanes; ++p) {
      const int64_t n = p * matrix.packed_rows + row;
      store_first(sums + (m + t) * matrix.rows + n, smaller(count, matrix.rows - n),
                  _mm256_sub_epi32(wide[t][p], total));
    }
  }
}

void strips(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch) {
  for (int64_t r = begin; r < end; r += kLanes) {
    const int64_t count = smaller(end - r, kLanes);
    unpack_strip(matrix.packed + r * matrix.columns, count, matrix.columns, scratch);
    int64_t m = 0;
    for (; m + 2 <= tokens.count; m += 2) strip_times_tokens<2>(tokens, matrix, scratch, r, count, m, sums);
    if (m < tokens.count) strip_times_tokens<1>(tokens, matrix, scratch, r, count, m, sums);
  }
}

}  // namespace

void ternary_2x4(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
                 uint8_t* scratch) {
  const int64_t many = tokens_of_tables(tokens.count);
  if (many > 0) tables_2x4(part(tokens, 0, many), matrix, begin, end, sums, scratch);
  const Tokens few = part(tokens, many, tokens.count);
  if (few.count > 0) rows<TwoBit>(few, matrix, begin, end, sums + many * matrix.rows);
}

void ternary_3x5(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
                 uint8_t* scratch) {
  const int64_t many = tokens_of_tables(tokens.count);
  if (many > 0) tables_3x5(part(tokens, 0, many), matrix, begin, end, sums, scratch);
  const Tokens few = part(tokens, many, tokens.count);
  sums += many * matrix.rows;
  if (few.count >= kStripTokens) return strips(few, matrix, begin, end, sums, scratch);
  if (few.count > 0) rows<BaseThree>(few, matrix, begin, end, sums);
}

}  // namespace avx2
}  // namespace microvlm

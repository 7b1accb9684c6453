// Ternary products of the avx512vnni variant, two bits and base 3.
//
// Few tokens: packed rows are read as two streams of 64-byte lines far from each other, and each accumulator is reduced
// across its lanes at the end of a row. Measured on Zen 4, one layer from a cache / from memory: one stream takes 1.05
// / 1.04 times as long; two streams a few rows apart take 1.03 / 1.6 times.
// Many tokens: strips of 16 packed rows are transposed, one row a lane.

#include "avx512vnni.h"

namespace microvlm {
namespace avx512vnni {
namespace {

// From this many tokens on, transposing the weights once and tiling registers is faster than reducing every sum across
// lanes.
constexpr int64_t kTwoBitStripTokens = 8, kBaseThreeStripTokens = 3;

// 1 / 81 modulo 2^32: an exact multiple of 81, times this, is the exact quotient.
constexpr uint32_t kInverse81 = 0x781948b1u;
static_assert(81u * kInverse81 == 1u);

// bytes[b] for b in 0..242: the four low base-3 digits of b, two bits each.
struct DigitTable {
  alignas(64) uint8_t bytes[256];
  constexpr DigitTable() : bytes() {
    for (int b = 0; b < 256; ++b) {
      bytes[b] = static_cast<uint8_t>(b % 3 | b / 3 % 3 << 2 | b / 9 % 3 << 4 | b / 27 % 3 << 6);
    }
  }
};
constexpr DigitTable kDigits;

// Two-bit fields left in place. The last needs no mask: the sums of the other three are subtracted from its sum.
struct Fields {
  __m512i mask0 = _mm512_set1_epi8(0x03), mask1 = _mm512_set1_epi8(0x0c), mask2 = _mm512_set1_epi8(0x30);
  void split(__m512i packed, __m512i* field) const {
    field[0] = _mm512_and_si512(packed, mask0);
    field[1] = _mm512_and_si512(packed, mask1);
    field[2] = _mm512_and_si512(packed, mask2);
    field[3] = packed;
  }
};

struct Digits {
  __m512i low0 = _mm512_load_si512(kDigits.bytes), low1 = _mm512_load_si512(kDigits.bytes + 64);
  __m512i high0 = _mm512_load_si512(kDigits.bytes + 128), high1 = _mm512_load_si512(kDigits.bytes + 192);
  // Base-3 bytes -> bytes with two-bit fields of their four low digits.
  __m512i fields(__m512i packed) const {
    const __m512i low = _mm512_permutex2var_epi8(low0, packed, low1);
    const __m512i high = _mm512_permutex2var_epi8(high0, packed, high1);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(packed), low, high);
  }
};

// Sums of fields in place -> sums of trit codes times activations. field[3] is the unmasked byte's sum, field[4] the
// base-3 byte's.
template <int kPlanes>
inline void unscale(const __m512i* field, __m512i* plane) {
  plane[0] = field[0];
  plane[1] = _mm512_srai_epi32(field[1], 2);
  plane[2] = _mm512_srai_epi32(field[2], 4);
  const __m512i lower = _mm512_add_epi32(_mm512_add_epi32(field[0], field[1]), field[2]);
  plane[3] = _mm512_srai_epi32(_mm512_sub_epi32(field[3], lower), 6);
  if constexpr (kPlanes == 5) {
    __m512i rest = field[4];
    for (int p = 0, power = 1; p < 4; ++p, power *= 3) {
      rest = _mm512_sub_epi32(rest, _mm512_mullo_epi32(plane[p], _mm512_set1_epi32(power)));
    }
    plane[4] = _mm512_mullo_epi32(rest, _mm512_set1_epi32(static_cast<int32_t>(kInverse81)));
  }
}

// The two ways to turn a 64-byte load into kPlanes operands of vpdpbusd.
struct TwoBit {
  static constexpr int kPlanes = 4;
  Fields fields;
  void split(__m512i packed, __m512i* field) const { fields.split(packed, field); }
};

struct BaseThree {
  static constexpr int kPlanes = 5;
  Fields fields;
  Digits digits;
  void split(__m512i packed, __m512i* field) const {
    fields.split(digits.fields(packed), field);
    field[4] = packed;
  }
};

// Multiplies two packed rows by one token -> for each row, 128-bit lanes that sum to [field 0, 1, 2, 3], and lanes that
// sum to field 4. The rows share a load of activations, and neither waits for the other's vpdpbusd.
template <class Layout>
inline void row_lanes(const Layout& layout, const uint8_t* const (&packed)[2], int64_t columns,
                      const int8_t* activations_q8, __m512i* (&low)[2], __m512i* (&raw)[2]) {
  __m512i acc[2][5], field[Layout::kPlanes];
  for (int p = 0; p < 5; ++p) acc[0][p] = acc[1][p] = _mm512_setzero_si512();
  const char* const ahead[2] = {lines_ahead(packed[0], kPairAhead), lines_ahead(packed[1], kPairAhead)};
  const auto add = [&](int64_t k, __m512i first, __m512i second) __attribute__((always_inline)) {
    const __m512i activations = _mm512_load_si512(activations_q8 + k);
    layout.split(first, field);
    for (int p = 0; p < Layout::kPlanes; ++p) acc[0][p] = dot(acc[0][p], field[p], activations);
    layout.split(second, field);
    for (int p = 0; p < Layout::kPlanes; ++p) acc[1][p] = dot(acc[1][p], field[p], activations);
  };
  int64_t k = 0;
  for (; k + 128 <= columns; k += 128) {
    _mm_prefetch(ahead[0] + k, _MM_HINT_T1);
    _mm_prefetch(ahead[1] + k, _MM_HINT_T1);
    add(k, load(packed[0] + k), load(packed[1] + k));
    add(k + 64, load(packed[0] + k + 64), load(packed[1] + k + 64));
  }
  for (; k < columns; k += 64) add(k, load_first(packed[0] + k, columns - k), load_first(packed[1] + k, columns - k));
  for (int i = 0; i < 2; ++i) {
    *low[i]++ = reduce_pairs(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    *raw[i]++ = acc[i][4];
  }
}

constexpr int64_t kGroupRows = 4;

// Adjacent packed rows, at most kGroupRows.
struct Group {
  int64_t row;
  int64_t count;
};

// The lanes of kGroupRows rows -> lane i of plane[p] is the sum for plane p of row i, with trit codes as weights.
template <class Layout>
inline void group_planes(const __m512i* low, const __m512i* raw, __m512i* plane) {
  __m512i field[5];
  // Lane p * 4 + i is the sum of field p of row i.
  const __m512i by_plane = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  field[0] = _mm512_permutexvar_epi32(by_plane, reduce_lanes(low[0], low[1], low[2], low[3]));
  field[1] = _mm512_shuffle_i32x4(field[0], field[0], 0x01);
  field[2] = _mm512_shuffle_i32x4(field[0], field[0], 0x02);
  field[3] = _mm512_shuffle_i32x4(field[0], field[0], 0x03);
  if constexpr (Layout::kPlanes == 5) field[4] = _mm512_zextsi128_si512(reduce_4(raw[0], raw[1], raw[2], raw[3]));
  unscale<Layout::kPlanes>(field, plane);
}

// Two groups times one token -> plane[g][p] as above. Past its count, a group repeats its last row; an empty group
// repeats the other group's. Not inlined: GCC would run out of registers for the loops around it.
template <class Layout>
__attribute__((noinline)) void pair_sums(const Matrix& matrix, const Group (&group)[2], const int8_t* activations_q8,
                                         __m512i (&plane)[2][Layout::kPlanes]) {
  const Layout layout;
  __m512i low[2][kGroupRows], raw[2][kGroupRows];
  __m512i *next_low[2] = {low[0], low[1]}, *next_raw[2] = {raw[0], raw[1]};
  const uint8_t* packed[2];
  for (int g = 0; g < 2; ++g) packed[g] = matrix.packed + group[group[g].count > 0 ? g : 0].row * matrix.columns;
#pragma GCC unroll 4
  for (int64_t i = 0; i < kGroupRows; ++i) {
    row_lanes(layout, packed, matrix.columns, activations_q8, next_low, next_raw);
    for (int g = 0; g < 2; ++g) packed[g] += i + 1 < group[g].count ? matrix.columns : 0;
  }
  for (int g = 0; g < 2; ++g) group_planes<Layout>(low[g], raw[g], plane[g]);
}

// Row path, for few tokens. Reads the first half of the rows beside the second, each as one stream of lines.
template <class Layout>
void rows(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums) {
  const int64_t half = (end - begin + 2 * kGroupRows - 1) / (2 * kGroupRows) * kGroupRows;
  const int64_t middle = half < end - begin ? begin + half : end;
  for (int64_t r = begin, second = middle; r < middle; r += kGroupRows, second += kGroupRows) {
    const Group group[2] = {{r, middle - r < kGroupRows ? middle - r : kGroupRows},
                            {second, end - second < kGroupRows ? end - second : kGroupRows}};
    for (int64_t m = 0; m < tokens.count; ++m) {
      __m512i plane[2][Layout::kPlanes];
      pair_sums<Layout>(matrix, group, tokens.activations_q8 + m * tokens.stride, plane);
      const __m512i total = _mm512_set1_epi32(tokens.totals[m]);
      for (int g = 0; g < 2; ++g) {
        for (int p = 0; p < Layout::kPlanes; ++p) {
          const int64_t n = p * matrix.packed_rows + group[g].row, left = matrix.rows - n;
          const int64_t count = left < group[g].count ? left : group[g].count;
          const __m512i exact = _mm512_sub_epi32(plane[g][p], total);
          int32_t* const place = sums + m * matrix.rows + n;
          if (count >= kGroupRows) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(place), _mm512_castsi512_si128(exact));
          } else if (count > 0) {
            // As wide as the register: GCC turns a masked 128-bit store of the lowest lanes into a vextracti32x4, which
            // touches memory that the mask excludes.
            _mm512_mask_storeu_epi32(place, first_lanes(count), exact);
          }
        }
      }
    }
  }
}

// What a strip holds for a quad of columns of 16 packed rows: the packed bytes; for base 3 their two-bit fields, then
// the packed bytes.
struct TwoBitStrip {
  static constexpr int kVectors = 4;
  static constexpr int kTokens = 4;
  static constexpr int64_t kQuadBytes = 64;
  static void load(const uint8_t* quad, __m512i* field) { Fields().split(_mm512_load_si512(quad), field); }
  static void complete(uint8_t*, int64_t) {}
};

struct BaseThreeStrip {
  static constexpr int kVectors = 5;
  static constexpr int kTokens = 3;
  static constexpr int64_t kQuadBytes = 128;
  static void load(const uint8_t* quad, __m512i* field) {
    Fields().split(_mm512_load_si512(quad), field);
    field[4] = _mm512_load_si512(quad + 64);
  }
  // Fills both halves from the packed bytes, which were transposed into the first half.
  static void complete(uint8_t* strip, int64_t quads) {
    const Digits digits;
    for (int64_t q = 0; q < quads; ++q, strip += kQuadBytes) {
      const __m512i packed = _mm512_load_si512(strip);
      _mm512_store_si512(strip, digits.fields(packed));
      _mm512_store_si512(strip + 64, packed);
    }
  }
};

template <class Strip>
struct StripTimesTokens {
  const Tokens& tokens;
  const Matrix& matrix;
  const uint8_t* strip;
  int64_t row;
  int64_t count;
  int32_t* sums;

  template <int kTokens>
  void run(int64_t m) const {
    __m512i acc[Strip::kVectors][kTokens];
    tile<Strip, kTokens>(strip, (matrix.columns + 3) / 4, tokens.activations_q8 + m * tokens.stride, tokens.stride,
                         acc);
    for (int t = 0; t < kTokens; ++t) {
      __m512i field[Strip::kVectors], plane[Strip::kVectors];
      for (int p = 0; p < Strip::kVectors; ++p) field[p] = acc[p][t];
      unscale<Strip::kVectors>(field, plane);
      const __m512i total = _mm512_set1_epi32(tokens.totals[m + t]);
      for (int p = 0; p < Strip::kVectors; ++p) {
        const int64_t n = p * matrix.packed_rows + row, left = matrix.rows - n;
        _mm512_mask_storeu_epi32(sums + (m + t) * matrix.rows + n, first_lanes(left < count ? left : count),
                                 _mm512_sub_epi32(plane[p], total));
      }
    }
  }
};

// Strip path, for many tokens.
template <class Strip>
void strips(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch) {
  for (int64_t r = begin; r < end; r += kLanes) {
    const int64_t count = end - r < kLanes ? end - r : kLanes;
    transpose_strip(matrix.packed + r * matrix.columns, matrix.columns, count, scratch, Strip::kQuadBytes);
    Strip::complete(scratch, (matrix.columns + 3) / 4);
    by_token_groups<Strip::kTokens>(tokens.count, StripTimesTokens<Strip>{tokens, matrix, scratch, r, count, sums});
  }
}

}  // namespace

void ternary_2x4(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
                 uint8_t* scratch) {
  if (tokens.count < kTwoBitStripTokens) return rows<TwoBit>(tokens, matrix, begin, end, sums);
  strips<TwoBitStrip>(tokens, matrix, begin, end, sums, scratch);
}

void ternary_3x5(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
                 uint8_t* scratch) {
  if (tokens.count < kBaseThreeStripTokens) return rows<BaseThree>(tokens, matrix, begin, end, sums);
  strips<BaseThreeStrip>(tokens, matrix, begin, end, sums, scratch);
}

}  // namespace avx512vnni
}  // namespace microvlm

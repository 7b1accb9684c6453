// Ternary products of the avx512vnni variant, two bits and base 3.
//
// Few tokens: packed rows are read one after the other, as one stream of 64-byte lines, and each accumulator is summed
// across its lanes at the end of a row. Rows side by side read memory at half the speed.
// Many tokens: strips of 16 packed rows are transposed so that a lane is a row.

#include "avx512vnni.h"

namespace microvlm {
namespace avx512vnni {
namespace {

// From this many tokens on, transposing weights once and tiling registers beats reducing every sum across lanes.
constexpr int64_t kTwoBitStripTokens = 8, kBaseThreeStripTokens = 3;

// 1 / 81 modulo 2^32: an exact multiple of 81 times this is the exact quotient.
constexpr uint32_t kInverse81 = 0x781948b1u;
static_assert(81u * kInverse81 == 1u);

// packed2x4[b] for b in 0..242: the four low base-3 digits of b, two bits each.
struct DigitTable {
  alignas(64) uint8_t bytes[256];
  constexpr DigitTable() : bytes() {
    for (int b = 0; b < 256; ++b) {
      bytes[b] = static_cast<uint8_t>(b % 3 | b / 3 % 3 << 2 | b / 9 % 3 << 4 | b / 27 % 3 << 6);
    }
  }
};
constexpr DigitTable kDigits;

// Fields of two bits, left in place. The last needs no mask: all three before it are subtracted from its sums.
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
  // Base-3 bytes -> bytes of two-bit fields of their four low digits.
  __m512i fields(__m512i packed) const {
    const __m512i low = _mm512_permutex2var_epi8(low0, packed, low1);
    const __m512i high = _mm512_permutex2var_epi8(high0, packed, high1);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(packed), low, high);
  }
};

// Sums of fields in place -> sums of codes. field[3] holds the unmasked byte's, field[4] the base-3 byte's.
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

// The two ways in which a 64-byte load becomes kPlanes operands of vpdpbusd.
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

// One packed row times one token -> 128-bit lanes that sum to [field 0, 1, 2, 3], and lanes that sum to field 4.
template <class Layout>
inline void row_lanes(const Layout& layout, const uint8_t* packed, int64_t columns, const int8_t* codes, __m512i* low,
                      __m512i* raw) {
  // Two sets: one alone would wait for each vpdpbusd before the next of its own.
  __m512i acc[5], second[5], field[Layout::kPlanes];
  for (int p = 0; p < 5; ++p) acc[p] = second[p] = _mm512_setzero_si512();
  int64_t k = 0;
  const char* ahead = lines_ahead(packed);
  for (; k + 128 <= columns; k += 128) {
    _mm_prefetch(ahead + k, _MM_HINT_T1);
    layout.split(load(packed + k), field);
    for (int p = 0; p < Layout::kPlanes; ++p) acc[p] = dot(acc[p], field[p], _mm512_load_si512(codes + k));
    layout.split(load(packed + k + 64), field);
    for (int p = 0; p < Layout::kPlanes; ++p) second[p] = dot(second[p], field[p], _mm512_load_si512(codes + k + 64));
  }
  if (k + 64 <= columns) {
    layout.split(load(packed + k), field);
    for (int p = 0; p < Layout::kPlanes; ++p) acc[p] = dot(acc[p], field[p], _mm512_load_si512(codes + k));
    k += 64;
  }
  if (k < columns) {
    layout.split(load_first(packed + k, columns - k), field);
    for (int p = 0; p < Layout::kPlanes; ++p) second[p] = dot(second[p], field[p], _mm512_load_si512(codes + k));
  }
  for (int p = 0; p < Layout::kPlanes; ++p) acc[p] = _mm512_add_epi32(acc[p], second[p]);
  *low = reduce_pairs(acc[0], acc[1], acc[2], acc[3]);
  *raw = acc[4];
}

constexpr int64_t kGroupRows = 4;

// Four packed rows times one token -> lane i of plane[p] is the sum of codes of plane p of row i. Rows from `count` on
// repeat the last. Not inlined: GCC runs out of registers for the loops around it.
template <class Layout>
__attribute__((noinline)) void group_sums(const uint8_t* packed, int64_t count, int64_t columns, const int8_t* codes,
                                          __m512i* plane) {
  const Layout layout;
  __m512i low[kGroupRows], raw[kGroupRows], field[5];
#pragma GCC unroll 4
  for (int64_t i = 0; i < kGroupRows; ++i) {
    row_lanes(layout, packed, columns, codes, low + i, raw + i);
    if (i + 1 < count) packed += columns;
  }
  // Lane p * 4 + i is the sum of field p of row i.
  const __m512i by_plane = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  field[0] = _mm512_permutexvar_epi32(by_plane, reduce_lanes(low[0], low[1], low[2], low[3]));
  field[1] = _mm512_shuffle_i32x4(field[0], field[0], 0x01);
  field[2] = _mm512_shuffle_i32x4(field[0], field[0], 0x02);
  field[3] = _mm512_shuffle_i32x4(field[0], field[0], 0x03);
  if constexpr (Layout::kPlanes == 5) field[4] = _mm512_zextsi128_si512(reduce_4(raw[0], raw[1], raw[2], raw[3]));
  unscale<Layout::kPlanes>(field, plane);
}

// Row path: few tokens.
template <class Layout>
void rows(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums) {
  for (int64_t r = begin; r < end; r += kGroupRows) {
    const int64_t count = end - r < kGroupRows ? end - r : kGroupRows;
    for (int64_t m = 0; m < tokens.count; ++m) {
      __m512i plane[Layout::kPlanes];
      group_sums<Layout>(matrix.packed + r * matrix.columns, count, matrix.columns, tokens.codes + m * tokens.stride,
                         plane);
      const __m512i total = _mm512_set1_epi32(tokens.totals[m]);
      for (int p = 0; p < Layout::kPlanes; ++p) {
        const int64_t n = p * matrix.packed_rows + r, left = matrix.rows - n;
        const __m128i exact = _mm512_castsi512_si128(_mm512_sub_epi32(plane[p], total));
        if (count == kGroupRows && left >= kGroupRows) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + m * matrix.rows + n), exact);
        } else {
          const auto lanes = static_cast<__mmask8>(first_lanes(left < count ? left : count));
          _mm_mask_storeu_epi32(sums + m * matrix.rows + n, lanes, exact);
        }
      }
    }
  }
}

// What a strip holds of a quad of columns of 16 packed rows: the packed bytes, for base 3 after their two-bit fields.
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
  // From the packed bytes, which were transposed into the first half, to both halves.
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
    tile<Strip, kTokens>(strip, (matrix.columns + 3) / 4, tokens.codes + m * tokens.stride, tokens.stride, acc);
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

// Strip path: many tokens.
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

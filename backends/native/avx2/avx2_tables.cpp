// Ternary products of many tokens for the avx2 variant: sums of four columns are looked up instead of multiplied.
//
// The weights of one row in four columns are one of 81 combinations. For 16 tokens, one a lane, a table holds the sum
// of every combination. A row adds one entry, where vpmaddubsw needs two steps for every four tokens. The tables of 32
// columns fit the L1 cache beside a stream of rows. They are rebuilt for every 32 columns and used for all rows, so
// every row keeps 16-bit sums, which are added to its 32-bit sums before they can overflow. Measured on Zen 3 against
// register tiles of vpmaddubsw, from L2: 2 times as fast.

#include "avx2_layouts.h"

namespace microvlm {
namespace avx2 {
namespace {

constexpr int64_t kBlockTokens = 16;  // int16 lanes
constexpr int64_t kChunk = 32;        // columns whose tables exist at once
constexpr int64_t kGroups = kChunk / 4;
constexpr int64_t kEntryBytes = 2 * kBlockTokens, kTableBytes = 81 * kEntryBytes;
// An entry is -512..512, so an int16 lane takes 63 of them.
constexpr int64_t kChunksOfSums = 63 / kGroups;
constexpr int64_t kSlabTokens = 4 * kBlockTokens;

// Scratch, in this order: the 16-bit sums of a slab of rows and tokens, which must stay in L2; the offsets of these
// rows into the tables; the tables, and room behind them for the entry of four trit codes 3, which valid weights do not
// have.
constexpr int64_t kMaxRows = 1024;  // packed rows of a slab
constexpr int64_t kSumsBytes = 256 << 10, kOffsetBytes = kMaxRows * 5 * kGroups * 2;
constexpr int64_t kAllTablesBytes = kGroups * kTableBytes + 40 * kEntryBytes;

inline int64_t round_up_8(int64_t count) { return (count + 7) / 8 * 8; }

// Transposes a chunk of 16 tokens: columns j and j + 16 of it are the halves of vector j.
inline void transpose_activations(const Tokens& tokens, int64_t m, int64_t k, __m256i* columns) {
  __m256i other[kBlockTokens];
  for (int64_t t = 0; t < kBlockTokens; ++t) {
    columns[t] = m + t < tokens.count ? load_aligned(tokens.activations_q8 + (m + t) * tokens.stride + k)
                                      : _mm256_setzero_si256();
  }
  const auto shuffle = [](const __m256i* from, __m256i* to) {
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = _mm256_unpacklo_epi8(from[i], from[i + 8]);
      to[2 * i + 1] = _mm256_unpackhi_epi8(from[i], from[i + 8]);
    }
  };
  shuffle(columns, other);
  shuffle(other, columns);
  shuffle(columns, other);
  shuffle(other, columns);
}

// The sums of every combination of weights -1, 0, 1 in four columns; the first column's weight changes fastest.
inline void fill_table(__m256i x0, __m256i x1, __m256i x2, __m256i x3, uint8_t* table) {
  const auto add = [](__m256i sum, int weight, __m256i x) {
    return weight < 0 ? _mm256_sub_epi16(sum, x) : weight > 0 ? _mm256_add_epi16(sum, x) : sum;
  };
  for (int d = -1; d <= 1; ++d) {
    for (int c = -1; c <= 1; ++c) {
      const __m256i upper = add(add(_mm256_setzero_si256(), d, x3), c, x2);
      for (int b = -1; b <= 1; ++b, table += 3 * kEntryBytes) {
        const __m256i sum = add(upper, b, x1);
        store_aligned(table, _mm256_sub_epi16(sum, x0));
        store_aligned(table + kEntryBytes, sum);
        store_aligned(table + 2 * kEntryBytes, _mm256_add_epi16(sum, x0));
      }
    }
  }
}

void fill_tables(const Tokens& tokens, int64_t m, int64_t k, uint8_t* tables) {
  __m256i columns[kBlockTokens];
  transpose_activations(tokens, m, k, columns);
  for (int64_t g = 0; g < kGroups / 2; ++g, tables += kTableBytes) {
    __m256i low[4], high[4];
    for (int i = 0; i < 4; ++i) {
      low[i] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(columns[4 * g + i]));
      high[i] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(columns[4 * g + i], 1));
    }
    fill_table(low[0], low[1], low[2], low[3], tables);
    fill_table(high[0], high[1], high[2], high[3], tables + kGroups / 2 * kTableBytes);
  }
}

// Finds a chunk's entries: offsets[(p * stride + r) * kGroups + g] is the one of row r of plane p and group g.
template <class Layout>
void find_entries(const uint8_t* packed, int64_t rows, int64_t columns, int64_t k, int64_t stride, uint16_t* offsets) {
  constexpr int kPlanes = Layout::kPlanes;
  const __m256i pair = _mm256_set1_epi16(0x0301);
  for (int64_t r = 0; r < rows; ++r, packed += columns) {
    __m256i field[kPlanes + 1], entry[kPlanes + 1];
    Layout::fields(load_first(packed + k, columns - k), field);
    for (int p = 0; p < kPlanes; ++p) {
      // (c0 + 3 c1) + 9 (c2 + 3 c3), in entries
      const int32_t unit = kEntryBytes >> Layout::shift(p);
      entry[p] = _mm256_madd_epi16(_mm256_maddubs_epi16(field[p], pair), _mm256_set1_epi32(unit | 9 * unit << 16));
    }
    entry[kPlanes] = entry[kPlanes - 1];
    for (int p = 0; p < kPlanes; p += 2) {
      const __m256i two = _mm256_permute4x64_epi64(_mm256_packus_epi32(entry[p], entry[p + 1]), 0xd8);
      __m128i* place = reinterpret_cast<__m128i*>(offsets + (p * stride + r) * kGroups);
      _mm_store_si128(place, _mm256_castsi256_si128(two));
      if (p + 1 < kPlanes) _mm_store_si128(place + stride, _mm256_extracti128_si256(two, 1));
    }
  }
}

// What a pass over rows prefetches: a line of every fourth packed row.
struct Ahead {
  const uint8_t* line;
  int64_t stride;
};

// Adds the entries of one chunk to the sums of `rows` rows; kFresh overwrites the sums.
template <bool kFresh>
void add_entries(const uint8_t* tables, const uint16_t* offsets, int64_t rows, Ahead ahead, uint8_t* sums) {
  for (int64_t r = 0; r < rows; ++r, offsets += kGroups, sums += kEntryBytes) {
    if (r % 4 == 0) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead.line), _MM_HINT_T1);
      ahead.line += ahead.stride;
    }
    __m256i sum = kFresh ? _mm256_setzero_si256() : load_aligned(sums);
    for (int half = 0; half < 2; ++half) {
      uint64_t four;
      std::memcpy(&four, offsets + 4 * half, sizeof four);
      for (int g = 0; g < 4; ++g, four >>= 16) {
        const uint8_t* table = tables + (4 * half + g) * kTableBytes;
        sum = _mm256_add_epi16(sum, load_aligned(table + static_cast<uint16_t>(four)));
      }
    }
    store_aligned(sums, sum);
  }
}

// Adds 16-bit sums [row][token] to 32-bit sums [token][row]; `first` overwrites the 32-bit sums.
void widen(const uint8_t* narrow, int64_t rows, int64_t tokens, bool first, int64_t stride, int32_t* sums) {
  for (int64_t r = 0; r < rows; r += kLanes, narrow += kLanes * kEntryBytes) {
    const int64_t count = smaller(kLanes, rows - r);
    for (int64_t t = 0; t < tokens; t += kLanes) {
      __m256i row[kLanes], token[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        row[i] =
            _mm256_cvtepi16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(narrow + i * kEntryBytes + 2 * t)));
      }
      transpose_8(row, token);
      for (int64_t i = 0; i < smaller(kLanes, tokens - t); ++i) {
        int32_t* place = sums + (t + i) * stride + r;
        if (count == kLanes) {
          const __m256i before = first ? _mm256_setzero_si256() : load(place);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), _mm256_add_epi32(before, token[i]));
        } else {
          const __m256i before = first ? _mm256_setzero_si256() : load_first(place, 4 * count);
          store_first(place, count, _mm256_add_epi32(before, token[i]));
        }
      }
    }
  }
}

// Packed rows [begin, begin + count) times the given tokens, at most kSlabTokens.
template <class Layout>
void slab(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t count, int32_t* sums, uint8_t* scratch) {
  constexpr int kPlanes = Layout::kPlanes;
  const int64_t stride = round_up_8(count), blocks = (tokens.count + kBlockTokens - 1) / kBlockTokens;
  const uint8_t* packed = matrix.packed + begin * matrix.columns;
  uint8_t* const tables = scratch + kSumsBytes + kOffsetBytes;
  auto* const offsets = reinterpret_cast<uint16_t*>(scratch + kSumsBytes);
  const auto narrow = [&](int64_t b, int p) { return scratch + (b * kPlanes + p) * stride * kEntryBytes; };
  const auto rows_of = [&](int p) { return smaller(count, matrix.rows - p * matrix.packed_rows - begin); };

  int64_t pending = 0;
  bool first = true;
  for (int64_t k = 0; k < matrix.columns; k += kChunk) {
    find_entries<Layout>(packed, count, matrix.columns, k, stride, offsets);
    for (int64_t b = 0; b < blocks; ++b) {
      fill_tables(tokens, b * kBlockTokens, k, tables);
      for (int p = 0; p < kPlanes && rows_of(p) > 0; ++p) {
        // The passes of the first block share the lines that find_entries reads next: one of every packed row.
        const Ahead ahead =
            b == 0 && p < 4 ? Ahead{packed + p * matrix.columns + k + 64, 4 * matrix.columns} : Ahead{packed, 0};
        const uint16_t* entries = offsets + p * stride * kGroups;
        if (pending == 0) {
          add_entries<true>(tables, entries, rows_of(p), ahead, narrow(b, p));
        } else {
          add_entries<false>(tables, entries, rows_of(p), ahead, narrow(b, p));
        }
      }
    }
    if (++pending < kChunksOfSums && k + kChunk < matrix.columns) continue;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t m = b * kBlockTokens;
      for (int p = 0; p < kPlanes && rows_of(p) > 0; ++p) {
        widen(narrow(b, p), rows_of(p), smaller(kBlockTokens, tokens.count - m), first, matrix.rows,
              sums + m * matrix.rows + p * matrix.packed_rows + begin);
      }
    }
    pending = 0;
    first = false;
  }
}

// Every block of tokens and every slab of rows.
template <class Layout>
void slabs(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch) {
  for (int64_t m = 0; m < tokens.count; m += kSlabTokens) {
    const Tokens some = part(tokens, m, smaller(m + kSlabTokens, tokens.count));
    const int64_t blocks = (some.count + kBlockTokens - 1) / kBlockTokens;
    const int64_t fitting = smaller(kMaxRows, kSumsBytes / (blocks * Layout::kPlanes * kEntryBytes) / 8 * 8);
    const int64_t parts = (end - begin + fitting - 1) / fitting, rows = round_up_8((end - begin + parts - 1) / parts);
    for (int64_t r = begin; r < end; r += rows) {
      slab<Layout>(some, matrix, r, smaller(rows, end - r), sums + m * matrix.rows, scratch);
    }
  }
}

}  // namespace

int64_t tokens_of_tables(int64_t count) {
  // A block costs the same with fewer tokens. Measured: 12 tokens are worth it, 8 are not.
  const int64_t whole = count / kBlockTokens * kBlockTokens;
  return count - whole >= 12 ? count : whole;
}

int64_t tables_scratch_bytes() { return kSumsBytes + kOffsetBytes + kAllTablesBytes; }

void tables_2x4(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
                uint8_t* scratch) {
  slabs<TwoBit>(tokens, matrix, begin, end, sums, scratch);
}

void tables_3x5(const Tokens& tokens, const Matrix& matrix, int64_t begin, int64_t end, int32_t* sums,
                uint8_t* scratch) {
  slabs<BaseThree>(tokens, matrix, begin, end, sums, scratch);
}

}  // namespace avx2
}  // namespace microvlm

// Shared by the files of the avx2 variant: loads and stores, reductions across lanes, transposition.
//
// vpmaddubsw adds two products of an unsigned and a signed byte into 16 bits and saturates. With trit codes 0..2 a pair
// of products is -512..508, so an int16 lane holds 64 pairs before it must be widened; with trit codes times four, 16
// pairs.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace microvlm {
namespace avx2 {

void ternary_2x4(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);
void ternary_3x5(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);
// Table lookup (avx2_tables.cpp). tokens_of_tables() says how many of `count` tokens, from the first on, it pays for.
int64_t tokens_of_tables(int64_t count);
void tables_2x4(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);
void tables_3x5(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);
int64_t tables_scratch_bytes();
void int8(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);
// The int8 product for several tokens (avx2_panels.cpp).
void int8_panels(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);
int64_t panels_scratch_bytes(int64_t columns);
void int4(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);

namespace {

constexpr int64_t kLanes = 8;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Tokens [begin, end) of a ternary product.
inline Tokens part(Tokens tokens, int64_t begin, int64_t end) {
  tokens.activations_q8 += begin * tokens.stride;
  tokens.totals += begin;
  tokens.count = end - begin;
  return tokens;
}

inline __m256i load(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }
inline __m256i load_aligned(const void* bytes) { return _mm256_load_si256(static_cast<const __m256i*>(bytes)); }
inline void store_aligned(void* bytes, __m256i value) { _mm256_store_si256(static_cast<__m256i*>(bytes), value); }
// Loads the first `count` bytes and reads none behind them; the other bytes are 0.
inline __m256i load_first(const void* bytes, int64_t count) {
  if (count >= 32) return load(bytes);
  alignas(32) uint8_t block[32] = {};
  if (count > 0) std::memcpy(block, bytes, static_cast<size_t>(count));
  return load_aligned(block);
}

inline __m128i load_half(const void* bytes) { return _mm_loadu_si128(static_cast<const __m128i*>(bytes)); }
inline __m128i load_half_first(const uint8_t* bytes, int64_t count) {
  if (count >= 16) return load_half(bytes);
  alignas(16) uint8_t block[16] = {};
  std::memcpy(block, bytes, static_cast<size_t>(count));
  return load_half(block);
}

// The address to prefetch for each line that is read. Callers use _mm_prefetch themselves: GCC 12 drops it inside
// another function because it has no effect. Prefetching past the end of the weights is harmless. Measured on Zen 3,
// one layer from memory in two streams: distances of 1 to 4 KiB and hints for both caches are equal within 3 %;
// prefetching only every other line takes 2 times as long.
constexpr int64_t kAhead = 2048;
inline const char* line_ahead(const uint8_t* bytes, int64_t ahead = kAhead) {
  return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(bytes) + ahead);
}

// sums + addend in 16 or 32 bits. GCC 12 would first add the addends of several steps and spill sums to do so; inline
// assembly prevents that. A ternary product of one token is 6 % faster, one of eight tokens in base 3 25 %.
inline __m256i add_16(__m256i sums, __m256i addend) {
#if defined(__clang__)
  return _mm256_add_epi16(sums, addend);
#else
  __asm__("vpaddw %1, %0, %0" : "+x"(sums) : "x"(addend));
  return sums;
#endif
}
inline __m256i add_32(__m256i sums, __m256i addend) {
#if defined(__clang__)
  return _mm256_add_epi32(sums, addend);
#else
  __asm__("vpaddd %1, %0, %0" : "+x"(sums) : "x"(addend));
  return sums;
#endif
}

inline __m256i widen_pairs(__m256i sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

inline int32_t reduce(__m256i sums) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

// Four vectors -> 128-bit lanes that sum to [sum of v[0], of v[1], of v[2], of v[3]].
inline __m256i reduce_pairs(const __m256i* v) {
  const __m256i v01 = _mm256_add_epi32(_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
  const __m256i v23 = _mm256_add_epi32(_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(v01, v23), _mm256_unpackhi_epi64(v01, v23));
}

// Eight vectors -> lane i is the sum of all lanes of v[i].
inline __m256i reduce_8(const __m256i* v) {
  const __m256i a = reduce_pairs(v), b = reduce_pairs(v + 4);
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// Stores the lanes below `count` to sums[0..count).
inline void store_first(int32_t* sums, int64_t count, __m256i value) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), lane);
  _mm256_maskstore_epi32(sums, below, value);
}

// 8 rows of 32 bytes -> quads[q] holds dword q of every row.
inline void transpose_8(const __m256i* rows, __m256i* quads) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    quads[j] = _mm256_permute2x128_si256(b[j], b[4 + j], 0x20);
    quads[4 + j] = _mm256_permute2x128_si256(b[j], b[4 + j], 0x31);
  }
}

}  // namespace
}  // namespace avx2
}  // namespace microvlm

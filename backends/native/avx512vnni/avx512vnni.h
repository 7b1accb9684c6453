// Shared by the files of the avx512vnni variant: reductions across lanes, transposition, the register tile for many
// tokens.
//
// vpdpbusd adds four products of an unsigned and a signed byte into each int32 lane and never saturates, so the fields
// of a packed byte need no shift: (packed & 0x0c) . activations is exactly 4 times the sum of plane 1, and so on.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace microvlm {
namespace avx512vnni {

void ternary_2x4(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);
void ternary_3x5(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);
void int8(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);
void int4(const Tokens&, const Matrix&, int64_t begin, int64_t end, int32_t* sums, uint8_t* scratch);

constexpr int64_t kLanes = 16;

namespace {

inline __m512i load(const void* bytes) { return _mm512_loadu_si512(bytes); }
inline __m512i load_first(const void* bytes, int64_t count) {
  return _mm512_maskz_loadu_epi8(count >= 64 ? ~0ull : (1ull << count) - 1, bytes);
}
inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// sum + weights . activations, four products an int32 lane.
inline __m512i dot(__m512i sum, __m512i weights, __m512i activations_q8) {
#if defined(__clang__)
  return _mm512_dpbusd_epi32(sum, weights, activations_q8);
#else
  // GCC 12 copies and spills the accumulators around its intrinsic; inline assembly prevents that.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(activations_q8));
  return sum;
#endif
}

// The address to prefetch into the second-level cache while the line at `bytes` is read, once every two lines: the even
// line of a pair. An address past the end of the weights is harmless. Measured on Zen 4, from memory: a single stream
// is fastest with 8 KiB ahead (4 KiB: 6 % slower, 16 KiB: 1 %), each of two streams with 1.5 to 2 KiB (1 KiB: 2 %
// slower, 4 KiB: 4 %). Prefetching the odd lines too, other hints and no prefetch are slower.
constexpr int64_t kStreamAhead = 8192, kPairAhead = 1024;
inline const char* lines_ahead(const void* bytes, int64_t distance) {
  return reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(bytes) + distance) & ~uintptr_t{127});
}

// Four vectors -> 128-bit lanes that sum to [sum of v0, of v1, of v2, of v3].
inline __m512i reduce_pairs(__m512i v0, __m512i v1, __m512i v2, __m512i v3) {
  const __m512i v01 = _mm512_add_epi32(_mm512_unpacklo_epi32(v0, v1), _mm512_unpackhi_epi32(v0, v1));
  const __m512i v23 = _mm512_add_epi32(_mm512_unpacklo_epi32(v2, v3), _mm512_unpackhi_epi32(v2, v3));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(v01, v23), _mm512_unpackhi_epi64(v01, v23));
}

// Four vectors -> 128-bit lane i is the sum of the 128-bit lanes of w_i.
inline __m512i reduce_lanes(__m512i w0, __m512i w1, __m512i w2, __m512i w3) {
  const __m512i w01 = _mm512_add_epi32(_mm512_shuffle_i32x4(w0, w1, 0x44), _mm512_shuffle_i32x4(w0, w1, 0xee));
  const __m512i w23 = _mm512_add_epi32(_mm512_shuffle_i32x4(w2, w3, 0x44), _mm512_shuffle_i32x4(w2, w3, 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(w01, w23, 0x88), _mm512_shuffle_i32x4(w01, w23, 0xdd));
}

// Sixteen vectors -> lane i is the sum of all lanes of v[i].
inline __m512i reduce_16(const __m512i* v) {
  return reduce_lanes(reduce_pairs(v[0], v[1], v[2], v[3]), reduce_pairs(v[4], v[5], v[6], v[7]),
                      reduce_pairs(v[8], v[9], v[10], v[11]), reduce_pairs(v[12], v[13], v[14], v[15]));
}

// Four vectors -> lane i is the sum of all lanes of v_i.
inline __m128i reduce_4(__m512i v0, __m512i v1, __m512i v2, __m512i v3) {
  const __m512i lanes = reduce_pairs(v0, v1, v2, v3);
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// 16 rows of 64 bytes -> out[q] holds dword q of every row.
inline void transpose_16(const __m512i* rows, __m512i* out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // b[4 i + j], 128-bit lane l: dword 4 l + j of rows 4 i .. 4 i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xee);
    out[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    out[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    out[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    out[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

// Bytes [16 rows, row_bytes] -> strip[q * stride + 4 i ..] = bytes 4 q .. 4 q + 3 of row i; zeros past the end of a row
// and for rows from `count` on. Writes quads in blocks of 16.
inline void transpose_strip(const uint8_t* bytes, int64_t row_bytes, int64_t count, uint8_t* strip, int64_t stride) {
  for (int64_t k = 0; k < row_bytes; k += 64) {
    __m512i rows[16], quads[16];
    for (int64_t i = 0; i < 16; ++i) {
      rows[i] = i < count ? load_first(bytes + i * row_bytes + k, row_bytes - k) : _mm512_setzero_si512();
    }
    transpose_16(rows, quads);
    for (int64_t q = 0; q < 16; ++q) _mm512_store_si512(strip + (k / 4 + q) * stride, quads[q]);
  }
}

// Multiplies kVectors vectors of 16 rows by kTokens tokens: lane i of acc[w][t] = sum over columns of row i of vector
// w. Weights::load makes the vectors of one quad of columns from Weights::kQuadBytes bytes of a strip.
template <class Weights, int kTokens>
inline void tile(const uint8_t* strip, int64_t quads, const int8_t* activations_q8, int64_t stride,
                 __m512i (&acc)[Weights::kVectors][kTokens]) {
  for (int w = 0; w < Weights::kVectors; ++w) {
    for (int t = 0; t < kTokens; ++t) acc[w][t] = _mm512_setzero_si512();
  }
  for (int64_t q = 0; q < quads; ++q, strip += Weights::kQuadBytes, activations_q8 += 4) {
    __m512i weights[Weights::kVectors];
    Weights::load(strip, weights);
    for (int t = 0; t < kTokens; ++t) {
      int32_t quad;
      std::memcpy(&quad, activations_q8 + t * stride, sizeof quad);
      const __m512i activations = _mm512_set1_epi32(quad);
      for (int w = 0; w < Weights::kVectors; ++w) acc[w][t] = dot(acc[w][t], weights[w], activations);
    }
  }
}

// Calls Body::run<T>(m) over all tokens in groups of T <= kMax tokens of almost equal size.
template <int kMax, class Body>
inline void by_token_groups(int64_t count, const Body& body) {
  const int64_t groups = (count + kMax - 1) / kMax;
  for (int64_t g = 0, m = 0; g < groups; ++g) {
    const int64_t size = (count - m + groups - g - 1) / (groups - g);
    switch (size) {
      case 1:
        body.template run<1>(m);
        break;
      case 2:
        body.template run<2>(m);
        break;
      case 3:
        body.template run<3>(m);
        break;
      case 4:
        body.template run<4>(m);
        break;
      case 5:
        if constexpr (kMax >= 5) body.template run<5>(m);
        break;
      case 6:
        if constexpr (kMax >= 6) body.template run<6>(m);
        break;
      case 7:
        if constexpr (kMax >= 7) body.template run<7>(m);
        break;
      case 8:
        if constexpr (kMax >= 8) body.template run<8>(m);
        break;
    }
    m += size;
  }
}

}  // namespace
}  // namespace avx512vnni
}  // namespace microvlm

// Unpacks a vector of packed ternary bytes for the avx2 variant, two bits and base 3.
#pragma once

#include "avx2.h"

namespace microvlm {
namespace avx2 {
namespace {

// The number of vpmaddubsw with trit codes 0..2 that an int16 lane can hold.
constexpr int64_t kStepsOfTritCodes = 64;

// One vector of packed bytes -> kPlanes vectors of trit codes, times 2^shift.
struct TwoBit {
  static constexpr int kPlanes = 4;
  static constexpr int64_t kSteps = 16;  // of fields left in place: trit codes 0, 4, 8
  static constexpr int shift(int plane) { return plane % 2 * 2; }
  static void fields(__m256i packed, __m256i* field) {
    const __m256i low = _mm256_set1_epi8(0x03), high = _mm256_set1_epi8(0x0c);
    const __m256i upper = _mm256_srli_epi16(packed, 4);
    field[0] = _mm256_and_si256(packed, low);
    field[1] = _mm256_and_si256(packed, high);
    field[2] = _mm256_and_si256(upper, low);
    field[3] = _mm256_and_si256(upper, high);
  }
};

struct BaseThree {
  static constexpr int kPlanes = 5;
  static constexpr int64_t kSteps = kStepsOfTritCodes;
  static constexpr int shift(int) { return 0; }
  // floor(b / 3^p) of every byte b <= 255: x * ceil(2^16 / 3^p) >> 16 is exact for one byte in 16 bits.
  static __m256i quotient(__m256i even, __m256i odd, int power) {
    const __m256i factor = _mm256_set1_epi16(static_cast<int16_t>((65535 + power) / power));
    const __m256i odd_quotient = _mm256_slli_epi16(_mm256_mulhi_epu16(odd, factor), 8);
    return _mm256_or_si256(_mm256_mulhi_epu16(even, factor), odd_quotient);
  }
  // Digit p = quotient p - 3 quotient p + 1.
  static void fields(__m256i packed, __m256i* field) {
    const __m256i even = _mm256_and_si256(packed, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(packed, 8);
    __m256i above = packed;
    for (int p = 0, power = 3; p < kPlanes - 1; ++p, power *= 3) {
      const __m256i next = quotient(even, odd, power);
      field[p] = _mm256_sub_epi8(_mm256_sub_epi8(above, next), _mm256_add_epi8(next, next));
      above = next;
    }
    field[kPlanes - 1] = above;
  }
};

}  // namespace
}  // namespace avx2
}  // namespace microvlm

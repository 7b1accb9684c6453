// What this x86-64 processor and its operating system can run. Uses cpuid itself: not every toolchain's runtime has the
// tables behind __builtin_cpu_supports.
#pragma once

#include <cpuid.h>

#include <cstdint>

namespace microvlm {
namespace {

// The register state that the system saves at a context switch: bits 1-2 SSE and AVX, bits 5-7 AVX-512.
inline uint64_t saved_state() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return static_cast<uint64_t>(d) << 32 | a;
}

inline bool has_avx2() {
  uint32_t a, b, c, d;
  return (saved_state() & 0x6) == 0x6 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}

// F, DQ, BW, VL, VBMI and VNNI: Intel from Ice Lake on, AMD from Zen 4 on.
inline bool has_avx512_vnni_vbmi() {
  constexpr uint32_t kEbx = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, kEcx = 1u << 1 | 1u << 11;
  uint32_t a, b, c, d;
  return (saved_state() & 0xe6) == 0xe6 && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & kEbx) == kEbx &&
         (c & kEcx) == kEcx;
}

}  // namespace
}  // namespace microvlm

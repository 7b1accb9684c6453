// The variant for ARMv8.2 processors with the dot product (Cortex-A55, A76 and later): sdot into 32-bit sums.

#include <sys/auxv.h>

#include "layers/float_steps.h"
#include "neon_bytes.h"
#include "neon_elementwise.h"
#include "neon_ternary.h"

namespace microvlm {
namespace {

// Sixteen products an instruction, added in 32 bits.
struct DotProduct {
  static constexpr bool kNarrow = false;
  using Partial = int32x4_t;

  static MICROVLM_INLINE Partial zero() { return vdupq_n_s32(0); }

  static MICROVLM_INLINE void widen(int32x4_t& total, Partial partial) { total = vaddq_s32(total, partial); }

  template <int kPlanes>
  static MICROVLM_INLINE void add_products(Partial (&sum)[kPlanes], const int8x16_t (&part)[kPlanes], int8x16_t x) {
    MICROVLM_UNROLL for (int p = 0; p < kPlanes; ++p) sum[p] = vdotq_s32(sum[p], part[p], x);
  }

  template <int kRows, int kTokens>
  static MICROVLM_INLINE void add_wide_products(int32x4_t (&total)[kRows][kTokens], const int8x16_t (&q)[kRows],
                                                const int8x16_t (&x)[kTokens]) {
    MICROVLM_EACH_PAIR total[r][t] = vdotq_s32(total[r][t], q[r], x[t]);
  }

  // One factor a lane.
  struct Factors {
    int32x4_t four[2];
  };
  static MICROVLM_INLINE Factors factors(int16x8_t eight) {
    return {{vmovl_s16(vget_low_s16(eight)), vmovl_high_s16(eight)}};
  }

  template <int kLane, int kRows, int kTokens>
  static MICROVLM_INLINE void add_group(int32x4_t (&total)[kRows][kTokens], const int8x16_t (&low)[kRows],
                                        const int8x16_t (&high)[kRows], const int8x16_t (&even)[kTokens],
                                        const int8x16_t (&odd)[kTokens], const Factors (&factor)[kRows]) {
    int32x4_t sum[kRows][kTokens];
    MICROVLM_EACH_PAIR sum[r][t] = vdotq_s32(vdupq_n_s32(0), low[r], even[t]);
    MICROVLM_EACH_PAIR sum[r][t] = vdotq_s32(sum[r][t], high[r], odd[t]);
    MICROVLM_EACH_PAIR total[r][t] = vmlaq_laneq_s32(total[r][t], sum[r][t], factor[r].four[kLane / 4], kLane % 4);
  }
};

int score() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 ? 20 : 0; }

int64_t scratch_bytes(int64_t, bool) { return 0; }

}  // namespace

const Kernels kNeonDot = {
    "neon-dot",
    score,
    quantize,
    scale_sums,
    scratch_bytes,
    by_tiles<Ternary<DotProduct, Base4, 2, 4>>,
    by_tiles<Ternary<DotProduct, Base3, 1, 2>>,
    by_tiles<Int8<DotProduct, 1>>,
    by_tiles<Int4<DotProduct, 2, 1, 4>>,
    dequantize_int8,
    dequantize_int4,
    kFloatSteps,
    kTaskWork,
};

}  // namespace microvlm

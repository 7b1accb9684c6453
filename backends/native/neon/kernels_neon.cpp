// The variant for every ARMv8 processor, the Cortex-A53 included: smlal into 16-bit sums, no dot product.
// bench/kernels/cortex_a53.py counts its instructions and simulates them on an A53.

#include <sys/auxv.h>

#include "layers/float_steps.h"
#include "neon_bytes.h"
#include "neon_elementwise.h"
#include "neon_ternary.h"

namespace microvlm {
namespace {

// Eight products an instruction, added in 16 bits and widened before they can overflow.
struct MultiplyLong {
  static constexpr bool kNarrow = true;
  using Partial = int16x8_t;

  static MICROVLM_INLINE Partial zero() { return vdupq_n_s16(0); }

  static MICROVLM_INLINE void widen(int32x4_t& total, Partial partial) { total = vpadalq_s16(total, partial); }

  // All lower halves before all upper halves: a sum is ready again when its turn comes.
  template <int kPlanes>
  static MICROVLM_INLINE void add_products(Partial (&sum)[kPlanes], const int8x16_t (&part)[kPlanes], int8x16_t x) {
    MICROVLM_UNROLL for (int p = 0; p < kPlanes; ++p) sum[p] = vmlal_s8(sum[p], vget_low_s8(part[p]), vget_low_s8(x));
    MICROVLM_UNROLL for (int p = 0; p < kPlanes; ++p) sum[p] = vmlal_high_s8(sum[p], part[p], x);
  }

  // 16 bits hold two products of -127..127 and -128..127, no more. Each instruction goes over all pairs of a row and a
  // token, as above.
  template <int kRows, int kTokens>
  static MICROVLM_INLINE void add_wide_products(int32x4_t (&total)[kRows][kTokens], const int8x16_t (&q)[kRows],
                                                const int8x16_t (&x)[kTokens]) {
    int16x8_t two[kRows][kTokens];
    MICROVLM_EACH_PAIR two[r][t] = vmull_s8(vget_low_s8(q[r]), vget_low_s8(x[t]));
    MICROVLM_EACH_PAIR two[r][t] = vmlal_high_s8(two[r][t], q[r], x[t]);
    MICROVLM_EACH_PAIR total[r][t] = vpadalq_s16(total[r][t], two[r][t]);
  }

  // One factor a lane.
  using Factors = int16x8_t;
  static MICROVLM_INLINE Factors factors(int16x8_t eight) { return eight; }

  template <int kLane, int kRows, int kTokens>
  static MICROVLM_INLINE void add_group(int32x4_t (&total)[kRows][kTokens], const int8x16_t (&low)[kRows],
                                        const int8x16_t (&high)[kRows], const int8x16_t (&even)[kTokens],
                                        const int8x16_t (&odd)[kTokens], const Factors (&factor)[kRows]) {
    int16x8_t four[kRows][kTokens];
    MICROVLM_EACH_PAIR four[r][t] = vmull_s8(vget_low_s8(low[r]), vget_low_s8(even[t]));
    MICROVLM_EACH_PAIR four[r][t] = vmlal_high_s8(four[r][t], low[r], even[t]);
    MICROVLM_EACH_PAIR four[r][t] = vmlal_s8(four[r][t], vget_low_s8(high[r]), vget_low_s8(odd[t]));
    MICROVLM_EACH_PAIR four[r][t] = vmlal_high_s8(four[r][t], high[r], odd[t]);
    MICROVLM_EACH_PAIR total[r][t] = vmlal_laneq_s16(total[r][t], vget_low_s16(four[r][t]), factor[r], kLane);
    MICROVLM_EACH_PAIR total[r][t] = vmlal_high_laneq_s16(total[r][t], four[r][t], factor[r], kLane);
  }
};

int score() { return (getauxval(AT_HWCAP) & HWCAP_ASIMD) != 0 ? 10 : 0; }

int64_t scratch_bytes(int64_t, bool) { return 0; }

}  // namespace

// Tiles are the fastest of those that fit the registers by published timings of a Cortex-A53 and by llvm-mca
// (`microvlm-bench loops`): a vector load stops vector arithmetic, and a second row uses the tokens' loads again.
const Kernels kNeon = {
    "neon",
    score,
    quantize,
    scale_sums,
    scratch_bytes,
    by_tiles<Ternary<MultiplyLong, Base4, 2, 4>>,
    by_tiles<Ternary<MultiplyLong, Base3, 1, 2>>,
    by_tiles<Int8<MultiplyLong, 2>>,
    by_tiles<Int4<MultiplyLong, 3, 2, 2>>,
    dequantize_int8,
    dequantize_int4,
    kFloatSteps,
    kTaskWork,
};

}  // namespace microvlm

// The variant for every ARMv8 processor, the Cortex-A53 included: 16-bit sums of smlal, no dot product.
// Instructions are counted and their flow through an A53 is simulated by bench/a53.py.

#include <sys/auxv.h>

#include "neon_bytes.h"
#include "neon_elementwise.h"
#include "neon_ternary.h"

namespace microvlm {
namespace {

// Eight products an instruction, added up in 16 bits and widened before these can overflow.
struct MultiplyLong {
  static constexpr bool kNarrow = true;
  using Partial = int16x8_t;

  static MICROVLM_INLINE Partial zero() { return vdupq_n_s16(0); }

  static MICROVLM_INLINE void widen(int32x4_t& total, Partial partial) { total = vpadalq_s16(total, partial); }

  // All the lower halves before all the upper ones: a sum is ready again when its turn comes.
  template <int kPlanes>
  static MICROVLM_INLINE void add_products(Partial (&sum)[kPlanes], const int8x16_t (&part)[kPlanes], int8x16_t x) {
    MICROVLM_UNROLL for (int p = 0; p < kPlanes; ++p) sum[p] = vmlal_s8(sum[p], vget_low_s8(part[p]), vget_low_s8(x));
    MICROVLM_UNROLL for (int p = 0; p < kPlanes; ++p) sum[p] = vmlal_high_s8(sum[p], part[p], x);
  }

  // Two products of -127..127 and -128..127 are all that 16 bits hold.
  static MICROVLM_INLINE void add_wide_products(int32x4_t& total, int8x16_t q, int8x16_t x) {
    const int16x8_t lower = vmull_s8(vget_low_s8(q), vget_low_s8(x));
    total = vpadalq_s16(total, vmlal_high_s8(lower, q, x));
  }

  static MICROVLM_INLINE void add_group(int32x4_t& total, int8x16_t low, int8x16_t high, int8x16_t even, int8x16_t odd,
                                        int16_t factor) {
    int16x8_t sum = vmull_s8(vget_low_s8(low), vget_low_s8(even));
    sum = vmlal_high_s8(sum, low, even);
    sum = vmlal_s8(sum, vget_low_s8(high), vget_low_s8(odd));
    sum = vmlal_high_s8(sum, high, odd);
    total = vmlal_n_s16(total, vget_low_s16(sum), factor);
    total = vmlal_high_n_s16(total, sum, factor);
  }
};

int score() { return (getauxval(AT_HWCAP) & HWCAP_ASIMD) != 0 ? 10 : 0; }

int64_t scratch_bytes(int64_t) { return 0; }

}  // namespace

const Kernels kNeon = {
    "neon",
    score,
    quantize,
    scale_sums,
    scratch_bytes,
    by_tiles<Ternary<MultiplyLong, Base4, 2, 4>>,
    by_tiles<Ternary<MultiplyLong, Base3, 1, 2>>,
    by_tiles<Int8<MultiplyLong>>,
    by_tiles<Int4<MultiplyLong>>,
    dequantize_int8,
    dequantize_int4,
};

}  // namespace microvlm

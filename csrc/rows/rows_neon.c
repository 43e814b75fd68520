/* SPDX-License-Identifier: Apache-2.0
 *
 * The row primitives for 64-bit Arm, where NEON is always there.
 */
#include "rows.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <math.h>
#include <string.h>

#define LANES 4
#define PANEL_ROWS 8
#define PANEL_VECTORS 2
#define TARGET

typedef float32x4_t vec;

static inline vec v_load(const float *x) { return vld1q_f32(x); }
static inline void v_store(float *x, vec a) { vst1q_f32(x, a); }
static inline vec v_fill(float x) { return vdupq_n_f32(x); }
static inline vec v_add(vec a, vec b) { return vaddq_f32(a, b); }
static inline vec v_mul(vec a, vec b) { return vmulq_f32(a, b); }
static inline vec v_div(vec a, vec b) { return vdivq_f32(a, b); }
static inline vec v_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
static inline vec v_max(vec a, vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); } /* b where a is NaN, unlike vmaxq */
static inline float v_sum(vec a) { return vaddvq_f32(a); }
static inline vec v_sums(const vec *x) { return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])); }
static inline vec v_from_f16(const uint16_t *x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
static inline vec v_from_bf16(const uint16_t *x) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16)); }

static inline float v_highest(vec a) {
    const float32x2_t x = vpmax_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(vpmax_f32(x, x), 0);
}

/* x = whole + rest with rest in [-1/2, 1/2]; a polynomial for 2^rest, and 2^whole from its bits: 0 at -127, infinity at
 * 128. vmaxq and vminq hand on a NaN. */
static inline vec v_exp2(vec x) {
    x = vminq_f32(vdupq_n_f32(128.0f), vmaxq_f32(vdupq_n_f32(-127.0f), x));
    const vec whole = vrndnq_f32(x), rest = vsubq_f32(x, whole);
    vec p = vdupq_n_f32(0.0013276472f);
    p = vfmaq_f32(vdupq_n_f32(0.00967554133f), p, rest);
    p = vfmaq_f32(vdupq_n_f32(0.0555071327f), p, rest);
    p = vfmaq_f32(vdupq_n_f32(0.240221197f), p, rest);
    p = vfmaq_f32(vdupq_n_f32(0.693146967f), p, rest);
    p = vfmaq_f32(vdupq_n_f32(1.00000007f), p, rest);
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127)), 23);
    return vmulq_f32(p, vreinterpretq_f32_s32(power));
}

static inline void v_transpose(vec *rows) {
    const float32x4x2_t one = vtrnq_f32(rows[0], rows[1]), two = vtrnq_f32(rows[2], rows[3]);
    rows[0] = vcombine_f32(vget_low_f32(one.val[0]), vget_low_f32(two.val[0]));
    rows[1] = vcombine_f32(vget_low_f32(one.val[1]), vget_low_f32(two.val[1]));
    rows[2] = vcombine_f32(vget_high_f32(one.val[0]), vget_high_f32(two.val[0]));
    rows[3] = vcombine_f32(vget_high_f32(one.val[1]), vget_high_f32(two.val[1]));
}

#include "rows_template.h"

#include "rows_select.h"

static bool is_available(void) { return true; }

/* Plain copies: the non-temporal pairs of Arm were not measured. */
static void stream(void *target, const void *source, size_t n) { memmove(target, source, n); }

static void end_stream(void) {}

const kvpi_rows kvpi_rows_neon = {
    .name = "neon",
    .is_available = is_available,
    SHARED_FUNCTIONS,
    FLOAT_FUNCTIONS,
};
#endif

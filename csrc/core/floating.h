/* SPDX-License-Identifier: Apache-2.0
 *
 * The floating-point environment. A thread may come with another rounding mode, with subnormal numbers taken for zeros
 * (one library that was linked with -ffast-math is enough, or torch.set_flush_denormal) or with traps; each would
 * change bits, and the threads of one call may differ in them. So the core works in the default one, and leaves the
 * thread's own as it was, exception flags too.
 */
#ifndef KVP_FLOATING_H
#define KVP_FLOATING_H

#include <fenv.h>

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "compiled with -ffast-math or -Ofast; expected neither, since NaN, infinity and the order of sums count"
#endif

static inline fenv_t kvpi_enter_default(void) {
    fenv_t own;
    fegetenv(&own);
    fesetenv(FE_DFL_ENV);
    return own;
}

static inline void kvpi_leave_default(fenv_t own) { fesetenv(&own); }

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * The row primitives without a line for any one processor: what runs everywhere.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 4
#define PANEL_ROWS 4
#define PANEL_VECTORS 2
#define TARGET

typedef float vec
    __attribute__((vector_size(LANES * sizeof(float)))); /* an extension of GCC and Clang; any processor can do it */
typedef int32_t flags __attribute__((vector_size(LANES * sizeof(float))));

#define EACH_LANE for (int i = 0; i < LANES; i++)

static inline vec v_load(const float *x) {
    vec out;
    memcpy(&out, x, sizeof out);
    return out;
}

static inline void v_store(float *x, vec a) { memcpy(x, &a, sizeof a); }

static inline vec v_fill(float x) { return (vec){x, x, x, x}; }

static inline vec v_add(vec a, vec b) { return a + b; }

static inline vec v_mul(vec a, vec b) { return a * b; }

static inline vec v_div(vec a, vec b) { return a / b; }

static inline vec v_fma(vec a, vec b, vec c) { return a * b + c; }

static inline vec v_max(vec a, vec b) {
    const flags above = a > b;
    return (vec)((above & (flags)a) | (~above & (flags)b));
}

static inline float v_sum(vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }

static inline vec v_sums(const vec *x) { return (vec){v_sum(x[0]), v_sum(x[1]), v_sum(x[2]), v_sum(x[3])}; }

static inline float v_highest(vec a) {
    float high = a[0];
    EACH_LANE high = a[i] > high ? a[i] : high;
    return high;
}

/* x = whole + rest with rest in [-1/2, 1/2]; a polynomial for 2^rest, and 2^whole from its bits: 0 at -127, infinity at
 * 128. */
static inline vec v_exp2(vec x) {
    const vec low = v_fill(-127), high = v_fill(128),
              magic = v_fill(0x1.8p23f); /* adding this rounds to a whole number */
    x = v_max(low, x);
    const flags above = x > high;
    x = (vec)((above & (flags)high) | (~above & (flags)x));
    const vec whole = (x + magic) - magic, rest = x - whole;
    vec p = v_fill(0.0013276472f);
    p = p * rest + v_fill(0.00967554133f);
    p = p * rest + v_fill(0.0555071327f);
    p = p * rest + v_fill(0.240221197f);
    p = p * rest + v_fill(0.693146967f);
    p = p * rest + v_fill(1.00000007f);
    vec power = low;
    EACH_LANE {
        const uint32_t bits = isnan(whole[i]) ? 0x7fc00000u : (uint32_t)((int32_t)whole[i] + 127) << 23;
        float two_to_whole;
        memcpy(&two_to_whole, &bits, sizeof two_to_whole);
        power[i] = two_to_whole;
    }
    return p * power;
}

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* bfloat16 is the upper half of a float32. */
static inline float widen_bf16(uint16_t x) { return bits_to_float((uint32_t)x << 16); }

/* IEEE half: 1 sign, 5 exponent (bias 15), 10 mantissa bits. Subnormals are mantissa * 2^-24. */
static inline float widen_f16(uint16_t x) {
    const uint32_t sign = (uint32_t)(x & 0x8000u) << 16, exponent = x >> 10 & 0x1fu, mantissa = x & 0x3ffu;
    if (exponent == 0) {
        const float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
    return bits_to_float(sign | (exponent + 112u) << 23 | mantissa << 13);
}

static inline vec v_from_f16(const uint16_t *x) {
    vec out = v_fill(0);
    EACH_LANE out[i] = widen_f16(x[i]);
    return out;
}

static inline vec v_from_bf16(const uint16_t *x) {
    vec out = v_fill(0);
    EACH_LANE out[i] = widen_bf16(x[i]);
    return out;
}

static inline void v_transpose(vec *rows) {
    for (int i = 0; i < LANES; i++) {
        for (int k = 0; k < i; k++) {
            const float swap = rows[i][k];
            rows[i][k] = rows[k][i];
            rows[k][i] = swap;
        }
    }
}

#include "rows_template.h"

#include "rows_select.h"

static bool is_available(void) { return true; }

static void stream(void *target, const void *source, size_t n) { memmove(target, source, n); }

static void end_stream(void) {}

const kvpi_rows kvpi_rows_scalar = {
    .name = "scalar",
    .is_available = is_available,
    SHARED_FUNCTIONS,
    FLOAT_FUNCTIONS,
};

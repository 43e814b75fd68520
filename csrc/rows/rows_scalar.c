/* SPDX-License-Identifier: Apache-2.0
 *
 * The row primitives in plain C: the definition the other tables are tested against, and the one that runs everywhere.
 */
#include "rows.h"

#include <string.h>

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float load_f32(float x) { return x; }

/* bfloat16 is the upper half of a float32. */
static inline float load_bf16(uint16_t x) { return from_bits((uint32_t)x << 16); }

/* IEEE half: 1 sign, 5 exponent (bias 15), 10 mantissa bits. Subnormals are mantissa * 2^-24. */
static inline float load_f16(uint16_t x) {
    const uint32_t sign = (uint32_t)(x & 0x8000u) << 16, exponent = x >> 10 & 0x1fu, mantissa = x & 0x3ffu;
    if (exponent == 0) {
        const float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
    return from_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
}

static inline float add_lanes(const float *sum) {
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

#define ROW_NAME(x) x##_f32
#define ROW_TYPE float
#define ROW_LOAD load_f32
#include "rows_template.h"

#define ROW_NAME(x) x##_f16
#define ROW_TYPE uint16_t
#define ROW_LOAD load_f16
#include "rows_template.h"

#define ROW_NAME(x) x##_bf16
#define ROW_TYPE uint16_t
#define ROW_LOAD load_bf16
#include "rows_template.h"

const kvpi_rows kvpi_rows_scalar = {
    .name = "scalar",
    .widen = {widen_f32, widen_f16, widen_bf16},
    .dot = {dot_f32, dot_f16, dot_bf16},
    .sum_of_squares = {sum_of_squares_f32, sum_of_squares_f16, sum_of_squares_bf16},
};

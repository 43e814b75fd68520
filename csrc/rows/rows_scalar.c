/* SPDX-License-Identifier: Apache-2.0
 *
 * The row primitives in plain C: what the other tables are tested against, and what runs everywhere.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define PANEL_ROWS 2
#define PANEL_VECTORS 1
#define TARGET

typedef struct vec {
    float lane[LANES];
} vec;

#define EACH_LANE for (int i = 0; i < LANES; i++)

static inline vec v_load(const float *x) {
    vec out;
    memcpy(&out, x, sizeof out);
    return out;
}

static inline void v_store(float *x, vec a) { memcpy(x, &a, sizeof a); }

static inline vec v_fill(float x) {
    vec out;
    EACH_LANE out.lane[i] = x;
    return out;
}

static inline vec v_add(vec a, vec b) {
    EACH_LANE a.lane[i] += b.lane[i];
    return a;
}

static inline vec v_mul(vec a, vec b) {
    EACH_LANE a.lane[i] *= b.lane[i];
    return a;
}

static inline vec v_fma(vec a, vec b, vec c) {
    EACH_LANE c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}

static inline vec v_max(vec a, vec b) {
    EACH_LANE a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}

static inline float v_sum(vec a) { return ((a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6])) + ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7])); }

static inline float v_highest(vec a) {
    float high = a.lane[0];
    EACH_LANE high = a.lane[i] > high ? a.lane[i] : high;
    return high;
}

/* x = whole + rest with rest in [-1/2, 1/2]; a polynomial for 2^rest, and 2^whole from its bits: 0 at -127, infinity at 128. */
static inline vec v_exp2(vec x) {
    vec out;
    for (int i = 0; i < LANES; i++) {
        const float lowest = x.lane[i] < -127.0f ? -127.0f : x.lane[i], clamped = lowest > 128.0f ? 128.0f : lowest;
        const float whole = (clamped + 0x1.8p23f) - 0x1.8p23f, rest = clamped - whole;
        float p = 0.0013276472f;
        p = p * rest + 0.00967554133f;
        p = p * rest + 0.0555071327f;
        p = p * rest + 0.240221197f;
        p = p * rest + 0.693146967f;
        p = p * rest + 1.00000007f;
        const uint32_t bits = isnan(whole) ? 0x7fc00000u : (uint32_t)((int32_t)whole + 127) << 23;
        float power;
        memcpy(&power, &bits, sizeof power);
        out.lane[i] = p * power;
    }
    return out;
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
    vec out;
    EACH_LANE out.lane[i] = widen_f16(x[i]);
    return out;
}

static inline vec v_from_bf16(const uint16_t *x) {
    vec out;
    EACH_LANE out.lane[i] = widen_bf16(x[i]);
    return out;
}

static inline void v_transpose(vec *rows) {
    for (int i = 0; i < LANES; i++) {
        for (int k = 0; k < i; k++) {
            const float swap = rows[i].lane[k];
            rows[i].lane[k] = rows[k].lane[i];
            rows[k].lane[i] = swap;
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
    .panel = PANEL_KEYS,
    .norms = {norms_f32, norms_f16, norms_bf16},
    .pack_keys = {pack_keys_f32, pack_keys_f16, pack_keys_bf16},
    .pack_queries = {pack_queries_f32, pack_queries_f16, pack_queries_bf16},
    .multiply = {multiply_floats, multiply_floats, multiply_floats},
    .soften = soften,
    .add_columns = add_columns,
    .list = list,
    .filter = filter,
    .stream = stream,
    .end_stream = end_stream,
};

/* SPDX-License-Identifier: Apache-2.0
 *
 * The row primitives for x86-64 processors with AVX-512 (F, BW, DQ, VL), and a second table for those that also multiply bfloat16 (AMD
 * since Zen 4, Intel since Cooper Lake), which is twice as fast as float32.
 */
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LANES 16
#define PANEL_ROWS 8
#define PANEL_VECTORS 2
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define TARGET_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

typedef __m512 vec;

TARGET static inline vec v_load(const float *x) { return _mm512_loadu_ps(x); }
TARGET static inline void v_store(float *x, vec a) { _mm512_storeu_ps(x, a); }
TARGET static inline vec v_fill(float x) { return _mm512_set1_ps(x); }
TARGET static inline vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
TARGET static inline vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
TARGET static inline vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
TARGET static inline float v_sum(vec a) { return _mm512_reduce_add_ps(a); }
TARGET static inline float v_highest(vec a) { return _mm512_reduce_max_ps(a); }
TARGET static inline vec v_from_f16(const uint16_t *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)x)); }

TARGET static inline vec v_from_bf16(const uint16_t *x) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* x = whole + rest with rest in [0, 1), which vreduceps gives in one step; a polynomial for 2^rest, and vscalefps for the whole part. */
TARGET static inline vec v_exp2(vec x) {
    const vec rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    vec p = _mm512_set1_ps(1.87757669e-3f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(8.98933969e-3f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.58263175e-2f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.40153611e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.93153083e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.99999940e-1f));
    return _mm512_scalef_ps(p, x);
}

#include "rows_template.h"

/* In place source and target may be the same row, but never overlap otherwise. */
TARGET static void stream(void *target, const void *source, size_t n) {
    if (((uintptr_t)target | n) % sizeof(__m512i)) {
        memmove(target, source, n);
        return;
    }
    for (size_t i = 0; i < n; i += sizeof(__m512i)) {
        const __m512i part = _mm512_loadu_si512((const char *)source + i);
        _mm512_stream_si512((__m512i *)(void *)((char *)target + i), part);
    }
}

static void end_stream(void) { _mm_sfence(); }

/* Packed bfloat16: as float32, but with two dimensions side by side in one 32-bit element. An odd last dimension is paired with zero. */
static void pack_key_pairs(kvpi_head head, int64_t n_key, int64_t n_dim, void *out) {
    uint16_t *panel = out;
    const int64_t n_pair = (n_dim + 1) / 2;
    for (int64_t first = 0; first < n_key; first += PANEL_KEYS, panel += PANEL_KEYS * n_pair * 2) {
        for (int64_t i = 0; i < PANEL_KEYS; i++) {
            const uint16_t *row = (const uint16_t *)head.first + (first + i) * head.row_stride;
            for (int64_t d = 0; d < 2 * n_pair; d++)
                panel[(d / 2 * PANEL_KEYS + i) * 2 + d % 2] = first + i < n_key && d < n_dim ? row[d * head.dim_stride] : 0;
        }
    }
}

/* The scale stays out of bfloat16, but for its sign, so that the highest logit times the scale is the highest scaled one. */
static float pack_query_pairs(const void *const *rows, int64_t dim_stride, int64_t n_row, int64_t n_dim, float scale, void *out) {
    uint16_t *panel = out;
    const int64_t n_pair = (n_dim + 1) / 2;
    const uint16_t sign = scale < 0 ? 0x8000u : 0;
    for (int64_t first = 0; first < n_row; first += PANEL_ROWS, panel += PANEL_ROWS * n_pair * 2) {
        for (int64_t r = 0; r < PANEL_ROWS; r++) {
            const uint16_t *row = first + r < n_row ? rows[first + r] : NULL;
            for (int64_t d = 0; d < 2 * n_pair; d++)
                panel[(d / 2 * PANEL_ROWS + r) * 2 + d % 2] = row && d < n_dim ? (uint16_t)(row[d * dim_stride] ^ sign) : 0;
        }
    }
    return fabsf(scale);
}

TARGET_BF16 static void multiply_pairs(const void *queries, const void *keys, int64_t n_row, int64_t n_key, int64_t n_dim, float *logits,
                                       int64_t stride) {
    const int64_t n_pair = (n_dim + 1) / 2;
    for (int64_t key = 0; key < n_key; key += PANEL_KEYS) {
        for (int64_t row = 0; row < n_row; row += PANEL_ROWS) {
            const uint32_t *k = (const uint32_t *)keys + key * n_pair, *q = (const uint32_t *)queries + row * n_pair;
            vec sum[PANEL_ROWS][PANEL_VECTORS];
            for (int r = 0; r < PANEL_ROWS; r++)
                for (int v = 0; v < PANEL_VECTORS; v++) sum[r][v] = _mm512_setzero_ps();
            for (int64_t d = 0; d < n_pair; d++) {
                __m512bh of_keys[PANEL_VECTORS];
                for (int v = 0; v < PANEL_VECTORS; v++) of_keys[v] = (__m512bh)_mm512_loadu_si512(k + v * LANES);
                for (int r = 0; r < PANEL_ROWS; r++) {
                    const __m512bh of_query = (__m512bh)_mm512_set1_epi32((int32_t)q[r]);
                    for (int v = 0; v < PANEL_VECTORS; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], of_query, of_keys[v]);
                }
                k += PANEL_KEYS;
                q += PANEL_ROWS;
            }
            for (int r = 0; r < PANEL_ROWS; r++)
                for (int v = 0; v < PANEL_VECTORS; v++) _mm512_storeu_ps(logits + (row + r) * stride + key + v * LANES, sum[r][v]);
        }
    }
}

static bool is_available(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c");
}

static bool is_bf16_available(void) { return is_available() && __builtin_cpu_supports("avx512bf16"); }

#define SHARED_FUNCTIONS                                                                                          \
    .panel = PANEL_KEYS, .sum_of_squares = {sum_of_squares_f32, sum_of_squares_f16, sum_of_squares_bf16}, .soften = soften, \
    .add_columns = add_columns, .stream = stream, .end_stream = end_stream

const kvpi_rows kvpi_rows_avx512 = {
    .name = "avx512",
    .is_available = is_available,
    SHARED_FUNCTIONS,
    .pack_keys = {pack_keys_f32, pack_keys_f16, pack_keys_bf16},
    .pack_queries = {pack_queries_f32, pack_queries_f16, pack_queries_bf16},
    .multiply = {multiply_floats, multiply_floats, multiply_floats},
};

const kvpi_rows kvpi_rows_avx512_bf16 = {
    .name = "avx512_bf16",
    .is_available = is_bf16_available,
    SHARED_FUNCTIONS,
    .pack_keys = {pack_keys_f32, pack_keys_f16, pack_key_pairs},
    .pack_queries = {pack_queries_f32, pack_queries_f16, pack_query_pairs},
    .multiply = {multiply_floats, multiply_floats, multiply_pairs},
};
#endif

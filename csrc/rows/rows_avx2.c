/* SPDX-License-Identifier: Apache-2.0
 *
 * The row primitives for x86-64 processors with AVX2, FMA and F16C (2013 and later).
 */
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LANES 8
#define PANEL_ROWS 4
#define PANEL_VECTORS 2
#define TARGET __attribute__((target("avx2,fma,f16c")))

typedef __m256 vec;

TARGET static inline vec v_load(const float *x) { return _mm256_loadu_ps(x); }
TARGET static inline void v_store(float *x, vec a) { _mm256_storeu_ps(x, a); }
TARGET static inline vec v_fill(float x) { return _mm256_set1_ps(x); }
TARGET static inline vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
TARGET static inline vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
TARGET static inline vec v_div(vec a, vec b) { return _mm256_div_ps(a, b); }
TARGET static inline vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
TARGET static inline vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
TARGET static inline vec v_from_f16(const uint16_t *x) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)x));
}

TARGET static inline vec v_from_bf16(const uint16_t *x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

TARGET static inline float v_sum(vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

TARGET static inline vec v_sums(const vec *x) {
    const vec low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3])); /* of each half */
    const vec high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

TARGET static inline float v_highest(vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

/* x = whole + rest with rest in [-1/2, 1/2]; a polynomial for 2^rest, and 2^whole from its bits: 0 at -127, infinity at
 * 128. The comparisons hand on a NaN, which is their second argument. */
TARGET static inline vec v_exp2(vec x) {
    x = _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), x));
    const vec whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), rest = _mm256_sub_ps(x, whole);
    vec p = _mm256_set1_ps(0.0013276472f);
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(0.00967554133f));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(0.0555071327f));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(0.240221197f));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(0.693146967f));
    p = _mm256_fmadd_ps(p, rest, _mm256_set1_ps(1.00000007f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

TARGET static inline void v_transpose(vec *rows) {
    vec pairs[8], fours[8]; /* of rows; then columns j and j + 4 of four rows, in the two halves */
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    }
    for (int j = 0; j < 4; j++) {
        rows[j] = _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x20);
        rows[j + 4] = _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x31);
    }
}

#include "rows_template.h"

#include "rows_select.h"

/* In place source and target may be the same row, but never overlap otherwise. */
TARGET static void stream(void *target, const void *source, size_t n) {
    if (((uintptr_t)target | n) % sizeof(__m256i)) {
        memmove(target, source, n);
        return;
    }
    for (size_t i = 0; i < n; i += sizeof(__m256i)) {
        const __m256i part = _mm256_loadu_si256((const __m256i *)(const void *)((const char *)source + i));
        _mm256_stream_si256((__m256i *)(void *)((char *)target + i), part);
    }
}

static void end_stream(void) { _mm_sfence(); }

static bool is_available(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && kvpi_has_f16c();
}

const kvpi_rows kvpi_rows_avx2 = {
    .name = "avx2",
    .is_available = is_available,
    SHARED_FUNCTIONS,
    FLOAT_FUNCTIONS,
};
#endif

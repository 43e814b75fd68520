/* SPDX-License-Identifier: Apache-2.0
 *
 * The row primitives for x86-64 processors with AVX-512 (F, BW, DQ, VL), and a second table for those that also
 * multiply bfloat16 (AMD since Zen 4, Intel since Cooper Lake), which is faster than float32 on AMD's, and slower
 * on Intel's (cpu_features.c), and a third for those that multiply tiles of it (AMX, Intel since Sapphire Rapids): H2O
 * of 2048 tokens, 32/8/128, takes 40 ms by tiles, 119 by avx512 and 172 by avx512_bf16 (an Intel Xeon with AMX, one
 * core).
 */
#define _DEFAULT_SOURCE /* for syscall */
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
TARGET static inline vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
TARGET static inline vec v_div(vec a, vec b) { return _mm512_div_ps(a, b); }
TARGET static inline vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
TARGET static inline vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
TARGET static inline float v_sum(vec a) { return _mm512_reduce_add_ps(a); }
TARGET static inline vec v_sums(const vec *x) {
    vec twos[8], fours[4]; /* sums of neighbours in each quarter: of two vectors by turns; of four, and the quarter's */
    for (int i = 0; i < 8; i++)
        twos[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    for (int i = 0; i < 4; i++)
        fours[i] = _mm512_add_ps(_mm512_shuffle_ps(twos[2 * i], twos[2 * i + 1], 0x44),
                                 _mm512_shuffle_ps(twos[2 * i], twos[2 * i + 1], 0xee));
    const vec low =
        _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    const vec high =
        _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88), _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}
TARGET static inline float v_highest(vec a) { return _mm512_reduce_max_ps(a); }
TARGET static inline vec v_from_f16(const uint16_t *x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)x));
}

TARGET static inline vec v_from_bf16(const uint16_t *x) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* The first n of LANES elements; a masked load reads no others. */
#define HAS_MASKS
TARGET static inline __mmask16 first_of(int64_t n) { return (__mmask16)((1u << n) - 1); }
TARGET static inline vec v_part_f32(const float *x, int64_t n) { return _mm512_maskz_loadu_ps(first_of(n), x); }
TARGET static inline vec v_part_f16(const uint16_t *x, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_of(n), x));
}

TARGET static inline vec v_part_bf16(const uint16_t *x, int64_t n) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_of(n), x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

TARGET static inline void move_part(char *target, const char *source, size_t n) {
    const __mmask64 first = ((__mmask64)1 << n) - 1;
    _mm512_mask_storeu_epi8(target, first, _mm512_maskz_loadu_epi8(first, source));
}

/* x = whole + rest with rest in [0, 1), which vreduceps gives in one step; a polynomial for 2^rest, and vscalefps for
 * the whole part. */
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

TARGET static inline void v_transpose(vec *rows) {
    vec pairs[16], fours[16]; /* of rows; then columns j, j + 4, j + 8 and j + 12 of four rows, in the four quarters */
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            fours[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    }
    for (int j = 0; j < 4; j++) {
        const vec even[2] = {_mm512_shuffle_f32x4(fours[j], fours[j + 4], 0x88),
                             _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0x88)};
        const vec odd[2] = {_mm512_shuffle_f32x4(fours[j], fours[j + 4], 0xdd),
                            _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0xdd)};
        rows[j] = _mm512_shuffle_f32x4(even[0], even[1], 0x88);
        rows[j + 4] = _mm512_shuffle_f32x4(odd[0], odd[1], 0x88);
        rows[j + 8] = _mm512_shuffle_f32x4(even[0], even[1], 0xdd);
        rows[j + 12] = _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd);
    }
}

#include "rows_template.h"

/* Compressed in a register first: compressing to memory is several times slower on Zen 4. */
TARGET static int64_t list(const uint32_t *ranks, int64_t n, uint32_t lowest, int32_t first, int32_t *out,
                           int64_t n_out) {
    const __m512i bound = _mm512_set1_epi32((int32_t)lowest), step = _mm512_set1_epi32(LANES);
    __m512i position = _mm512_add_epi32(_mm512_set1_epi32(first),
                                        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    int64_t n_listed = 0;
    for (int64_t i = 0; i < n && n_listed < n_out; i += LANES, position = _mm512_add_epi32(position, step)) {
        const __mmask16 inside = (__mmask16)(n - i < LANES ? (1u << (n - i)) - 1 : 0xffffu);
        const __mmask16 chosen =
            _mm512_mask_cmpge_epu32_mask(inside, _mm512_maskz_loadu_epi32(inside, ranks + i), bound);
        const __m512i packed = _mm512_maskz_compress_epi32(chosen, position);
        const int64_t count = __builtin_popcount(chosen), room = n_out - n_listed;
        if (room >= LANES)
            _mm512_storeu_si512(out + n_listed, packed);
        else
            _mm512_mask_storeu_epi32(out + n_listed, (__mmask16)((1u << room) - 1), packed);
        n_listed += count < room ? count : room;
    }
    return n_listed;
}

TARGET static int64_t filter(const uint32_t *ranks, int64_t n, uint32_t mask, uint32_t prefix, uint32_t *out) {
    const __m512i bits = _mm512_set1_epi32((int32_t)mask), wanted = _mm512_set1_epi32((int32_t)prefix);
    int64_t n_left = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        const __mmask16 inside = (__mmask16)(n - i < LANES ? (1u << (n - i)) - 1 : 0xffffu);
        const __m512i rank = _mm512_maskz_loadu_epi32(inside, ranks + i);
        const __mmask16 chosen = _mm512_mask_cmpeq_epi32_mask(inside, _mm512_and_si512(rank, bits), wanted);
        _mm512_storeu_si512(out + n_left, _mm512_maskz_compress_epi32(chosen, rank));
        n_left += __builtin_popcount(chosen);
    }
    return n_left;
}

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

/* Packed bfloat16: as float32, but with two dimensions side by side in one 32-bit element. An odd last dimension is
 * paired with zero. */
TARGET __attribute__((noinline)) static vec gather_pairs(const uint16_t *row, int64_t stride, int64_t pair,
                                                         int64_t n_dim) {
    uint16_t part[2 * LANES];
    for (int64_t i = 0; i < 2 * LANES; i++) part[i] = 2 * pair + i < n_dim ? row[(2 * pair + i) * stride] : 0;
    return _mm512_loadu_ps(part);
}

TARGET static inline vec load_pairs(const uint16_t *row, int64_t stride, int64_t pair, int64_t n_dim) {
    const int64_t n = n_dim - 2 * pair; /* elements that are left */
    if (stride != 1) return gather_pairs(row, stride, pair, n_dim);
    if (n >= 2 * LANES) return _mm512_loadu_ps(row + 2 * pair);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), row + 2 * pair));
}

TARGET static void pack_key_pairs(kvpi_head head, int64_t n_key, int64_t n_dim, void *out) {
    const uint16_t *first = head.first;
    const int64_t n_pair = (n_dim + 1) / 2;
    for (int64_t key = 0; key < n_key; key += LANES) {
        float *panel = (float *)out + key / PANEL_KEYS * PANEL_KEYS * n_pair + key % PANEL_KEYS;
        for (int64_t pair = 0; pair < n_pair; pair += LANES) {
            vec part[LANES];
            for (int64_t i = 0; i < LANES; i++)
                part[i] = key + i < n_key
                              ? load_pairs(first + (key + i) * head.row_stride, head.dim_stride, pair, n_dim)
                              : v_fill(0);
            store_columns(part, n_pair - pair < LANES ? n_pair - pair : LANES, panel + pair * PANEL_KEYS, PANEL_KEYS);
        }
    }
    clear_missing_keys(out, n_key, n_pair);
}

/* The scale stays out of bfloat16, but for its sign, so that the highest logit times the scale is the highest scaled
 * one. */
TARGET static float pack_query_pairs(const void *const *rows, int64_t dim_stride, int64_t n_row, int64_t n_dim,
                                     float scale, void *out) {
    const int64_t n_pair = (n_dim + 1) / 2;
    const __m512i signs = _mm512_set1_epi32(scale < 0 ? (int32_t)0x80008000u : 0);
    for (int64_t pair = 0; pair < n_pair; pair += LANES) {
        vec part[LANES];
        for (int64_t i = 0; i < LANES; i++) {
            const vec row = i < n_row ? load_pairs(rows[i], dim_stride, pair, n_dim) : v_fill(0);
            part[i] = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(row), signs));
        }
        store_columns(part, n_pair - pair < LANES ? n_pair - pair : LANES, (float *)out + pair * KVPI_STRIP,
                      KVPI_STRIP);
    }
    return fabsf(scale);
}
_Static_assert(KVPI_STRIP == LANES, "pack_query_pairs makes one vector of a strip");

TARGET_BF16 static void multiply_pairs(const void *queries, const void *keys, int64_t n_row, int64_t n_key,
                                       int64_t n_dim, float *logits, int64_t stride) {
    const int64_t n_pair = (n_dim + 1) / 2;
    for (int64_t key = 0; key < n_key; key += PANEL_KEYS) {
        for (int64_t row = 0; row < n_row; row += PANEL_ROWS) {
            const uint32_t *k = (const uint32_t *)keys + key * n_pair, *q = (const uint32_t *)queries + row;
            vec sum[PANEL_ROWS][PANEL_VECTORS];
            for (int r = 0; r < PANEL_ROWS; r++)
                for (int v = 0; v < PANEL_VECTORS; v++) sum[r][v] = _mm512_setzero_ps();
            for (int64_t d = 0; d < n_pair; d++) {
                __m512bh of_keys[PANEL_VECTORS];
                for (int v = 0; v < PANEL_VECTORS; v++) of_keys[v] = (__m512bh)_mm512_loadu_si512(k + v * LANES);
                for (int r = 0; r < PANEL_ROWS; r++) {
                    const __m512bh of_query = (__m512bh)_mm512_set1_epi32((int32_t)q[r]);
                    for (int v = 0; v < PANEL_VECTORS; v++)
                        sum[r][v] = _mm512_dpbf16_ps(sum[r][v], of_query, of_keys[v]);
                }
                k += PANEL_KEYS;
                q += KVPI_STRIP;
            }
            for (int r = 0; r < PANEL_ROWS; r++)
                for (int v = 0; v < PANEL_VECTORS; v++)
                    _mm512_storeu_ps(logits + (row + r) * stride + key + v * LANES, sum[r][v]);
        }
    }
}

static bool is_available(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && kvpi_has_f16c();
}

static bool is_bf16_available(void) { return is_available() && __builtin_cpu_supports("avx512bf16"); }

const kvpi_rows kvpi_rows_avx512 = {
    .name = "avx512",
    .is_available = is_available,
    SHARED_FUNCTIONS,
    FLOAT_FUNCTIONS,
};

const kvpi_rows kvpi_rows_avx512_bf16 = {
    .name = "avx512_bf16",
    .is_available = is_bf16_available,
    SHARED_FUNCTIONS,
    .pack_keys = {[KVP_F32] = pack_keys_f32, [KVP_F16] = pack_keys_f16, [KVP_BF16] = pack_key_pairs},
    .pack_queries = {[KVP_F32] = pack_queries_f32, [KVP_F16] = pack_queries_f16, [KVP_BF16] = pack_query_pairs},
    .multiply = {[KVP_F32] = multiply_floats, [KVP_F16] = multiply_floats, [KVP_BF16] = multiply_pairs},
};

#ifdef KVPI_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TARGET_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

/* A strip of query rows is the left tile, 16 pairs of dimensions wide; a panel of packed key pairs, as pack_key_pairs
 * lays them, two right ones. */
enum { TILE_PAIRS = 16, TILE_BYTES = 64 };
_Static_assert(KVPI_STRIP == 16 && PANEL_KEYS * sizeof(float) == 2 * TILE_BYTES, "tiles have 16 rows of 64 bytes");

static bool fills_tiles(int64_t n_dim) { return n_dim % (2 * TILE_PAIRS) == 0; }

TARGET static void pack_key_tiles(kvpi_head head, int64_t n_key, int64_t n_dim, void *out) {
    if (fills_tiles(n_dim))
        pack_key_pairs(head, n_key, n_dim, out);
    else
        pack_keys_bf16(head, n_key, n_dim, out);
}

/* Rows as they are, but for the sign of the scale; see pack_query_pairs. */
TARGET static float pack_query_tiles(const void *const *rows, int64_t dim_stride, int64_t n_row, int64_t n_dim,
                                     float scale, void *out) {
    if (!fills_tiles(n_dim)) return pack_queries_bf16(rows, dim_stride, n_row, n_dim, scale, out);
    const __m512i signs = _mm512_set1_epi32(scale < 0 ? (int32_t)0x80008000u : 0);
    for (int64_t r = 0; r < KVPI_STRIP; r++) {
        for (int64_t pair = 0; pair < n_dim / 2; pair += TILE_PAIRS) {
            const vec part = r < n_row ? load_pairs(rows[r], dim_stride, pair, n_dim) : v_fill(0);
            _mm512_storeu_si512((float *)out + r * (n_dim / 2) + pair,
                                _mm512_xor_si512(_mm512_castps_si512(part), signs));
        }
    }
    return fabsf(scale);
}

typedef struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t n_row[16];
} tile_config;
_Static_assert(sizeof(tile_config) == 64, "as the processor reads it");

/* Of 128 dimensions: the queries' four tiles stay. */
TARGET_AMX static void multiply_four(const char *queries, const char *keys, int64_t n_key, float *logits,
                                     int64_t stride) {
    enum { STEP = TILE_PAIRS * PANEL_KEYS * 4, ROW = 4 * TILE_BYTES };
    _tile_loadd(4, queries, ROW);
    _tile_loadd(5, queries + TILE_BYTES, ROW);
    _tile_loadd(6, queries + 2 * TILE_BYTES, ROW);
    _tile_loadd(7, queries + 3 * TILE_BYTES, ROW);
    for (int64_t key = 0; key < n_key; key += PANEL_KEYS, keys += 4 * STEP) {
        _tile_zero(0);
        _tile_zero(1);
#define ADD_TILES(step, of_queries)                                    \
    _tile_loadd(2, keys + (step) * STEP, 2 * TILE_BYTES);              \
    _tile_dpbf16ps(0, of_queries, 2);                                  \
    _tile_loadd(3, keys + (step) * STEP + TILE_BYTES, 2 * TILE_BYTES); \
    _tile_dpbf16ps(1, of_queries, 3)
        ADD_TILES(0, 4);
        ADD_TILES(1, 5);
        ADD_TILES(2, 6);
        ADD_TILES(3, 7);
#undef ADD_TILES
        _tile_stored(0, logits + key, (size_t)stride * sizeof(float));
        _tile_stored(1, logits + key + LANES, (size_t)stride * sizeof(float));
    }
}

TARGET_AMX static void multiply_any(const char *queries, const char *keys, int64_t n_key, int64_t n_pair, float *logits,
                                    int64_t stride) {
    for (int64_t key = 0; key < n_key; key += PANEL_KEYS) {
        const char *q = queries;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t d = 0; d < n_pair; d += TILE_PAIRS, q += TILE_BYTES, keys += TILE_PAIRS * PANEL_KEYS * 4) {
            _tile_loadd(2, q, (size_t)n_pair * 4);
            _tile_loadd(3, keys, 2 * TILE_BYTES);
            _tile_loadd(4, keys + TILE_BYTES, 2 * TILE_BYTES);
            _tile_dpbf16ps(0, 2, 3);
            _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, logits + key, (size_t)stride * sizeof(float));
        _tile_stored(1, logits + key + LANES, (size_t)stride * sizeof(float));
    }
}

TARGET_AMX static void multiply_tiles(const void *queries, const void *keys, int64_t n_row, int64_t n_key,
                                      int64_t n_dim, float *logits, int64_t stride) {
    tile_config config = {.palette = 1};
    if (!fills_tiles(n_dim)) {
        multiply_floats(queries, keys, n_row, n_key, n_dim, logits, stride);
        return;
    }
    for (int t = 0; t < 8; t++) config.row_bytes[t] = TILE_BYTES, config.n_row[t] = 16;
    _tile_loadconfig(&config);
    if (n_dim == 8 * TILE_PAIRS)
        multiply_four(queries, keys, n_key, logits, stride);
    else
        multiply_any(queries, keys, n_key, n_dim / 2, logits, stride);
    _tile_release();
}

/* The processor has tiles (bit 24) of bfloat16 (bit 22), and Linux lends this process the room to save them
 * (arch_prctl, ARCH_REQ_XCOMP_PERM). */
static bool is_amx_available(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned eax, ebx, ecx, edx;
    return is_bf16_available() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1) &&
           (edx >> 24 & 1) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

const kvpi_rows kvpi_rows_amx = {
    .name = "amx",
    .is_available = is_amx_available,
    SHARED_FUNCTIONS,
    .pack_keys = {[KVP_F32] = pack_keys_f32, [KVP_F16] = pack_keys_f16, [KVP_BF16] = pack_key_tiles},
    .pack_queries = {[KVP_F32] = pack_queries_f32, [KVP_F16] = pack_queries_f16, [KVP_BF16] = pack_query_tiles},
    .multiply = {[KVP_F32] = multiply_floats, [KVP_F16] = multiply_floats, [KVP_BF16] = multiply_tiles},
};
#endif
#endif

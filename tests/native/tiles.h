/* SPDX-License-Identifier: Apache-2.0
 *
 * Intel's tiles (AMX) in plain C, for processors that have none: `make tiles` puts this before rows_avx512.c, whose
 * code for them then runs under the sanitizers, which see no load of a real tile. The rest of that code needs AVX-512.
 */
#ifndef KVP_TILES_H
#define KVP_TILES_H

#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A processor that has tiles, and a system that lends them. */
#undef __get_cpuid_count
#define __get_cpuid_count(leaf, part, a, b, c, d) ((void)(a), (void)(b), (void)(c), *(d) = ~0u, 1)
#undef syscall
#define syscall(...) 0

typedef struct tiles {
    uint8_t palette, start_row, reserved[14]; /* as the configuration lies in memory */
    uint16_t row_bytes[16];
    uint8_t n_row[16];
    uint8_t bytes[8][16][64];
} tiles;

static _Thread_local tiles tile;

static inline void tile_load_config(const void *config) {
    memset(&tile, 0, sizeof tile);
    memcpy(&tile, config, 64);
    if (tile.palette != 1) abort();
}

static inline void tile_load(int t, const void *from, size_t stride) {
    if (tile.palette != 1) abort();
    for (int row = 0; row < tile.n_row[t]; row++)
        memcpy(tile.bytes[t][row], (const char *)from + (size_t)row * stride, tile.row_bytes[t]);
}

static inline void tile_store(int t, void *to, size_t stride) {
    if (tile.palette != 1) abort();
    for (int row = 0; row < tile.n_row[t]; row++)
        memcpy((char *)to + (size_t)row * stride, tile.bytes[t][row], tile.row_bytes[t]);
}

/* The two bfloat16 of one place: the first is the low half. */
static inline void tile_pair(const uint8_t *at, float pair[2]) {
    uint32_t bits;
    memcpy(&bits, at, 4);
    const uint32_t halves[2] = {bits << 16, bits & 0xffff0000u};
    memcpy(pair, halves, 8);
}

/* to[m][n] += a[m][k] . b[k][n], of pairs; sums of evens and of odds are apart until the end. */
static inline void tile_multiply(int to, int a, int b) {
    for (int m = 0; m < tile.n_row[to]; m++)
        for (int n = 0; n < tile.row_bytes[to] / 4; n++) {
            float sum, part[2] = {0, 0}, x[2], y[2];
            for (int k = 0; k < tile.row_bytes[a] / 4; k++) {
                tile_pair(tile.bytes[a][m] + 4 * k, x);
                tile_pair(tile.bytes[b][k] + 4 * n, y);
                part[0] += x[0] * y[0];
                part[1] += x[1] * y[1];
            }
            memcpy(&sum, tile.bytes[to][m] + 4 * n, 4);
            sum += part[0] + part[1];
            memcpy(tile.bytes[to][m] + 4 * n, &sum, 4);
        }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) tile_load_config(config)
#define _tile_release() (tile.palette = 0)
#define _tile_zero(t) memset(tile.bytes[t], 0, sizeof tile.bytes[t])
#define _tile_loadd(t, from, stride) tile_load(t, from, stride)
#define _tile_stored(t, to, stride) tile_store(t, to, stride)
#define _tile_dpbf16ps(to, a, b) tile_multiply(to, a, b)

#endif

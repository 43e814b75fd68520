/* SPDX-License-Identifier: Apache-2.0
 *
 * Which tiles of columns a tile of rows needs, and which of them without looking at any mask; plain C, so that the
 * host can test it.
 */
#ifndef KVP_BAND_H
#define KVP_BAND_H

#include <stdbool.h>

#ifdef __CUDACC__
#define KVPG_EVERYWHERE __host__ __device__ __forceinline__
#else
#define KVPG_EVERYWHERE static inline
#endif

/* Of a tile of rows: some take some of [lo,hi), all take all of [full_lo,full_hi). */
typedef struct kvpg_cover {
    int lo, hi, full_lo, full_hi;
} kvpg_cover;

/* Of tiles 0 to n-1: none of [0,begin) and [end,n) is needed, all of [full,full_end) are taken by all rows. */
typedef struct kvpg_band {
    int begin, full, full_end, end;
} kvpg_band;

KVPG_EVERYWHERE int kvpg_least(int a, int b) { return a < b ? a : b; }
KVPG_EVERYWHERE int kvpg_most(int a, int b) { return a > b ? a : b; }

/* Tiles are of `size` columns, the first from `column` on; of a cover that is not empty they hold at least one column.
 * Where single columns may be masked (has_masked), no tile is full. */
KVPG_EVERYWHERE kvpg_band kvpg_find_band(kvpg_cover cover, int column, int n, int size, bool has_masked) {
    kvpg_band band = {n, n, n, n};
    if (cover.lo >= cover.hi) return band;
    band.begin = kvpg_least(n, kvpg_most(0, cover.lo - column) / size);
    band.end = kvpg_least(n, (cover.hi - column + size - 1) / size);
    const int first_full = (kvpg_most(cover.full_lo - column, 0) + size - 1) / size,
              full_hi = kvpg_least(cover.full_hi, cover.hi);
    band.full = has_masked ? band.end : kvpg_least(band.end, kvpg_most(band.begin, first_full));
    band.full_end = kvpg_most(band.full, kvpg_least(band.end, (full_hi - column) / size));
    return band;
}

#endif

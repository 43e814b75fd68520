/* SPDX-License-Identifier: Apache-2.0
 *
 * Which tiles the GPU's attention on Hopper looks at, column by column.
 */
#include "harness.h"
#include "score/attention/band.h"
#include "tests.h"

static int between(int low, int high) { return low + (int)random_below(high - low + 1); }

/* What a tile is by definition: whether any row takes one of its columns, and whether all rows take all of them. */
static void check_tile(kvpg_cover cover, int first, int size, bool has_masked, kvpg_band band, int tile) {
    bool is_needed = false, is_full = !has_masked;
    for (int column = first; column < first + size; column++) {
        const bool is_taken = column >= cover.lo && column < cover.hi;
        is_needed |= is_taken;
        is_full &= is_taken && column >= cover.full_lo && column < cover.full_hi;
    }
    CHECK((tile >= band.begin && tile < band.end) == is_needed, "tile %d is needed: %d", tile, is_needed);
    CHECK((tile >= band.full && tile < band.full_end) == is_full, "tile %d is full: %d", tile, is_full);
}

void test_band(void) {
    for (int i = 0; i < 20000; i++) {
        const int size = between(1, 9), n = between(0, 7), column = between(0, 20), end = column + n * size;
        kvpg_cover cover = {0, 0, 0, 0};
        if (n > 0 && random_below(8)) {
            cover.lo = between(column > 4 ? column - 4 : 0, end - 1);
            cover.hi = between(cover.lo < column ? column + 1 : cover.lo + 1, end + 4);
            cover.full_lo = between(cover.lo, cover.hi); /* all rows take no more than some do */
            cover.full_hi = random_below(4) ? between(cover.lo, cover.hi) : 0;
        }
        const bool has_masked = random_below(4) == 0;
        const kvpg_band band = kvpg_find_band(cover, column, n, size, has_masked);
        name_case("band of [%d,%d), full [%d,%d), %d tiles of %d from %d", cover.lo, cover.hi, cover.full_lo,
                  cover.full_hi, n, size, column);
        CHECK(0 <= band.begin && band.begin <= band.full && band.full <= band.full_end && band.full_end <= band.end &&
                  band.end <= n,
              "not in order: %d %d %d %d", band.begin, band.full, band.full_end, band.end);
        for (int tile = 0; tile < n; tile++) check_tile(cover, column + tile * size, size, has_masked, band, tile);
    }
}

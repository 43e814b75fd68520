/* SPDX-License-Identifier: Apache-2.0
 *
 * The order of kvp.h as unsigned numbers, and their digits: what topk.c and share.c search by.
 */
#ifndef KVP_RANKS_H
#define KVP_RANKS_H

#include "../core/internal.h"

#include <string.h>

/* Ranks below and above all scores. -infinity ranks 0x007fffff, +infinity 0xff800000. */
enum { KVPI_RANK_NEVER = 0, KVPI_RANK_NAN = 1 };

/* Digits of a rank, from the top. Few candidates want small histograms, which take as long to clear and to search as to
 * fill. */
enum { KVPI_LONG_ROW = 1024, KVPI_MAX_BIN = 1 << 11 };
typedef struct kvpi_digit {
    uint32_t shift, bits; /* behind the last: no bits */
} kvpi_digit;

static inline const kvpi_digit *kvpi_digits_for(int64_t n_candidate) {
    static const kvpi_digit of_long[] = {{21, 11}, {10, 11}, {0, 10}, {0, 0}},
                            of_short[] = {{24, 8}, {16, 8}, {8, 8}, {0, 8}, {0, 0}};
    return n_candidate >= KVPI_LONG_ROW ? of_long : of_short;
}

static inline uint32_t kvpi_rank(float score) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    bits = bits == 0x80000000u ? 0 : bits; /* -0 and +0 are equal */
    const uint32_t rank = bits ^ (bits >> 31 ? UINT32_MAX : 0x80000000u);
    return (bits & 0x7fffffffu) > 0x7f800000u ? KVPI_RANK_NAN : rank;
}

/* Into histogram[0]; two by turns, so that equal neighbours do not wait for each other. */
static inline void kvpi_count_digit(const uint32_t *ranks, int64_t n, kvpi_digit d,
                                    uint32_t (*histogram)[KVPI_MAX_BIN]) {
    const uint32_t n_bin = 1u << d.bits;
    memset(histogram[0], 0, n_bin * sizeof histogram[0][0]);
    memset(histogram[1], 0, n_bin * sizeof histogram[1][0]);
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) {
        histogram[0][ranks[i] >> d.shift & (n_bin - 1)]++;
        histogram[1][ranks[i + 1] >> d.shift & (n_bin - 1)]++;
    }
    if (i < n) histogram[0][ranks[i] >> d.shift & (n_bin - 1)]++;
    for (uint32_t bin = 0; bin < n_bin; bin++) histogram[0][bin] += histogram[1][bin];
}

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * The primitives of selection in plain C, for the tables that have no better. No step branches on a rank, which no
 * processor could foresee.
 */
#include "rows.h"

static int64_t list(const uint32_t *ranks, int64_t n, uint32_t lowest, int32_t first, int32_t *out, int64_t n_out) {
    int64_t n_listed = 0;
    for (int64_t i = 0; i < n && n_listed < n_out; i++) {
        out[n_listed] = first + (int32_t)i;
        n_listed += ranks[i] >= lowest;
    }
    return n_listed;
}

static int64_t filter(const uint32_t *ranks, int64_t n, uint32_t mask, uint32_t prefix, uint32_t *out) {
    int64_t n_left = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t rank = ranks[i]; /* read first: out may be ranks */
        out[n_left] = rank;
        n_left += (rank & mask) == prefix;
    }
    return n_left;
}

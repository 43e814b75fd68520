/* SPDX-License-Identifier: Apache-2.0
 *
 * Scores and segments for the tests of selection.
 */
#ifndef KVP_TEST_SELECTION_H
#define KVP_TEST_SELECTION_H

#include "harness.h"

typedef enum score_kind {
    SCORES_NORMAL,
    SCORES_TIED,       /* three values */
    SCORES_EQUAL,      /* one value */
    SCORES_ODD,        /* NaN, infinities, zeros of both signs, denormals, the largest number */
    SCORES_NEIGHBOURS, /* differ in the last bits only, around a power of two and its negative */
    SCORES_BITS,       /* any bit pattern */
    SCORES_NAN,        /* nothing but NaN of any sign and payload */
    SCORE_KIND_COUNT
} score_kind;

void draw_scores(const kvp_tensor *scores, score_kind kind);
/* Sorted edges; one row in two begins at 0 and ends at T, the others leave tokens outside all segments. */
void draw_segments(const kvp_tensor *segments, int64_t n_token);

#endif

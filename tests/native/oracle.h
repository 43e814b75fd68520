/* SPDX-License-Identifier: Apache-2.0
 *
 * What kvp.h says, written down a second time as plainly as possible: whole attention matrices, quadratic selection, no
 * tricks.
 *
 * The rule for scores. Let "exact" be the mathematics in double and "naive" the same loops in float32, one number after
 * the other. The error of a row is its largest deviation from exact, divided by the largest exact value of the row. The
 * core's error in any row may be at most twice naive's largest error over the tensor's rows, plus 1e-6 (some 8 units in
 * the last place, for rows where naive happens to be exact).
 */
#ifndef KVP_TEST_ORACLE_H
#define KVP_TEST_ORACLE_H

#include "harness.h"

/* Scores of norm, attention and keydiff, in order (B,H,T). */
void exact_norm(const kvp_score_args *args, double *scores);
void naive_norm(const kvp_score_args *args, float *scores);
void exact_attention(const kvp_score_args *args, double *scores);
void naive_attention(const kvp_score_args *args, float *scores);
void exact_keydiff(const kvp_score_args *args, double *scores);
void naive_keydiff(const kvp_score_args *args, float *scores);

/* Natural log of the softmax denominator of each query row (Q) of one query head. */
void exact_lse(const kvp_score_args *args, int64_t b, int64_t n, double *out);

/* Compares args->scores by the rule; in windows and outside the valid range they must be equal. */
void check_scores(const kvp_score_args *args, void (*exact)(const kvp_score_args *, double *),
                  void (*naive)(const kvp_score_args *, float *));
/* The same with more room for error, where inputs are searched for: sooner or later naive is exact by chance. */
void check_scores_within(const kvp_score_args *args, void (*exact)(const kvp_score_args *, double *),
                         void (*naive)(const kvp_score_args *, float *), double room);

/* Fills positions (K) and returns the count for one row of a selection. */
int64_t exact_select(const kvp_select_args *args, int64_t b, int64_t h, int32_t *positions);

/* Fills counts (H) of one segment of a batch row whose heads share. */
void exact_share(const kvp_share_args *args, int64_t b, int64_t s, int64_t *counts);

#endif

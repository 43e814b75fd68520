/* SPDX-License-Identifier: Apache-2.0
 *
 * The oracle's votes, selection and comparison; its arithmetic is in oracle_scores.h.
 */
#include "oracle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1);
    if (memory) return memory;
    fprintf(stderr, "out of memory\n");
    exit(2);
}

/* A vote with its ranges cut by the row's valid range; an empty range may have its end below its begin. */
typedef struct cut_vote {
    int64_t key_begin, key_end, a_begin, a_end, b_begin, b_end, window_begin, window_end, age_end, weight;
} cut_vote;

static cut_vote read_vote(const kvp_score_args *args, int64_t b, int64_t v) {
    int64_t begin, end, field[KVP_VOTE_FIELDS];
    read_valid(&args->valid, b, args->keys.shape[2], &begin, &end);
    for (int f = 0; f < KVP_VOTE_FIELDS; f++) {
        field[f] = (int64_t)get(&args->votes, b, v, f, 0);
        const bool is_begin =
            f == KVP_VOTE_KEY_BEGIN || f == KVP_VOTE_A_BEGIN || f == KVP_VOTE_B_BEGIN || f == KVP_VOTE_WINDOW_BEGIN;
        const bool is_end =
            f == KVP_VOTE_KEY_END || f == KVP_VOTE_A_END || f == KVP_VOTE_B_END || f == KVP_VOTE_WINDOW_END;
        if (is_begin && field[f] < begin) field[f] = begin;
        if (is_end && field[f] > end) field[f] = end;
    }
    return (cut_vote){field[KVP_VOTE_KEY_BEGIN],    field[KVP_VOTE_KEY_END],    field[KVP_VOTE_A_BEGIN],
                      field[KVP_VOTE_A_END],        field[KVP_VOTE_B_BEGIN],    field[KVP_VOTE_B_END],
                      field[KVP_VOTE_WINDOW_BEGIN], field[KVP_VOTE_WINDOW_END], field[KVP_VOTE_AGE_END],
                      field[KVP_VOTE_WEIGHT]};
}

static bool is_voter(const cut_vote *v, int64_t q) {
    return (q >= v->a_begin && q < v->a_end) || (q >= v->b_begin && q < v->b_end);
}

/* The score of a key in a window, a whole number of at least 2, which both arithmetics hold; 0 for a key in no window.
 */
static int64_t score_of_window(const kvp_score_args *args, int64_t b, int64_t k) {
    for (int64_t i = 0; i < args->votes.shape[1]; i++) {
        const cut_vote v = read_vote(args, b, i);
        if (k >= v.window_begin && k < v.window_end) return 2 + k - v.window_begin;
    }
    return 0;
}

#define NAME(x) exact_##x
#define REAL double
#define EXP exp
#define TANH tanh
#define SQRT sqrt
#include "oracle_scores.h"

#define NAME(x) naive_##x
#define REAL float
#define EXP expf
#define TANH tanhf
#define SQRT sqrtf
#include "oracle_scores.h"

void exact_lse(const kvp_score_args *args, int64_t b, int64_t n, double *out) {
    const int64_t n_token = args->keys.shape[2], n_dim = args->keys.shape[3], n_query = args->queries.shape[2];
    double *queries = exact_load(&args->queries, b, n),
           *keys = exact_load(&args->keys, b, n / (args->queries.shape[1] / args->keys.shape[1]));
    int64_t begin, end;
    read_valid(&args->valid, b, n_token, &begin, &end);
    for (int64_t i = 0; i < n_query; i++) {
        double sum = 0;
        for (int64_t k = begin; k <= n_token - n_query + i; k++)
            sum += exp(exact_logit(args, queries + i * n_dim, keys + k * n_dim));
        out[i] = log(sum);
    }
    free(queries);
    free(keys);
}

/* The error of one row as defined in oracle.h; infinite when something that has to be equal is not. */
static double row_error(const double *exact, const float *given, const bool *must_equal, int64_t n) {
    double largest = 0, deviation = 0;
    for (int64_t k = 0; k < n; k++) {
        if (must_equal[k]) {
            if ((double)given[k] != exact[k]) return (double)INFINITY;
            continue;
        }
        largest = fmax(largest, fabs(exact[k]));
        /* not fmax: that would drop a NaN */
        if (!(fabs((double)given[k] - exact[k]) <= deviation)) deviation = fabs((double)given[k] - exact[k]);
        if (isnan(deviation)) return (double)INFINITY;
    }
    return deviation == 0 ? 0 : deviation / largest;
}

/* The largest error of naive float32 over all rows. */
static double error_of_naive(const kvp_score_args *args, void (*naive)(const kvp_score_args *, float *),
                             const double *want, const bool *must_equal) {
    const int64_t n_token = args->scores.shape[2], n_row = args->scores.shape[0] * args->scores.shape[1];
    float *plain = allocate((size_t)(n_row * n_token) * sizeof *plain);
    double largest = 0;
    naive(args, plain);
    for (int64_t r = 0; r < n_row; r++)
        largest = fmax(largest, row_error(want + r * n_token, plain + r * n_token, must_equal + r * n_token, n_token));
    free(plain);
    return largest;
}

/* Naive float32 is asked only where a row is off by more than is allowed whatever its error. */
void check_scores_within(const kvp_score_args *args, void (*exact)(const kvp_score_args *, double *),
                         void (*naive)(const kvp_score_args *, float *), double room) {
    const int64_t n_head = args->scores.shape[1], n_token = args->scores.shape[2],
                  n_row = args->scores.shape[0] * n_head;
    double *want = allocate((size_t)(n_row * n_token) * sizeof *want), naive_error = -1;
    float *given = allocate((size_t)n_token * sizeof *given);
    bool *must_equal = allocate((size_t)(n_row * n_token) * sizeof *must_equal);
    exact(args, want);
    for (int64_t i = 0; i < n_row * n_token; i++)
        must_equal[i] =
            isinf(want[i]) || (args->votes.data && score_of_window(args, i / n_token / n_head, i % n_token));
    for (int64_t r = 0; r < n_row; r++) {
        for (int64_t k = 0; k < n_token; k++) given[k] = (float)get(&args->scores, r / n_head, r % n_head, k, 0);
        const double error = row_error(want + r * n_token, given, must_equal + r * n_token, n_token);
        if (!(error <= 1e-6 + room) && naive_error < 0) naive_error = error_of_naive(args, naive, want, must_equal);
        CHECK(error <= 1e-6 + room || error <= 2 * naive_error + 1e-6 + room,
              "row %lld is off by %g, naive float32 by %g", (long long)r, error, naive_error);
    }
    free(want);
    free(given);
    free(must_equal);
}

void check_scores(const kvp_score_args *args, void (*exact)(const kvp_score_args *, double *),
                  void (*naive)(const kvp_score_args *, float *)) {
    check_scores_within(args, exact, naive, 0);
}

/* The order of kvp.h between two positions of a row that may both be kept. */
static bool is_better(const kvp_select_args *args, int64_t b, int64_t h, int64_t x, int64_t y) {
    const bool x_protected = args->protect.data && get(&args->protect, b, x, 0, 0) != 0;
    const bool y_protected = args->protect.data && get(&args->protect, b, y, 0, 0) != 0;
    if (x_protected != y_protected) return x_protected;
    if (x_protected) return x < y;
    const double x_score = get(&args->scores, b, h, x, 0), y_score = get(&args->scores, b, h, y, 0);
    if (isnan(x_score) != isnan(y_score)) return isnan(y_score);
    if (x_score > y_score || x_score < y_score) return x_score > y_score;
    return x < y;
}

/* Quadratic: a position is kept if fewer than the quota's number of its segment's positions are better. */
int64_t exact_select(const kvp_select_args *args, int64_t b, int64_t h, int32_t *positions) {
    int64_t n_kept = 0, low, high;
    read_valid(&args->valid, b, args->scores.shape[2], &low, &high);
    for (int64_t s = 0; s < args->quotas.shape[2]; s++) {
        const int64_t from = (int64_t)get(&args->segments, b, s, 0, 0),
                      to = (int64_t)get(&args->segments, b, s + 1, 0, 0);
        const int64_t begin = from > low ? from : low, end = to < high ? to : high;
        for (int64_t t = begin; t < end; t++) {
            int64_t n_better = 0;
            for (int64_t other = begin; other < end; other++) n_better += other != t && is_better(args, b, h, other, t);
            if (n_better < (int64_t)get(&args->quotas, b, h, s, 0)) positions[n_kept++] = (int32_t)t;
        }
    }
    for (int64_t i = n_kept; i < args->positions.shape[2]; i++) positions[i] = -1;
    return n_kept;
}

/* A token of a segment whose heads share. */
typedef struct shared_token {
    double score;
    int64_t h, t;
    bool is_sure;
} shared_token;

static int compare_shared(const void *x, const void *y) {
    const shared_token *a = x, *b = y;
    if (a->is_sure != b->is_sure) return a->is_sure ? -1 : 1;
    if ((isnan(a->score) != 0) != (isnan(b->score) != 0)) return isnan(a->score) ? 1 : -1;
    if (a->score > b->score || a->score < b->score) return a->score > b->score ? -1 : 1;
    if (a->h != b->h) return a->h < b->h ? -1 : 1;
    return a->t < b->t ? -1 : a->t > b->t;
}

/* By sorting: each head's own tokens, whose first are sure, and then those of all heads. */
void exact_share(const kvp_share_args *args, int64_t b, int64_t s, int64_t *counts) {
    const int64_t begin = (int64_t)get(&args->segments, b, s, 0, 0), n_head = args->scores.shape[1],
                  n = (int64_t)get(&args->segments, b, s + 1, 0, 0) - begin;
    shared_token *tokens = allocate((size_t)(n_head * n) * sizeof *tokens);
    int64_t total = 0;
    for (int64_t h = 0; h < n_head; h++) {
        const int64_t quota = (int64_t)get(&args->quotas, b, h, s, 0), least = (int64_t)get(&args->floors, b, h, s, 0);
        int64_t n_infinite = 0;
        for (int64_t t = 0; t < n; t++) {
            tokens[h * n + t] = (shared_token){get(&args->scores, b, h, begin + t, 0), h, t, false};
            n_infinite += tokens[h * n + t].score == (double)INFINITY;
        }
        qsort(tokens + h * n, (size_t)n, sizeof *tokens, compare_shared);
        const int64_t sure = n_infinite < quota ? n_infinite : quota;
        for (int64_t t = 0; t < n && t < (sure > least ? sure : least); t++) tokens[h * n + t].is_sure = true;
        total += quota;
        counts[h] = 0;
    }
    qsort(tokens, (size_t)(n_head * n), sizeof *tokens, compare_shared);
    for (int64_t i = 0; i < total && i < n_head * n; i++) counts[tokens[i].h]++;
    free(tokens);
}

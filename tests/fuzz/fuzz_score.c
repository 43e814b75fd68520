/* SPDX-License-Identifier: Apache-2.0
 *
 * Bytes as calls of kvp_score: the oracle's tolerance where numbers are tame, and where they are not what must hold of
 * any.
 */
#include "oracle.h"
#include "producer.h"

#include <math.h>
#include <string.h>

enum { KEYS, VALUES, QUERIES, VOTES, VALID, LSE, SCORES };

static const int32_t SCORERS[5] = {2, 1, 0, 3, 4}; /* an order that the corpus knows; "random" comes by its number */
static bool is_wild, is_odd_param;                 /* of the call at hand */

/* Each key may be under one vote and in one window at most; the core does not look, and what comes of it has no
 * meaning. */
static bool votes_meet(const kvp_score_args *args) {
    static const int fields[] = {KVP_VOTE_KEY_BEGIN, KVP_VOTE_WINDOW_BEGIN};
    for (int64_t b = 0; args->votes.data && b < args->votes.shape[0]; b++)
        for (int64_t k = 0; k < args->keys.shape[2]; k++) {
            int n = 0;
            for (int64_t v = 0; v < args->votes.shape[1]; v++)
                for (int f = 0; f < 2; f++)
                    n += (double)k >= get(&args->votes, b, v, fields[f], 0) &&
                         (double)k < get(&args->votes, b, v, fields[f] + 1, 0);
            if (n > 1) return true;
        }
    return false;
}

static double expect_position(const kvp_score_args *args, int64_t begin, int64_t t) {
    return (double)(t - begin) < args->param[0] ? (double)(2 * args->keys.shape[2] - t) : (double)t;
}

/* Minus infinity outside the valid range, whatever the scorer; and NaN in a norm where, and only where, a key has one.
 */
static void verify_each(const kvp_score_args *args) {
    for (int64_t b = 0; b < args->keys.shape[0]; b++) {
        int64_t begin, end;
        read_valid(&args->valid, b, args->keys.shape[2], &begin, &end);
        for (int64_t i = 0; i < args->keys.shape[1] * args->keys.shape[2]; i++) {
            const int64_t h = i / args->keys.shape[2], t = i % args->keys.shape[2];
            const double score = get(&args->scores, b, h, t, 0);
            bool has_nan = false;
            for (int64_t d = 0; d < args->keys.shape[3]; d++) has_nan |= isnan(get(&args->keys, b, h, t, d)) != 0;
            if (t < begin || t >= end)
                CHECK(score == -(double)INFINITY, "key %lld is not valid and scores %g", (long long)t, score);
            else if (args->scorer == kvp_scorer_find("norm"))
                CHECK((isnan(score) != 0) == has_nan && !(score > 0), "norm of key %lld: %g", (long long)t, score);
            else if (args->scorer == kvp_scorer_find("position"))
                CHECK(score == expect_position(args, begin, t), "position %lld: %g", (long long)t, score);
            else if (args->scorer == kvp_scorer_find("random"))
                CHECK(score >= 0 && score < 1, "draw %lld: %g", (long long)t, score);
        }
    }
}

/* What rounding can do to a sum of exponentials of logits up to "largest": the logits' own rounding, which exp makes
 * relative. */
static double rounding_of(const kvp_score_args *args) {
    const double n_dim = (double)args->keys.shape[3], largest = fabs(args->param[0]) * n_dim + (args->lse.data ? 1 : 0);
    return 4 * (n_dim + 8) * largest * 0x1p-24;
}

static void verify(const call *c) {
    const kvp_score_args *args = c->args;
    verify_each(args);
    if (is_wild) return;
    if (args->scorer == kvp_scorer_find("norm")) check_scores_within(args, exact_norm, naive_norm, 2e-6);
    if (args->scorer == kvp_scorer_find("attention") && !votes_meet(args) && !is_odd_param)
        check_scores_within(args, exact_attention, naive_attention, rounding_of(args));
    if (args->scorer == kvp_scorer_find("keydiff") && !votes_meet(args)) /* a short mean enlarges what rounding does */
        check_scores_within(args, exact_keydiff, naive_keydiff, 1e-3);
}

static void set_range(const kvp_tensor *votes, int64_t b, int64_t v, int field, int64_t begin, int64_t end) {
    set(votes, b, v, field, 0, (double)begin);
    set(votes, b, v, field + 1, 0, (double)end);
}

/* Key ranges and windows one behind the other, so that they do not meet, and voters among the queries; if wild, any
 * numbers. */
static void fill_votes(call *c, const kvp_tensor *t, int64_t n_token, int64_t n_query, bool wild) {
    static const double odd[] = {-1, INT32_MAX, INT32_MIN, 3};
    for (int64_t b = 0; b < t->shape[0] && t->shape[2] >= KVP_VOTE_FIELDS; b++) {
        int64_t at = 0;
        for (int64_t v = 0; v < t->shape[1]; v++) {
            for (int f = KVP_VOTE_KEY_BEGIN; f <= KVP_VOTE_WINDOW_BEGIN;
                 f += KVP_VOTE_WINDOW_BEGIN - KVP_VOTE_KEY_BEGIN) {
                const int64_t begin = at + take(c->in, (n_token - at) / 2 + 1),
                              end = begin + take(c->in, n_token - begin + 1);
                set_range(t, b, v, f, begin, end);
                at = end;
            }
            for (int f = KVP_VOTE_A_BEGIN; f <= KVP_VOTE_B_BEGIN; f += 2) {
                const int64_t begin = n_token - n_query + take(c->in, n_query + 1);
                set_range(t, b, v, f, begin, begin + take(c->in, n_token - begin + 1));
            }
            set(t, b, v, KVP_VOTE_WEIGHT, 0, (double)take(c->in, 4));
            set(t, b, v, KVP_VOTE_AGE_END, 0, (double)(take(c->in, n_token + 20) - 5));
            const bool has_queries = needs_of(((const kvp_score_args *)c->args)->scorer) & KVP_NEEDS_QUERIES;
            for (int f = KVP_VOTE_KEY_END + 1; f < KVP_VOTE_FIELDS && !has_queries; f++) set(t, b, v, f, 0, 0);
            while (wild && take(c->in, 2))
                set(t, b, v, take(c->in, KVP_VOTE_FIELDS), 0,
                    take(c->in, 2) ? odd[take(c->in, 4)] : (double)take(c->in, n_token + 2));
        }
    }
}

static void fill_valid_ranges(call *c, const kvp_tensor *t, int64_t n_token, bool wild) {
    for (int64_t b = 0; b < t->shape[0] && t->shape[1] == 2; b++) {
        const int64_t begin = take(c->in, n_token + 1), end = begin + take(c->in, n_token - begin + 1);
        set(t, b, 0, 0, 0, (double)(begin - (wild && take(c->in, 4) == 0)));
        set(t, b, 1, 0, 0, (double)(end + (wild ? take(c->in, 3) - 1 : 0)));
    }
}

/* Near what a true one would be; one in eight is not finite, and casts no vote. */
static void fill_lse(call *c, const kvp_tensor *t) {
    static const float odd[] = {NAN, INFINITY, -INFINITY};
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t n = 0; n < t->shape[1]; n++)
            for (int64_t i = 0; i < t->shape[2]; i++)
                set(t, b, n, i, 0,
                    random_below(8) ? 3 + (double)take_value(c->in, false) : (double)odd[random_below(3)]);
}

static void draw_params(call *c, double *param, int32_t scorer, int64_t n_dim) {
    static const double odd[] = {NAN, INFINITY, -1, 0.5, 1e300, 0, 2, 1 << 20};
    static const double scalings[] = {1, -0.5, 0.25, 0}, softcaps[] = {0, 0, 2, 30}, kernels[] = {1, 3, 5, 1001};
    if (scorer == kvp_scorer_find("position")) param[0] = (double)take(c->in, 40);
    if (scorer == kvp_scorer_find("lagkv")) {
        param[0] = (double)take(c->in, 4);
        param[1] = 2 + (double)take(c->in, 5);
    }
    if (scorer == kvp_scorer_find("attention")) {
        param[0] = scalings[take(c->in, 4)] / sqrt((double)n_dim);
        param[1] = softcaps[take(c->in, 4)];
        param[2] = kernels[take(c->in, 4)];
        param[3] = (double)take(c->in, 2);
    }
    is_odd_param = take(c->in, 16) == 15;
    if (!is_odd_param) return;
    param[take(c->in, 4)] = odd[take(c->in, 8)];
    c->spoilt = true;
}

static bool is_broadcast(const argument *a) {
    for (int d = 0; d < a->tensor->ndim && d < 4; d++)
        if (a->given && a->tensor->shape[d] > 1 && a->tensor->stride[d] == 0) return true;
    return false;
}

static void fill(call *c, int64_t n_token, int64_t n_query) {
    argument *a = c->arguments;
    const bool wild_tables = take(c->in, 8) == 7;
    if (wild_tables || is_broadcast(&a[VOTES]) || is_broadcast(&a[VALID]))
        c->spoilt = true; /* of a broadcast, what was written last counts */
    if (is_usable(&a[VOTES])) fill_votes(c, a[VOTES].tensor, n_token, n_query, wild_tables);
    if (is_usable(&a[VALID])) fill_valid_ranges(c, a[VALID].tensor, n_token, wild_tables);
    if (is_usable(&a[LSE])) fill_lse(c, a[LSE].tensor);
    is_wild = take(c->in, 4) == 3;
    fill_values(c, KEYS, is_wild);
    fill_values(c, VALUES, is_wild);
    fill_values(c, QUERIES, is_wild);
}

static void draw_sizes(input *in, int64_t *sizes) {
    const bool is_long = take(in, 64) == 63; /* several blocks of keys; the oracle holds whole matrices */
    sizes['B'] = is_long ? 1 : 1 + take(in, 2);
    sizes['H'] = is_long ? 1 : 1 + take(in, 3);
    sizes['N'] = is_long ? 1 : sizes['H'] * (1 + take(in, 3));
    sizes['T'] = 1 + (is_long ? take(in, 600) : take(in, 24));
    sizes['D'] = 1 + (!is_long && take(in, 8) == 0 ? take(in, 40) : take(in, 7));
    sizes['Q'] = take(in, 2) ? sizes['T'] : 1 + take(in, sizes['T']);
    sizes['C'] = 1 + take(in, 7);
    sizes['V'] = 1 + take(in, 4);
    sizes['F'] = KVP_VOTE_FIELDS;
    sizes['R'] = 2;
}

int fuzz_score(const uint8_t *data, size_t size) {
    input in = {data, size};
    kvp_score_args args = {.size = sizeof(kvp_score_args), .scorer = 0};
    seed_random((uint64_t)take(&in, 1 << 16));
    args.scorer = (int32_t)take(&in, 32) ? SCORERS[take(&in, 5)] : (int32_t)take(&in, 8) - 2;
    const bool votes = needs_of(args.scorer) & KVP_NEEDS_VOTES;
    argument arguments[MAX_ARGUMENTS];
    call c = {.verb = KVP_SCORE,
              .args = &args,
              .arguments = arguments,
              .n_argument = list_score_arguments(&args, arguments),
              .in = &in};
    int64_t sizes[128] = {0};
    draw_sizes(&in, sizes);
    if (args.scorer < 0 || args.scorer >= kvp_scorer_count() || !votes)
        c.spoilt = true; /* votes that none asks for are looked at all the same */
    draw_tensors(&c, sizes);
    draw_params(&c, args.param, args.scorer, sizes['D']);
    if (take(&in, 3) == 0) spoil_tensors(&c, 3);
    place_tensors(&c);
    fill(&c, sizes['T'], sizes['Q']);
    name_case("fuzz score %s B=%lld H=%lld N=%lld T=%lld Q=%lld D=%lld V=%lld",
              votes ? kvp_scorer_name(args.scorer) : "", (long long)sizes['B'], (long long)sizes['H'],
              (long long)sizes['N'], (long long)sizes['T'], (long long)sizes['Q'], (long long)sizes['D'],
              (long long)sizes['V']);
    run_call(&c, false, verify);
    free_tensors(&c);
    return 0;
}

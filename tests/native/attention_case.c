/* SPDX-License-Identifier: Apache-2.0
 *
 * Drawing calls of the scorer "attention".
 */
#include "attention_case.h"

#include <math.h>
#include <string.h>

enum { MAX_VOTES = 4 };

typedef int32_t vote_fields[KVP_VOTE_FIELDS];

static void order_pair(int32_t *pair) {
    if (pair[0] <= pair[1]) return;
    const int32_t swap = pair[0];
    pair[0] = pair[1];
    pair[1] = swap;
}

/* Key ranges and windows are neighbours between ascending cuts, so they never overlap; all else is free. */
static void draw_votes(vote_fields *votes, int32_t n_token) {
    int32_t cut[2 * MAX_VOTES + 1];
    for (int i = 0; i <= 2 * MAX_VOTES; i++) {
        cut[i] = (int32_t)random_below(n_token + 1);
        for (int j = i; j > 0; j--) order_pair(&cut[j - 1]);
    }
    for (int v = 0; v < MAX_VOTES; v++) {
        for (int f = KVP_VOTE_A_BEGIN; f <= KVP_VOTE_B_END; f++) votes[v][f] = (int32_t)random_below(n_token + 1);
        order_pair(&votes[v][KVP_VOTE_A_BEGIN]);
        order_pair(&votes[v][KVP_VOTE_B_BEGIN]);
        votes[v][KVP_VOTE_KEY_BEGIN] = cut[2 * v];
        votes[v][KVP_VOTE_KEY_END] = cut[2 * v + 1];
        votes[v][KVP_VOTE_WINDOW_BEGIN] = cut[2 * v + 1];
        votes[v][KVP_VOTE_WINDOW_END] = cut[2 * v + 2];
        votes[v][KVP_VOTE_WEIGHT] = (int32_t)random_below(4);
        votes[v][KVP_VOTE_AGE_END] = (int32_t)random_below(n_token + 60) - 5;
    }
}

/* The votes of one batch row; returns how many. Ranges reach over the whole row, so padding cuts them. */
static int64_t write_votes(voting kind, int32_t n, vote_fields *votes) {
    const int32_t window = n < 6 ? n / 2 : 4, half = n / 2;
    switch (kind) {
    case VOTING_SNAPKV:
        memcpy(votes[0], (vote_fields){0, n - window, n - window, n, 0, 0, KVP_WEIGHT_MEAN, 0, n - window, n},
               sizeof votes[0]);
        return 1;
    case VOTING_TOVA:
        memcpy(votes[0], (vote_fields){0, n, n - 1, n, 0, 0, KVP_WEIGHT_SUM, 0, 0, 0}, sizeof votes[0]);
        return 1;
    case VOTING_H2O:
        memcpy(votes[0], (vote_fields){0, n, 0, n, 0, 0, KVP_WEIGHT_AGE, n, 0, 0}, sizeof votes[0]);
        return 1;
    case VOTING_SPANS:
        memcpy(votes[0], (vote_fields){0, half, half / 2, half, n - n / 4, n, KVP_WEIGHT_MEAN, 0, 0, 0},
               sizeof votes[0]);
        memcpy(votes[1], (vote_fields){half, n - 1, half, n, n, n, KVP_WEIGHT_AGE, n - 1, n - 1, n}, sizeof votes[1]);
        return 2;
    case VOTING_EMPTY:
        memcpy(votes[0], (vote_fields){0, half / 2, half, half, n, n, KVP_WEIGHT_MEAN, 0, 0, 0}, sizeof votes[0]);
        memcpy(votes[1], (vote_fields){half, half, n - 1, n, 0, 0, KVP_WEIGHT_SUM, 0, n, n}, sizeof votes[1]);
        return 2;
    case VOTING_OVERLAP:
        memcpy(votes[0], (vote_fields){0, n, 0, n - n / 3, n / 3, n, KVP_WEIGHT_MEAN, 0, 0, 0}, sizeof votes[0]);
        return 1;
    case VOTING_KVZIP:
        memcpy(votes[0], (vote_fields){0, half, half, n, 0, 0, KVP_WEIGHT_MAX, 0, 0, 0}, sizeof votes[0]);
        memcpy(votes[1], (vote_fields){half, n - 1, half, n - n / 4, 0, 0, KVP_WEIGHT_MAX, 0, n - 1, n},
               sizeof votes[1]);
        return 2;
    default: draw_votes(votes, n); return MAX_VOTES;
    }
}

static array draw_vote_array(const attention_shape *s) {
    vote_fields votes[MAX_VOTES];
    const int64_t n_vote = write_votes(s->kind, (int32_t)s->n_token, votes);
    array a = new_array(KVP_I32, random_layout(), 3, (int64_t[3]){s->n_batch, n_vote, KVP_VOTE_FIELDS});
    for (int64_t b = 0; b < s->n_batch; b++) {
        write_votes(s->kind, (int32_t)s->n_token, votes);
        for (int64_t v = 0; v < n_vote; v++)
            for (int f = 0; f < KVP_VOTE_FIELDS; f++) set(&a.view, b, v, f, 0, votes[v][f]);
    }
    return a;
}

/* The lowest position, over all batch rows, whose query is needed; T if none is. */
static int64_t find_first_voter(const kvp_score_args *args, int64_t n_token) {
    int64_t first = n_token;
    for (int64_t b = 0; b < args->votes.shape[0]; b++) {
        int64_t low, high;
        read_valid(&args->valid, b, n_token, &low, &high);
        for (int64_t v = 0; v < args->votes.shape[1]; v++) {
            for (int f = KVP_VOTE_A_BEGIN; f <= KVP_VOTE_B_BEGIN; f += 2) {
                const int64_t from = (int64_t)get(&args->votes, b, v, f, 0),
                              to = (int64_t)get(&args->votes, b, v, f + 1, 0);
                const int64_t begin = from > low ? from : low, end = to < high ? to : high;
                if (begin < end && begin < first) first = begin;
            }
        }
    }
    return first;
}

/* What stands outside the valid range must not matter: NaN. (A broadcast row has no padding of its own.) */
static void spoil_padding(const kvp_tensor *t, const kvp_tensor *valid, int64_t n_token) {
    if (!valid->data || t->stride[0] == 0) return;
    for (int64_t b = 0; b < t->shape[0]; b++) {
        int64_t begin, end;
        read_valid(valid, b, n_token, &begin, &end);
        for (int64_t i = 0; i < t->shape[2]; i++) {
            const int64_t position = n_token - t->shape[2] + i;
            for (int64_t h = 0; h < t->shape[1] && (position < begin || position >= end); h++)
                for (int64_t d = 0; d < (t->ndim > 3 ? t->shape[3] : 1); d++) set(t, b, h, i, d, (double)NAN);
        }
    }
}

/* Any lse will do, true or not: A = exp(s - lse). One row in eight is not finite. */
static array draw_lse(const attention_shape *s, int64_t n_query) {
    array a = new_array(KVP_F32, random_layout(), 3, (int64_t[3]){s->n_batch, s->n_head * s->group, n_query});
    for (int64_t b = 0; b < s->n_batch; b++)
        for (int64_t n = 0; n < a.view.shape[1]; n++)
            for (int64_t i = 0; i < n_query; i++) {
                static const float odd[] = {NAN, INFINITY, -INFINITY};
                const double value =
                    random_below(8) ? log((double)s->n_token) + random_normal() : (double)odd[random_below(3)];
                set(&a.view, b, n, i, 0, value);
            }
    return a;
}

static void draw_params(const attention_shape *s, double *param) {
    static const double softcaps[] = {0, 0, 0, 2, 30}, kernels[] = {1, 1, 3, 5, 7, 1001};
    param[0] = (random_below(4) ? 1 : -0.5) / sqrt((double)s->n_dim);
    param[1] = softcaps[random_below(5)];
    param[2] = s->kind == VOTING_SNAPKV ? 5 : kernels[random_below(6)];
    param[3] = s->kind == VOTING_TOVA || random_below(6) == 0;
}

attention_case new_attention_case(const attention_shape *s) {
    attention_case c = {.args = {.size = sizeof(kvp_score_args), .scorer = kvp_scorer_find("attention")}};
    c.votes = draw_vote_array(s);
    c.args.votes = c.votes.view;
    if (random_below(3)) {
        c.valid = new_array(KVP_I32, random_layout(), 2, (int64_t[2]){s->n_batch, 2});
        fill_valid(&c.valid.view, s->n_token, false);
        c.args.valid = c.valid.view;
    }
    const int64_t first = find_first_voter(&c.args, s->n_token), fewest = first < s->n_token ? s->n_token - first : 1;
    const int64_t n_query = random_below(2) ? fewest : fewest + random_below(s->n_token - fewest + 1);
    c.keys = new_array(s->dtype, random_layout(), 4, (int64_t[4]){s->n_batch, s->n_head, s->n_token, s->n_dim});
    c.queries =
        new_array(s->dtype, random_layout(), 4, (int64_t[4]){s->n_batch, s->n_head * s->group, n_query, s->n_dim});
    fill_normal(&c.keys.view);
    fill_normal(&c.queries.view);
    spoil_padding(&c.keys.view, &c.args.valid, s->n_token);
    spoil_padding(&c.queries.view, &c.args.valid, s->n_token);
    if (random_below(4) == 0) {
        c.lse = draw_lse(s, n_query);
        c.args.lse = c.lse.view;
    }
    c.scores = new_array(KVP_F32, output_layout(random_layout()), 3, c.keys.view.shape);
    c.args.keys = c.keys.view;
    c.args.queries = c.queries.view;
    c.args.scores = c.scores.view;
    draw_params(s, c.args.param);
    return c;
}

void free_attention_case(attention_case *c) {
    free_array(&c->keys);
    free_array(&c->queries);
    free_array(&c->votes);
    free_array(&c->valid);
    free_array(&c->lse);
    free_array(&c->scores);
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * Column sums of the attention matrix, for the votes of kvp.h:
 *
 *     A[h,q,k] = exp(s[h,q,k] - lse[h,q]),  s = softcap(scaling * query[h,q].key[k]),  k in [valid begin, q]
 *     score[k] = mean over heads of pool( weight(k) * sum over voters q of A[h,q,k] )
 *
 * One attention row at a time, so memory is O(T) per worker and no T x T matrix exists. The mean over heads and the pooling commute, so
 * the heads of a group are summed first. A task is one key head (or one batch row when all heads share their scores) and runs on one
 * worker in a fixed order: results have the same bits for any number of workers. Column sums are kept in double: a column of H2O adds up
 * to T terms.
 */
#include "../rows/rows.h"
#include "score.h"

#include <math.h>
#include <string.h>

typedef struct job {
    const kvp_score_args *args;
    const kvp_context *ctx;
    size_t scratch_bytes;
    int64_t n_token, n_query, n_dim, n_vote, group; /* group: query heads per key head */
    double scaling, softcap;
    int64_t kernel_size;
    bool share_heads;
} job;

/* Scratch of one worker. */
typedef struct scratch {
    double *column; /* (T) sums per key */
    double *pooled; /* (T) */
    float *row;     /* (T) one attention row */
    float *query;   /* (D) the query, widened */
} scratch;

/* One vote, with its ranges cut by the valid range. */
typedef struct vote {
    int64_t key[2], a[2], b[2], window[2], age_end;
    int32_t weight;
} vote;

size_t kvpi_score_attention_workspace(const kvp_score_args *args) {
    const size_t n_token = (size_t)args->keys.shape[2], n_dim = (size_t)args->keys.shape[3];
    return 2 * kvpi_round_up_64(n_token * sizeof(double)) + kvpi_round_up_64(n_token * sizeof(float)) + kvpi_round_up_64(n_dim * sizeof(float));
}

static scratch carve_scratch(const job *j, int32_t worker) {
    const size_t doubles = kvpi_round_up_64((size_t)j->n_token * sizeof(double));
    char *base = kvpi_scratch(j->ctx, worker, j->scratch_bytes);
    return (scratch){
        .column = (double *)(void *)base,
        .pooled = (double *)(void *)(base + doubles),
        .row = (float *)(void *)(base + 2 * doubles),
        .query = (float *)(void *)(base + 2 * doubles + kvpi_round_up_64((size_t)j->n_token * sizeof(float))),
    };
}

static void read_range(const kvp_tensor *votes, int64_t b, int64_t v, int field, const int64_t *valid, int64_t *range) {
    range[0] = kvpi_i32(votes, b, v, field);
    range[1] = kvpi_i32(votes, b, v, field + 1);
    if (range[0] < valid[0]) range[0] = valid[0];
    if (range[1] > valid[1]) range[1] = valid[1];
    if (range[1] < range[0]) range[1] = range[0];
}

static vote read_vote(const job *j, int64_t b, int64_t v, const int64_t *valid) {
    const kvp_tensor *votes = &j->args->votes;
    vote out = {.weight = kvpi_i32(votes, b, v, KVP_VOTE_WEIGHT), .age_end = kvpi_i32(votes, b, v, KVP_VOTE_AGE_END)};
    read_range(votes, b, v, KVP_VOTE_KEY_BEGIN, valid, out.key);
    read_range(votes, b, v, KVP_VOTE_A_BEGIN, valid, out.a);
    read_range(votes, b, v, KVP_VOTE_B_BEGIN, valid, out.b);
    read_range(votes, b, v, KVP_VOTE_WINDOW_BEGIN, valid, out.window);
    return out;
}

static bool votes_here(const vote *v, int64_t q) { return (q >= v->a[0] && q < v->a[1]) || (q >= v->b[0] && q < v->b[1]); }

/* How many voters the two ranges hold, counted once where they overlap. */
static int64_t count_voters(const vote *v) {
    const int64_t low = v->a[0] > v->b[0] ? v->a[0] : v->b[0], high = v->a[1] < v->b[1] ? v->a[1] : v->b[1];
    return (v->a[1] - v->a[0]) + (v->b[1] - v->b[0]) - (high > low ? high - low : 0);
}

/* Fills row[begin..q] with the attention of query q of query head n. False: the row casts no vote. */
static bool attend(const job *j, const scratch *s, int64_t b, int64_t n, int64_t q, int64_t begin) {
    const kvp_tensor *keys = &j->args->keys, *queries = &j->args->queries, *lse = &j->args->lse;
    const kvpi_rows *rows = kvpi_rows_now();
    const int64_t h = n / j->group, i = q - (j->n_token - j->n_query);
    float given = 0.0f, highest = -INFINITY;
    if (lse->data) {
        given = *(const float *)kvpi_at(lse, b, n, i);
        if (!isfinite(given)) return false;
    }
    rows->widen[queries->dtype](kvpi_at(queries, b, n, i), queries->stride[3], j->n_dim, s->query);
    for (int64_t k = begin; k <= q; k++) {
        float logit = (float)j->scaling * rows->dot[keys->dtype](s->query, kvpi_at(keys, b, h, k), keys->stride[3], j->n_dim);
        if (j->softcap > 0) logit = (float)j->softcap * tanhf(logit / (float)j->softcap);
        s->row[k] = logit;
        if (logit > highest) highest = logit;
    }
    if (lse->data) highest = given;
    double sum = 0;
    for (int64_t k = begin; k <= q; k++) {
        s->row[k] = expf(s->row[k] - highest);
        sum += s->row[k];
    }
    if (lse->data) return true;
    const float inverse = (float)(1.0 / sum);
    for (int64_t k = begin; k <= q; k++) s->row[k] *= inverse;
    return true;
}

static void add_votes(const job *j, const scratch *s, int64_t b, int64_t n, int64_t q, const int64_t *valid) {
    bool attended = false;
    for (int64_t v = 0; v < j->n_vote; v++) {
        const vote now = read_vote(j, b, v, valid);
        if (!votes_here(&now, q) || now.key[0] > q) continue;
        if (!attended && !attend(j, s, b, n, q, valid[0])) return;
        attended = true;
        const int64_t end = now.key[1] < q + 1 ? now.key[1] : q + 1;
        for (int64_t k = now.key[0]; k < end; k++) s->column[k] += s->row[k];
    }
}

/* Weights, pools and averages the sums of one vote's keys, in place. */
static void finish_vote(const job *j, const scratch *s, const vote *v, int64_t n_head) {
    const int64_t n_voter = count_voters(v), reach = j->kernel_size / 2;
    for (int64_t k = v->key[0]; k < v->key[1]; k++) {
        double divisor = (double)n_head;
        if (v->weight == KVP_WEIGHT_MEAN && n_voter > 0) divisor *= (double)n_voter;
        if (v->weight == KVP_WEIGHT_AGE && v->age_end - k > 1) divisor *= (double)(v->age_end - k);
        s->column[k] /= divisor;
    }
    if (reach > 0) {
        for (int64_t k = v->key[0]; k < v->key[1]; k++) {
            const int64_t low = k - reach > v->key[0] ? k - reach : v->key[0], high = k + reach + 1 < v->key[1] ? k + reach + 1 : v->key[1];
            double sum = 0;
            for (int64_t i = low; i < high; i++) sum += s->column[i];
            s->pooled[k] = sum / (double)j->kernel_size;
        }
        memcpy(s->column + v->key[0], s->pooled + v->key[0], (size_t)(v->key[1] - v->key[0]) * sizeof(double));
    }
    for (int64_t k = v->window[0]; k < v->window[1]; k++) s->column[k] = 2.0 + (double)(k - v->window[0]);
}

static void score_task(void *arg, int64_t task, int32_t worker) {
    const job *j = arg;
    const kvp_tensor *scores = &j->args->scores;
    const int64_t n_head = scores->shape[1], b = j->share_heads ? task : task / n_head, h = j->share_heads ? 0 : task % n_head;
    const int64_t first = j->share_heads ? 0 : h * j->group, last = j->share_heads ? n_head * j->group : first + j->group;
    const scratch s = carve_scratch(j, worker);
    int64_t valid[2];
    kvpi_valid_range(&j->args->valid, b, j->n_token, &valid[0], &valid[1]);
    memset(s.column, 0, (size_t)j->n_token * sizeof(double));
    const int64_t first_query = j->n_token - j->n_query, begin = first_query > valid[0] ? first_query : valid[0];
    for (int64_t n = first; n < last; n++)
        for (int64_t q = begin; q < valid[1]; q++) add_votes(j, &s, b, n, q, valid);
    for (int64_t v = 0; v < j->n_vote; v++) {
        const vote now = read_vote(j, b, v, valid);
        finish_vote(j, &s, &now, last - first);
    }
    for (int64_t out = h; out < (j->share_heads ? n_head : h + 1); out++)
        for (int64_t k = 0; k < j->n_token; k++)
            *(float *)kvpi_at(scores, b, out, k) = k >= valid[0] && k < valid[1] ? (float)s.column[k] : -INFINITY;
}

kvp_status kvpi_score_attention_cpu(const kvp_score_args *args, kvp_context *ctx) {
    const int64_t *keys = args->keys.shape, *queries = args->queries.shape;
    KVPI_TRY(kvpi_check_valid_values(&args->valid, keys[2], ctx));
    KVPI_TRY(kvpi_check_vote_values(args, ctx));
    job j = {
        .args = args,
        .ctx = ctx,
        .scratch_bytes = kvpi_score_attention_workspace(args),
        .n_token = keys[2],
        .n_query = queries[2],
        .n_dim = keys[3],
        .n_vote = args->votes.shape[1],
        .group = queries[1] / keys[1],
        .scaling = args->param[0],
        .softcap = args->param[1],
        .kernel_size = (int64_t)args->param[2],
        .share_heads = args->param[3] > 0,
    };
    const double work = (double)queries[0] * (double)queries[1] * (double)keys[2] * (double)keys[3] * 0.2;
    kvpi_run(ctx, j.share_heads ? keys[0] : keys[0] * keys[1], work, score_task, &j);
    return KVP_OK;
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * LagKV: a token matters by how much its key and its value differ from the chunk after its own (arXiv 2504.04704);
 * kvp.h has the formula. A task is a few chunks of one unit (a head of a batch row): each is read twice, once for the
 * bounds of the chunk before it and once for its own spreads, the second time from the caches.
 */
#include "../rows/rows.h"
#include "score.h"

#include <math.h>
#include <string.h>

enum { TASK_TOKENS = 512, N_LINE = 4 };

/* Spreads in float32 up to here; what is beyond, or is none, is computed anew in double. */
#define MOST_IN_FLOAT 0x1p60f
/* A spread that is larger counts as this. */
#define MOST 0x1p126f

typedef struct job {
    const kvp_score_args *args;
    const kvpi_rows *rows;
    const kvp_context *ctx;
    int64_t n_head, n_token, lag_size, n_padded; /* a chunk's tokens, and those rounded up to whole blocks */
    int64_t n_task, n_chunk;                     /* tasks of a unit; chunks of a task */
    double n_sink;
    size_t worker_bytes;
} job;

/* What a worker works with. */
typedef struct scratch {
    uint64_t *order, *merged;                /* (lag_size) */
    float *weights[2];                       /* (n_padded): by keys, by values */
    float *minus_low, *high, *factor, *line; /* (D or Dv) */
} scratch;

static kvp_status check_params(const double *param, int64_t n_token, kvp_context *ctx) {
    if (n_token > 1 << 23)
        return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED, "T is %lld in keys; the scorer \"lagkv\" tells at most %d apart",
                         (long long)n_token, 1 << 23);
    KVPI_TRY(kvpi_check_whole(param[KVPI_PARAM_lagkv_n_sink], "n_sink", 0, INT32_MAX, ctx));
    return kvpi_check_whole(param[KVPI_PARAM_lagkv_lag_size], "lag_size", 2, INT32_MAX, ctx);
}

static int64_t most_dims(const kvp_score_args *args) {
    const int64_t of_keys = args->keys.shape[3], of_values = args->values.shape[3];
    return of_keys > of_values ? of_keys : of_values;
}

static job read_job(const kvp_score_args *args) {
    const double asked = args->param[KVPI_PARAM_lagkv_lag_size];
    job j = {.args = args,
             .rows = kvpi_rows_now(),
             .n_head = args->keys.shape[1],
             .n_token = args->keys.shape[2],
             .n_sink = args->param[KVPI_PARAM_lagkv_n_sink]};
    j.lag_size = asked < (double)j.n_token ? (int64_t)asked : j.n_token;
    j.n_padded = (j.lag_size + KVPI_BLOCK - 1) / KVPI_BLOCK * KVPI_BLOCK;
    j.n_chunk = j.lag_size < TASK_TOKENS ? TASK_TOKENS / j.lag_size : 1;
    j.n_task = 1 + (j.n_token / j.lag_size + j.n_chunk - 1) / j.n_chunk; /* the last is what no chunk has */
    j.worker_bytes = kvpi_round_up_64((size_t)(2 * j.lag_size) * sizeof(uint64_t)) +
                     kvpi_round_up_64((size_t)(2 * j.n_padded) * sizeof(float)) +
                     N_LINE * kvpi_round_up_64((size_t)(most_dims(args) + KVPI_SLACK) * sizeof(float));
    return j;
}

static size_t size_workspace(const kvp_score_args *args, int32_t n_worker) {
    return read_job(args).worker_bytes * (size_t)n_worker;
}

static scratch scratch_of(const job *j, char *at) {
    const size_t line = kvpi_round_up_64((size_t)(most_dims(j->args) + KVPI_SLACK) * sizeof(float));
    scratch s = {.order = (uint64_t *)(void *)at};
    s.merged = s.order + j->lag_size;
    at += kvpi_round_up_64((size_t)(2 * j->lag_size) * sizeof(uint64_t));
    s.weights[0] = (float *)(void *)at;
    s.weights[1] = s.weights[0] + j->n_padded;
    at += kvpi_round_up_64((size_t)(2 * j->n_padded) * sizeof(float));
    s.minus_low = (float *)(void *)at;
    s.high = (float *)(void *)(at + line);
    s.factor = (float *)(void *)(at + 2 * line);
    s.line = (float *)(void *)(at + 3 * line);
    return s;
}

static kvpi_head rows_at(const kvp_tensor *x, int64_t b, int64_t h, int64_t t) {
    return (kvpi_head){kvpi_at(x, b, h, t), x->stride[2], x->stride[3]};
}

/* The spread of a row in double, which holds any quotient of float32's, and its square. */
static float wide_spread(const job *j, int32_t dtype, kvpi_head row, int64_t n_dim, const scratch *s) {
    const float one = 1;
    double sum = 0, square = 0;
    memset(s->line, 0, (size_t)(n_dim + KVPI_SLACK) * sizeof(float));
    j->rows->add_rows[dtype](row, 1, n_dim, &one, s->line);
    for (int pass = 0; pass < 2; pass++) {
        const double mean = sum / (double)n_dim;
        for (int64_t d = 0; d < n_dim; d++) {
            const double low = -(double)s->minus_low[d], width = (double)s->high[d] - low;
            const double z = width == 0 ? 0 : ((double)s->line[d] - low) / width;
            sum += pass ? 0 : z;
            square += pass ? (z - mean) * (z - mean) : 0;
        }
    }
    const double spread = sqrt(square / (double)(n_dim > 1 ? n_dim - 1 : 1));
    return spread > (double)MOST ? MOST : (float)spread; /* NaN stays */
}

/* The weights of the n tokens from t on, with the bounds of as many behind them, at out; returns their sum. */
static float weigh(const job *j, const kvp_tensor *x, int64_t b, int64_t h, int64_t t, const scratch *s, float *out) {
    const int64_t n = j->lag_size, n_dim = x->shape[3];
    const kvpi_head own = rows_at(x, b, h, t), next = rows_at(x, b, h, t + n);
    memset(s->minus_low, 0, (size_t)(s->line - s->minus_low) * sizeof(float));
    j->rows->bounds[x->dtype](next, n, n_dim, s->minus_low, s->high);
    for (int64_t d = 0; d < n_dim; d++) {
        const double width = (double)s->high[d] - (double)s->minus_low[d];
        s->minus_low[d] = -s->minus_low[d];
        s->factor[d] = width == 0 ? 0 : (float)(1 / width);
    }
    j->rows->spreads[x->dtype](own, n, n_dim, s->minus_low, s->factor, s->line, out);
    for (int64_t i = 0; i < n; i++) {
        if (!(out[i] <= MOST_IN_FLOAT)) out[i] = wide_spread(j, x->dtype, rows_at(x, b, h, t + i), n_dim, s);
        out[i] *= (float)KVPI_LOG2_E; /* here, since soften would round by it what the most is less itself */
    }
    float shift = NAN;
    return j->rows->soften(out, n, j->n_padded, 1, &shift);
}

/* order[0, n) ascending, with room for as many at merged; returns where they are. */
static const uint64_t *sort(uint64_t *order, uint64_t *merged, int64_t n) {
    for (int64_t step = 1; step < n; step *= 2) {
        for (int64_t first = 0; first < n; first += 2 * step) {
            const int64_t middle = first + step < n ? first + step : n;
            const int64_t last = middle + step < n ? middle + step : n;
            for (int64_t i = first, k = middle, to = first; to < last; to++)
                merged[to] = k == last || (i < middle && order[i] < order[k]) ? order[i++] : order[k++];
        }
        uint64_t *swap = order;
        order = merged;
        merged = swap;
    }
    return order;
}

/* Scores of the chunk that begins at token t. */
static void score_chunk(const job *j, int64_t b, int64_t h, int64_t t, const scratch *s) {
    const kvp_score_args *args = j->args;
    const float by_key = 1 / weigh(j, &args->keys, b, h, t, s, s->weights[0]);
    const float by_value = 1 / weigh(j, &args->values, b, h, t, s, s->weights[1]);
    float *out = (float *)(void *)kvpi_at(&args->scores, b, h, t);
    const int64_t step = args->scores.stride[2];
    bool is_number = true;
    for (int64_t i = 0; i < j->lag_size; i++) {
        const float weight = s->weights[0][i] * by_key + s->weights[1][i] * by_value; /* not negative */
        uint32_t bits;
        memcpy(&bits, &weight, sizeof bits);
        is_number = is_number && weight == weight;
        s->order[i] = (uint64_t)~bits << 32 | (uint32_t)i;
    }
    const uint64_t *order = sort(s->order, s->merged, j->lag_size);
    for (int64_t i = 0; i < j->lag_size; i++) out[(int64_t)(uint32_t)order[i] * step] = is_number ? (float)-i : NAN;
}

/* Scores of what is in no chunk that has one behind it: padding, the first tokens, and those from t on. */
static void score_rest(const job *j, int64_t b, int64_t h, int64_t begin, int64_t first, int64_t t, int64_t end) {
    const kvp_tensor *scores = &j->args->scores;
    float *out = (float *)(void *)kvpi_at(scores, b, h, 0);
    const int64_t step = scores->stride[2];
    for (int64_t k = 0; k < begin; k++) out[k * step] = -INFINITY;
    for (int64_t k = begin; k < first; k++) out[k * step] = (float)(j->n_token + 1);
    for (int64_t k = t; k < end; k++) out[k * step] = (float)(k - t + 1);
    for (int64_t k = end; k < j->n_token; k++) out[k * step] = -INFINITY;
}

static void score_task(void *arg, int64_t task, int32_t worker) {
    const job *j = arg;
    const int64_t unit = task / j->n_task, part = task % j->n_task, b = unit / j->n_head, h = unit % j->n_head;
    int64_t begin, end;
    kvpi_valid_range(&j->args->valid, b, j->n_token, &begin, &end);
    const int64_t first = j->n_sink < (double)(end - begin) ? begin + (int64_t)j->n_sink : end;
    const int64_t n_whole = (end - first) / j->lag_size, n_scored = n_whole > 1 ? n_whole - 1 : 0;
    if (part == j->n_task - 1) {
        score_rest(j, b, h, begin, first, first + n_scored * j->lag_size, end);
        return;
    }
    const scratch s = scratch_of(j, kvpi_scratch(j->ctx, worker, j->worker_bytes));
    const int64_t last = (part + 1) * j->n_chunk < n_scored ? (part + 1) * j->n_chunk : n_scored;
    for (int64_t i = part * j->n_chunk; i < last; i++) score_chunk(j, b, h, first + i * j->lag_size, &s);
}

const kvpi_scorer_traits kvpi_lagkv_traits = {check_params, size_workspace};

kvp_status kvpi_score_lagkv_cpu(const kvp_score_args *args, kvp_context *ctx) {
    job j = read_job(args);
    j.ctx = ctx;
    const int64_t *shape = args->keys.shape, n_unit = shape[0] * shape[1];
    const double work = (double)(n_unit * shape[2]) * (double)(shape[3] + args->values.shape[3]);
    kvpi_run(ctx, n_unit * j.n_task, work, score_task, &j);
    return KVP_OK;
}

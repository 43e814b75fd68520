/* SPDX-License-Identifier: Apache-2.0
 *
 * KeyDiff: scores[b,h,k] = -cos(keys[b,h,k], mean of key / |key| over the range of k). A key unlike the others is an
 * important one (arXiv 2504.15364).
 *
 * Two reads of the keys, by pieces of ranges, for a few units (heads of batch rows) at a time, so that the second read
 * may find them in the caches: each piece adds up its unit vectors, in float32 for a block and in double from block to
 * block; then each adds the pieces of its range, in order, and compares. In between, scores hold the keys' norms.
 */
#include "../rows/rows.h"
#include "score.h"

#include <math.h>
#include <string.h>

enum { PIECE = 2048, BLOCK = 32 }; /* tokens */
enum { SHORTEST = 3 };             /* tokens of a range: of two, each is as like their mean as the other */

#define WAVE_BYTES ((int64_t)8 << 20) /* of keys */

/* Squares of norms between these are ordinary numbers in float32; all others are moved there by a power of two. */
#define LOW_NORM 0x1p-30f
#define HIGH_NORM 0x1p60f
#define LIFT 0x1p90f

/* A mean of unit vectors that is shorter is what rounding left of those that cancel each other out. */
#define NO_MEAN 0x1p-18

/* Tokens [begin, end), of the range whose pieces are [first, last). */
typedef struct piece {
    int32_t begin, end, first, last;
} piece;

typedef struct job {
    const kvp_score_args *args;
    const kvpi_rows *rows;
    int64_t n_batch, n_head, n_token, n_dim;
    int64_t n_slot, n_wave; /* room for pieces of a batch row; units at a time */
    int64_t first_unit;     /* of the wave at hand */
    size_t worker_bytes;
    piece *pieces;    /* (n_batch, n_slot) */
    int64_t *n_piece; /* (n_batch) */
    double *sums;     /* (n_wave, n_slot, n_dim): of unit vectors */
    char *worker;
} job;

/* What a worker works with. Floats have zeros behind their n_dim. */
typedef struct scratch {
    double *total;
    float *vector, *lifted;
} scratch;

static size_t float_bytes(int64_t n_dim) { return kvpi_round_up_64((size_t)(n_dim + KVPI_SLACK) * sizeof(float)); }

/* Ranges are disjoint, and those that count are not short. */
static int64_t count_slots(const kvp_score_args *args) {
    const int64_t n_token = args->keys.shape[2], most = n_token / SHORTEST, n_vote = args->votes.shape[1];
    return n_token / PIECE + (n_vote < most ? n_vote : most);
}

static int64_t wave_size(const kvp_score_args *args) {
    const int64_t *shape = args->keys.shape, n_unit = shape[0] * shape[1];
    const int64_t fit = WAVE_BYTES / (shape[2] * shape[3] * (int64_t)kvpi_dtype_size(args->keys.dtype));
    return fit < 1 ? 1 : fit < n_unit ? fit : n_unit;
}

static job read_job(const kvp_score_args *args) {
    const int64_t *shape = args->keys.shape;
    return (job){
        .args = args,
        .rows = kvpi_rows_now(),
        .n_batch = shape[0],
        .n_head = shape[1],
        .n_token = shape[2],
        .n_dim = shape[3],
        .n_slot = count_slots(args),
        .n_wave = wave_size(args),
        .worker_bytes = kvpi_round_up_64((size_t)shape[3] * sizeof(double)) + 2 * float_bytes(shape[3]),
    };
}

/* Places the scratch in the workspace; a NULL workspace gives the sizes only. Returns the bytes of all of it. */
static size_t lay_out(job *j, char *workspace, int32_t n_worker) {
    const size_t pieces = kvpi_round_up_64((size_t)(j->n_batch * j->n_slot) * sizeof(piece));
    const size_t counts = kvpi_round_up_64((size_t)j->n_batch * sizeof(int64_t));
    const size_t sums = kvpi_round_up_64((size_t)(j->n_wave * j->n_slot * j->n_dim) * sizeof(double));
    if (workspace) {
        j->pieces = (piece *)(void *)workspace;
        j->n_piece = (int64_t *)(void *)(workspace + pieces);
        j->sums = (double *)(void *)(workspace + pieces + counts);
        j->worker = workspace + pieces + counts + sums;
    }
    return pieces + counts + sums + j->worker_bytes * (size_t)n_worker;
}

static size_t size_workspace(const kvp_score_args *args, int32_t n_worker) {
    job j = read_job(args);
    return lay_out(&j, NULL, n_worker);
}

static scratch scratch_of(const job *j, int32_t worker) {
    char *at = j->worker + (size_t)worker * j->worker_bytes;
    char *floats = at + j->worker_bytes - 2 * float_bytes(j->n_dim);
    memset(floats, 0, 2 * float_bytes(j->n_dim));
    return (scratch){(double *)(void *)at, (float *)(void *)floats, (float *)(void *)(floats + float_bytes(j->n_dim))};
}

static void list_pieces(const job *j, int64_t b) {
    piece *list = j->pieces + b * j->n_slot;
    int32_t n = 0;
    for (int64_t v = 0; v < j->args->votes.shape[1]; v++) {
        int64_t range[2];
        kvpi_vote_range(j->args, b, v, KVP_VOTE_KEY_BEGIN, range);
        if (range[1] - range[0] < SHORTEST) continue;
        const int32_t first = n, last = n + (int32_t)((range[1] - range[0] + PIECE - 1) / PIECE);
        for (; n < last; n++) {
            const int64_t begin = range[0] + (int64_t)(n - first) * PIECE, end = begin + PIECE;
            list[n] = (piece){(int32_t)begin, (int32_t)(end < range[1] ? end : range[1]), first, last};
        }
    }
    j->n_piece[b] = n;
}

/* Scores of one unit whose keys are under no vote. */
static void clear_task(void *arg, int64_t unit, int32_t worker) {
    (void)worker;
    const job *j = arg;
    const kvp_tensor *scores = &j->args->scores;
    int64_t begin, end;
    kvpi_valid_range(&j->args->valid, unit / j->n_head, j->n_token, &begin, &end);
    float *out = (float *)(void *)kvpi_at(scores, unit / j->n_head, unit % j->n_head, 0);
    for (int64_t t = 0; t < j->n_token; t++, out += scores->stride[2]) *out = t >= begin && t < end ? 0 : -INFINITY;
}

static bool is_ordinary(float norm) { return norm >= LOW_NORM && norm <= HIGH_NORM; }

/* A key of length zero has no direction and no weight. */
static float weight_of(float norm) { return norm == 0 ? 0 : 1 / norm; }

/* The key, whose norm is not ordinary, times a power of two, at s->lifted; returns the norm of that. */
static float lift(const job *j, kvpi_head key, float norm, const scratch *s) {
    const float factor = norm < LOW_NORM ? LIFT : 1 / LIFT;
    const kvpi_head lifted = {s->lifted, 0, 1};
    memset(s->lifted, 0, (size_t)j->n_dim * sizeof(float));
    j->rows->add_rows[j->args->keys.dtype](key, 1, j->n_dim, &factor, s->lifted);
    j->rows->norms[KVP_F32](lifted, 1, j->n_dim, &norm, 1);
    return norm;
}

static kvpi_head keys_from(const job *j, kvpi_head head, int64_t row) {
    const int64_t step = head.row_stride * (int64_t)kvpi_dtype_size(j->args->keys.dtype);
    head.first = (const char *)head.first + row * step;
    return head;
}

/* Adds n <= BLOCK unit vectors to s->vector, in order, whatever their lengths were. */
static void add_units(const job *j, kvpi_head keys, int64_t n, const float *norms, int64_t step, const scratch *s) {
    float weights[BLOCK];
    for (int64_t done = 0, r = 0; done < n; done = ++r) {
        for (; r < n && is_ordinary(norms[r * step]); r++) weights[r] = weight_of(norms[r * step]);
        j->rows->add_rows[j->args->keys.dtype](keys_from(j, keys, done), r - done, j->n_dim, weights + done, s->vector);
        if (r == n) return;
        const float weight = weight_of(lift(j, keys_from(j, keys, r), norms[r * step], s));
        j->rows->add_rows[KVP_F32]((kvpi_head){s->lifted, 0, 1}, 1, j->n_dim, &weight, s->vector);
    }
}

/* The scores of n <= BLOCK keys, where their norms are now: minus the product of s->vector, their mean, and the unit
 * vector. */
static void compare(const job *j, kvpi_head keys, int64_t n, float *out, int64_t step, const scratch *s) {
    float products[BLOCK];
    j->rows->products[j->args->keys.dtype](keys, n, j->n_dim, s->vector, products);
    for (int64_t r = 0; r < n; r++, out += step) {
        float norm = *out;
        if (!is_ordinary(norm)) {
            norm = lift(j, keys_from(j, keys, r), norm, s);
            j->rows->products[KVP_F32]((kvpi_head){s->lifted, 0, 1}, 1, j->n_dim, s->vector, &products[r]);
        }
        *out = 0 - products[r] * weight_of(norm); /* not -x: a zero has no sign */
    }
}

/* The mean's direction, at s->vector. */
static void find_mean(const job *j, const piece *pieces, const piece *own, const double *sums, const scratch *s) {
    const double n_token = pieces[own->last - 1].end - pieces[own->first].begin;
    double square = 0;
    memset(s->total, 0, (size_t)j->n_dim * sizeof(double));
    for (int32_t i = own->first; i < own->last; i++)
        for (int64_t d = 0; d < j->n_dim; d++) s->total[d] += sums[i * j->n_dim + d];
    for (int64_t d = 0; d < j->n_dim; d++) square += s->total[d] * s->total[d];
    const double length = sqrt(square), factor = length < NO_MEAN * n_token ? 0 : 1 / length;
    for (int64_t d = 0; d < j->n_dim; d++) s->vector[d] = (float)(s->total[d] * factor);
}

/* One piece of one unit: where it is. */
typedef struct place {
    const piece *pieces, *own;
    double *sums; /* of the unit's pieces */
    kvpi_head keys;
    float *scores;
    int64_t n, step;
} place;

/* False where the batch row has fewer pieces. */
static bool find_place(const job *j, int64_t task, place *at) {
    const kvp_tensor *keys = &j->args->keys, *scores = &j->args->scores;
    const int64_t slot = task / j->n_slot, i = task % j->n_slot, unit = j->first_unit + slot;
    const int64_t b = unit / j->n_head, h = unit % j->n_head;
    if (i >= j->n_piece[b]) return false;
    at->pieces = j->pieces + b * j->n_slot;
    at->own = at->pieces + i;
    at->sums = j->sums + slot * j->n_slot * j->n_dim;
    at->keys = (kvpi_head){kvpi_at(keys, b, h, at->own->begin), keys->stride[2], keys->stride[3]};
    at->scores = (float *)(void *)kvpi_at(scores, b, h, at->own->begin);
    at->n = at->own->end - at->own->begin;
    at->step = scores->stride[2];
    return true;
}

static void sum_task(void *arg, int64_t task, int32_t worker) {
    const job *j = arg;
    place at;
    if (!find_place(j, task, &at)) return;
    const scratch s = scratch_of(j, worker);
    double *sum = at.sums + (at.own - at.pieces) * j->n_dim;
    memset(sum, 0, (size_t)j->n_dim * sizeof(double));
    for (int64_t r = 0; r < at.n; r += BLOCK) {
        const kvpi_head block = keys_from(j, at.keys, r);
        const int64_t n = at.n - r < BLOCK ? at.n - r : BLOCK;
        float *norms = at.scores + r * at.step;
        j->rows->norms[j->args->keys.dtype](block, n, j->n_dim, norms, at.step);
        memset(s.vector, 0, (size_t)j->n_dim * sizeof(float));
        add_units(j, block, n, norms, at.step, &s);
        for (int64_t d = 0; d < j->n_dim; d++) sum[d] += (double)s.vector[d];
    }
}

static void compare_task(void *arg, int64_t task, int32_t worker) {
    const job *j = arg;
    place at;
    if (!find_place(j, task, &at)) return;
    const scratch s = scratch_of(j, worker);
    find_mean(j, at.pieces, at.own, at.sums, &s);
    for (int64_t r = 0; r < at.n; r += BLOCK)
        compare(j, keys_from(j, at.keys, r), at.n - r < BLOCK ? at.n - r : BLOCK, at.scores + r * at.step, at.step, &s);
}

const kvpi_scorer_traits kvpi_keydiff_traits = {NULL, size_workspace};

kvp_status kvpi_score_keydiff_cpu(const kvp_score_args *args, kvp_context *ctx) {
    job j = read_job(args);
    lay_out(&j, ctx->workspace, kvpi_worker_count(ctx));
    const int64_t n_unit = j.n_batch * j.n_head;
    for (int64_t b = 0; b < j.n_batch; b++) list_pieces(&j, b);
    kvpi_run(ctx, n_unit, (double)(n_unit * j.n_token), clear_task, &j);
    for (; j.first_unit < n_unit; j.first_unit += j.n_wave) {
        const int64_t left = n_unit - j.first_unit, n = left < j.n_wave ? left : j.n_wave;
        const double work = (double)(n * j.n_token * j.n_dim);
        kvpi_run(ctx, n * j.n_slot, work * 0.3, sum_task, &j);
        kvpi_run(ctx, n * j.n_slot, work * 0.2, compare_task, &j);
    }
    return KVP_OK;
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * Column sums of the attention matrix, or what is most in a column, for the votes of kvp.h:
 *
 *     A[h,q,k] = exp(s[h,q,k] - lse[h,q]),  s = softcap(scaling * query[h,q].key[k]),  k in [valid begin, q]
 *     score[k] = mean over heads of pool( weight(k) * sum over voters q of A[h,q,k] )
 *     score[k] = pool( the most over heads and voters q of A[h,q,k] )
 *
 * Query rows are worked on in strips, so memory is O(T) and no T x T matrix exists (strip.c). The mean over heads and
 * the pooling commute, so the heads of a group are summed first. Three steps for a few units at a time: pack their
 * keys, add up their strips, and finish: join the chunks' columns in double, weigh, pool, write.
 */
#include "attention.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Packed keys held at a time, in bytes. Workers wait for each other at each step, so that steps should be few: enough
 * for the second-level caches of a few cores, little beside a model. One that works alone need not wait, and holds what
 * its own cache holds: SnapKV's sums of 2048 tokens, 32/8/128, take 5 % less by that (Zen 4). */
#define PACKED_BYTES ((size_t)8 << 20)
#define PACKED_BYTES_ALONE ((size_t)1 << 20)

static size_t unit_bytes(const kvp_score_args *args) {
    const int64_t n_block = (args->keys.shape[2] + KVPI_BLOCK - 1) / KVPI_BLOCK;
    return kvpi_round_up_64(kvpi_packed_bytes(n_block * KVPI_BLOCK, args->keys.shape[3]));
}

static int64_t wave_size(const kvp_score_args *args, int32_t n_worker) {
    const size_t room = n_worker > 1 ? PACKED_BYTES : PACKED_BYTES_ALONE;
    const int64_t n_unit = args->keys.shape[0] * args->keys.shape[1], fit = (int64_t)(room / unit_bytes(args));
    return fit < 1 ? 1 : fit < n_unit ? fit : n_unit;
}

static int64_t row_stride(int64_t n_token) { return (n_token + KVPI_BLOCK - 1) / KVPI_BLOCK * KVPI_BLOCK + KVPI_SLACK; }

/* Two vectors of doubles: sums per key, and the pooled ones. */
static size_t finish_bytes(int64_t n_token) { return 2 * kvpi_round_up_64((size_t)n_token * sizeof(double)); }

/* Places the scratch in the workspace; a NULL workspace gives the sizes only. Returns the bytes of all of it. */
static size_t lay_out(kvpi_attention *j, char *workspace, int32_t n_worker) {
    size_t used = 0;
#define PLACE(field, bytes)                                       \
    do {                                                          \
        j->field = workspace ? (void *)(workspace + used) : NULL; \
        used += kvpi_round_up_64(bytes);                          \
    } while (0)
    PLACE(voters, (size_t)(j->n_batch * j->n_query) * sizeof(int32_t));
    PLACE(n_voters, (size_t)j->n_batch * sizeof(int64_t));
    PLACE(packed, (size_t)j->n_wave * j->packed_bytes);
    PLACE(columns, (size_t)(j->n_wave * KVPI_CHUNK * j->stride) * sizeof(float));
    PLACE(shared, j->share_heads ? (size_t)(j->n_batch * j->n_token) * sizeof(double) : 0);
    PLACE(worker, j->worker_bytes * (size_t)n_worker);
#undef PLACE
    return used;
}

static kvpi_attention read_job(const kvp_score_args *args, const kvp_context *ctx, int32_t n_worker) {
    const int64_t *keys = args->keys.shape, *queries = args->queries.shape;
    const size_t strip = kvpi_strip_bytes(keys[2], keys[3]), finish = finish_bytes(keys[2]);
    return (kvpi_attention){
        .args = args,
        .ctx = ctx,
        .rows = kvpi_rows_now(),
        .n_batch = keys[0],
        .n_head = keys[1],
        .n_token = keys[2],
        .n_query = queries[2],
        .n_dim = keys[3],
        .n_vote = args->votes.shape[1],
        .group = queries[1] / keys[1],
        .n_wave = wave_size(args, n_worker),
        .stride = row_stride(keys[2]),
        .share_heads = args->param[KVPI_PARAM_attention_share_heads] > 0,
        .worker_bytes = strip > finish ? strip : finish,
        .packed_bytes = unit_bytes(args),
    };
}

static size_t size_workspace(const kvp_score_args *args, int32_t n_worker) {
    kvpi_attention j = read_job(args, NULL, n_worker);
    return lay_out(&j, NULL, n_worker);
}

/* Powers are of 2, in float32. */
static kvp_status check_params(const double *param, int64_t n_token, kvp_context *ctx) {
    (void)n_token;
    const double scaling = param[KVPI_PARAM_attention_scaling], softcap = param[KVPI_PARAM_attention_softcap];
    const double kernel_size = param[KVPI_PARAM_attention_kernel_size];
    if (!isfinite((float)(scaling * KVPI_LOG2_E)))
        return kvpi_fail(ctx, KVP_ERR_VALUE, "scaling is %g; expected a number that is finite in float32, %g at most",
                         scaling, FLT_MAX / KVPI_LOG2_E);
    if (softcap != 0 && (!(softcap >= (double)FLT_MIN) || !isfinite((float)(softcap * KVPI_LOG2_E))))
        return kvpi_fail(ctx, KVP_ERR_VALUE, "softcap is %g; expected 0 (none), or %g to %g", softcap, (double)FLT_MIN,
                         FLT_MAX / KVPI_LOG2_E);
    if (softcap != 0 && !isfinite((float)(scaling / softcap)))
        return kvpi_fail(ctx, KVP_ERR_VALUE,
                         "scaling is %g and softcap %g; expected their quotient to be finite in float32", scaling,
                         softcap);
    KVPI_TRY(kvpi_check_whole(kernel_size, "kernel_size", 1, 1 << 20, ctx));
    if ((int64_t)kernel_size % 2 == 0)
        return kvpi_fail(ctx, KVP_ERR_VALUE, "kernel_size is %.0f; expected an odd number", kernel_size);
    return kvpi_check_whole(param[KVPI_PARAM_attention_share_heads], "share_heads", 0, 1, ctx);
}

kvpi_vote kvpi_read_vote(const kvpi_attention *j, int64_t b, int64_t v) {
    const kvp_tensor *votes = &j->args->votes;
    kvpi_vote out = {.weight = kvpi_i32(votes, b, v, KVP_VOTE_WEIGHT),
                     .age_end = kvpi_i32(votes, b, v, KVP_VOTE_AGE_END)};
    kvpi_vote_range(j->args, b, v, KVP_VOTE_KEY_BEGIN, out.key);
    kvpi_vote_range(j->args, b, v, KVP_VOTE_A_BEGIN, out.a);
    kvpi_vote_range(j->args, b, v, KVP_VOTE_B_BEGIN, out.b);
    kvpi_vote_range(j->args, b, v, KVP_VOTE_WINDOW_BEGIN, out.window);
    return out;
}

kvpi_head kvpi_keys_of(const kvpi_attention *j, int64_t b, int64_t h) {
    const kvp_tensor *keys = &j->args->keys;
    int64_t begin, end;
    kvpi_valid_range(&j->args->valid, b, j->n_token, &begin, &end);
    return (kvpi_head){kvpi_at(keys, b, h, begin), keys->stride[2], keys->stride[3]};
}

/* Lists the queries of batch row b that vote on anything, in order of position. */
static void list_voters(const kvpi_attention *j, int64_t b) {
    const int64_t first_query = j->n_token - j->n_query;
    int32_t *list = j->voters + b * j->n_query;
    int64_t n = 0;
    for (int64_t i = 0; i < j->n_query; i++) list[i] = 0;
    for (int64_t v = 0; v < j->n_vote; v++) {
        const kvpi_vote vote = kvpi_read_vote(j, b, v);
        const int64_t *const ranges[] = {vote.a, vote.b};
        for (int i = 0; i < 2 && vote.key[0] < vote.key[1]; i++) {
            const int64_t low = ranges[i][0] > vote.key[0] ? ranges[i][0] : vote.key[0];
            for (int64_t q = low > first_query ? low : first_query; q < ranges[i][1]; q++) list[q - first_query] = 1;
        }
    }
    for (int64_t i = 0; i < j->n_query; i++)
        if (list[i]) list[n++] = (int32_t)(first_query + i);
    j->n_voters[b] = n;
}

/* A wave: units first to first + n, unit u being head u % n_head of batch row u / n_head. */
typedef struct wave {
    const kvpi_attention *job;
    int64_t first, n;
} wave;

/* With a single strip, packing all keys first would only cost memory traffic. */
static bool packs_first(const kvpi_attention *j, int64_t b) { return kvpi_strip_count(j, b) > 1; }

/* One block of keys of one unit. */
static void pack_task(void *arg, int64_t task, int32_t worker) {
    (void)worker;
    const wave *w = arg;
    const kvpi_attention *j = w->job;
    const int64_t n_block = (j->n_token + KVPI_BLOCK - 1) / KVPI_BLOCK, slot = task / n_block, block = task % n_block;
    const int64_t b = (w->first + slot) / j->n_head, h = (w->first + slot) % j->n_head, first = block * KVPI_BLOCK;
    int64_t begin, end;
    kvpi_valid_range(&j->args->valid, b, j->n_token, &begin, &end);
    const int64_t left = end - begin - first;
    if (left <= 0 || !packs_first(j, b)) return;
    char *out = j->packed + (size_t)slot * j->packed_bytes + (size_t)block * kvpi_packed_bytes(KVPI_BLOCK, j->n_dim);
    kvpi_pack_block(j, kvpi_keys_of(j, b, h), first, left < KVPI_BLOCK ? left : KVPI_BLOCK, out);
}

static float *column_of(const kvpi_attention *j, int64_t slot, int64_t chunk) {
    return j->columns + (slot * j->n_chunk + chunk) * j->stride;
}

static void strip_task(void *arg, int64_t task, int32_t worker) {
    const wave *w = arg;
    const kvpi_attention *j = w->job;
    const int64_t slot = task / j->n_chunk, chunk = task % j->n_chunk;
    const int64_t b = (w->first + slot) / j->n_head, h = (w->first + slot) % j->n_head;
    if (chunk >= kvpi_strip_count(j, b)) return;
    const char *packed = packs_first(j, b) ? j->packed + (size_t)slot * j->packed_bytes : NULL;
    kvpi_add_strips(j, b, h, chunk, packed, j->worker + (size_t)worker * j->worker_bytes, column_of(j, slot, chunk));
}

/* How many voters the two ranges hold, counted once where they overlap. */
static int64_t count_voters(const kvpi_vote *v) {
    const int64_t low = v->a[0] > v->b[0] ? v->a[0] : v->b[0], high = v->a[1] < v->b[1] ? v->a[1] : v->b[1];
    return (v->a[1] - v->a[0]) + (v->b[1] - v->b[0]) - (high > low ? high - low : 0);
}

/* Weights, pools and averages the sums of one vote's keys, in place. */
static void finish_vote(const kvpi_vote *v, int64_t kernel_size, double n_head, double *column, double *pooled) {
    const int64_t n_voter = count_voters(v), reach = kernel_size / 2;
    if (v->weight == KVP_WEIGHT_AGE) {
        for (int64_t k = v->key[0]; k < v->key[1]; k++)
            column[k] /= n_head * (double)(v->age_end - k > 1 ? v->age_end - k : 1);
    } else if (v->weight != KVP_WEIGHT_MAX) {
        const double divisor = v->weight == KVP_WEIGHT_MEAN && n_voter > 0 ? n_head * (double)n_voter : n_head;
        for (int64_t k = v->key[0]; k < v->key[1]; k++) column[k] /= divisor;
    }
    if (reach > 0) {
        for (int64_t k = v->key[0]; k < v->key[1]; k++) {
            const int64_t low = k - reach > v->key[0] ? k - reach : v->key[0],
                          high = k + reach + 1 < v->key[1] ? k + reach + 1 : v->key[1];
            double sum = 0;
            for (int64_t i = low; i < high; i++) sum += column[i];
            pooled[k] = sum / (double)kernel_size;
        }
        memcpy(column + v->key[0], pooled + v->key[0], (size_t)(v->key[1] - v->key[0]) * sizeof(double));
    }
    for (int64_t k = v->window[0]; k < v->window[1]; k++) column[k] = 2.0 + (double)(k - v->window[0]);
}

/* Finishes the sums of n_head query heads and writes the scores of key heads first to last of batch row b. */
static void write_scores(const kvpi_attention *j, int64_t b, int64_t first, int64_t last, int64_t n_head,
                         double *column, double *pooled) {
    const kvp_tensor *scores = &j->args->scores;
    int64_t begin, end;
    kvpi_valid_range(&j->args->valid, b, j->n_token, &begin, &end);
    for (int64_t v = 0; v < j->n_vote; v++) {
        const kvpi_vote vote = kvpi_read_vote(j, b, v);
        finish_vote(&vote, (int64_t)j->args->param[KVPI_PARAM_attention_kernel_size], (double)n_head, column, pooled);
    }
    for (int64_t h = first; h < last; h++) {
        float *out = (float *)(void *)kvpi_at(scores, b, h, 0);
        const int64_t step = scores->stride[2];
        for (int64_t k = 0; k < begin; k++) out[k * step] = -INFINITY;
        for (int64_t k = begin; k < end; k++) out[k * step] = (float)column[k];
        for (int64_t k = end; k < j->n_token; k++) out[k * step] = -INFINITY;
    }
}

/* NaN, if one of them is. */
static double most_of(double a, double b) { return a >= b || isnan(a) ? a : b; }

/* Adds the chunks of one unit, in order, or takes the most of them: so the keys of each vote, all others have nothing.
 */
static void join_chunks(const kvpi_attention *j, int64_t slot, int64_t b, double *column) {
    const int64_t n_strip = kvpi_strip_count(j, b), n_chunk = n_strip < KVPI_CHUNK ? n_strip : KVPI_CHUNK;
    int64_t begin, end;
    kvpi_valid_range(&j->args->valid, b, j->n_token, &begin, &end);
    for (int64_t i = 0; i < j->n_vote * n_chunk; i++) {
        const kvpi_vote vote = kvpi_read_vote(j, b, i / n_chunk);
        const float *from = column_of(j, slot, i % n_chunk);
        if (vote.weight == KVP_WEIGHT_MAX)
            for (int64_t k = vote.key[0]; k < vote.key[1]; k++) column[k] = most_of(column[k], (double)from[k - begin]);
        else
            for (int64_t k = vote.key[0]; k < vote.key[1]; k++) column[k] += (double)from[k - begin];
    }
}

static void finish_task(void *arg, int64_t task, int32_t worker) {
    const wave *w = arg;
    const kvpi_attention *j = w->job;
    const int64_t b = (w->first + task) / j->n_head, h = (w->first + task) % j->n_head;
    char *scratch = j->worker + (size_t)worker * j->worker_bytes;
    double *column = (double *)(void *)scratch, *pooled = (double *)(void *)(scratch + finish_bytes(j->n_token) / 2);
    memset(column, 0, (size_t)j->n_token * sizeof(double));
    join_chunks(j, task, b, column);
    write_scores(j, b, h, h + 1, j->group, column, pooled);
}

static void finish_shared_task(void *arg, int64_t b, int32_t worker) {
    const kvpi_attention *j = arg;
    double *pooled = (double *)(void *)(j->worker + (size_t)worker * j->worker_bytes);
    write_scores(j, b, 0, j->n_head, j->n_head * j->group, j->shared + b * j->n_token, pooled);
}

static void run_wave(wave *w, double work) {
    const kvpi_attention *j = w->job;
    const int64_t n_block = (j->n_token + KVPI_BLOCK - 1) / KVPI_BLOCK;
    if (j->n_chunk > 1) kvpi_run(j->ctx, w->n * n_block, (double)(w->n * j->n_token * j->n_dim) * 0.5, pack_task, w);
    kvpi_run(j->ctx, w->n * j->n_chunk, work, strip_task, w);
    if (!j->share_heads) {
        kvpi_run(j->ctx, w->n, (double)(w->n * j->n_token) * (double)KVPI_CHUNK, finish_task, w);
        return;
    }
    for (int64_t slot = 0; slot < w->n; slot++) {
        const int64_t b = (w->first + slot) / j->n_head;
        join_chunks(j, slot, b, j->shared + b * j->n_token);
    }
}

/* Once the voters are known: how many chunks the longest unit has. Where that is one, as in TOVA, nothing is packed
 * first, and all that memory holds columns, so that many more units are worked on at a time: with 16384 tokens of 128
 * dimensions it was one. */
static void size_waves(kvpi_attention *j) {
    int64_t n_strip = 1;
    for (int64_t b = 0; b < j->n_batch; b++)
        if (kvpi_strip_count(j, b) > n_strip) n_strip = kvpi_strip_count(j, b);
    j->n_chunk = n_strip < KVPI_CHUNK ? n_strip : KVPI_CHUNK;
    if (j->n_chunk > 1) return;
    const size_t column = (size_t)j->stride * sizeof(float),
                 room = (size_t)j->n_wave * (j->packed_bytes + KVPI_CHUNK * column);
    const int64_t n_unit = j->n_batch * j->n_head, fit = (int64_t)(room / column);
    j->columns = (float *)(void *)j->packed; /* which stands before them */
    j->n_wave = fit < n_unit ? fit : n_unit;
}

const kvpi_scorer_traits kvpi_attention_traits = {check_params, size_workspace};

kvp_status kvpi_score_attention_cpu(const kvp_score_args *args, kvp_context *ctx) {
    const int32_t n_worker = kvpi_worker_count(ctx);
    kvpi_attention j = read_job(args, ctx, n_worker);
    lay_out(&j, ctx->workspace, n_worker);
    double n_voter = 0;
    for (int64_t b = 0; b < j.n_batch; b++) {
        list_voters(&j, b);
        n_voter += (double)j.n_voters[b] / (double)j.n_batch;
    }
    size_waves(&j);
    if (j.share_heads) memset(j.shared, 0, (size_t)(j.n_batch * j.n_token) * sizeof(double));
    const int64_t n_unit = j.n_batch * j.n_head;
    for (int64_t first = 0; first < n_unit; first += j.n_wave) {
        wave w = {&j, first, n_unit - first < j.n_wave ? n_unit - first : j.n_wave};
        run_wave(&w, n_voter * (double)(w.n * j.group * j.n_token) * ((double)j.n_dim * 0.02 + 1.0));
    }
    if (j.share_heads) kvpi_run(ctx, j.n_batch, (double)(j.n_batch * j.n_head * j.n_token), finish_shared_task, &j);
    return KVP_OK;
}

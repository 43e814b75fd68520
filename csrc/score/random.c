/* SPDX-License-Identifier: Apache-2.0
 *
 * The control: a draw for each token, by row and head, of the keys of a few of the row's tokens; draws.h has the
 * arithmetic, whole numbers throughout, so that every device and build draws the same.
 */
#include "../rows/rows.h"
#include "draws.h"
#include "score.h"

#include <math.h>

enum { BLOCK = 4096, PART = 64 }; /* tokens of a task; channels that are widened at a time */

static kvp_status check_params(const double *param, int64_t n_token, kvp_context *ctx) {
    (void)n_token;
    KVPI_TRY(kvpi_check_whole(param[KVPI_PARAM_random_seed], "seed", 0, UINT32_MAX, ctx));
    return kvpi_check_whole(param[KVPI_PARAM_random_seed_high], "seed_high", 0, (1 << 30) - 1, ctx);
}

const kvpi_scorer_traits kvpi_random_traits = {check_params, NULL};

/* The sum of a key's salts, which is the i-th of the row's. */
static uint64_t salt_key(const kvp_tensor *keys, const char *first, int64_t i_key) {
    const int64_t n_dim = keys->shape[3], step = keys->stride[3] * (int64_t)kvpi_dtype_size(keys->dtype);
    const float one = 1;
    uint64_t salt = 0;
    for (int64_t d = 0; d < n_dim; d += PART) {
        const int64_t n = n_dim - d < PART ? n_dim - d : PART;
        float line[PART + KVPI_SLACK] = {0};
        kvpi_rows_now()->add_rows[keys->dtype]((kvpi_head){first + d * step, 0, keys->stride[3]}, 1, n, &one, line);
        for (int64_t i = 0; i < n; i++) salt += kvpi_salt(line[i], i_key * n_dim + d + i);
    }
    return salt;
}

/* What the draws of a head begin with. */
static uint64_t start_head(const kvp_score_args *args, int64_t b, int64_t h, int64_t begin, int64_t end) {
    uint64_t salts = 0;
    for (int64_t i = 0; i < KVPI_TOLD_BY; i++)
        salts += salt_key(&args->keys, kvpi_at(&args->keys, b, h, kvpi_told_by(i, begin, end)), i);
    return kvpi_draw_head(salts, h, kvpi_seed(args->param), end - begin);
}

static void draw_block(void *arg, int64_t task, int32_t worker) {
    (void)worker;
    const kvp_score_args *args = arg;
    const kvp_tensor *keys = &args->keys, *scores = &args->scores;
    const int64_t n_token = keys->shape[2], n_block = (n_token + BLOCK - 1) / BLOCK, n_head = keys->shape[1];
    const int64_t b = task / n_block / n_head, h = task / n_block % n_head, first = task % n_block * BLOCK;
    const int64_t last = first + BLOCK < n_token ? first + BLOCK : n_token, step = scores->stride[2];
    int64_t begin, end;
    kvpi_valid_range(&args->valid, b, n_token, &begin, &end);
    float *out = (float *)(void *)kvpi_at(scores, b, h, 0);
    const int64_t low = begin < first  ? first
                        : begin < last ? begin
                                       : last,
                  high = end < low    ? low
                         : end < last ? end
                                      : last;
    for (int64_t t = first; t < low; t++) out[t * step] = -INFINITY;
    if (low < high) {
        const uint64_t head = start_head(args, b, h, begin, end);
        for (int64_t t = low; t < high; t++) out[t * step] = kvpi_draw(head, t - begin);
    }
    for (int64_t t = high; t < last; t++) out[t * step] = -INFINITY;
}

kvp_status kvpi_score_random_cpu(const kvp_score_args *args, kvp_context *ctx) {
    const int64_t *shape = args->keys.shape, n_block = (shape[2] + BLOCK - 1) / BLOCK;
    kvpi_run(ctx, shape[0] * shape[1] * n_block, (double)shape[0] * (double)shape[1] * (double)shape[2] * 1.5,
             draw_block, (void *)(uintptr_t)args);
    return KVP_OK;
}

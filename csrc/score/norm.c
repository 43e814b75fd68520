/* SPDX-License-Identifier: Apache-2.0
 *
 * K-norm: scores[b,h,t] = -|keys[b,h,t,:]|. A low norm marks a key that attracts much attention (arXiv 2406.11430). One
 * read of the keys; tasks are blocks of tokens so that few heads still fill all threads.
 */
#include "../rows/rows.h"
#include "score.h"

#include <math.h>

enum { BLOCK = 1024 }; /* tokens */

static void score_block(void *arg, int64_t task, int32_t worker) {
    (void)worker;
    const kvp_score_args *args = arg;
    const kvp_tensor *keys = &args->keys, *scores = &args->scores;
    const int64_t n_token = keys->shape[2], n_block = (n_token + BLOCK - 1) / BLOCK, n_head = keys->shape[1];
    const int64_t b = task / n_block / n_head, h = task / n_block % n_head, first = task % n_block * BLOCK;
    const int64_t last = first + BLOCK < n_token ? first + BLOCK : n_token;
    int64_t begin, end;
    kvpi_valid_range(&args->valid, b, n_token, &begin, &end);
    float *out = (float *)(void *)kvpi_at(scores, b, h, first);
    const kvpi_head head = {kvpi_at(keys, b, h, first), keys->stride[2], keys->stride[3]};
    kvpi_rows_now()->norms[keys->dtype](head, last - first, keys->shape[3], out, scores->stride[2]);
    for (int64_t t = first; t < last; t++, out += scores->stride[2]) *out = t >= begin && t < end ? -*out : -INFINITY;
}

const kvpi_scorer_traits kvpi_norm_traits = {NULL, NULL};

kvp_status kvpi_score_norm_cpu(const kvp_score_args *args, kvp_context *ctx) {
    const int64_t *shape = args->keys.shape;
    const int64_t n_block = (shape[2] + BLOCK - 1) / BLOCK;
    const double work = (double)shape[0] * (double)shape[1] * (double)shape[2] * (double)shape[3] * 0.2;
    kvpi_run(ctx, shape[0] * shape[1] * n_block, work, score_block, (void *)(uintptr_t)args);
    return KVP_OK;
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * Sinks and recency on the GPU; see position.c.
 */
#include "../gpu/tables.cuh"
#include "made.cuh"

extern "C" {
#include "score.h"
}

enum { THREADS = 256 };

typedef struct position_job {
    kvpg_rows scores;
    int n_head;
    kvpg_made made;
    kvpg_table valid;
} position_job;

static __global__ void position(const __grid_constant__ position_job j) {
    kvpg_follow();
    const int b = blockIdx.y / j.n_head, h = blockIdx.y % j.n_head, t = blockIdx.x * THREADS + threadIdx.x;
    if (t >= j.made.n_token) return;
    const int begin = j.valid.stride ? kvpg_table_row(j.valid, b)[0] : 0;
    const float score = kvpg_make_score(j.made, 0, begin, t);
    *(float *)kvpg_row(j.scores, b, h, t) = kvpg_is_valid(j.valid, b, t) ? score : -INFINITY;
}

extern "C" size_t kvpi_score_position_cuda_workspace(const kvp_score_args *args) {
    return kvpg_valid_bytes(&args->valid);
}

extern "C" kvp_status kvpi_score_position_cuda(const kvp_score_args *args, kvp_context *ctx) {
    const int64_t *shape = args->keys.shape;
    position_job j;
    j.scores = kvpg_rows_of(&args->scores);
    j.n_head = (int)shape[1];
    j.made = kvpg_make_scores(args);
    KVPI_TRY(kvpg_table_of_valid(&args->valid, ctx, &j.valid));
    return kvpg_launch("position", ctx, position, {kvpg_ceil_div(shape[2], THREADS), shape[0] * shape[1]}, THREADS, 1,
                       0, j);
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * Draws on the GPU; see random.c. Each block makes its head's salt anew, which costs one read of a few keys.
 */
#include "../gpu/tables.cuh"
#include "made.cuh"

extern "C" {
#include "score.h"
}

enum { THREADS = 256, DRAWS = 4 }; /* DRAWS: tokens of a thread */

typedef struct random_job {
    kvpg_rows scores;
    int n_head;
    kvpg_made made;
    kvpg_table valid;
} random_job;

static __global__ void __launch_bounds__(THREADS) draw(const __grid_constant__ random_job j) {
    kvpg_follow();
    const int b = blockIdx.y / j.n_head, h = blockIdx.y % j.n_head, first = blockIdx.x * THREADS * DRAWS;
    int begin = 0, end = j.made.n_token;
    if (j.valid.stride) {
        const kvpg_numbers row = kvpg_table_row(j.valid, b);
        begin = row[0], end = row[1];
    }
    const uint64_t head = kvpg_start_scores<THREADS>(j.made, b, h, begin, end);
#pragma unroll
    for (int i = 0; i < DRAWS; i++) {
        const int t = first + i * THREADS + threadIdx.x;
        if (t < j.made.n_token)
            *(float *)kvpg_row(j.scores, b, h, t) =
                t >= begin && t < end ? kvpg_make_score(j.made, head, begin, t) : -INFINITY;
    }
}

extern "C" size_t kvpi_score_random_cuda_workspace(const kvp_score_args *args) {
    return kvpg_valid_bytes(&args->valid);
}

extern "C" kvp_status kvpi_score_random_cuda(const kvp_score_args *args, kvp_context *ctx) {
    const int64_t *shape = args->keys.shape;
    random_job j;
    j.scores = kvpg_rows_of(&args->scores);
    j.n_head = (int)shape[1];
    j.made = kvpg_make_scores(args);
    KVPI_TRY(kvpg_table_of_valid(&args->valid, ctx, &j.valid));
    const kvpg_grid grid = {kvpg_ceil_div(shape[2], THREADS * DRAWS), shape[0] * shape[1]};
    return kvpg_launch("random", ctx, draw, grid, THREADS, 1, 0, j);
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * Draws on the GPU; see random.c. Each block makes its head's salt anew, which costs one read of a key.
 */
#include "../gpu/tables.cuh"
#include "draws.h"

extern "C" {
#include "score.h"
}

enum { THREADS = 256, DRAWS = 4 }; /* DRAWS: tokens of a thread */

typedef struct random_job {
    kvpg_rows keys, scores;
    int n_head, n_token, n_dim;
    uint64_t seed;
    kvpg_table valid;
} random_job;

/* The sum over the block, for all its threads. */
__device__ __forceinline__ uint64_t sum_block(uint64_t x) {
    __shared__ uint64_t of_warps[THREADS / 32];
    for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(~0u, x, o);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    uint64_t sum = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) sum += of_warps[w];
    return sum;
}

template <typename T> __global__ void __launch_bounds__(THREADS) draw(const __grid_constant__ random_job j) {
    kvpg_follow();
    const int b = blockIdx.y / j.n_head, h = blockIdx.y % j.n_head, first = blockIdx.x * THREADS * DRAWS;
    int begin = 0, end = j.n_token;
    if (j.valid.stride) {
        const kvpg_numbers row = kvpg_table_row(j.valid, b);
        begin = row[0], end = row[1];
    }
    uint64_t salts = 0;
    const char *key = kvpg_row(j.keys, b, h, begin);
    if (begin < end)
        for (int d = threadIdx.x; d < j.n_dim; d += THREADS)
            salts += kvpi_salt(kvpg_float(*(const T *)(key + d * j.keys.d)), d);
    const uint64_t head = kvpi_draw_head(sum_block(salts), h, j.seed, end - begin);
#pragma unroll
    for (int i = 0; i < DRAWS; i++) {
        const int t = first + i * THREADS + threadIdx.x;
        if (t < j.n_token)
            *(float *)kvpg_row(j.scores, b, h, t) = t >= begin && t < end ? kvpi_draw(head, t - begin) : -INFINITY;
    }
}

extern "C" size_t kvpi_score_random_cuda_workspace(const kvp_score_args *args) {
    return kvpg_valid_bytes(&args->valid);
}

extern "C" kvp_status kvpi_score_random_cuda(const kvp_score_args *args, kvp_context *ctx) {
    const int64_t *shape = args->keys.shape;
    random_job j;
    j.keys = kvpg_rows_of(&args->keys);
    j.scores = kvpg_rows_of(&args->scores);
    j.n_head = (int)shape[1];
    j.n_token = (int)shape[2];
    j.n_dim = (int)shape[3];
    j.seed = kvpi_seed(args->param);
    KVPI_TRY(kvpg_table_of_valid(&args->valid, ctx, &j.valid));
    const kvpg_grid grid = {kvpg_ceil_div(shape[2], THREADS * DRAWS), shape[0] * shape[1]};
    return kvpg_with_type(args->keys.dtype, ctx, [&](auto t) {
        return kvpg_launch("random", ctx, draw<typename decltype(t)::type>, grid, THREADS, 1, 0, j);
    });
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * K-norm on the GPU; see norm.c. Rows on 16-byte boundaries are read once, 16 bytes a lane and four rows in flight; others by single elements.
 */
#include "../rows/rows.cuh"
#include "../rows/tables.cuh"

extern "C" {
#include "score.h"
}

enum { THREADS = 256, IN_FLIGHT = 4 };

typedef struct norm_job {
    kvpg_rows keys, scores;
    int n_row, n_head, n_token, n_dim; /* n_row: batch rows times heads */
    kvpg_table valid;
} norm_job;

__device__ __forceinline__ void write_norm(const norm_job &j, int b, int h, int t, float square_sum) {
    const bool inside = kvpg_is_valid(j.valid, b, t);
    *(float *)kvpg_row(j.scores, b, h, t) = inside ? -sqrtf(square_sum) : -INFINITY;
}

/* LANES lanes to a row. Blocks that follow each other take the same tokens of all heads, which a model lays side by side. */
template <typename T, int LANES> __global__ void __launch_bounds__(THREADS) norm_wide(const __grid_constant__ norm_job j) {
    const int row = blockIdx.x % j.n_row, b = row / j.n_head, h = row % j.n_head, lane = threadIdx.x % LANES, n_chunk = j.n_dim * (int)sizeof(T) / 16;
    const int first = (blockIdx.x / j.n_row * (THREADS / LANES) + threadIdx.x / LANES) * IN_FLIGHT;
    const char *keys = kvpg_row(j.keys, b, h, first);
    float sum[IN_FLIGHT] = {};
    for (int chunk = lane; chunk < n_chunk; chunk += LANES) {
        uint4 v[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++)
            v[i] = first + i < j.n_token ? __ldcs((const uint4 *)(keys + i * j.keys.t) + chunk) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) sum[i] += kvpg_square_sum<T>(v[i]);
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++)
        for (int o = LANES / 2; o > 0; o /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], o);
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++)
        if (lane == i % LANES && first + i < j.n_token) write_norm(j, b, h, first + i, sum[i]);
}

/* A warp to a row. */
template <typename T> __global__ void __launch_bounds__(THREADS) norm_narrow(const __grid_constant__ norm_job j) {
    const int row = blockIdx.x % j.n_row, b = row / j.n_head, h = row % j.n_head, lane = threadIdx.x % 32;
    const int t = blockIdx.x / j.n_row * (THREADS / 32) + threadIdx.x / 32;
    if (t >= j.n_token) return;
    float sum = 0;
    for (int d = lane; d < j.n_dim; d += 32) {
        const float x = kvpg_float(*(const T *)(kvpg_row(j.keys, b, h, t) + d * j.keys.d));
        sum = fmaf(x, x, sum);
    }
    for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane == 0) write_norm(j, b, h, t, sum);
}

template <typename T, int LANES> static void launch_wide(const norm_job &j, cudaStream_t stream) {
    norm_wide<T, LANES><<<kvpg_ceil_div(j.n_token, THREADS / LANES * IN_FLIGHT) * j.n_row, THREADS, 0, stream>>>(j);
}

template <typename T> static void launch(const norm_job &j, bool wide, cudaStream_t stream) {
    const int n_chunk = j.n_dim * (int)sizeof(T) / 16;
    if (!wide)
        norm_narrow<T><<<kvpg_ceil_div(j.n_token, THREADS / 32) * j.n_row, THREADS, 0, stream>>>(j);
    else if (n_chunk <= 8)
        launch_wide<T, 8>(j, stream);
    else if (n_chunk <= 16)
        launch_wide<T, 16>(j, stream);
    else
        launch_wide<T, 32>(j, stream);
}

extern "C" kvp_status kvpi_score_norm_cuda(const kvp_score_args *args, kvp_context *ctx) {
    const int64_t *shape = args->keys.shape;
    norm_job j;
    j.keys = kvpg_rows_of(&args->keys);
    j.scores = kvpg_rows_of(&args->scores);
    j.n_row = (int)(shape[0] * shape[1]);
    j.n_head = (int)shape[1];
    j.n_token = (int)shape[2];
    j.n_dim = (int)shape[3];
    KVPI_TRY(kvpg_table_of_valid(&args->valid, ctx, &j.valid));
    const bool wide = kvpg_has_wide_rows(&args->keys);
    switch (args->keys.dtype) {
    case KVP_F32: launch<float>(j, wide, kvpg_stream(ctx)); break;
    case KVP_F16: launch<__half>(j, wide, kvpg_stream(ctx)); break;
    default: launch<__nv_bfloat16>(j, wide, kvpg_stream(ctx)); break;
    }
    return kvpg_launched("norm", ctx);
}

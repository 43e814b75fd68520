/* SPDX-License-Identifier: Apache-2.0
 *
 * K-norm on the GPU; see norm.c. Rows on 16-byte boundaries are read once, 16 bytes a lane and four rows in flight;
 * others by single elements.
 */
#include "../gpu/rows.cuh"
#include "../gpu/tables.cuh"

extern "C" {
#include "score.h"
}

enum { THREADS = 256, IN_FLIGHT = 4 };

typedef struct norm_job {
    kvpg_rows keys, scores;
    int n_row, n_head, n_token, n_dim; /* n_row: batch rows times heads */
    int n_cached;                      /* tokens that are left in the cache */
    kvpg_table valid;
} norm_job;

__device__ __forceinline__ void write_norm(const norm_job &j, int b, int h, int t, float square_sum) {
    const bool inside = kvpg_is_valid(j.valid, b, t);
    *(float *)kvpg_row(j.scores, b, h, t) = inside ? -sqrtf(square_sum) : -INFINITY;
}

/* LANES lanes to a row. Blocks that follow each other take the same tokens of all heads, which a model lays side by
 * side. The oldest come last and stay in the second-level cache, as far as they fit: gathering begins with them. */
template <typename T, int LANES> __global__ void __launch_bounds__(THREADS)
    norm_wide(const __grid_constant__ norm_job j) {
    kvpg_follow();
    const int row = blockIdx.x % j.n_row, b = row / j.n_head, h = row % j.n_head, lane = threadIdx.x % LANES,
              n_chunk = j.n_dim * (int)sizeof(T) / 16;
    const int first = ((gridDim.x - 1 - blockIdx.x) / j.n_row * (THREADS / LANES) + threadIdx.x / LANES) * IN_FLIGHT;
    const bool is_cached = first < j.n_cached;
    const char *keys = kvpg_row(j.keys, b, h, first);
    float sum[IN_FLIGHT] = {};
    for (int chunk = lane; chunk < n_chunk; chunk += LANES) {
        uint4 v[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            const uint4 *from = (const uint4 *)(keys + i * j.keys.t) + chunk;
            v[i] = first + i >= j.n_token ? make_uint4(0, 0, 0, 0) : is_cached ? __ldcg(from) : __ldcs(from);
        }
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
    kvpg_follow();
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

template <typename T> static kvp_status launch(const norm_job &j, bool wide, kvp_context *ctx) {
    const int n_chunk = j.n_dim * (int)sizeof(T) / 16, lanes = !wide ? 32 : n_chunk <= 8 ? 8 : n_chunk <= 16 ? 16 : 32;
    const int rows = THREADS / lanes * (wide ? IN_FLIGHT : 1);
    void (*kernel)(norm_job) = !wide         ? norm_narrow<T>
                               : lanes == 8  ? norm_wide<T, 8>
                               : lanes == 16 ? norm_wide<T, 16>
                                             : norm_wide<T, 32>;
    return kvpg_launch("norm", ctx, kernel, {kvpg_ceil_div(j.n_token, rows) * j.n_row, 1}, THREADS, 1, 0, j);
}

extern "C" size_t kvpi_score_norm_cuda_workspace(const kvp_score_args *args) { return kvpg_valid_bytes(&args->valid); }

extern "C" kvp_status kvpi_score_norm_cuda(const kvp_score_args *args, kvp_context *ctx) {
    const int64_t *shape = args->keys.shape;
    norm_job j;
    j.keys = kvpg_rows_of(&args->keys);
    j.scores = kvpg_rows_of(&args->scores);
    j.n_row = (int)(shape[0] * shape[1]);
    j.n_head = (int)shape[1];
    j.n_token = (int)shape[2];
    j.n_dim = (int)shape[3];
    int cache_bytes;
    KVPG_TRY("tell the size of the cache",
             cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, args->keys.device_index));
    const int64_t token_bytes = (int64_t)j.n_row * j.n_dim * (int64_t)kvpi_dtype_size(args->keys.dtype);
    const int64_t n_cached = cache_bytes / 2 / token_bytes; /* half: the other has what is written */
    j.n_cached = n_cached < j.n_token ? (int)n_cached : j.n_token;
    KVPI_TRY(kvpg_table_of_valid(&args->valid, ctx, &j.valid));
    const bool wide = kvpg_has_wide_rows(&args->keys);
    return kvpg_with_type(args->keys.dtype, ctx,
                          [&](auto t) { return launch<typename decltype(t)::type>(j, wide, ctx); });
}

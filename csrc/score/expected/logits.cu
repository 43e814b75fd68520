/* SPDX-License-Identifier: Apache-2.0
 *
 * The verb expect on the GPU, and its second step: the logits of keys k under a forecast, k.(m + Sk), by tensor cores.
 * A block has the S of one query head in its registers, 16 columns a warp, and takes tile after tile of keys; more than
 * 128 channels one part of the columns after the other. S is taken in three parts and keys in as many as their type has
 * bits for, all products of parts but those beyond float32's last place: the exact product, nearly, of float32 numbers.
 */
#include "expected.cuh"

extern "C" {
#include "expected.h"
}

enum { BLOCK = 512, FRAGMENTS = 2 }; /* keys of a block; times 16 keys at once */

/* Columns of S that a warp has at once, times 8, and how often all warps take some. */
template <int DIM> struct columns {
    static constexpr int EIGHTS = DIM > 128 ? 1 : 2, OF_BLOCK = kvpg_expected<DIM>::WARPS * EIGHTS * 8,
                         PASSES = DIM / OF_BLOCK;
};
template <int DIM> using spread_parts = uint32_t[3][DIM / 16][columns<DIM>::EIGHTS][2];

template <typename T> struct parts {
    enum { N = 3 };
};
template <> struct parts<__half> {
    enum { N = 2 };
};
template <> struct parts<__nv_bfloat16> {
    enum { N = 1 };
};

typedef struct logits_job {
    kvpg_rows keys, logits;
    bool wide;
    int n_unit, n_head, group; /* units are query heads, group of them to a key head */
    kvpg_forecast forecast;
    kvpg_table edges;
} logits_job;

/* What a warp multiplies with: the columns of S from `column` on. S stands for its transpose as well. */
template <int DIM> __device__ __forceinline__ void load_spread(const float *spread, int column, spread_parts<DIM> &b) {
    const int lane = threadIdx.x % 32;
    const float *row = spread + (column + lane / 4) * DIM + lane % 4 * 2;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++)
#pragma unroll
        for (int n = 0; n < columns<DIM>::EIGHTS; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float2 x = *(const float2 *)(row + 8 * n * DIM + 16 * k + 8 * half);
#pragma unroll
                for (int part = 0; part < 3; part++) b[part][k][n][half] = take_part(x.x, x.y);
            }
}

/* Where a tile has a part of a key's channels. */
template <int DIM, typename P> __device__ __forceinline__ P *key_part(P *tile, int part, int row, int channel) {
    return tile + (part * kvpg_expected<DIM>::TILE + row) * kvpg_expected<DIM>::PITCH + channel;
}

/* A tile of keys to shared memory, part after part; zeros behind the last. */
template <typename T, int DIM>
__device__ __forceinline__ void load_keys(const logits_job &j, int b, int h, int first, int end, __nv_bfloat16 *tile) {
    const int at = threadIdx.x % kvpg_expected<DIM>::LANES * 8, own_row = threadIdx.x / kvpg_expected<DIM>::LANES;
#pragma unroll
    for (int row = 0; row < kvpg_expected<DIM>::TILE; row += kvpg_expected<DIM>::ROWS) {
        const int t = first + own_row + row;
        float x[8] = {};
        if (t < end) {
            load_four<T>(kvpg_row(j.keys, b, h, t), j.keys.d, j.wide, at, x);
            load_four<T>(kvpg_row(j.keys, b, h, t), j.keys.d, j.wide, at + 4, x + 4);
        }
#pragma unroll
        for (int part = 0; part < parts<T>::N; part++) {
            uint4 taken;
            taken.x = take_part(x[0], x[1]);
            taken.y = take_part(x[2], x[3]);
            taken.z = take_part(x[4], x[5]);
            taken.w = take_part(x[6], x[7]);
            *(uint4 *)key_part<DIM>(tile, part, own_row + row, at) = taken;
        }
    }
}

/* Products of FRAGMENTS times 16 keys with the spread: those of the first parts, and all others, which are so much
 * smaller that what tensor cores cut off of their sum is below float32's last place. */
template <typename T, int DIM>
__device__ __forceinline__ void add_products(const __nv_bfloat16 *tile, int row, const spread_parts<DIM> &spread,
                                             float (&sum)[2][FRAGMENTS][columns<DIM>::EIGHTS][4]) {
    const int own = row + threadIdx.x % 16, channel = threadIdx.x % 32 / 16 * 8;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++)
#pragma unroll
        for (int part = 0; part < parts<T>::N; part++) {
            uint32_t a[FRAGMENTS][4];
#pragma unroll
            for (int m = 0; m < FRAGMENTS; m++)
                kvpg_load_matrix(a[m], (uint32_t)__cvta_generic_to_shared(
                                           key_part<DIM>(tile, part, own + 16 * m, channel + 16 * k)));
#pragma unroll
            for (int other = 0; other < 3 - part; other++)
#pragma unroll
                for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
                    for (int n = 0; n < columns<DIM>::EIGHTS; n++)
                        kvpg_multiply<__nv_bfloat16>(sum[part + other > 0][m][n], a[m], spread[other][k][n][0],
                                                     spread[other][k][n][1]);
        }
}

/* Two channels of a key, as they were. */
template <typename T, int DIM>
__device__ __forceinline__ float2 key_at(const __nv_bfloat16 *tile, int row, int column) {
    float2 key = {};
#pragma unroll
    for (int part = parts<T>::N - 1; part >= 0; part--) {
        const __nv_bfloat162 x = *(const __nv_bfloat162 *)key_part<DIM>(tile, part, row, column);
        key.x += __low2float(x);
        key.y += __high2float(x);
    }
    return key;
}

/* Of a tile of keys that lies in shared memory: products with the columns of S that each warp has, summed by warp. */
template <typename T, int DIM>
__device__ __forceinline__ void dot_tile(const __nv_bfloat16 *tile, int column, bool with_spread,
                                         const spread_parts<DIM> &spread, const float2 (&mean)[columns<DIM>::EIGHTS],
                                         float *dots) {
    enum { TILE = kvpg_expected<DIM>::TILE, EIGHTS = columns<DIM>::EIGHTS };
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = 0; row < TILE; row += 16 * FRAGMENTS) {
        float sum[2][FRAGMENTS][EIGHTS][4] = {};
        if (with_spread) add_products<T, DIM>(tile, row, spread, sum);
#pragma unroll
        for (int i = 0; i < FRAGMENTS * 2; i++) {
            const int own = row + 8 * i + lane / 4;
            float dot = 0;
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
                const float2 key = key_at<T, DIM>(tile, own, column + lane % 4 * 2 + 8 * n);
                const float *main = sum[0][i / 2][n] + i % 2 * 2, *rest = sum[1][i / 2][n] + i % 2 * 2;
                dot = fmaf(mean[n].x + (main[0] + rest[0]), key.x, dot);
                dot = fmaf(mean[n].y + (main[1] + rest[1]), key.y, dot);
            }
            dot += __shfl_xor_sync(~0u, dot, 1);
            dot += __shfl_xor_sync(~0u, dot, 2);
            if (lane % 4 == 0) dots[warp * TILE + own] = dot;
        }
    }
}

template <typename T, int DIM> __global__ void __launch_bounds__(kvpg_expected<DIM>::THREADS)
    ask_forecast(const __grid_constant__ logits_job j) {
    kvpg_follow();
    enum { TILE = kvpg_expected<DIM>::TILE, EIGHTS = columns<DIM>::EIGHTS };
    extern __shared__ uint4 shared[];
    __nv_bfloat16 *tile = (__nv_bfloat16 *)shared;
    float *dots = (float *)key_part<DIM>(tile, parts<T>::N, 0, 0); /* (warp, token): of a warp's channels */
    const int unit = blockIdx.x % j.n_unit, b = unit / j.n_head, head = unit % j.n_head;
    const kvpg_judged judged = kvpg_judged_of(j.edges, b);
    const int begin = judged.begin + blockIdx.x / j.n_unit * BLOCK, end = min(begin + BLOCK, judged.end);
    if (begin >= end) return;
    for (int pass = 0; pass < columns<DIM>::PASSES; pass++) {
        const int column = pass * columns<DIM>::OF_BLOCK + threadIdx.x / 32 * EIGHTS * 8;
        const float *means = j.forecast.mean + (int64_t)unit * DIM + column + threadIdx.x % 4 * 2;
        uint32_t spread[3][DIM / 16][EIGHTS][2];
        float2 mean[EIGHTS];
        if (j.forecast.spread) load_spread<DIM>(j.forecast.spread + (int64_t)unit * DIM * DIM, column, spread);
        for (int n = 0; n < EIGHTS; n++) mean[n] = *(const float2 *)(means + 8 * n);
        for (int first = begin; first < end; first += TILE) {
            load_keys<T, DIM>(j, b, head / j.group, first, end, tile);
            __syncthreads();
            dot_tile<T, DIM>(tile, column, j.forecast.spread, spread, mean, dots);
            __syncthreads();
            if (threadIdx.x < TILE && first + (int)threadIdx.x < end) {
                float *to = (float *)kvpg_row(j.logits, b, head, first + threadIdx.x), logit = pass ? *to : 0;
                for (int w = 0; w < kvpg_expected<DIM>::WARPS; w++) logit += dots[w * TILE + threadIdx.x];
                *to = logit;
            }
        }
    }
}

kvp_status kvpg_ask_forecast(const kvp_expect_args *args, const kvpg_table *edges, const kvpg_forecast *made,
                             kvp_context *ctx) {
    const int64_t n_unit = args->queries.shape[0] * args->queries.shape[1];
    logits_job job = {};
    job.keys = kvpg_rows_of(&args->keys);
    job.logits = kvpg_rows_of(&args->logits);
    job.wide = kvpg_has_wide_rows(&args->keys);
    job.n_unit = (int)n_unit;
    job.n_head = (int)args->queries.shape[1];
    job.group = (int)(args->queries.shape[1] / args->keys.shape[1]);
    job.forecast = *made;
    job.edges = *edges;
    return kvpg_with_dim(args->keys.shape[3], ctx, [&](auto dim) {
        enum { DIM = decltype(dim)::value };
        return kvpg_with_type(args->keys.dtype, ctx, [&](auto type) {
            typedef typename decltype(type)::type T;
            typedef kvpg_expected<DIM> of;
            const size_t bytes =
                parts<T>::N * of::TILE * of::PITCH * sizeof(__nv_bfloat16) + of::WARPS * of::TILE * sizeof(float);
            return kvpg_launch("expect_logits", ctx, ask_forecast<T, DIM>,
                               {kvpg_ceil_div(args->keys.shape[2], BLOCK) * n_unit, 1}, of::THREADS, 1, bytes, job);
        });
    });
}

static size_t edges_bytes(const kvp_tensor *segments) {
    return kvpg_table_bytes(segments->shape[0], segments->shape[1]);
}

extern "C" size_t kvpi_expect_cuda_workspace(const kvp_expect_args *args) {
    return edges_bytes(&args->segments) + kvpg_forecast_bytes(args) + kvpg_expected_scores_bytes(args);
}

extern "C" kvp_status kvpi_expect_cuda(const kvp_expect_args *args, kvp_context *ctx) {
    const kvp_tensor *segments = &args->segments;
    char *workspace = (char *)ctx->workspace, *scratch = workspace + edges_bytes(segments);
    kvpg_table edges;
    kvpg_writer w;
    kvpg_forecast forecast;
    kvpg_start_table(&w, &edges, segments->shape[0], segments->shape[1], workspace, ctx);
    for (int64_t b = 0; b < segments->shape[0]; b++)
        for (int64_t e = 0; e < segments->shape[1]; e++) kvpg_put(&w, kvpi_i32(segments, b, e, 0));
    KVPI_TRY(kvpg_end_table(&w));
    KVPI_TRY(kvpg_make_forecast(args, &edges, scratch, &forecast, ctx));
    KVPI_TRY(kvpg_ask_forecast(args, &edges, &forecast, ctx));
    return kvpg_make_expected_scores(args, &edges, scratch + kvpg_forecast_bytes(args), ctx);
}

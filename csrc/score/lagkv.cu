/* SPDX-License-Identifier: Apache-2.0
 *
 * LagKV on the GPU; see lagkv.c. A block to a chunk of one unit (a head of a batch row): bounds of the chunk behind it,
 * then spreads of its own tokens, by keys and by values; softmax, and ranks by counting. A short kernel scores the
 * rest. Rows on 16-byte boundaries are read 16 bytes a lane, others by single elements.
 */
#include "../gpu/tables.cuh"

extern "C" {
#include "score.h"
}

enum { THREADS = 256 };
#define MOST 0x1p126f /* as in lagkv.c */

/* Differences and widths are of as much of each number, so that none overflows and an inverse is not 0. */
#define SHARE 0.0625f
/* Of spreads above HIGH squares may overflow, so that they are computed anew, LOWER times smaller. */
#define HIGH 0x1p60f
#define LOWER 0x1p64f

typedef struct lagkv_job {
    kvpg_rows x[2], scores; /* keys and values */
    int n_dim[2];
    int n_unit, n_head, n_token, n_sink, lag_size;
    float *weights[2]; /* (n_unit, n_token): of keys, and of values */
    kvpg_table valid;
} lagkv_job;

/* Where the tokens of a batch row are: [begin, first) come first, chunks that are scored end at last. */
typedef struct layout {
    int begin, first, last, end;
} layout;

__device__ __forceinline__ layout layout_of(const lagkv_job &j, int b) {
    layout at = {0, 0, 0, j.n_token};
    if (j.valid.stride) {
        const kvpg_numbers row = kvpg_table_row(j.valid, b);
        at.begin = row[0];
        at.end = row[1];
    }
    at.first = at.begin + min(j.n_sink, at.end - at.begin);
    at.last = at.first + max(0, (at.end - at.first) / j.lag_size - 1) * j.lag_size;
    return at;
}

/* Elements that a lane reads at once: 16 bytes of them, or one. */
template <typename T, bool WIDE> struct part {
    enum { EACH = WIDE ? 16 / (int)sizeof(T) : 1 };
    uint4 wide;
    T one;
    __device__ __forceinline__ void load(const char *row, int64_t step, int i) {
        if (WIDE)
            wide = __ldcg((const uint4 *)row + i);
        else
            one = *(const T *)(row + i * step);
    }
    __device__ __forceinline__ float operator[](int e) const { return kvpg_float(WIDE ? ((const T *)&wide)[e] : one); }
};

/* Floats in an order of whole numbers, there and back. */
__device__ __forceinline__ int ordered(int bits) { return bits >= 0 ? bits : bits ^ 0x7fffffff; }

/* The least and the most of each dimension over the n rows from t on; NaN is none of them. */
template <typename T, bool WIDE> __device__ __forceinline__ void
find_bounds(const kvpg_rows &x, int b, int h, int t, int n, int n_dim, float *low, float *high) {
    typedef part<T, WIDE> part_type;
    enum { EACH = part_type::EACH };
    const int n_part = n_dim / EACH, width = min(n_part, (int)THREADS), n_group = THREADS / width;
    for (int d = threadIdx.x; d < n_dim; d += THREADS) {
        ((int *)low)[d] = ordered(__float_as_int(INFINITY));
        ((int *)high)[d] = ordered(__float_as_int(-INFINITY));
    }
    __syncthreads();
    for (int i = threadIdx.x % width; i < n_part && (int)threadIdx.x / width < n_group; i += width) {
        float least[EACH], most[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            least[e] = INFINITY;
            most[e] = -INFINITY;
        }
#pragma unroll(WIDE ? 4 : 1)
        for (int r = threadIdx.x / width; r < n; r += n_group) {
            part_type at;
            at.load(kvpg_row(x, b, h, t + r), x.d, i);
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                least[e] = fminf(least[e], at[e]);
                most[e] = fmaxf(most[e], at[e]);
            }
        }
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            atomicMin((int *)low + i * EACH + e, ordered(__float_as_int(least[e])));
            atomicMax((int *)high + i * EACH + e, ordered(__float_as_int(most[e])));
        }
    }
    __syncthreads();
    for (int d = threadIdx.x; d < n_dim; d += THREADS) {
        low[d] = __int_as_float(ordered(((int *)low)[d]));
        high[d] = __int_as_float(ordered(((int *)high)[d]));
    }
    __syncthreads();
}

/* To about 2 units in the last place: correctly rounded ones are calls, for which registers are saved. */
__device__ __forceinline__ float inverse(float x) { return __fdividef(1, x); } /* 0 above 2^126 */
__device__ __forceinline__ float root(float x) {
    float y;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The spread of a row by `lanes` neighbours, the same for each, times scale. low and factor are those of SHARE of the
 * row's numbers. */
template <typename T, bool WIDE> __device__ __forceinline__ float
spread_of(const char *row, int64_t step, int n_dim, const float *low, const float *factor, float scale, int lanes) {
    typedef part<T, WIDE> part_type;
    enum { EACH = part_type::EACH };
    const int lane = threadIdx.x % lanes, base = threadIdx.x % 32 / lanes * lanes;
    const unsigned mask = lanes == 32 ? ~0u : ((1u << lanes) - 1) << base;
    float mean = 0, square = 0;
    for (int pass = 0; pass < 2; pass++) {
        float sum = 0;
        for (int i = lane; i < n_dim / EACH; i += lanes) {
            part_type at;
            at.load(row, step, i);
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int d = i * EACH + e;
                const float z = fmaf(at[e], SHARE, -low[d]) * (factor[d] * scale);
                sum += pass ? (z - mean) * (z - mean) : z;
            }
        }
        for (int o = lanes / 2; o > 0; o /= 2) sum += __shfl_xor_sync(mask, sum, o);
        mean = sum * inverse((float)n_dim);
        square = sum;
    }
    return root(square * inverse((float)max(1, n_dim - 1)));
}

/* Over the block, the same for each thread: the most, which NaN is none of, or the sum. */
__device__ float over_block(float x, bool is_sum) {
    __shared__ float parts[THREADS / 32];
    for (int o = 16; o > 0; o /= 2) {
        const float other = __shfl_xor_sync(~0u, x, o);
        x = is_sum ? x + other : fmaxf(x, other);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int i = 1; i < THREADS / 32; i++) x = is_sum ? x + parts[i] : fmaxf(x, parts[i]);
    return x;
}

/* exp of the spreads less their most at out, which has n_token of them; returns the sum. */
template <typename T, bool WIDE> __device__ __forceinline__ float weigh(const kvpg_rows &x, int b, int h, int t, int n,
                                                                        int n_dim, float *shared, float *out) {
    float *low = shared, *factor = low + n_dim; /* before the factors there are the most */
    int lanes = 1;
    while (lanes < 32 && lanes < n_dim / part<T, WIDE>::EACH) lanes *= 2;
    __syncthreads(); /* all have done with what is there */
    find_bounds<T, WIDE>(x, b, h, t + n, n, n_dim, low, factor);
    for (int d = threadIdx.x; d < n_dim; d += THREADS) {
        low[d] *= SHARE;
        const float width = factor[d] * SHARE - low[d];
        factor[d] = width == 0 ? 0 : inverse(width);
    }
    __syncthreads();
    for (int i = threadIdx.x / lanes; i < n; i += THREADS / lanes) {
        const char *row = kvpg_row(x, b, h, t + i);
        float spread = spread_of<T, WIDE>(row, x.d, n_dim, low, factor, 1, lanes);
        if (!(spread <= HIGH)) spread = spread_of<T, WIDE>(row, x.d, n_dim, low, factor, 1 / LOWER, lanes) * LOWER;
        if (threadIdx.x % lanes == 0) out[i] = spread > MOST ? MOST : spread; /* NaN stays */
    }
    __syncthreads();
    float most = -INFINITY, sum = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) most = fmaxf(most, out[i]);
    most = over_block(most, false);
    for (int i = threadIdx.x; i < n; i += THREADS) sum += out[i] = expf(out[i] - most);
    return over_block(sum, true);
}

template <typename T, bool WIDE> __global__ void __launch_bounds__(THREADS)
    score_chunk(const __grid_constant__ lagkv_job j) {
    kvpg_follow();
    extern __shared__ float shared[];
    __shared__ float tile[THREADS];
    const int unit = blockIdx.x % j.n_unit, b = unit / j.n_head, h = unit % j.n_head, n = j.lag_size;
    const layout at = layout_of(j, b);
    const int t = at.first + (int)(blockIdx.x / j.n_unit) * n;
    if (t >= at.last) return;
    float *of_keys = j.weights[0] + (int64_t)unit * j.n_token + t;
    float *of_values = j.weights[1] + (int64_t)unit * j.n_token + t;
    const float by_key = inverse(weigh<T, WIDE>(j.x[0], b, h, t, n, j.n_dim[0], shared, of_keys));
    const float by_value = inverse(weigh<T, WIDE>(j.x[1], b, h, t, n, j.n_dim[1], shared, of_values));
    for (int i = threadIdx.x; i < n; i += THREADS) of_keys[i] = of_keys[i] * by_key + of_values[i] * by_value;
    __syncthreads();
    for (int first = 0; first < n; first += THREADS) {
        const int own = first + threadIdx.x;
        const float weight = own < n ? of_keys[own] : 0;
        int rank = 0;
        for (int from = 0; from < n; from += THREADS) {
            const int n_tile = min(n - from, (int)THREADS);
            if ((int)threadIdx.x < n_tile) tile[threadIdx.x] = of_keys[from + threadIdx.x];
            __syncthreads();
            for (int i = 0; i < n_tile; i++) rank += tile[i] > weight || (tile[i] == weight && from + i < own);
            __syncthreads();
        }
        if (own < n) *(float *)kvpg_row(j.scores, b, h, t + own) = weight == weight ? (float)-rank : weight;
    }
}

/* Scores of what is in no chunk that has one behind it. */
static __global__ void __launch_bounds__(THREADS) score_rest(const __grid_constant__ lagkv_job j) {
    kvpg_follow();
    const int unit = blockIdx.x % j.n_unit, b = unit / j.n_head, t = blockIdx.x / j.n_unit * THREADS + threadIdx.x;
    const layout at = layout_of(j, b);
    if (t >= j.n_token || (t >= at.first && t < at.last)) return;
    const bool is_valid = t >= at.begin && t < at.end;
    const float score = (float)(t < at.first ? j.n_token + 1 : t - at.last + 1);
    *(float *)kvpg_row(j.scores, b, unit % j.n_head, t) = is_valid ? score : -INFINITY;
}

static size_t weight_bytes(const kvp_score_args *args) {
    const int64_t *shape = args->keys.shape;
    return kvpi_round_up_64((size_t)(shape[0] * shape[1] * shape[2]) * sizeof(float));
}

extern "C" size_t kvpi_score_lagkv_cuda_workspace(const kvp_score_args *args) {
    return kvpg_valid_bytes(&args->valid) + 2 * weight_bytes(args);
}

extern "C" kvp_status kvpi_score_lagkv_cuda(const kvp_score_args *args, kvp_context *ctx) {
    const int64_t *shape = args->keys.shape;
    const double lag_size = args->param[KVPI_PARAM_lagkv_lag_size];
    const kvp_tensor *x[2] = {&args->keys, &args->values};
    char *workspace = (char *)ctx->workspace + kvpg_valid_bytes(&args->valid);
    lagkv_job j;
    for (int i = 0; i < 2; i++, workspace += weight_bytes(args)) {
        j.x[i] = kvpg_rows_of(x[i]);
        j.n_dim[i] = (int)x[i]->shape[3];
        j.weights[i] = (float *)workspace;
    }
    j.scores = kvpg_rows_of(&args->scores);
    j.n_unit = (int)(shape[0] * shape[1]);
    j.n_head = (int)shape[1];
    j.n_token = (int)shape[2];
    j.n_sink = (int)args->param[KVPI_PARAM_lagkv_n_sink];
    j.lag_size = lag_size < (double)shape[2] ? (int)lag_size : j.n_token;
    KVPI_TRY(kvpg_table_of_valid(&args->valid, ctx, &j.valid));
    const int64_t n_unit = j.n_unit, n_chunk = j.n_token / j.lag_size - 1;
    KVPI_TRY(
        kvpg_launch("lagkv_rest", ctx, score_rest, {kvpg_ceil_div(shape[2], THREADS) * n_unit, 1}, THREADS, 1, 0, j));
    if (n_chunk < 1) return KVP_OK;
    const bool wide = kvpg_has_wide_rows(x[0]) && kvpg_has_wide_rows(x[1]);
    const size_t shared = 2 * sizeof(float) * (size_t)max(j.n_dim[0], j.n_dim[1]);
    return kvpg_with_type(args->keys.dtype, ctx, [&](auto t) {
        typedef typename decltype(t)::type T;
        return kvpg_launch("lagkv_chunk", ctx, wide ? score_chunk<T, true> : score_chunk<T, false>,
                           {n_chunk * n_unit, 1}, THREADS, 1, shared, j);
    });
}

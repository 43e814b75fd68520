/* SPDX-License-Identifier: Apache-2.0
 *
 * The last step of the verb expect: from logits to scores. A block adds up the powers of one segment's logits of one
 * query head; then a block takes a few keys, makes shares of their logits, and multiplies what the group gives to a key
 * by the length of its value. Sums are in an order that depends on a segment alone. A third kernel, for the tokens that
 * are kept unjudged, waits for the best of all.
 */
#include "expected.cuh"

#include <float.h>

enum { ADDERS = 1024, THREADS = 256, KEYS = 64, LANES = 16, PARTS = THREADS / KEYS };
enum { AT_ONCE = KEYS * LANES / THREADS }; /* values that LANES lanes have in flight */

/* What a softmax divides by: the sum of exp(logit - max). */
typedef struct total {
    float max, sum;
} total;

typedef struct scores_job {
    kvpg_rows logits, values, scores;
    const char *sinks; /* NULL: none */
    int64_t sink_step;
    total *totals; /* (unit, segment); units are query heads */
    float *best;   /* (B, block of the batch row) */
    bool wide;
    int n_head, group, n_token, n_dim, n_block; /* n_head: key heads; n_dim: of values, 0: there are none */
    float epsilon;
    kvpg_table edges;
} scores_job;

/* Over all threads of a block, the same for each. */
template <int N, typename F> __device__ __forceinline__ float over_block(float x, float (&parts)[N / 32], F join) {
    for (int o = 16; o > 0; o /= 2) x = join(x, __shfl_xor_sync(~0u, x, o));
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int w = 1; w < N / 32; w++) x = join(x, parts[w]);
    return x;
}

static __global__ void __launch_bounds__(ADDERS, 1) add_powers(const __grid_constant__ scores_job j) {
    kvpg_follow();
    __shared__ float parts[ADDERS / 32];
    const int n_segment = kvpg_n_judged(j.edges), unit = blockIdx.x / n_segment, segment = blockIdx.x % n_segment;
    const int n_query_head = j.n_head * j.group, b = unit / n_query_head, head = unit % n_query_head;
    const kvpg_numbers edges = kvpg_judged_edges(j.edges, b) + segment;
    const int begin = edges[0], end = edges[1];
    if (begin >= end) return;
    const auto logit_at = [&](int t) { return *(const float *)kvpg_row(j.logits, b, head, t); };
    const float sink = j.sinks ? *(const float *)(j.sinks + head * j.sink_step) : -INFINITY;
    float max = sink, sum = 0;
#pragma unroll 8
    for (int t = begin + threadIdx.x; t < end; t += ADDERS) max = fmaxf(max, logit_at(t));
    max = over_block<ADDERS>(max, parts, [](float x, float y) { return fmaxf(x, y); });
#pragma unroll 8
    for (int t = begin + threadIdx.x; t < end; t += ADDERS) sum += expf(logit_at(t) - max);
    sum = over_block<ADDERS>(sum, parts, [](float x, float y) { return x + y; });
    if (j.sinks) sum += expf(sink - max);
    if (threadIdx.x == 0) j.totals[blockIdx.x] = {max, sum};
}

/* Which segment holds a token: the last that begins before it, or at it. */
__device__ __forceinline__ int segment_of(kvpg_numbers edges, int n_segment, int t) {
    int low = 0, high = n_segment;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (edges[middle] <= t)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Of every PARTS-th query head of a group, from `part` on: the shares of a key's logits, added up. */
__device__ __forceinline__ float add_shares(const scores_job &j, int b, int h, int segment, int part, int t) {
    float sum = 0;
    for (int g = part; g < j.group; g += PARTS) {
        const int64_t unit = ((int64_t)b * j.n_head + h) * j.group + g;
        const total all = j.totals[unit * kvpg_n_judged(j.edges) + segment];
        sum += expf(*(const float *)kvpg_row(j.logits, b, h * j.group + g, t) - all.max) / all.sum;
    }
    return sum;
}

/* Lengths of the values of KEYS tokens from `first` on, by LANES lanes each. */
template <typename T>
__device__ __forceinline__ void find_lengths(const scores_job &j, int b, int h, int first, int end, float *lengths) {
    const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES;
    float sum[AT_ONCE] = {};
    if (j.wide)
        for (int chunk = lane; chunk < j.n_dim * (int)sizeof(T) / 16; chunk += LANES) {
            uint4 v[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int t = first + own + i * (THREADS / LANES);
                v[i] = t < end ? *((const uint4 *)kvpg_row(j.values, b, h, t) + chunk) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) sum[i] += kvpg_square_sum<T>(v[i]);
        }
    else
        for (int d = lane; d < j.n_dim; d += LANES)
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int t = first + own + i * (THREADS / LANES);
                const float x = t < end ? kvpg_float(*(const T *)(kvpg_row(j.values, b, h, t) + d * j.values.d)) : 0;
                sum[i] = fmaf(x, x, sum[i]);
            }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
        for (int o = LANES / 2; o > 0; o /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], o);
        if (lane == 0) lengths[own + i * (THREADS / LANES)] = sqrtf(sum[i]);
    }
}

/* Blocks that follow each other take the same tokens of all heads, which a model lays side by side. */
template <typename T> __global__ void __launch_bounds__(THREADS) write_scores(const __grid_constant__ scores_job j) {
    kvpg_follow();
    __shared__ float shares[PARTS][KEYS], lengths[KEYS], parts[THREADS / 32];
    const int b = blockIdx.x / j.n_block, block = blockIdx.x % j.n_block, h = block % j.n_head;
    const int first = block / j.n_head * KEYS, own = threadIdx.x % KEYS, part = threadIdx.x / KEYS, t = first + own;
    const kvpg_judged judged = kvpg_judged_of(j.edges, b);
    const bool is_judged = t >= judged.begin && t < judged.end;
    const int segment = segment_of(kvpg_judged_edges(j.edges, b), kvpg_n_judged(j.edges), t);
    if (is_judged) shares[part][own] = add_shares(j, b, h, segment, part, t);
    if (j.n_dim) find_lengths<T>(j, b, h, first, judged.end, lengths);
    __syncthreads();
    float score = 0;
    if (part == 0 && t < j.n_token) {
        for (int i = 0; i < PARTS && is_judged; i++) score += shares[i][own];
        if (is_judged) score = (score / (float)j.group + j.epsilon) * (j.n_dim ? lengths[own] : 1);
        *(float *)kvpg_row(j.scores, b, h, t) = score;
    }
    const float best = over_block<THREADS>(fmaxf(score, 0), parts, [](float x, float y) { return fmaxf(x, y); });
    if (threadIdx.x == 0) j.best[blockIdx.x] = best; /* of a score that is NaN, 0 */
}

/* Scores of the tokens of the first segment. */
static __global__ void __launch_bounds__(THREADS) write_unjudged(const __grid_constant__ scores_job j) {
    kvpg_follow();
    __shared__ float parts[THREADS / 32];
    const int b = blockIdx.x, first = kvpg_table_row(j.edges, b)[0], n = kvpg_judged_of(j.edges, b).begin - first;
    float best = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < j.n_block; i += THREADS) best = fmaxf(best, j.best[(int64_t)b * j.n_block + i]);
    best = over_block<THREADS>(best, parts, [](float x, float y) { return fmaxf(x, y); });
    for (int64_t i = threadIdx.x; i < (int64_t)n * j.n_head; i += THREADS)
        *(float *)kvpg_row(j.scores, b, i / n, first + i % n) = fminf(best, FLT_MAX) + 1;
}

static int64_t blocks_of(const kvp_tensor *keys) { return kvpg_ceil_div(keys->shape[2], KEYS) * keys->shape[1]; }

static size_t totals_bytes(const kvp_expect_args *args) {
    const int64_t *queries = args->queries.shape;
    return kvpi_round_up_64((size_t)(queries[0] * queries[1] * (args->segments.shape[1] - 2)) * sizeof(total));
}

size_t kvpg_expected_scores_bytes(const kvp_expect_args *args) {
    const int64_t n_block = args->keys.shape[0] * blocks_of(&args->keys);
    return totals_bytes(args) + kvpi_round_up_64((size_t)n_block * sizeof(float));
}

static scores_job job_of(const kvp_expect_args *args, const kvpg_table *edges, char *workspace) {
    scores_job job = {};
    job.logits = kvpg_rows_of(&args->logits);
    job.scores = kvpg_rows_of(&args->scores);
    job.sinks = (const char *)args->sinks.data;
    if (job.sinks) job.sink_step = args->sinks.stride[0] * (int64_t)sizeof(float);
    if (args->values.data) {
        job.values = kvpg_rows_of(&args->values);
        job.wide = kvpg_has_wide_rows(&args->values);
        job.n_dim = (int)args->values.shape[3];
    }
    job.totals = (total *)workspace;
    job.best = (float *)(workspace + totals_bytes(args));
    job.n_head = (int)args->keys.shape[1];
    job.group = (int)(args->queries.shape[1] / args->keys.shape[1]);
    job.n_token = (int)args->keys.shape[2];
    job.n_block = (int)blocks_of(&args->keys);
    job.epsilon = (float)args->epsilon;
    job.edges = *edges;
    return job;
}

kvp_status kvpg_make_expected_scores(const kvp_expect_args *args, const kvpg_table *edges, void *workspace,
                                     kvp_context *ctx) {
    const scores_job job = job_of(args, edges, (char *)workspace);
    const int64_t n_batch = args->keys.shape[0], n_unit = n_batch * args->queries.shape[1];
    bool has_unjudged = false;
    for (int64_t b = 0; b < n_batch; b++)
        has_unjudged = has_unjudged || kvpi_i32(&args->segments, b, 0, 0) < kvpi_i32(&args->segments, b, 1, 0);
    KVPI_TRY(kvpg_launch("expect_totals", ctx, add_powers, {n_unit * (job.edges.stride - 2), 1}, ADDERS, 1, 0, job));
    const int32_t dtype = args->values.data ? args->values.dtype : args->keys.dtype;
    KVPI_TRY(kvpg_with_type(dtype, ctx, [&](auto type) {
        return kvpg_launch("expect_scores", ctx, write_scores<typename decltype(type)::type>,
                           {n_batch * job.n_block, 1}, THREADS, 1, 0, job);
    }));
    if (!has_unjudged) return KVP_OK;
    return kvpg_launch("expect_unjudged", ctx, write_unjudged, {n_batch, 1}, THREADS, 1, 0, job);
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * KeyDiff on the GPU; see keydiff.c. Two reads of the keys by pieces of ranges of one unit (a head of a batch row): the
 * first adds up the unit vectors of each piece, in float32 for a few tokens and in double from there on; the second
 * makes the mean of them, or a short kernel between the two where there are many, and compares. Rows on 16-byte
 * boundaries are read by the kernels of keydiff.cuh, others by single elements.
 */
#include "keydiff.cuh"

extern "C" {
#include "score.h"
}

/* The key of token t times *factor, and the weight, by a warp and single elements. */
template <typename T> __device__ float narrow_weight(const keydiff_job &j, const char *key, float *factor) {
    float sum = 0;
    *factor = 1;
    for (int again = 0; again < 2; again++) {
        sum = 0;
        for (int d = threadIdx.x % 32; d < j.n_dim; d += 32) {
            const float x = kvpg_float(*(const T *)(key + d * j.keys.d)) * *factor;
            sum = fmaf(x, x, sum);
        }
        sum = sum_of_lanes<32>(sum);
        if (again || (*factor = lift_of(sum)) == 1) break;
    }
    return weight_of(sum);
}

/* Weights by a warp to a key, then sums by a thread to an element, both of THREADS tokens at a time. */
template <typename T> __global__ void __launch_bounds__(THREADS) sum_narrow(const __grid_constant__ keydiff_job j) {
    kvpg_follow();
    __shared__ float factors[THREADS], weights[THREADS];
    place at;
    if (!find_place(j, blockIdx.x % j.n_unit, blockIdx.x / j.n_unit, 1, &at)) return;
    double *sums = j.sums + ((int64_t)at.unit * j.n_slot + at.slot) * j.n_dim;
    for (int first = at.begin; first < at.end; first += THREADS) {
        const int n = min(at.end - first, (int)THREADS);
        for (int i = threadIdx.x / 32; i < n; i += THREADS / 32) {
            float factor;
            const float weight = narrow_weight<T>(j, kvpg_row(j.keys, at.b, at.h, first + i), &factor);
            factors[i] = factor;
            weights[i] = weight;
        }
        __syncthreads();
        for (int d = threadIdx.x; d < j.n_dim; d += THREADS) {
            double total = first == at.begin ? 0 : sums[d];
            for (int i = 0; i < n; i++) {
                const char *key = kvpg_row(j.keys, at.b, at.h, first + i);
                total += kvpg_float(*(const T *)(key + d * j.keys.d)) * factors[i] * weights[i];
            }
            sums[d] = total;
        }
        __syncthreads();
    }
}

template <typename T> __global__ void __launch_bounds__(THREADS) compare_narrow(const __grid_constant__ keydiff_job j) {
    kvpg_follow();
    place at;
    if (!find_place(j, blockIdx.x % j.n_unit, blockIdx.x / j.n_unit, 1, &at)) return;
    const float *mean = j.means + ((int64_t)at.unit * j.n_range + at.range) * j.n_dim;
    for (int t = at.begin + threadIdx.x / 32; t < at.end; t += THREADS / 32) {
        const char *key = kvpg_row(j.keys, at.b, at.h, t);
        float factor, product = 0;
        const float weight = narrow_weight<T>(j, key, &factor);
        for (int d = threadIdx.x % 32; d < j.n_dim; d += 32)
            product = fmaf(kvpg_float(*(const T *)(key + d * j.keys.d)) * factor, __ldcg(mean + d), product);
        product = sum_of_lanes<32>(product);
        if (threadIdx.x % 32 == 0) *(float *)kvpg_row(j.scores, at.b, at.h, t) = 0 - product * weight;
    }
}

/* The direction of the mean of a range of one unit. PARTS threads to an element add up the sums of pieces, each of them
 * every PARTS-th; the total takes the place of the first piece's. */
static __global__ void __launch_bounds__(PARTS *ELEMENTS) find_means(const __grid_constant__ keydiff_job j) {
    kvpg_follow();
    __shared__ double parts[PARTS][ELEMENTS], squares[ELEMENTS / 32];
    const int unit = blockIdx.x % j.n_unit, range = blockIdx.x / j.n_unit, part = threadIdx.x / ELEMENTS,
              own = threadIdx.x % ELEMENTS;
    const kvpg_numbers row = kvpg_table_row(j.ranges, unit / j.n_head);
    if (range >= row[0]) return;
    const kvpg_numbers at = row + (1 + 3 * range);
    const int n_piece = (range + 1 < row[0] ? at[5] : at[3]) - at[2];
    if (n_piece <= j.few) return;
    double *sums = j.sums + ((int64_t)unit * j.n_slot + at[2]) * j.n_dim, square = 0;
    for (int first = 0; first < j.n_dim; first += ELEMENTS) {
        const int d = first + own, n = d < j.n_dim ? (n_piece - part + PARTS - 1) / PARTS : 0;
        parts[part][own] = add_pieces(sums + (int64_t)part * j.n_dim + d, (int64_t)PARTS * j.n_dim, n);
        __syncthreads();
        if (part == 0 && d < j.n_dim) {
            double total = 0;
            for (int i = 0; i < PARTS; i++) total += parts[i][own];
            square = fma(total, total, square);
            sums[d] = total;
        }
        __syncthreads();
    }
    for (int o = 16; o > 0; o /= 2) square += __shfl_xor_sync(~0u, square, o);
    if (part == 0 && own % 32 == 0) squares[own / 32] = square;
    __syncthreads();
    if (part != 0) return;
    square = 0;
    for (int i = 0; i < ELEMENTS / 32; i++) square += squares[i];
    const double factor = factor_of(square, at[1] - at[0]);
    float *mean = j.means + ((int64_t)unit * j.n_range + range) * j.n_dim;
    for (int d = own; d < j.n_dim; d += ELEMENTS) mean[d] = (float)(sums[d] * factor);
}

/* Scores of keys that are under no vote. */
static __global__ void __launch_bounds__(THREADS)
    clear_scores(const __grid_constant__ keydiff_job j, const __grid_constant__ kvpg_table valid) {
    kvpg_follow();
    const int unit = blockIdx.x % j.n_unit, b = unit / j.n_head, t = blockIdx.x / j.n_unit * THREADS + threadIdx.x;
    if (t < j.n_token) *(float *)kvpg_row(j.scores, b, unit % j.n_head, t) = kvpg_is_valid(valid, b, t) ? 0 : -INFINITY;
}

/* The ranges that count; says whether each batch row has one of all tokens, so that there are no others. */
static kvp_status list_ranges(const kvp_score_args *args, kvp_context *ctx, keydiff_job *j, void *memory, bool *all) {
    const int64_t n_batch = args->keys.shape[0];
    kvpg_writer w;
    kvpg_start_table(&w, &j->ranges, n_batch, 2 + 3 * (int64_t)j->n_range, memory, ctx);
    *all = true;
    for (int64_t b = 0; b < n_batch; b++) {
        int64_t n = 0, n_piece = 0, n_put = 1;
        for (int pass = 0; pass < 2; pass++) {
            if (pass) kvpg_put(&w, n);
            for (int64_t v = 0; v < args->votes.shape[1]; v++) {
                int64_t range[2];
                kvpi_vote_range(args, b, v, KVP_VOTE_KEY_BEGIN, range);
                if (range[1] - range[0] < SHORTEST) continue;
                if (!pass) {
                    n++;
                    continue;
                }
                *all = *all && range[1] - range[0] == j->n_token;
                for (int64_t number : {range[0], range[1], n_piece}) kvpg_put(&w, number);
                n_put += 3;
                n_piece += kvpg_ceil_div(range[1] - range[0], j->piece);
            }
        }
        *all = *all && n > 0;
        for (kvpg_put(&w, n_piece), n_put++; n_put < j->ranges.stride; n_put++) kvpg_put(&w, 0);
    }
    return kvpg_end_table(&w);
}

/* Sizes, and the scratch's places in a workspace that may be NULL; returns the bytes of all of it. */
static size_t lay_out(const kvp_score_args *args, char *workspace, keydiff_job *j, void **table, char **valid) {
    const int64_t *shape = args->keys.shape, n_vote = args->votes.shape[1], most = shape[2] / SHORTEST;
    j->keys = kvpg_rows_of(&args->keys);
    j->scores = kvpg_rows_of(&args->scores);
    j->n_unit = (int)(shape[0] * shape[1]);
    j->n_head = (int)shape[1];
    j->n_token = (int)shape[2];
    j->n_dim = (int)shape[3];
    j->n_range = (int)(n_vote < most ? n_vote : most); /* they are disjoint, and not short */
    for (j->piece = LEAST_PIECE; j->n_token / j->piece > MOST_PIECES;) j->piece *= 2;
    j->n_slot = j->n_token / j->piece + j->n_range;
    const size_t vectors = (size_t)j->n_unit * (size_t)j->n_dim;
    const size_t sizes[] = {kvpg_valid_bytes(&args->valid), kvpg_table_bytes(shape[0], 2 + 3 * (int64_t)j->n_range),
                            kvpi_round_up_64(vectors * (size_t)j->n_slot * sizeof(double)),
                            kvpi_round_up_64(vectors * (size_t)j->n_range * sizeof(float))};
    *valid = workspace; /* where kvpg_table_of_valid puts them */
    *table = workspace ? workspace + sizes[0] : NULL;
    j->sums = workspace ? (double *)(workspace + sizes[0] + sizes[1]) : NULL;
    j->means = workspace ? (float *)(workspace + sizes[0] + sizes[1] + sizes[2]) : NULL;
    return sizes[0] + sizes[1] + sizes[2] + sizes[3];
}

/* What follows from the device alone: not a bit of the scores does. */
static kvp_status fit_device(const kvp_score_args *args, bool is_wide, kvp_context *ctx, keydiff_job *j) {
    int n_processor, cache_bytes;
    KVPG_TRY("tell how many processors it has",
             cudaDeviceGetAttribute(&n_processor, cudaDevAttrMultiProcessorCount, args->keys.device_index));
    KVPG_TRY("tell the size of the cache",
             cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, args->keys.device_index));
    const int64_t token_bytes = (int64_t)j->n_unit * j->n_dim * (int64_t)kvpi_dtype_size(args->keys.dtype);
    const int64_t n_cached = cache_bytes / 2 / token_bytes;
    j->n_cached = n_cached < j->n_token ? (int)n_cached : j->n_token;
    j->run = is_wide ? (int)kvpg_ceil_div((int64_t)j->n_slot * j->n_unit, BLOCKS * n_processor) : 1; /* all at once */
    return KVP_OK;
}

typedef void (*keydiff_kernel)(keydiff_job);

template <typename T, int LANES, int CHUNKS> static void wide_kernels(keydiff_kernel (&two)[2]) {
    two[0] = sum_wide<T, LANES, CHUNKS>;
    two[1] = compare_wide<T, LANES, CHUNKS>;
}

/* The kernels of both reads. */
template <typename T> static void choose_kernels(int n_dim, bool wide, keydiff_kernel (&two)[2]) {
    const int n_chunk = n_dim * (int)sizeof(T) / 16;
    if (!wide) {
        two[0] = sum_narrow<T>;
        two[1] = compare_narrow<T>;
    } else if (n_chunk <= 8)
        wide_kernels<T, 8, 1>(two);
    else if (n_chunk <= 16)
        wide_kernels<T, 16, 1>(two);
    else if (n_chunk <= 32)
        wide_kernels<T, 32, 1>(two);
    else if (n_chunk <= 64)
        wide_kernels<T, 32, 2>(two);
    else
        wide_kernels<T, 32, 4>(two);
}

extern "C" size_t kvpi_score_keydiff_cuda_workspace(const kvp_score_args *args) {
    keydiff_job j;
    void *table;
    char *valid;
    return lay_out(args, NULL, &j, &table, &valid);
}

extern "C" kvp_status kvpi_score_keydiff_cuda(const kvp_score_args *args, kvp_context *ctx) {
    keydiff_job j;
    kvpg_table valid;
    void *table;
    char *unused;
    bool all;
    lay_out(args, (char *)ctx->workspace, &j, &table, &unused);
    KVPI_TRY(kvpg_table_of_valid(&args->valid, ctx, &valid));
    KVPI_TRY(list_ranges(args, ctx, &j, table, &all));
    const int64_t n_unit = j.n_unit;
    if (!all)
        KVPI_TRY(kvpg_launch("clear_scores", ctx, clear_scores, {kvpg_ceil_div(j.n_token, THREADS) * n_unit, 1},
                             THREADS, 1, 0, j, valid));
    if (j.n_range == 0) return KVP_OK;
    keydiff_kernel two[2] = {};
    const bool is_wide = kvpg_has_wide_rows(&args->keys) && j.n_dim * (int)kvpi_dtype_size(args->keys.dtype) <= 2048;
    KVPI_TRY(kvpg_with_type(args->keys.dtype, ctx, [&](auto t) {
        choose_kernels<typename decltype(t)::type>(j.n_dim, is_wide, two);
        return KVP_OK;
    }));
    j.few = is_wide ? FEW : 0;
    KVPI_TRY(fit_device(args, is_wide, ctx, &j));
    const int64_t n_block = kvpg_ceil_div(j.n_slot, j.run) * n_unit;
    KVPI_TRY(kvpg_launch("keydiff_sum", ctx, two[0], {n_block, 1}, THREADS, 1, 0, j));
    if (j.n_token > j.few * j.piece)
        KVPI_TRY(kvpg_launch("keydiff_mean", ctx, find_means, {j.n_range * n_unit, 1}, PARTS * ELEMENTS, 1, 0, j));
    return kvpg_launch("keydiff_compare", ctx, two[1], {n_block, 1}, THREADS, 1, 0, j);
}

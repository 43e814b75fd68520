/* SPDX-License-Identifier: Apache-2.0
 *
 * KeyDiff on the GPU; see keydiff.c. Two reads of the keys by pieces of ranges, a block to a piece of one unit (a head
 * of a batch row): the first adds up the piece's unit vectors, in float32 for a few tokens and in double from there on;
 * a short kernel makes the means of them; the second compares. Rows on 16-byte boundaries are read 16 bytes a lane,
 * others by single elements.
 */
#include "../gpu/rows.cuh"
#include "../gpu/tables.cuh"

extern "C" {
#include "score.h"
}

enum { THREADS = 256 };
enum { LEAST_PIECE = 256, MOST_PIECES = 128 }; /* tokens; pieces of a range of all tokens */
enum { SHORTEST = 3 };                         /* as in keydiff.c, and so are these: */
#define LOW_NORM 0x1p-30f
#define HIGH_NORM 0x1p60f
#define LIFT 0x1p90f
#define NO_MEAN 0x1p-18

/* A batch row of the table: the number of its ranges, then begin, end and first piece of each, and how many pieces
 * there are. */
typedef struct keydiff_job {
    kvpg_rows keys, scores;
    int n_unit, n_head, n_token, n_dim, n_range, n_slot, piece; /* n_range, n_slot: room in a batch row */
    double *sums;                                               /* (n_unit, n_slot, n_dim): of unit vectors */
    float *means;                                               /* (n_unit, n_range, n_dim) */
    kvpg_table ranges;
} keydiff_job;

/* One piece of one unit. */
typedef struct place {
    int unit, b, h, slot, range, begin, end;
} place;

/* False where the batch row has fewer pieces. Blocks that follow each other take the same tokens of all heads. */
__device__ __forceinline__ bool find_place(const keydiff_job &j, place *at) {
    at->unit = blockIdx.x % j.n_unit;
    at->slot = blockIdx.x / j.n_unit;
    at->b = at->unit / j.n_head;
    at->h = at->unit % j.n_head;
    const kvpg_numbers row = kvpg_table_row(j.ranges, at->b);
    int low = 0, high = row[0]; /* the last range in [low, high) whose first piece is not behind the slot */
    if (at->slot >= row[1 + 3 * high]) return false;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (row[1 + 3 * middle + 2] <= at->slot)
            low = middle;
        else
            high = middle;
    }
    const kvpg_numbers range = row + (1 + 3 * low);
    at->range = low;
    at->begin = range[0] + (at->slot - range[2]) * j.piece;
    at->end = min(at->begin + j.piece, range[1]);
    return true;
}

__device__ __forceinline__ bool is_ordinary(float norm) { return norm >= LOW_NORM && norm <= HIGH_NORM; }

/* What a key whose squares add up to square_sum is to be multiplied by before they are summed again. */
__device__ __forceinline__ float lift_of(float square_sum) {
    const float norm = sqrtf(square_sum);
    return is_ordinary(norm) ? 1 : norm < LOW_NORM ? LIFT : 1 / LIFT;
}

/* A key of length zero has no direction and no weight. */
__device__ __forceinline__ float weight_of(float square_sum) { return square_sum == 0 ? 0 : 1 / sqrtf(square_sum); }

/* The sum over LANES neighbours, the same for each. */
template <int LANES> __device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) x += __shfl_xor_sync(~0u, x, o);
    return x;
}

/* CHUNKS times 16 bytes a lane of one key: lane, lane + LANES, ... */
template <typename T, int LANES, int CHUNKS> struct wide_key {
    enum { EACH = 16 / sizeof(T) };
    enum { AT_ONCE = CHUNKS > 2 ? 2 : 4 }; /* such keys in flight, as many as registers hold */
    uint4 chunk[CHUNKS];
    __device__ __forceinline__ void load(const keydiff_job &j, const place &at, int t, int lane) {
        const uint4 *from = (const uint4 *)kvpg_row(j.keys, at.b, at.h, t);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int i = lane + c * LANES;
            chunk[c] = t < at.end && i < j.n_dim / EACH ? __ldcg(from + i) : make_uint4(0, 0, 0, 0);
        }
    }
    __device__ __forceinline__ float element(int i) const {
        return kvpg_float(((const T *)&chunk[i / EACH])[i % EACH]);
    }
    __device__ __forceinline__ float square_sum(float factor) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < CHUNKS * EACH; i++) sum = fmaf(element(i) * factor, element(i) * factor, sum);
        return sum_of_lanes<LANES>(sum);
    }
    /* What its elements times *factor times the result are those of the unit vector by. */
    __device__ __forceinline__ float weight(float *factor) const {
        float sum = square_sum(1);
        *factor = lift_of(sum);
        if (__any_sync(~0u, *factor != 1)) sum = square_sum(*factor);
        return weight_of(sum);
    }
};

template <typename T, int LANES, int CHUNKS> __global__ void __launch_bounds__(THREADS)
    sum_wide(const __grid_constant__ keydiff_job j) {
    kvpg_follow();
    typedef wide_key<T, LANES, CHUNKS> key_type;
    enum { WIDTH = CHUNKS * key_type::EACH, KEYS = THREADS / LANES, AT_ONCE = key_type::AT_ONCE };
    __shared__ float parts[KEYS][WIDTH * LANES];
    const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES;
    place at;
    if (!find_place(j, &at)) return;
    float sum[WIDTH] = {};
    for (int first = at.begin; first < at.end; first += KEYS * AT_ONCE) {
        key_type key[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) key[i].load(j, at, first + i * KEYS + own, lane);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            float factor;
            const float weight = key[i].weight(&factor);
#pragma unroll
            for (int e = 0; e < WIDTH; e++) sum[e] = fmaf(key[i].element(e) * factor, weight, sum[e]);
        }
    }
#pragma unroll
    for (int e = 0; e < WIDTH; e++)
        parts[own][(lane + e / key_type::EACH * LANES) * key_type::EACH + e % key_type::EACH] = sum[e];
    __syncthreads();
    for (int d = threadIdx.x; d < j.n_dim; d += THREADS) {
        double total = 0;
        for (int k = 0; k < KEYS; k++) total += parts[k][d];
        j.sums[((int64_t)at.unit * j.n_slot + at.slot) * j.n_dim + d] = total;
    }
}

template <typename T, int LANES, int CHUNKS> __global__ void __launch_bounds__(THREADS)
    compare_wide(const __grid_constant__ keydiff_job j) {
    kvpg_follow();
    typedef wide_key<T, LANES, CHUNKS> key_type;
    enum { WIDTH = CHUNKS * key_type::EACH, KEYS = THREADS / LANES, AT_ONCE = key_type::AT_ONCE };
    const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES;
    place at;
    if (!find_place(j, &at)) return;
    const float *from = j.means + ((int64_t)at.unit * j.n_range + at.range) * j.n_dim;
    float mean[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        const int d = (lane + e / key_type::EACH * LANES) * key_type::EACH + e % key_type::EACH;
        mean[e] = d < j.n_dim ? __ldcg(from + d) : 0;
    }
    for (int first = at.begin; first < at.end; first += KEYS * AT_ONCE) {
        key_type key[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) key[i].load(j, at, first + i * KEYS + own, lane);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int t = first + i * KEYS + own;
            float factor, product = 0;
            const float weight = key[i].weight(&factor);
#pragma unroll
            for (int e = 0; e < WIDTH; e++) product = fmaf(key[i].element(e) * factor, mean[e], product);
            product = sum_of_lanes<LANES>(product);
            /* not -x: a zero has no sign */
            if (lane == i % LANES && t < at.end) *(float *)kvpg_row(j.scores, at.b, at.h, t) = 0 - product * weight;
        }
    }
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
    if (!find_place(j, &at)) return;
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
    if (!find_place(j, &at)) return;
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

/* The direction of the mean of a range of one unit. */
static __global__ void __launch_bounds__(THREADS) find_means(const __grid_constant__ keydiff_job j) {
    kvpg_follow();
    __shared__ double squares[THREADS];
    const int unit = blockIdx.x % j.n_unit, range = blockIdx.x / j.n_unit;
    const kvpg_numbers row = kvpg_table_row(j.ranges, unit / j.n_head);
    if (range >= row[0]) return;
    const kvpg_numbers own = row + (1 + 3 * range);
    const int first = own[2], last = row[1 + 3 * (range + 1) + (range + 1 < row[0] ? 2 : 0)];
    const double *sums = j.sums + (int64_t)unit * j.n_slot * j.n_dim;
    float *mean = j.means + ((int64_t)unit * j.n_range + range) * j.n_dim;
    double square = 0, factor = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int d = threadIdx.x; d < j.n_dim; d += THREADS) {
            double total = 0;
#pragma unroll 8
            for (int i = first; i < last; i++) total += __ldcg(sums + (int64_t)i * j.n_dim + d);
            square = fma(total, total, square);
            if (pass) mean[d] = (float)(total * factor);
        }
        if (pass) return;
        squares[threadIdx.x] = square;
        __syncthreads();
        for (int o = THREADS / 2; o > 0; o /= 2) {
            if (threadIdx.x < o) squares[threadIdx.x] += squares[threadIdx.x + o];
            __syncthreads();
        }
        const double length = sqrt(squares[0]);
        factor = length < NO_MEAN * (own[1] - own[0]) ? 0 : 1 / length;
    }
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

typedef void (*keydiff_kernel)(keydiff_job);

template <typename T, int LANES, int CHUNKS> static void wide_kernels(keydiff_kernel (&two)[2]) {
    two[0] = sum_wide<T, LANES, CHUNKS>;
    two[1] = compare_wide<T, LANES, CHUNKS>;
}

/* The kernels of both reads. */
template <typename T> static void choose_kernels(int n_dim, bool wide, keydiff_kernel (&two)[2]) {
    const int n_chunk = n_dim * (int)sizeof(T) / 16;
    if (!wide || n_chunk > 128) {
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
    const bool wide = kvpg_has_wide_rows(&args->keys);
    KVPI_TRY(kvpg_with_type(args->keys.dtype, ctx, [&](auto t) {
        choose_kernels<typename decltype(t)::type>(j.n_dim, wide, two);
        return KVP_OK;
    }));
    KVPI_TRY(kvpg_launch("keydiff_sum", ctx, two[0], {j.n_slot * n_unit, 1}, THREADS, 1, 0, j));
    KVPI_TRY(kvpg_launch("keydiff_mean", ctx, find_means, {j.n_range * n_unit, 1}, THREADS, 1, 0, j));
    return kvpg_launch("keydiff_compare", ctx, two[1], {j.n_slot * n_unit, 1}, THREADS, 1, 0, j);
}

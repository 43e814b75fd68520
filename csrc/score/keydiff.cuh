/* SPDX-License-Identifier: Apache-2.0
 *
 * KeyDiff on the GPU: what both ways to read keys share, and the one for rows on 16-byte boundaries, which reads 16
 * bytes a lane of several keys at a time, and keeps keys' weights from one read to the other where scores will be.
 */
#ifndef KVP_KEYDIFF_CUH
#define KVP_KEYDIFF_CUH

#include "../gpu/rows.cuh"
#include "../gpu/tables.cuh"

enum { THREADS = 256 };
enum { LEAST_PIECE = 256, MOST_PIECES = 128 }; /* tokens, times a power of two; pieces of a range of all tokens */
enum { IN_FLIGHT = 8, BLOCKS = 2 };            /* keys of a lane at a time; blocks of a processor */
enum { FEW = 32 };                             /* pieces that the second read adds up itself */
enum { PARTS = 8, ELEMENTS = 128 };            /* threads of find_means to an element, and elements at a time */
enum { SUMS_IN_FLIGHT = 8 };                   /* of pieces */
enum { SHORTEST = 3 };                         /* as in keydiff.c, and so are these: */
#define LOW_SQUARE 0x1p-60f
#define HIGH_SQUARE 0x1p120f
#define LIFT 0x1p90f
#define NO_MEAN 0x1p-18

/* A batch row of the table: the number of its ranges, then begin, end and first piece of each, and how many pieces
 * there are. */
typedef struct keydiff_job {
    kvpg_rows keys, scores;
    int n_unit, n_head, n_token, n_dim, n_range, n_slot, piece; /* n_range, n_slot: room in a batch row */
    int run;                                                    /* slots that a block of wide rows reads */
    int few;      /* ranges of so many pieces get their means from the second read, others from find_means */
    int n_cached; /* tokens that one read leaves in the second-level cache for what comes next */
    double *sums; /* (n_unit, n_slot, n_dim): of unit vectors */
    float *means; /* (n_unit, n_range, n_dim) */
    kvpg_table ranges;
} keydiff_job;

/* Pieces of one range of one unit that follow each other. */
typedef struct place {
    int unit, b, h, slot, n_slot, begin, end;
    int range, first, n_piece, n_token; /* the range, its first piece, and how many of both it has */
} place;

/* At most n pieces from a slot on; false where the batch row has fewer. */
__device__ __forceinline__ bool find_place(const keydiff_job &j, int unit, int slot, int n, place *at) {
    at->unit = unit;
    at->b = unit / j.n_head;
    at->h = unit % j.n_head;
    at->slot = slot;
    const kvpg_numbers row = kvpg_table_row(j.ranges, at->b);
    int low = 0, high = row[0]; /* the last range in [low, high) whose first piece is not behind the slot */
    if (slot >= row[1 + 3 * high]) return false;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (row[1 + 3 * middle + 2] <= slot)
            low = middle;
        else
            high = middle;
    }
    const kvpg_numbers range = row + (1 + 3 * low);
    at->range = low;
    at->first = range[2];
    at->n_piece = range[low + 1 < row[0] ? 5 : 3] - at->first;
    at->n_token = range[1] - range[0];
    at->n_slot = min(n, at->first + at->n_piece - slot);
    at->begin = range[0] + (slot - at->first) * j.piece;
    at->end = min(at->begin + at->n_slot * j.piece, range[1]);
    return true;
}

/* What a key whose squares add up to square_sum is to be multiplied by before they are summed again. */
__device__ __forceinline__ float lift_of(float square_sum) {
    return square_sum >= LOW_SQUARE && square_sum <= HIGH_SQUARE ? 1 : square_sum < LOW_SQUARE ? LIFT : 1 / LIFT;
}

/* A key of length zero has no direction and no weight. One step of Newton's makes the reciprocal root as exact as a
 * root and a division would. */
__device__ __forceinline__ float weight_of(float square_sum) {
    const float root = rsqrtf(square_sum);
    return square_sum == 0 ? 0 : fmaf(0.5f * root, fmaf(-square_sum * root, root, 1), root);
}

/* The sum over LANES neighbours, the same for each. */
template <int LANES> __device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) x += __shfl_xor_sync(~0u, x, o);
    return x;
}

/* N such sums at once, by a tree that is the same for each: that of x[i] to lanes [i, i + 1) LANES / N. */
template <int LANES, int N> __device__ __forceinline__ float share_sums(float (&x)[N], int lane) {
    int n = N;
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) {
        n /= 2;
        if (n == 0) x[0] += __shfl_xor_sync(~0u, x[0], o);
#pragma unroll
        for (int i = 0; i < n; i++) {
            const bool upper = lane & o;
            x[i] = (upper ? x[i + n] : x[i]) + __shfl_xor_sync(~0u, upper ? x[i] : x[i + n], o);
        }
    }
    return x[0];
}

/* The sum of n numbers, one every stride. */
__device__ __forceinline__ double add_pieces(const double *x, int64_t stride, int n) {
    double sum = 0;
    for (int i = 0; i < n; i += SUMS_IN_FLIGHT) {
        double part[SUMS_IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < SUMS_IN_FLIGHT; k++) part[k] = i + k < n ? __ldcg(x + (i + k) * stride) : 0;
#pragma unroll
        for (int k = 0; k < SUMS_IN_FLIGHT; k++) sum += part[k];
    }
    return sum;
}

/* What makes a direction of the sum of n unit vectors, whose squares add up to square. */
__device__ __forceinline__ double factor_of(double square, int n) {
    const double length = sqrt(square);
    return length < NO_MEAN * n ? 0 : 1 / length;
}

/* The elements of 4 bytes: as float, and times a power of two. */
template <typename T> __device__ __forceinline__ float float_of_word(uint32_t word, bool) {
    return __uint_as_float(word);
}
template <> __device__ __forceinline__ float float_of_word<__nv_bfloat16>(uint32_t word, bool odd) {
    return __uint_as_float(odd ? word & 0xffff0000 : word << 16);
}
template <> __device__ __forceinline__ float float_of_word<__half>(uint32_t word, bool odd) {
    return __half2float(__ushort_as_half((unsigned short)(odd ? word >> 16 : word)));
}
template <typename T> __device__ __forceinline__ uint32_t lift_word(uint32_t word, float factor) {
    T lifted[4 / sizeof(T)];
#pragma unroll
    for (int i = 0; i < (int)(4 / sizeof(T)); i++) lifted[i] = T(float_of_word<T>(word, i) * factor);
    return *(const uint32_t *)lifted;
}

/* N keys that follow each other, CHUNKS times 16 bytes of each a lane: lane, lane + LANES, ... A key's sums are those
 * of the lanes that own it. */
template <typename T, int LANES, int CHUNKS> struct wide_keys {
    enum { EACH = 16 / sizeof(T), WIDTH = CHUNKS * EACH };
    enum { N = CHUNKS == 1 ? IN_FLIGHT : 4 / CHUNKS }; /* as many as registers hold */
    enum { OWNERS = LANES / N };                       /* lanes that own a key */
    enum { STEP = THREADS / LANES * N };               /* keys of a block */
    uint4 chunk[N][CHUNKS];
    /* From t on; instead of what is behind the end, the last one again. A lane without an element reads the last chunk,
     * too, and counts it not. */
    __device__ __forceinline__ void load(const keydiff_job &j, const place &at, int t, int lane, uint64_t policy) {
        const int last = at.end - 1, left = last - t;
        const char *from = kvpg_row(j.keys, at.b, at.h, min(t, last));
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const char *p = from + 16 * min(lane + c * LANES, j.n_dim / EACH - 1);
            if (left >= N - 1) {
#pragma unroll
                for (int i = 0; i < N; i++) chunk[i][c] = kvpg_load_wide(p + i * j.keys.t, policy);
            } else {
#pragma unroll
                for (int i = 0; i < N; i++) chunk[i][c] = kvpg_load_wide(p + max(min(i, left), 0) * j.keys.t, policy);
            }
        }
    }
    /* Adds the unit vectors to sum. */
    __device__ __forceinline__ void add_to(float (&sum)[WIDTH], float weight) const {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float w = of_owner(weight, i);
#pragma unroll
            for (int e = 0; e < WIDTH; e++) sum[e] = fmaf(element(i, e), w, sum[e]);
        }
    }
    __device__ __forceinline__ float product(const float (&mean)[WIDTH], int lane) const {
        float sum[N] = {};
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int e = 0; e < WIDTH; e++) sum[i] = fmaf(element(i, e), mean[e], sum[i]);
        }
        return share_sums<LANES>(sum, lane);
    }
    __device__ __forceinline__ float element(int i, int e) const {
        return float_of_word<T>(((const uint32_t *)&chunk[i][e / EACH])[e % EACH * sizeof(T) / 4], e % 2);
    }
    __device__ __forceinline__ float square_sum(const keydiff_job &j, int lane) const {
        float sum[N] = {};
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                float of_chunk = 0;
#pragma unroll
                for (int e = c * EACH; e < (c + 1) * EACH; e++) of_chunk = fmaf(element(i, e), element(i, e), of_chunk);
                sum[i] += lane + c * LANES < j.n_dim / EACH ? of_chunk : 0;
            }
        }
        return share_sums<LANES>(sum, lane);
    }
    /* What makes a unit vector of the own key, which this first lifts where it must be: by a power of two, which leaves
     * the elements that count as they are in any type. */
    __device__ __forceinline__ float weight(const keydiff_job &j, int lane, bool *is_lifted) {
        const float sum = square_sum(j, lane), factor = lift_of(sum);
        *is_lifted = factor != 1;
        if (!__any_sync(~0u, factor != 1)) return weight_of(sum);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float own = of_owner(factor, i);
#pragma unroll
            for (int c = 0; c < 4 * CHUNKS; c++) {
                uint32_t *word = (uint32_t *)&chunk[i][c / 4] + c % 4;
                *word = lift_word<T>(*word, own);
            }
        }
        return weight_of(square_sum(j, lane));
    }
    static __device__ __forceinline__ float of_owner(float x, int i) { return __shfl_sync(~0u, x, i * OWNERS, LANES); }
    /* The element of a key that is e of a lane's. */
    static __device__ __forceinline__ int index(int lane, int e) { return (lane + e / EACH * LANES) * EACH + e % EACH; }
};

/* The scores of its keys hold their weights in between, less than 0 where the keys had to be lifted. */
template <typename T, int LANES, int CHUNKS> __global__ void __launch_bounds__(THREADS, BLOCKS)
    sum_wide(const __grid_constant__ keydiff_job j) {
    kvpg_follow();
    typedef wide_keys<T, LANES, CHUNKS> keys_type;
    enum { N = keys_type::N, STEP = keys_type::STEP, WIDTH = keys_type::WIDTH };
    __shared__ float parts[THREADS / LANES][WIDTH * LANES];
    const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES, unit = blockIdx.x % j.n_unit;
    int slot = blockIdx.x / j.n_unit * j.run;
    const int end = slot + j.run;
    place at;
    for (; slot < end && find_place(j, unit, slot, end - slot, &at); slot += at.n_slot) {
        const uint64_t policy = at.end > j.n_token - j.n_cached ? kvpg_stay() : kvpg_pass();
        const int n_group = (at.end - at.begin + STEP - 1) / STEP;
        float sum[WIDTH] = {};
        for (int g = 0; g < n_group; g++) {
            const int t = at.begin + g * STEP + own * N, own_t = t + lane / keys_type::OWNERS;
            keys_type keys;
            keys.load(j, at, t, lane, policy);
            bool is_lifted;
            const float weight = keys.weight(j, lane, &is_lifted);
            keys.add_to(sum, own_t < at.end ? weight : 0);
            if (lane % keys_type::OWNERS == 0 && own_t < at.end)
                *(float *)kvpg_row(j.scores, at.b, at.h, own_t) = is_lifted ? -weight : weight;
            const int n = (g + 1) * STEP;
            if ((n & (j.piece - 1)) != 0 && g + 1 < n_group) continue;
#pragma unroll
            for (int e = 0; e < WIDTH; e++) {
                parts[own][keys_type::index(lane, e)] = sum[e];
                sum[e] = 0;
            }
            __syncthreads();
            double *to = j.sums + ((int64_t)unit * j.n_slot + slot + (n - 1) / j.piece) * j.n_dim;
            for (int d = threadIdx.x; d < j.n_dim; d += THREADS) {
                double total = 0;
#pragma unroll
                for (int k = 0; k < THREADS / LANES; k++) total += parts[k][d];
                to[d] = total;
            }
            __syncthreads();
        }
    }
}

/* The direction of the mean of a place's range: of each lane the elements of its keys. Where the range has few pieces,
 * the block adds them up itself, and find_means does not. */
template <typename T, int LANES, int CHUNKS>
__device__ __forceinline__ void find_mean(const keydiff_job &j, const place &at, double *totals, int lane,
                                          float (&mean)[wide_keys<T, LANES, CHUNKS>::WIDTH]) {
    typedef wide_keys<T, LANES, CHUNKS> keys_type;
    if (at.n_piece > j.few) {
        const float *from = j.means + ((int64_t)at.unit * j.n_range + at.range) * j.n_dim;
#pragma unroll
        for (int e = 0; e < keys_type::WIDTH; e++) {
            const int d = keys_type::index(lane, e);
            mean[e] = d < j.n_dim ? __ldcg(from + d) : 0;
        }
        return;
    }
    const double *from = j.sums + ((int64_t)at.unit * j.n_slot + at.first) * j.n_dim;
    double square = 0;
    __syncthreads();
    for (int d = threadIdx.x; d < LANES * keys_type::WIDTH; d += THREADS)
        totals[d] = d < j.n_dim ? add_pieces(from + d, j.n_dim, at.n_piece) : 0;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < keys_type::WIDTH; e++) {
        const double total = totals[keys_type::index(lane, e)];
        square = fma(total, total, square);
    }
#pragma unroll
    for (int o = LANES / 2; o > 0; o /= 2) square += __shfl_xor_sync(~0u, square, o);
    const double factor = factor_of(square, at.n_token);
#pragma unroll
    for (int e = 0; e < keys_type::WIDTH; e++) mean[e] = (float)(totals[keys_type::index(lane, e)] * factor);
}

/* Backwards, so that it begins with what the cache still holds of the other read. */
template <typename T, int LANES, int CHUNKS> __global__ void __launch_bounds__(THREADS, BLOCKS)
    compare_wide(const __grid_constant__ keydiff_job j) {
    kvpg_follow();
    typedef wide_keys<T, LANES, CHUNKS> keys_type;
    enum { N = keys_type::N, STEP = keys_type::STEP, WIDTH = keys_type::WIDTH };
    __shared__ double totals[WIDTH * LANES];
    const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES, unit = blockIdx.x % j.n_unit;
    int slot = (gridDim.x - 1 - blockIdx.x) / j.n_unit * j.run;
    const int end = slot + j.run;
    place at;
    for (; slot < end && find_place(j, unit, slot, end - slot, &at); slot += at.n_slot) {
        const uint64_t policy = at.begin < j.n_cached ? kvpg_stay() : kvpg_pass();
        const int first = own * N, last = (at.end - at.begin - 1) / STEP;
        float *score = (float *)kvpg_row(j.scores, at.b, at.h, at.begin + first + lane / keys_type::OWNERS),
              mean[WIDTH];
        const int n = at.end - at.begin - first - lane / keys_type::OWNERS; /* tokens from there */
        for (int g = last; g >= 0; g--) {
            keys_type keys;
            keys.load(j, at, at.begin + g * STEP + first, lane, policy);
            float weight = g * STEP < n ? __ldcg(score + g * STEP) : 0;
            if (g == last) find_mean<T, LANES, CHUNKS>(j, at, totals, lane, mean);
            bool is_lifted;
            if (__any_sync(~0u, weight < 0)) weight = keys.weight(j, lane, &is_lifted);
            const float product = keys.product(mean, lane);
            /* not -x: a zero has no sign */
            if (lane % keys_type::OWNERS == 0 && g * STEP < n) score[g * STEP] = 0 - product * weight;
        }
    }
}

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * The forecast of queries to come: mean and covariance of those of a prompt as they were before rotary embedding, then
 * turned on average as what comes next.
 *
 * A block takes a chunk of one unit, and of more than 128 channels a part of the products' columns. It turns back a
 * tile of queries, subtracts the mean of the chunk's first tile, so that float32 has room for what differs beside a
 * large mean, and multiplies what is left with itself by tensor cores: with x = high + low in bfloat16, 16 bits
 * together, high'high + high'(2 low) + low'low has the symmetric part of x'x. A sum of a chunk is made in 96 steps
 * where the prompt has no more than 32768 tokens, since tensor cores cut off what float32 has no room for, where others
 * round: logits are off by at most 4e-6 of their largest terms' sum, and by 4e-7 at 300 and 5,000 tokens, three times
 * what float32 products of torch are (H100). A second kernel shifts all chunks to the mean of the whole, which takes no
 * differences of large sums, and turns.
 */
#include "expected.cuh"

/* Chunks of a unit, at most, and their least tokens: both by the length alone, so that bits depend on nothing else. */
enum { MAX_CHUNK = 64, LEAST_CHUNK = 512, JOIN_THREADS = 256 };

typedef struct chunking {
    int length, n; /* tokens of each but the last, and how many there are */
} chunking;

__device__ __forceinline__ chunking chunks_of(int n_token) {
    const int most = LEAST_CHUNK * MAX_CHUNK, length = LEAST_CHUNK * max(1, (n_token + most - 1) / most);
    return {length, (n_token + length - 1) / length};
}

/* No row of n_token tokens or fewer has more chunks. */
static inline int most_chunks(int64_t n_token) {
    const int64_t n = kvpg_ceil_div(n_token, LEAST_CHUNK);
    return n < MAX_CHUNK ? (int)n : (int)MAX_CHUNK;
}

typedef struct moments_job {
    kvpg_rows queries, cosines, sines;
    bool wide, wide_tables;
    int n_head, n_place;  /* n_place: room for a unit's chunks */
    float *shifts, *sums; /* (unit, place, D): what was subtracted, and the sum of what is left */
    float *products;      /* (unit, place, D, D); NULL: only the mean is asked for */
    kvpg_table edges;
} moments_job;

/* A thread has channels `at` to at + 3, and those DIM / 2 further: which of them is its number e. */
template <int DIM> __device__ __forceinline__ constexpr int channel(int e) { return e % 4 + e / 4 * (DIM / 2); }

/* Channels `at` to at + 3 of a query and, behind them, those DIM / 2 further: what they were before they were turned */
template <typename T, int DIM>
__device__ __forceinline__ void turn_back(const moments_job &j, int b, int head, int t, int at, float (&x)[8]) {
    float c[8], s[8];
    const char *row = kvpg_row(j.queries, b, head, t);
    const char *cosines = kvpg_row(j.cosines, b, 0, t), *sines = kvpg_row(j.sines, b, 0, t);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        load_four<T>(row, j.queries.d, j.wide, at + half * (DIM / 2), x + 4 * half);
        load_four<float>(cosines, j.cosines.d, j.wide_tables, at + half * (DIM / 2), c + 4 * half);
        load_four<float>(sines, j.sines.d, j.wide_tables, at + half * (DIM / 2), s + 4 * half);
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float low = x[e], high = x[e + 4];
        /* not 1 where a model makes what it turns longer or shorter */
        x[e] = __fdividef(fmaf(low, c[e], high * s[e]), fmaf(c[e], c[e], s[e] * s[e]));
        x[e + 4] = __fdividef(fmaf(high, c[e + 4], -(low * s[e + 4])), fmaf(c[e + 4], c[e + 4], s[e + 4] * s[e + 4]));
    }
}

/* What threads with the same channels have added up, each in a place of its own: (ROWS, DIM). */
template <int DIM> struct sums {
    float of[kvpg_expected<DIM>::ROWS * DIM];
    __device__ __forceinline__ float &own(int at, int e) {
        return of[threadIdx.x / kvpg_expected<DIM>::LANES * DIM + at + channel<DIM>(e)];
    }
    __device__ __forceinline__ float all(int d) const {
        float sum = 0;
        for (int r = 0; r < kvpg_expected<DIM>::ROWS; r++) sum += of[r * DIM + d];
        return sum;
    }
};

__device__ __forceinline__ uint32_t quarter_of(uint32_t pair) {
    const __nv_bfloat162 by = __float2bfloat162_rn(0.25f), x = *(const __nv_bfloat162 *)&pair * by;
    return *(const uint32_t *)&x;
}

/* Where the 16 columns of the product begin that a warp has, in a block that has this part of them. */
template <int DIM> __device__ __forceinline__ int own_column(int part) {
    return (part * kvpg_expected<DIM>::WARPS + (int)threadIdx.x / 32) * 16;
}

/* Of two tiles of bfloat16, high and (twice) low, high'(high + 2 low) + low'low. */
template <int DIM>
__device__ __forceinline__ void add_products(uint32_t high, uint32_t low, int part, float (&sum)[DIM / 16][2][4]) {
    const int lane = threadIdx.x % 32, column = own_column<DIM>(part);
    const int row = lane % 8, first = lane / 8 % 2 * 8, second = lane / 16 * 8;
    enum { PITCH = kvpg_expected<DIM>::PITCH * (int)sizeof(__nv_bfloat16) };
#pragma unroll 1 /* for registers */
    for (int k = 0; k < kvpg_expected<DIM>::TILE; k += 16) {
        uint32_t b[2][4]; /* of high, tokens k and k + 8, and of low */
#pragma unroll
        for (int n = 0; n < 2; n++)
            kvpg_load_matrix_transposed(b[n],
                                        (lane < 16 ? high : low) + (k + row + first) * PITCH + (column + 8 * n) * 2);
#pragma unroll
        for (int m = 0; m < DIM / 16; m++) {
            uint32_t a[4];
            kvpg_load_matrix_transposed(a, high + (k + row + second) * PITCH + (16 * m + first) * 2);
#pragma unroll
            for (int part = 0; part < 2; part++)
#pragma unroll
                for (int n = 0; n < 2; n++)
                    kvpg_multiply<__nv_bfloat16>(sum[m][n], a, b[n][2 * part], b[n][2 * part + 1]);
            kvpg_load_matrix_transposed(a, low + (k + row + second) * PITCH + (16 * m + first) * 2);
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = quarter_of(a[i]);
#pragma unroll
            for (int n = 0; n < 2; n++) kvpg_multiply<__nv_bfloat16>(sum[m][n], a, b[n][2], b[n][3]);
        }
    }
}

template <int DIM> struct tiles {
    static constexpr int N = kvpg_expected<DIM>::TILE * kvpg_expected<DIM>::PITCH;
    alignas(16) __nv_bfloat16 high[N], low[N];
};

template <int DIM> __device__ __forceinline__ void store_parts(float (&x)[8], int to, tiles<DIM> &tile) {
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        *(uint32_t *)(tile.high + to + channel<DIM>(e)) = take_part(x[e], x[e + 1]);
        *(__nv_bfloat162 *)(tile.low + to + channel<DIM>(e)) = __floats2bfloat162_rn(2 * x[e], 2 * x[e + 1]);
    }
}

/* A tile of queries, turned back: to the sums, and less the shift in two parts to shared memory, zeros behind the last.
 * FIRST: to the sums alone, in place of what stands there. */
template <typename T, int DIM, bool FIRST>
__device__ __forceinline__ void add_tile(const moments_job &j, int b, int head, int first, int end, int at,
                                         const float *shift, sums<DIM> &sum, tiles<DIM> &tile) {
    const int own_row = threadIdx.x / kvpg_expected<DIM>::LANES;
    float own[8] = {};
#pragma unroll 2
    for (int row = own_row; row < own_row + kvpg_expected<DIM>::TILE; row += kvpg_expected<DIM>::ROWS) {
        float x[8] = {};
        if (first + row < end) {
            turn_back<T, DIM>(j, b, head, first + row, at, x);
#pragma unroll
            for (int e = 0; e < 8; e++) own[e] += x[e] -= FIRST ? 0 : shift[at + channel<DIM>(e)];
        }
        if constexpr (!FIRST)
            if (j.products) store_parts<DIM>(x, row * kvpg_expected<DIM>::PITCH + at, tile);
    }
#pragma unroll
    for (int e = 0; e < 8; e++) sum.own(at, e) = own[e] + (FIRST ? 0 : sum.own(at, e));
}

template <typename T, int DIM> __global__ void __launch_bounds__(kvpg_expected<DIM>::THREADS, DIM > 128 ? 1 : 2)
    sum_chunk(const __grid_constant__ moments_job j) {
    kvpg_follow();
    __shared__ tiles<DIM> tile;
    __shared__ sums<DIM> sum; /* not in registers, of which products have most, and so the shift */
    __shared__ alignas(16) float shift[DIM];
    const int part = blockIdx.x % kvpg_expected<DIM>::BLOCKS, place = blockIdx.x / kvpg_expected<DIM>::BLOCKS;
    const int unit = place / j.n_place, chunk = place % j.n_place;
    const int b = unit / j.n_head, head = unit % j.n_head;
    const kvpg_judged judged = kvpg_judged_of(j.edges, b);
    const chunking chunks = chunks_of(judged.end - judged.begin);
    if (chunk >= chunks.n || (part && !j.products)) return;
    const int begin = judged.begin + chunk * chunks.length, end = min(begin + chunks.length, judged.end);
    const int at = threadIdx.x % kvpg_expected<DIM>::LANES * 4, own_row = threadIdx.x / kvpg_expected<DIM>::LANES;
    float product[DIM / 16][2][4] = {};
    add_tile<T, DIM, true>(j, b, head, begin, end, at, shift, sum, tile);
    __syncthreads();
    if (threadIdx.x < DIM)
        shift[threadIdx.x] = sum.all(threadIdx.x) / (float)min(kvpg_expected<DIM>::TILE, end - begin);
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; e++) sum.own(at, e) = 0;
    for (int first = begin; first < end; first += kvpg_expected<DIM>::TILE) {
        add_tile<T, DIM, false>(j, b, head, first, end, at, shift, sum, tile);
        if (!j.products) continue;
        __syncthreads();
        add_products<DIM>((uint32_t)__cvta_generic_to_shared(tile.high), (uint32_t)__cvta_generic_to_shared(tile.low),
                          part, product);
        __syncthreads();
    }
    __syncthreads();
    const int64_t row = (int64_t)place * DIM;
    if (part == 0 && threadIdx.x < DIM) {
        j.shifts[row + threadIdx.x] = shift[threadIdx.x];
        j.sums[row + threadIdx.x] = sum.all(threadIdx.x);
    }
    if (!j.products) return;
    float *to = j.products + (row + threadIdx.x % 32 / 4) * DIM + own_column<DIM>(part) + threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < DIM / 16; m++)
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int low = 0; low < 2; low++)
                *(float2 *)(to + (16 * m + 8 * low) * DIM + 8 * n) = {product[m][n][2 * low],
                                                                      product[m][n][2 * low + 1]};
}

typedef struct join_job {
    moments_job of;
    kvpg_forecast to;
    const char *cosines, *sines; /* (B, D), of the turn to come */
    int64_t cosine_b, cosine_d, sine_b, sine_d;
    float scaling;
} join_job;

/* By what channels p and p + DIM / 2 make those of a turned row: {{low to low, low to high}, {high to low, ...}}. */
struct turn_of_pair {
    float by[2][2];
    template <int DIM> __device__ __forceinline__ void read(const join_job &j, int b, int p) {
        float c[2], s[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t d = p + half * (DIM / 2);
            c[half] = *(const float *)(j.cosines + b * j.cosine_b + d * j.cosine_d) * j.scaling;
            s[half] = *(const float *)(j.sines + b * j.sine_b + d * j.sine_d) * j.scaling;
        }
        by[0][0] = c[0];
        by[0][1] = s[1];
        by[1][0] = -s[0];
        by[1][1] = c[1];
    }
};

/* A thread has the two channels of a pair p against the two of a pair q. */
template <int DIM> __global__ void __launch_bounds__(JOIN_THREADS) join_chunks(const __grid_constant__ join_job j) {
    kvpg_follow();
    enum { HALF = DIM / 2, PAIRS = JOIN_THREADS / HALF, SLABS = (HALF + PAIRS - 1) / PAIRS };
    const int unit = blockIdx.x / SLABS, b = unit / j.of.n_head;
    const kvpg_judged judged = kvpg_judged_of(j.of.edges, b);
    const int n_token = judged.end - judged.begin;
    if (n_token == 0) return;
    const chunking chunks = chunks_of(n_token);
    const int q = threadIdx.x % HALF, p = blockIdx.x % SLABS * PAIRS + threadIdx.x / HALF;
    if ((int)threadIdx.x / HALF >= PAIRS || p >= HALF) return;
    const int at[4] = {p, p + HALF, q, q + HALF};
    const int64_t place = (int64_t)unit * j.of.n_place;
    const float *shifts = j.of.shifts + place * DIM, *sums = j.of.sums + place * DIM;
    float mean[4], product[2][2] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float sum = 0; /* of what differs from the shift of the first chunk */
        for (int c = 0; c < chunks.n; c++) {
            const float n = (float)min(chunks.length, n_token - c * chunks.length);
            sum += fmaf(n, shifts[c * DIM + at[i]] - shifts[at[i]], sums[c * DIM + at[i]]);
        }
        mean[i] = shifts[at[i]] + sum / (float)n_token;
    }
    turn_of_pair by_p, by_q;
    by_p.read<DIM>(j, b, p);
    by_q.read<DIM>(j, b, q);
    if (q == 0)
#pragma unroll
        for (int u = 0; u < 2; u++)
            j.to.mean[(int64_t)unit * DIM + at[u]] = mean[0] * by_p.by[0][u] + mean[1] * by_p.by[1][u];
    if (!j.of.products) return;
    const float *products = j.of.products + place * DIM * DIM;
#pragma unroll 4
    for (int c = 0; c < chunks.n; c++, products += DIM * DIM) {
        const float n = (float)min(chunks.length, n_token - c * chunks.length);
        float off[4], sum[4]; /* sum of (x + off)(y + off)' for what is left, x and y */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            off[i] = shifts[c * DIM + at[i]] - mean[i];
            sum[i] = sums[c * DIM + at[i]];
        }
#pragma unroll
        for (int u = 0; u < 2; u++)
#pragma unroll
            for (int v = 2; v < 4; v++)
                product[u][v - 2] +=
                    fmaf(off[u], fmaf(n, off[v], sum[v]), fmaf(sum[u], off[v], products[at[u] * DIM + at[v]]));
    }
    const float share = 0.5f / (float)n_token;
#pragma unroll
    for (int u = 0; u < 2; u++)
#pragma unroll
        for (int v = 0; v < 2; v++) {
            float turned = 0;
#pragma unroll
            for (int w = 0; w < 4; w++) turned += by_p.by[w / 2][u] * product[w / 2][w % 2] * by_q.by[w % 2][v];
            j.to.spread[((int64_t)unit * DIM + at[u]) * DIM + at[2 + v]] = turned * share;
        }
}

/* Numbers of the workspace, in this order: mean, shifts, sums, spread, products. */
typedef struct forecast_sizes {
    size_t row, rows, square, squares; /* all multiples of 64 bytes, as D is of 16 */
} forecast_sizes;

static forecast_sizes sizes_of(const kvp_expect_args *args) {
    const int64_t n_dim = args->keys.shape[3], n_chunk = most_chunks(args->queries.shape[2]);
    const size_t row = (size_t)(args->queries.shape[0] * args->queries.shape[1] * n_dim);
    const size_t square = args->with_spread ? row * (size_t)n_dim : 0;
    return {row, row * (size_t)n_chunk, square, square * (size_t)n_chunk};
}

size_t kvpg_forecast_bytes(const kvp_expect_args *args) {
    const forecast_sizes n = sizes_of(args);
    return kvpi_round_up_64((n.row + 2 * n.rows + n.square + n.squares) * sizeof(float));
}

kvp_status kvpg_make_forecast(const kvp_expect_args *args, const kvpg_table *edges, void *workspace,
                              kvpg_forecast *made, kvp_context *ctx) {
    const forecast_sizes n = sizes_of(args);
    const int64_t *shape_of = args->queries.shape, n_unit = shape_of[0] * shape_of[1];
    float *at = (float *)workspace;
    moments_job job = {};
    made->mean = at;
    job.shifts = at += n.row;
    job.sums = at += n.rows;
    at += n.rows;
    made->spread = args->with_spread ? at : NULL;
    job.products = args->with_spread ? at + n.square : NULL;
    job.queries = kvpg_rows_of(&args->queries);
    job.cosines = kvpg_rows_of(&args->cosines);
    job.sines = kvpg_rows_of(&args->sines);
    job.wide = kvpg_has_wide_rows(&args->queries);
    job.wide_tables = kvpg_has_wide_rows(&args->cosines) && kvpg_has_wide_rows(&args->sines);
    job.n_head = (int)shape_of[1];
    job.n_place = most_chunks(shape_of[2]);
    job.edges = *edges;
    const kvp_tensor *cosines = &args->ahead_cosines, *sines = &args->ahead_sines;
    const join_job join = {job,
                           *made,
                           (const char *)cosines->data,
                           (const char *)sines->data,
                           cosines->stride[0] * (int64_t)sizeof(float),
                           cosines->stride[1] * (int64_t)sizeof(float),
                           sines->stride[0] * (int64_t)sizeof(float),
                           sines->stride[1] * (int64_t)sizeof(float),
                           (float)args->scaling};
    return kvpg_with_dim(shape_of[3], ctx, [&](auto dim) {
        enum { DIM = decltype(dim)::value, PAIRS = JOIN_THREADS / (DIM / 2) };
        KVPI_TRY(kvpg_with_type(args->queries.dtype, ctx, [&](auto type) {
            typedef typename decltype(type)::type T;
            return kvpg_launch("expect_chunk", ctx, sum_chunk<T, DIM>,
                               {n_unit * job.n_place * kvpg_expected<DIM>::BLOCKS, 1}, kvpg_expected<DIM>::THREADS, 1,
                               0, job);
        }));
        return kvpg_launch("expect_join", ctx, join_chunks<DIM>, {n_unit * kvpg_ceil_div(DIM / 2, PAIRS), 1},
                           JOIN_THREADS, 1, 0, join);
    });
}

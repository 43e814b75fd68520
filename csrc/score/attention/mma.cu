/* SPDX-License-Identifier: Apache-2.0
 *
 * The sweeps of sweep.cuh by tensor cores, for rows on 16-byte boundaries, of up to 1024 bytes. A block of four warps
 * holds 128 rows (64 of float32 or above 256 bytes) as fragments in registers; tiles of 64 columns (32 above 512 bytes)
 * come through a ring in shared memory by asynchronous copies. All query heads of a group stream past one tile of keys
 * where there are blocks enough. Everything a thread needs of a column is in its own registers, so sums need no
 * atomics: four lanes share a row and join at the end.
 *
 * An element of float32 is taken as the sum of two of tf32, whose 11 bits each leave 2^-22 of it, and a product as
 * three of theirs. Fragments have the same bytes in the same places for all types: 32 of each row at a time.
 */
#include "sweep.cuh"

enum { THREADS = 128, ENOUGH_BLOCKS = 1024 };

/* DIM: the elements of a row, rounded up; the rest is zeros. */
template <typename T, int DIM> struct shape {
    typedef T type;
    static constexpr bool IS_SPLIT = sizeof(T) == 4;          /* each element into two of tf32 */
    static constexpr int ROW = DIM * sizeof(T);               /* bytes */
    static constexpr int STEPS = ROW / 32;                    /* of a product */
    static constexpr int M = ROW <= 256 && !IS_SPLIT ? 2 : 1; /* fragments of 16 rows a warp */
    static constexpr int BLOCKS = M == 2 ? 4 : ROW > 512 || (IS_SPLIT && ROW > 256) ? 2 : 3; /* of a processor */
    static constexpr int ROWS = 64 * M;                                                      /* of a block */
    static constexpr int COLUMNS = ROW <= 512 ? 64 : 32;                                     /* of a tile */
    static constexpr int STAGES = ROW <= 256 ? 3 : 2;                                        /* of the ring */
    /* The rows come by the ring, too: into the first tiles of columns, or, where these are too few, into all. */
    static constexpr bool ROWS_FILL_RING = (STAGES - 1) * COLUMNS < ROWS;
    static_assert(ROWS <= STAGES * COLUMNS, "the ring has room for the rows");
    static constexpr int PITCH =
        ROW + 16; /* from row to row: an odd number of 16, so that ldmatrix meets no bank twice */
    static constexpr int TILE = COLUMNS * PITCH;
    static constexpr int BYTES = STAGES * (TILE + COLUMNS * 4) + ROWS * (2 * sizeof(kvpg_interval) + sizeof(float *));
};

/* What a block works on. */
template <int SWEEP> struct work_unit {
    kvpg_numbers table;
    int b, h, head, n_head; /* query heads head to head + n_head - 1 of the group (SUM) */
    int begin, end, split;
};

/* Blocks are numbered tile by tile, the long ones first, so that those at work together share rows or columns in the
 * second-level cache. Where a key has few voters all tiles are short; then the newest keys are first, which the other
 * sweep read last, and gathering will begin with the oldest. */
template <typename S, int SWEEP>
__device__ __forceinline__ bool find_work_unit(const kvpg_attention &p, int heads_at_once, work_unit<SWEEP> &u) {
    const bool ascending = SWEEP == KVPG_SUM && p.max_hull > p.n_token / 4;
    const int n_part = SWEEP == KVPG_SUM ? p.group / heads_at_once : 1, n_unit = p.n_batch * p.n_head * n_part,
              at = blockIdx.x / n_unit;
    const int tile = ascending ? at : gridDim.x / n_unit - 1 - at, head = blockIdx.x % n_unit / n_part;
    u.b = head / p.n_head;
    u.h = head % p.n_head;
    u.head = blockIdx.x % n_unit % n_part * heads_at_once;
    u.n_head = SWEEP == KVPG_SUM ? heads_at_once : 1;
    u.table = kvpg_table_row(p.table, u.b);
    u.split = u.table[KVPG_IS_SINGLE] ? u.table[KVPG_N_SPLIT] - 1 - (int)blockIdx.y : blockIdx.y;
    const int n_row = SWEEP == KVPG_SUM ? p.n_token : u.table[KVPG_N_VOTER] * p.group;
    u.begin = tile * S::ROWS;
    u.end = min(u.begin + S::ROWS, n_row);
    return !kvpg_skips<SWEEP>(u.table) && u.begin < n_row &&
           (SWEEP == KVPG_SUM || (u.split >= 0 && u.split < u.table[KVPG_N_SPLIT]));
}

/* The tiles of columns, in order: for each head those of interval 0, then those of interval 1. */
struct tile_sequence {
    kvpg_cover cover[2];
    int n_first, n; /* tiles of interval 0, of both */
};

/* A place in the sequence. */
struct tile_position {
    int head, s, column;
};

__device__ __forceinline__ tile_position first_position(const tile_sequence &c) {
    return c.n_first > 0 ? tile_position{0, 0, c.cover[0].lo} : tile_position{0, 1, c.cover[1].lo};
}

/* Goes on by a tile; returns whether that was the last of a head. */
template <int COLUMNS> __device__ __forceinline__ bool advance(const tile_sequence &c, tile_position &at) {
    at.column += COLUMNS;
    if (at.column < (at.s ? c.cover[1].hi : c.cover[0].hi)) return false;
    if (at.s == 0 && c.n > c.n_first) {
        at.s = 1;
        at.column = c.cover[1].lo;
        return false;
    }
    at = {at.head + 1, first_position(c).s, first_position(c).column};
    return true;
}

template <int COLUMNS, int SWEEP>
__device__ __forceinline__ tile_sequence tile_sequence_of(const kvpg_attention &p, const work_unit<SWEEP> &u) {
    tile_sequence c;
    for (int s = 0; s < 2; s++) c.cover[s] = kvpg_cover_of<SWEEP>(p, u.table, s, u.begin, u.end);
    if (SWEEP == KVPG_LSE) kvpg_cut_split(c.cover[0], u.table, u.split);
    c.n_first = max(0, c.cover[0].hi - c.cover[0].lo + COLUMNS - 1) / COLUMNS;
    c.n = c.n_first + max(0, c.cover[1].hi - c.cover[1].lo + COLUMNS - 1) / COLUMNS;
    return c;
}

/* Copies rows, 16 bytes at a time. Those from n_in_bounds on, and what is behind a row's last element, become zeros. */
template <typename S> __device__ __forceinline__ void copy_rows(uint32_t to, int n_row, int n_in_bounds,
                                                                const char *from, int64_t step, int n_dim) {
    constexpr int CHUNKS = S::ROW / 16, ELEMENTS = 16 / sizeof(typename S::type);
#pragma unroll 4
    for (int i = threadIdx.x; i < n_row * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool in_bounds = row < n_in_bounds && chunk * ELEMENTS < n_dim;
        kvpg_copy_async(to + row * S::PITCH + chunk * 16, in_bounds ? from + row * step + chunk * 16 : from,
                        in_bounds ? 16 : 0);
    }
}

template <int SWEEP, int M> struct results;
template <int M> struct results<KVPG_LSE, M> {
    kvpg_partial partial[2 * M];
    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 2 * M; i++) partial[i] = {KVPG_LOWEST, 0};
    }
};
template <int M> struct results<KVPG_SUM, M> {
    float sum[2 * M];
    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < 2 * M; i++) sum[i] = 0;
    }
};

/* Whether a row takes columns column and column + 1. */
__device__ __forceinline__ void mask_pair(kvpg_interval mask, int column, float &x, float &y, float masked_value) {
    if (column < mask.lo || column >= mask.hi) x = masked_value;
    if (column + 1 < mask.lo || column + 1 >= mask.hi) y = masked_value;
}

/* Reduces 16 columns: a[m][j] are those of fragments m and columns 8 j to 8 j + 7. */
template <int M, bool MASKED, bool MOST>
__device__ __forceinline__ void reduce(const kvpg_attention &p, float (&a)[M][2][4], const kvpg_interval *mask,
                                       int column, const float *, results<KVPG_LSE, M> &r) {
    const bool ready =
        p.cap > 0 ||
        p.scale <= 0; /* else products are compared before they are scaled, which saves an instruction each */
    if (ready) {
#pragma unroll
        for (int i = 0; i < 8 * M; i++) a[i / 8][i / 4 % 2][i % 4] = kvpg_logit(p, a[i / 8][i / 4 % 2][i % 4]);
    }
    const float scale = ready ? 1 : p.scale;
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = a[i / 2][j / 2][i % 2 * 2 + j % 2];
        if (MASKED) {
            const kvpg_interval t = mask[i / 2 * 16 + i % 2 * 8];
            mask_pair(t, column, x[0], x[1], -INFINITY);
            mask_pair(t, column + 8, x[2], x[3], -INFINITY);
        }
        kvpg_partial &partial = r.partial[i];
        kvpg_raise_max(partial, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) * scale);
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = kvpg_exp2(fmaf(x[j], scale, -partial.max));
        partial.sum += (x[0] + x[1]) + (x[2] + x[3]);
    }
}

template <int M, bool MASKED, bool MOST>
__device__ __forceinline__ void reduce(const kvpg_attention &p, float (&a)[M][2][4], const kvpg_interval *mask,
                                       int column, const float *exponents, results<KVPG_SUM, M> &r) {
    const float2 e[2] = {*(const float2 *)exponents, *(const float2 *)(exponents + 8)};
    const float scale = p.cap > 0 ? 1 : p.scale;
    if (p.cap > 0) {
#pragma unroll
        for (int i = 0; i < 8 * M; i++) a[i / 8][i / 4 % 2][i % 4] = kvpg_logit(p, a[i / 8][i / 4 % 2][i % 4]);
    }
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float exponent = j % 2 ? e[j / 2].y : e[j / 2].x;
            x[j] = kvpg_exp2(fmaf(a[i / 2][j / 2][i % 2 * 2 + j % 2], scale, exponent));
            if (MASKED && kvpg_is_masked(exponent)) x[j] = 0;
        }
        if (MASKED) {
            const kvpg_interval t = mask[i / 2 * 16 + i % 2 * 8];
            mask_pair(t, column, x[0], x[1], 0);
            mask_pair(t, column + 8, x[2], x[3], 0);
        }
        r.sum[i] = kvpg_join<MOST>(r.sum[i], kvpg_join<MOST>(kvpg_join<MOST>(x[0], x[1]), kvpg_join<MOST>(x[2], x[3])));
    }
}

/* What a voter's row in a batch row that is single leaves of its products: those with `keys`, from `to` on. */
struct kept_products {
    const kvpg_interval *keys; /* NULL: nothing */
    float *const *to;
};

/* Columns are the pairs from column and from column + 8 on. */
template <int M>
__device__ __forceinline__ void keep_products(const float (&a)[M][2][4], const kept_products &kept, int column) {
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int row = i / 2 * 16 + i % 2 * 8;
        const kvpg_interval keys = kept.keys[row];
        if (keys.lo >= keys.hi) continue;
        float *const to = kept.to[row];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int at = column + j / 2 * 8 + j % 2;
            if (at >= keys.lo && at < keys.hi) to[at] = a[i / 2][j / 2][i % 2 * 2 + j % 2];
        }
    }
}

/* x = first + rest, of 11 bits each. The first is cut off, since adding to NaN's bits could make a number of it; the
 * rest is rounded by adding half of what tensor cores do not read. */
__device__ __forceinline__ void split(uint32_t x, uint32_t &first, uint32_t &rest) {
    first = x & 0xffffe000;
    rest = __float_as_uint(__uint_as_float(x) - __uint_as_float(first)) + 0x1000;
}

/* Products of a warp's rows and 16 columns. */
template <typename S> __device__ __forceinline__ void multiply(const uint32_t (&rows)[S::M][S::STEPS][4],
                                                               uint32_t columns, float (&a)[S::M][2][4]) {
    float small[S::M][2][4] = {}; /* the products of a rest; those of two are less than what a product rounds */
#pragma unroll
    for (int k = 0; k < S::STEPS; k++) {
        uint32_t b[4];
        kvpg_load_matrix(b, columns + k * 32);
        if constexpr (S::IS_SPLIT) {
            uint32_t b_rest[4];
#pragma unroll
            for (int i = 0; i < 4; i++) split(b[i], b[i], b_rest[i]);
#pragma unroll
            for (int m = 0; m < S::M; m++) {
                uint32_t row[4], rest[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    row[i] = rows[m][k][i];
                    if (S::ROW > 512) asm volatile("" : "+r"(row[i])); /* each time: both parts have no room */
                    split(row[i], row[i], rest[i]);
                }
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    kvpg_multiply<float>(small[m][j], rest, b[2 * j], b[2 * j + 1]);
                    kvpg_multiply<float>(a[m][j], row, b[2 * j], b[2 * j + 1]);
                    kvpg_multiply<float>(small[m][j], row, b_rest[2 * j], b_rest[2 * j + 1]);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2 * S::M; i++)
                kvpg_multiply<typename S::type>(a[i / 2][i % 2], rows[i / 2][k], b[i % 2 * 2], b[i % 2 * 2 + 1]);
        }
    }
    if constexpr (S::IS_SPLIT) {
#pragma unroll
        for (int i = 0; i < 8 * S::M; i++) { /* of an infinite element the rest is none, and its products NaN */
            const float rest = small[i / 8][i / 4 % 2][i % 4];
            if (fabsf(rest) < INFINITY) a[i / 8][i / 4 % 2][i % 4] += rest;
        }
    }
}

/* One tile of columns: 16 from `first` on, and again each `step`. */
template <typename S, int SWEEP, bool MASKED, bool MOST>
__device__ __forceinline__ void sweep_tile(const kvpg_attention &p, const uint32_t (&rows)[S::M][S::STEPS][4],
                                           uint32_t tile, const kvpg_interval *mask, int column, int end,
                                           const float *exponents, int first, int step, const kept_products &kept,
                                           results<SWEEP, S::M> &r) {
    constexpr int M = S::M;
    const int lane = threadIdx.x % 32, of_pair = lane % 4 * 2;
    tile += (lane % 8 + lane / 16 * 8) * S::PITCH + lane / 8 % 2 * 16;
#pragma unroll 1
    for (; first < S::COLUMNS && column + first < end; first += step) {
        float a[M][2][4] = {};
        multiply<S>(rows, tile + first * S::PITCH, a);
        if (SWEEP == KVPG_LSE && kept.keys) keep_products<M>(a, kept, column + first + of_pair);
        reduce<M, MASKED, MOST>(p, a, mask, column + first + of_pair, exponents + first + of_pair, r);
    }
}

template <typename S, bool MOST> __device__ __forceinline__ void
store_results(const kvpg_attention &p, const work_unit<KVPG_LSE> &u, int, int row, results<KVPG_LSE, S::M> &r) {
#pragma unroll
    for (int i = 0; i < 2 * S::M; i++) {
        const kvpg_partial t = kvpg_merge_lanes<4>(r.partial[i]);
        const int at = row + i / 2 * 16 + i % 2 * 8;
        if (threadIdx.x % 4 == 0 && at < u.end) kvpg_store_partial(p, u.table, u.b, u.h, at, u.split, t);
    }
}

template <typename S, bool MOST> __device__ __forceinline__ void
store_results(const kvpg_attention &p, const work_unit<KVPG_SUM> &u, int head, int row, results<KVPG_SUM, S::M> &r) {
    float *sums = kvpg_sums_of(p, u.b, u.h * p.group + u.head + head);
#pragma unroll
    for (int i = 0; i < 2 * S::M; i++) {
        const float sum = kvpg_join_lanes<4, MOST>(r.sum[i]);
        const int at = row + i / 2 * 16 + i % 2 * 8;
        if (threadIdx.x % 4 == 0 && at < u.end) sums[at] = sum;
    }
}

template <typename S>
__device__ __forceinline__ void load_rows(const kvpg_attention &p, const work_unit<KVPG_SUM> &u, uint32_t to) {
    copy_rows<S>(to, S::ROWS, u.end - u.begin, kvpg_row(p.keys, u.b, u.h, u.begin), p.keys.t, p.n_dim);
}

/* Voters need not follow each other. A lane finds the address of a row, and eight copy it. */
template <typename S>
__device__ __forceinline__ void load_rows(const kvpg_attention &p, const work_unit<KVPG_LSE> &u, uint32_t to) {
    constexpr int LANES = 8, ELEMENTS = 16 / sizeof(typename S::type);
    for (int row = threadIdx.x / LANES; row < S::ROWS; row += THREADS / LANES) {
        const char *from = kvpg_query_of_row(p, u.table, u.b, u.h, min(u.begin + row, u.end - 1));
        for (int chunk = threadIdx.x % LANES; chunk < S::ROW / 16; chunk += LANES) {
            const bool in_bounds = u.begin + row < u.end && chunk * ELEMENTS < p.n_dim;
            kvpg_copy_async(to + row * S::PITCH + chunk * 16, in_bounds ? from + chunk * 16 : from, in_bounds ? 16 : 0);
        }
    }
}

/* A tile of columns, and for sums their exponents. */
template <typename S, int SWEEP>
__device__ __forceinline__ void load_columns(const kvpg_attention &p, const work_unit<SWEEP> &u, const tile_sequence &c,
                                             const tile_position &at, uint32_t to, uint32_t exponents) {
    const int n_column = min(S::COLUMNS, (at.s ? c.cover[1].hi : c.cover[0].hi) - at.column),
              n_row = (n_column + 15) / 16 * 16;
    if (SWEEP == KVPG_LSE) {
        copy_rows<S>(to, n_row, n_column, kvpg_row(p.keys, u.b, u.h, at.column), p.keys.t, p.n_dim);
        return;
    }
    const int query_head = u.h * p.group + u.head + at.head;
    copy_rows<S>(to, n_row, n_column, kvpg_row(p.queries, u.b, query_head, at.column - (p.n_token - p.n_query)),
                 p.queries.t, p.n_dim);
    if ((int)threadIdx.x < n_column)
        kvpg_copy_float_async(exponents + threadIdx.x * 4,
                              kvpg_exponent_at(p, u.b, query_head, at.column + threadIdx.x));
}

/* The stage of the ring that tile t of the columns goes to: the rows have the others until they are in registers. */
template <typename S> __device__ __forceinline__ int stage_of(int t) { return (t + S::STAGES - 1) % S::STAGES; }

/* The first warp's partial softmaxes become all warps', merged in order. */
template <int M>
__device__ __forceinline__ void merge_warps(results<KVPG_LSE, M> &r, kvpg_partial (*of_warps)[32][2 * M]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    kvpg_wait<0>();
    __syncthreads(); /* the ring's memory is free */
    for (int i = 0; i < 2 * M; i++) of_warps[warp][lane][i] = r.partial[i];
    __syncthreads();
    for (int w = 1; w < THREADS / 32 && warp == 0; w++)
        for (int i = 0; i < 2 * M; i++) r.partial[i] = kvpg_merge(r.partial[i], of_warps[w][lane][i]);
}

template <typename S, int SWEEP, bool MOST> __global__ void __launch_bounds__(THREADS, S::BLOCKS)
    sweep_mma(const __grid_constant__ kvpg_attention p, int heads_at_once) {
    constexpr int M = S::M, COLUMNS = S::COLUMNS, STAGES = S::STAGES, TILE = S::TILE, ROWS = S::ROWS;
    kvpg_follow();
    extern __shared__ __align__(128) char shared[];
    float *const exponents = (float *)(shared + STAGES * TILE);
    kvpg_interval *const masks = (kvpg_interval *)(exponents + STAGES * COLUMNS); /* [2][ROWS] */
    float **const products = (float **)(masks + 2 * ROWS);
    const uint32_t ring = (uint32_t)__cvta_generic_to_shared(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    work_unit<SWEEP> u;
    if (!find_work_unit<S>(p, heads_at_once, u)) return;
    const bool shares = SWEEP == KVPG_LSE &&
                        u.end - u.begin <= 16 * M; /* so few rows that the warps take the same, and other columns */
    const int first_row = shares ? 0 : warp * 16 * M, first_column = shares ? warp * 16 : 0,
              column_step = shares ? COLUMNS : 16;
    const tile_sequence c = tile_sequence_of<COLUMNS>(p, u);
    const int n_tile = c.n * u.n_head, row = u.begin + first_row + lane / 4;
    tile_position to_load = first_position(c), to_compute = to_load;
    const auto prefetch =
        [&](int t) { /* tile t is on its way */
                     if (t < n_tile) {
                         load_columns<S>(p, u, c, to_load, ring + stage_of<S>(t) * TILE,
                                         (uint32_t)__cvta_generic_to_shared(exponents + t % STAGES * COLUMNS));
                         advance<COLUMNS>(c, to_load);
                     }
                     kvpg_commit();
        };
    load_rows<S>(p, u, ring);
    kvpg_commit();
    if constexpr (!S::ROWS_FILL_RING) prefetch(0);
    const bool is_single = SWEEP == KVPG_LSE && u.table[KVPG_IS_SINGLE];
    for (int i = threadIdx.x; i < (c.n > c.n_first || is_single ? 2 : 1) * ROWS; i += THREADS)
        masks[i] = u.begin + i % ROWS < u.end ? kvpg_interval_of<SWEEP>(p, u.table, i / ROWS, u.begin + i % ROWS)
                                              : kvpg_interval{0, 0};
    if constexpr (SWEEP == KVPG_LSE)
        for (int i = threadIdx.x; is_single && i < u.end - u.begin; i += THREADS)
            products[i] = kvpg_products_of_row(p, u.table, u.b, u.h, u.begin + i);
    const kept_products kept = {is_single ? masks + ROWS + first_row + lane / 4 : NULL,
                                products + first_row + lane / 4};
    kvpg_wait<S::ROWS_FILL_RING ? 0 : 1>();
    __syncthreads();
    uint32_t rows[M][S::STEPS][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int k = 0; k < S::STEPS; k++)
            kvpg_load_matrix(rows[m][k], ring + (first_row + m * 16 + lane % 16) * S::PITCH + k * 32 + lane / 16 * 16);
    __syncthreads();
    for (int t = S::ROWS_FILL_RING ? 0 : 1; t < STAGES - 1; t++) prefetch(t);
    results<SWEEP, M> total;
    total.clear();
#pragma unroll 1
    for (int t = 0; t < n_tile; t++) {
        kvpg_wait<STAGES - 2>();
        __syncthreads();
        prefetch(t + STAGES - 1);
        const tile_position current = to_compute;
        const bool is_last = advance<COLUMNS>(c, to_compute);
        if (u.begin + first_row >= u.end) continue; /* none of this warp's rows exist */
        const kvpg_cover cover = current.s ? c.cover[1] : c.cover[0];
        const uint32_t tile = ring + stage_of<S>(t) * TILE;
        const float *e = exponents + t % STAGES * COLUMNS;
        const kvpg_interval *mask = masks + current.s * ROWS + first_row + lane / 4;
        if (!p.has_masked && current.column >= cover.full_lo &&
            current.column + COLUMNS <= min(cover.full_hi, cover.hi))
            sweep_tile<S, SWEEP, false, MOST>(p, rows, tile, mask, current.column, cover.hi, e, first_column,
                                              column_step, kept, total);
        else
            sweep_tile<S, SWEEP, true, MOST>(p, rows, tile, mask, current.column, cover.hi, e, first_column,
                                             column_step, kept, total);
        if (SWEEP == KVPG_SUM && is_last) {
            store_results<S, MOST>(p, u, current.head, row, total);
            total.clear();
        }
    }
    if constexpr (SWEEP == KVPG_LSE) {
        if (shares) merge_warps(total, (kvpg_partial(*)[32][2 * M]) shared);
        if (!shares || warp == 0) store_results<S, MOST>(p, u, 0, row, total);
    }
    if (SWEEP == KVPG_SUM && c.n == 0)
        for (int head = 0; head < u.n_head; head++) store_results<S, MOST>(p, u, head, row, total);
}

template <typename S, int SWEEP, bool MOST> static kvp_status launch(const kvpg_attention *p, kvp_context *ctx) {
    constexpr int ROWS = S::ROWS;
    const int64_t n_row = SWEEP == KVPG_SUM ? p->n_token : (int64_t)p->max_voter * p->group;
    const int64_t n_tile = kvpg_ceil_div(n_row, ROWS), n_head = (int64_t)p->n_batch * p->n_head;
    const int heads_at_once = n_head * n_tile >= ENOUGH_BLOCKS ? p->group : 1;
    const kvpg_grid grid = {n_tile * (SWEEP == KVPG_SUM ? n_head * (p->group / heads_at_once) : n_head),
                            SWEEP == KVPG_SUM ? 1 : p->max_split};
    return kvpg_launch("attention by tensor cores", ctx, sweep_mma<S, SWEEP, MOST>, grid, THREADS, 1, S::BYTES, *p,
                       heads_at_once);
}

template <typename T, int SWEEP, bool MOST> static kvp_status launch_dim(const kvpg_attention *p, kvp_context *ctx) {
    if (p->n_dim <= 64) return launch<shape<T, 64>, SWEEP, MOST>(p, ctx);
    if (p->n_dim <= 96) return launch<shape<T, 96>, SWEEP, MOST>(p, ctx);
    if (p->n_dim <= 128) return launch<shape<T, 128>, SWEEP, MOST>(p, ctx);
    if ((size_t)p->n_dim * sizeof(T) <= 512) return launch<shape<T, 512 / sizeof(T)>, SWEEP, MOST>(p, ctx);
    return launch<shape<T, 1024 / sizeof(T)>, SWEEP, MOST>(p, ctx);
}

kvp_status kvpg_sweep_mma(int sweep, const kvpg_attention *p, int32_t dtype, kvp_context *ctx) {
    return kvpg_with_type(dtype, ctx, [&](auto t) {
        using T = typename decltype(t)::type;
        return sweep == KVPG_LSE ? launch_dim<T, KVPG_LSE, false>(p, ctx)
               : p->is_most      ? launch_dim<T, KVPG_SUM, true>(p, ctx)
                                 : launch_dim<T, KVPG_SUM, false>(p, ctx);
    });
}

bool kvpg_can_mma(const kvp_score_args *args) {
    return args->keys.shape[3] * (int64_t)kvpi_dtype_size(args->keys.dtype) <= 1024 &&
           kvpg_has_wide_rows(&args->keys) && kvpg_has_wide_rows(&args->queries);
}

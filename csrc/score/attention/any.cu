/* SPDX-License-Identifier: Apache-2.0
 *
 * The sweeps of sweep.cuh for any element type, head dimension and strides, in float32 arithmetic. A block of 256
 * threads holds 64 rows and takes 64 columns at a time, 16 elements of both in shared memory; each thread has 4 by 4
 * products.
 */
#include "sweep.cuh"

enum { THREADS = 256, TILE = 64, DEPTH = 16, SIDE = 4, LANES = TILE / SIDE };

/* 16 elements of 64 rows and of 64 columns; a row of padding keeps banks apart. */
typedef struct panel {
    float row[DEPTH][TILE + 4], column[DEPTH][TILE + 4];
} panel;

template <typename T, typename ADDRESS> __device__ __forceinline__ void
load_panel(float (*to)[TILE + 4], int first_dim, int n_dim, int64_t step, ADDRESS address) {
    for (int i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
        const int which = i / DEPTH, d = i % DEPTH;
        const char *from = address(which);
        to[d][which] = from && first_dim + d < n_dim ? kvpg_float(*(const T *)(from + (first_dim + d) * step)) : 0;
    }
}

/* Products of a thread's rows LANES i + threadIdx.x / LANES and columns LANES j + threadIdx.x % LANES. */
template <typename T, typename ROW, typename COLUMN>
__device__ __forceinline__ void multiply(panel *shared, int n_dim, int64_t row_step, int64_t column_step, ROW row,
                                         COLUMN column, float (&a)[SIDE][SIDE]) {
    for (int d = 0; d < n_dim; d += DEPTH) {
        __syncthreads();
        load_panel<T>(shared->row, d, n_dim, row_step, row);
        load_panel<T>(shared->column, d, n_dim, column_step, column);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            float x[SIDE], y[SIDE];
#pragma unroll
            for (int i = 0; i < SIDE; i++)
                x[i] = shared->row[k][LANES * i + threadIdx.x / LANES],
                y[i] = shared->column[k][LANES * i + threadIdx.x % LANES];
#pragma unroll
            for (int i = 0; i < SIDE * SIDE; i++)
                a[i / SIDE][i % SIDE] = fmaf(x[i / SIDE], y[i % SIDE], a[i / SIDE][i % SIDE]);
        }
    }
}

/* What a block works on: rows begin to end - 1 of a head, a query head (SUM) or a key head (LSE). */
typedef struct work_unit {
    kvpg_numbers table;
    int b, head, begin, end, split;
} work_unit;

/* Rows are the voters of a key head's query heads, columns its keys; a row's result is its partial softmax. */
struct lse_sweep {
    enum { SWEEP = KVPG_LSE, N_INTERVAL = 1 };
    typedef kvpg_partial result;
    static __device__ result none() { return {KVPG_LOWEST, 0}; }
    static __device__ int n_head(const kvpg_attention &p) { return p.n_head; }
    static __device__ int n_row(const kvpg_attention &p, kvpg_numbers table) { return table[KVPG_N_VOTER] * p.group; }
    static __device__ bool is_idle(const work_unit &u) { return u.split >= u.table[KVPG_N_SPLIT]; }
    static __device__ void cut(kvpg_cover &cover, const work_unit &u) { kvpg_cut_split(cover, u.table, u.split); }
    static __device__ const kvpg_rows &rows(const kvpg_attention &p) { return p.queries; }
    static __device__ const kvpg_rows &columns(const kvpg_attention &p) { return p.keys; }
    static __device__ const char *row(const kvpg_attention &p, const work_unit &u, int row) {
        return kvpg_query_of_row(p, u.table, u.b, u.head, row);
    }
    static __device__ const char *column(const kvpg_attention &p, const work_unit &u, int position) {
        return kvpg_row(p.keys, u.b, u.head, position);
    }
    static __device__ float exponent(const kvpg_attention &, const work_unit &, int, int) { return 0; }
    static __device__ bool keeps(const work_unit &u) { return u.table[KVPG_IS_SINGLE]; }
    static __device__ void add(result &to, const float (&x)[SIDE], float top) {
        kvpg_raise_max(to, top);
        for (int j = 0; j < SIDE; j++) to.sum += kvpg_exp2(x[j] - to.max);
    }
    static __device__ result merge_lanes(result x) { return kvpg_merge_lanes<LANES>(x); }
    static __device__ void store(const kvpg_attention &p, const work_unit &u, int row, result x) {
        kvpg_store_partial(p, u.table, u.b, u.head, row, u.split, x);
    }
};

/* Rows are keys, columns the voters of one query head; a row's result is the sum of its column of attention,
 * or the most of it. */
template <bool MOST> struct sum_sweep {
    enum { SWEEP = KVPG_SUM, N_INTERVAL = 2 };
    typedef float result;
    static __device__ result none() { return 0; }
    static __device__ int n_head(const kvpg_attention &p) { return p.n_head * p.group; }
    static __device__ int n_row(const kvpg_attention &p, kvpg_numbers) { return p.n_token; }
    static __device__ bool is_idle(const work_unit &) { return false; }
    static __device__ void cut(kvpg_cover &, const work_unit &) {}
    static __device__ const kvpg_rows &rows(const kvpg_attention &p) { return p.keys; }
    static __device__ const kvpg_rows &columns(const kvpg_attention &p) { return p.queries; }
    static __device__ const char *row(const kvpg_attention &p, const work_unit &u, int row) {
        return kvpg_row(p.keys, u.b, u.head / p.group, row);
    }
    static __device__ const char *column(const kvpg_attention &p, const work_unit &u, int position) {
        return kvpg_row(p.queries, u.b, u.head, position - (p.n_token - p.n_query));
    }
    static __device__ float exponent(const kvpg_attention &p, const work_unit &u, int column, int end) {
        return column < end ? *kvpg_exponent_at(p, u.b, u.head, column) : -INFINITY;
    }
    static __device__ bool keeps(const work_unit &) { return false; }
    static __device__ void add(result &to, const float (&x)[SIDE], float) {
        for (int j = 0; j < SIDE; j++) to = kvpg_join<MOST>(to, kvpg_exp2(x[j]));
    }
    static __device__ result merge_lanes(result x) { return kvpg_join_lanes<LANES, MOST>(x); }
    static __device__ void store(const kvpg_attention &p, const work_unit &u, int row, result x) {
        kvpg_sums_of(p, u.b, u.head)[row] = x;
    }
};

/* Adds to the results of a thread's rows what its columns of the tile from first on give. */
template <typename S> __device__ __forceinline__ void add_tile(const kvpg_attention &p, const work_unit &u, int first,
                                                               int end, const float (&a)[SIDE][SIDE],
                                                               const kvpg_interval (&mask)[SIDE],
                                                               typename S::result (&results)[SIDE]) {
    float exponent[SIDE];
    for (int j = 0; j < SIDE; j++) exponent[j] = S::exponent(p, u, first + LANES * j + threadIdx.x % LANES, end);
    for (int i = 0; i < SIDE; i++) {
        float x[SIDE], top = -INFINITY;
        for (int j = 0; j < SIDE; j++) {
            const int column = first + LANES * j + threadIdx.x % LANES;
            x[j] = column >= mask[i].lo && column < mask[i].hi && !kvpg_is_masked(exponent[j])
                       ? kvpg_logit(p, a[i][j]) + exponent[j]
                       : -INFINITY;
            top = fmaxf(top, x[j]);
        }
        S::add(results[i], x, top);
    }
}

/* What the rows of a single batch row leave of the tile's products. */
__device__ __forceinline__ void keep_products(const kvpg_attention &p, const work_unit &u, int first,
                                              const float (&a)[SIDE][SIDE], const kvpg_interval (&kept)[SIDE]) {
    for (int i = 0; i < SIDE; i++) {
        if (kept[i].lo >= kept[i].hi) continue;
        float *const to = kvpg_products_of_row(p, u.table, u.b, u.head, u.begin + LANES * i + threadIdx.x / LANES);
        for (int j = 0; j < SIDE; j++) {
            const int column = first + LANES * j + threadIdx.x % LANES;
            if (column >= kept[i].lo && column < kept[i].hi) to[column] = a[i][j];
        }
    }
}

/* Blocks are (tile of rows, b, head; split). */
template <typename T, typename S> __global__ void __launch_bounds__(THREADS, 2)
    sweep_any(const __grid_constant__ kvpg_attention p) {
    kvpg_follow();
    __shared__ panel shared;
    const int n_head = S::n_head(p), n_unit = p.n_batch * n_head, b = blockIdx.x % n_unit / n_head;
    work_unit u = {kvpg_table_row(p.table, b),      b, (int)blockIdx.x % n_head,
                   (int)blockIdx.x / n_unit * TILE, 0, (int)blockIdx.y};
    u.end = min(u.begin + TILE, S::n_row(p, u.table));
    if (kvpg_skips<S::SWEEP>(u.table) || u.begin >= u.end || S::is_idle(u)) return;
    typename S::result results[SIDE];
    for (int i = 0; i < SIDE; i++) results[i] = S::none();
    for (int s = 0; s < S::N_INTERVAL; s++) {
        kvpg_cover cover = kvpg_cover_of<S::SWEEP>(p, u.table, s, u.begin, u.end);
        S::cut(cover, u);
        kvpg_interval mask[SIDE], kept[SIDE];
        for (int i = 0; i < SIDE; i++) {
            const int row = u.begin + LANES * i + threadIdx.x / LANES;
            mask[i] = row < u.end ? kvpg_interval_of<S::SWEEP>(p, u.table, s, row) : kvpg_interval{0, 0};
            kept[i] = row < u.end && S::keeps(u) ? kvpg_interval_of<S::SWEEP>(p, u.table, 1, row) : kvpg_interval{0, 0};
        }
        for (int first = cover.lo; first < cover.hi; first += TILE) {
            float a[SIDE][SIDE] = {};
            multiply<T>(
                &shared, p.n_dim, S::rows(p).d, S::columns(p).d,
                [&](int i) { return u.begin + i < u.end ? S::row(p, u, u.begin + i) : NULL; },
                [&](int i) { return first + i < cover.hi ? S::column(p, u, first + i) : NULL; }, a);
            if (S::keeps(u)) keep_products(p, u, first, a, kept);
            add_tile<S>(p, u, first, cover.hi, a, mask, results);
        }
    }
    for (int i = 0; i < SIDE; i++) {
        const int row = u.begin + LANES * i + threadIdx.x / LANES;
        const typename S::result merged = S::merge_lanes(results[i]);
        if (threadIdx.x % LANES == 0 && row < u.end) S::store(p, u, row, merged);
    }
}

template <typename T> static kvp_status launch(int sweep, const kvpg_attention *p, kvp_context *ctx) {
    const int64_t n_unit = (int64_t)p->n_batch * p->n_head;
    const kvpg_grid keys = {n_unit * p->group * kvpg_ceil_div(p->n_token, TILE), 1};
    const kvpg_grid voters = {n_unit * kvpg_ceil_div((int64_t)p->max_voter * p->group, TILE), p->max_split};
    void (*kernel)(kvpg_attention) = sweep == KVPG_LSE ? sweep_any<T, lse_sweep>
                                     : p->is_most      ? sweep_any<T, sum_sweep<true>>
                                                       : sweep_any<T, sum_sweep<false>>;
    return kvpg_launch("attention in float32", ctx, kernel, sweep == KVPG_SUM ? keys : voters, THREADS, 1, 0, *p);
}

kvp_status kvpg_sweep_any(int sweep, const kvpg_attention *p, int32_t dtype, kvp_context *ctx) {
    return kvpg_with_type(dtype, ctx, [&](auto t) { return launch<typename decltype(t)::type>(sweep, p, ctx); });
}

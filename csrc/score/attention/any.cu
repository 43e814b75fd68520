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

/* LSE: block (tile of rows, b, key head; split). SUM: block (tile of keys, b, query head). */
template <typename T, int SWEEP> __global__ void __launch_bounds__(THREADS, 2)
    sweep_any(const __grid_constant__ kvpg_attention p) {
    kvpg_follow();
    __shared__ panel shared;
    const int n_head = SWEEP == KVPG_SUM ? p.n_head * p.group : p.n_head, n_unit = p.n_batch * n_head;
    const int tile = blockIdx.x / n_unit, b = blockIdx.x % n_unit / n_head, head = blockIdx.x % n_head;
    const int h = SWEEP == KVPG_SUM ? head / p.group : head, first_query = p.n_token - p.n_query;
    const kvpg_numbers table = kvpg_table_row(p.table, b);
    const int n_row = SWEEP == KVPG_SUM ? p.n_token : table[KVPG_N_VOTER] * p.group, begin = tile * TILE,
              end = min(begin + TILE, n_row);
    if (table[KVPG_ON_SM90] || begin >= n_row || (SWEEP == KVPG_LSE && (int)blockIdx.y >= table[KVPG_N_SPLIT])) return;
    kvpg_partial partial[SIDE];
    float sum[SIDE] = {};
    for (int i = 0; i < SIDE; i++) partial[i] = {KVPG_LOWEST, 0};
    for (int s = 0; s < (SWEEP == KVPG_SUM ? 2 : 1); s++) {
        kvpg_cover cover = kvpg_cover_of<SWEEP>(p, table, s, begin, end);
        if (SWEEP == KVPG_LSE) kvpg_cut_split(cover, table, blockIdx.y);
        kvpg_interval mask[SIDE];
        for (int i = 0; i < SIDE; i++) {
            const int row = begin + LANES * i + threadIdx.x / LANES;
            mask[i] = row < end ? kvpg_interval_of<SWEEP>(p, table, s, row) : kvpg_interval{0, 0};
        }
        for (int first = cover.lo; first < cover.hi; first += TILE) {
            float a[SIDE][SIDE] = {};
            multiply<T>(
                &shared, p.n_dim, SWEEP == KVPG_SUM ? p.keys.d : p.queries.d,
                SWEEP == KVPG_SUM ? p.queries.d : p.keys.d,
                [&](int i) -> const char * {
                    if (begin + i >= end) return NULL;
                    return SWEEP == KVPG_SUM ? kvpg_row(p.keys, b, h, begin + i)
                                             : kvpg_query_of_row(p, table, b, h, begin + i);
                },
                [&](int i) -> const char * {
                    if (first + i >= cover.hi) return NULL;
                    return SWEEP == KVPG_SUM ? kvpg_row(p.queries, b, head, first + i - first_query)
                                             : kvpg_row(p.keys, b, h, first + i);
                },
                a);
            float exponent[SIDE] = {};
            for (int j = 0; j < SIDE && SWEEP == KVPG_SUM; j++) {
                const int column = first + LANES * j + threadIdx.x % LANES;
                exponent[j] = column < cover.hi ? *kvpg_exponent_at(p, b, head, column) : -INFINITY;
            }
            for (int i = 0; i < SIDE; i++) {
                float x[SIDE], top = -INFINITY;
                for (int j = 0; j < SIDE; j++) {
                    const int column = first + LANES * j + threadIdx.x % LANES;
                    x[j] = column >= mask[i].lo && column < mask[i].hi && !kvpg_is_masked(exponent[j])
                               ? kvpg_logit(p, a[i][j]) + exponent[j]
                               : -INFINITY;
                    top = fmaxf(top, x[j]);
                }
                if (SWEEP == KVPG_LSE) kvpg_raise_max(partial[i], top);
                for (int j = 0; j < SIDE; j++)
                    (SWEEP == KVPG_LSE ? partial[i].sum : sum[i]) +=
                        kvpg_exp2(SWEEP == KVPG_LSE ? x[j] - partial[i].max : x[j]);
            }
        }
    }
    for (int i = 0; i < SIDE; i++) {
        const int row = begin + LANES * i + threadIdx.x / LANES;
        const kvpg_partial t = kvpg_merge_lanes<LANES>(partial[i]);
        const float total = kvpg_sum_lanes<LANES>(sum[i]);
        if (threadIdx.x % LANES || row >= end) continue;
        if (SWEEP == KVPG_LSE)
            kvpg_store_partial(p, table, b, h, row, blockIdx.y, t);
        else
            kvpg_sums_of(p, b, head)[row] = total;
    }
}

template <typename T> static kvp_status launch(int sweep, const kvpg_attention *p, kvp_context *ctx) {
    const int64_t n_unit = (int64_t)p->n_batch * p->n_head;
    const kvpg_grid keys = {n_unit * p->group * kvpg_ceil_div(p->n_token, TILE), 1};
    const kvpg_grid voters = {n_unit * kvpg_ceil_div((int64_t)p->max_voter * p->group, TILE), p->max_split};
    void (*kernel)(kvpg_attention) = sweep == KVPG_SUM ? sweep_any<T, KVPG_SUM> : sweep_any<T, KVPG_LSE>;
    return kvpg_launch("attention in float32", ctx, kernel, sweep == KVPG_SUM ? keys : voters, THREADS, 1, 0, *p);
}

kvp_status kvpg_sweep_any(int sweep, const kvpg_attention *p, int32_t dtype, kvp_context *ctx) {
    return kvpg_with_type(dtype, ctx, [&](auto t) { return launch<typename decltype(t)::type>(sweep, p, ctx); });
}

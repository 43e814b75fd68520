/* SPDX-License-Identifier: Apache-2.0
 *
 * What the three steps of the verb expect share: moments.cu makes a forecast of the queries of each head, logits.cu
 * asks it of keys, scores.cu makes one number a key of that.
 *
 * Tensor cores multiply bfloat16, so that float32 numbers come to them as sums of such parts: of 8 bits the first, of
 * 16 the first two, of 24, all that there are, three. Sums are float32.
 */
#ifndef KVP_EXPECTED_CUH
#define KVP_EXPECTED_CUH

#include "../../gpu/tables.cuh"

/* A block has a warp for each 16 channels, and so threads for 16 rows of a tile at once; of more channels than 128
 * those of a part, since neither registers nor shared memory would hold more. */
template <int DIM> struct kvpg_expected {
    static constexpr int WARPS = DIM > 128 ? 8 : DIM / 16, THREADS = 32 * WARPS;
    static constexpr int BLOCKS = DIM / (16 * WARPS); /* that have all channels together */
    static constexpr int TILE = DIM > 128 ? 32 : 64;  /* tokens of a step */
    static constexpr int LANES = DIM / 8;             /* threads of a row */
    static constexpr int ROWS = THREADS / LANES;
    static constexpr int PITCH = DIM + 8; /* elements from row to row in shared memory: ldmatrix meets no bank twice */
};

/* The tokens of a batch row that are judged: all but those of its first segment. */
typedef struct kvpg_judged {
    int begin, end;
} kvpg_judged;

__device__ __forceinline__ kvpg_judged kvpg_judged_of(const kvpg_table &edges, int b) {
    const kvpg_numbers row = kvpg_table_row(edges, b);
    return {row[1], row[edges.stride - 1]};
}

/* How many segments they are, and the edges of these. */
__device__ __forceinline__ int kvpg_n_judged(const kvpg_table &edges) { return edges.stride - 2; }
__device__ __forceinline__ kvpg_numbers kvpg_judged_edges(const kvpg_table &edges, int b) {
    return kvpg_table_row(edges, b) + 1;
}

/* Of each unit, a query head of a batch row; the mean and half the covariance of the queries to come, scaled. */
typedef struct kvpg_forecast {
    float *mean;   /* (unit, D) */
    float *spread; /* (unit, D, D); NULL: none is asked for. Not symmetric, which k.Sk does not see */
} kvpg_forecast;

/* Each step's scratch is a part of the workspace, of as many bytes; the forecast then stands in its own. */
size_t kvpg_forecast_bytes(const kvp_expect_args *args);
kvp_status kvpg_make_forecast(const kvp_expect_args *args, const kvpg_table *edges, void *workspace,
                              kvpg_forecast *made, kvp_context *ctx);
kvp_status kvpg_ask_forecast(const kvp_expect_args *args, const kvpg_table *edges, const kvpg_forecast *made,
                             kvp_context *ctx);
size_t kvpg_expected_scores_bytes(const kvp_expect_args *args);
kvp_status kvpg_make_expected_scores(const kvp_expect_args *args, const kvpg_table *edges, void *workspace,
                                     kvp_context *ctx);

/* f(kvpg_dim<D>()), for each D that there are kernels for. */
template <int DIM> struct kvpg_dim {
    static constexpr int value = DIM;
};
template <typename F> static inline kvp_status kvpg_with_dim(int64_t n_dim, kvp_context *ctx, F f) {
    switch (n_dim) {
    case 64: return f(kvpg_dim<64>());
    case 96: return f(kvpg_dim<96>());
    case 128: return f(kvpg_dim<128>());
    case 256: return f(kvpg_dim<256>());
    }
    return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED, "keys.shape[3] is %lld; on a CUDA device expected 64, 96, 128 or 256",
                     (long long)n_dim);
}

/* Four neighbours from element `at` of a row on; wide: they lie side by side, on a boundary of their size. */
template <typename T>
__device__ __forceinline__ void load_four(const char *row, int64_t step, bool wide, int at, float *x) {
    struct alignas(4 * sizeof(T)) four {
        T x[4];
    };
    if (wide) {
        const four v = *(const four *)(row + at * sizeof(T));
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = kvpg_float(v.x[e]);
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++) x[e] = kvpg_float(*(const T *)(row + (at + e) * step));
    }
}

/* The nearest bfloat16 of two numbers, side by side, and what is left of them. */
__device__ __forceinline__ uint32_t take_part(float &x, float &y) {
    const __nv_bfloat162 part = __floats2bfloat162_rn(x, y);
    x -= __low2float(part);
    y -= __high2float(part);
    return *(const uint32_t *)&part;
}

#endif

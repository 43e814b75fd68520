/* SPDX-License-Identifier: Apache-2.0
 *
 * Scores that follow from a token's place, and of a row's keys from a few: for position.cu and random.cu,
 * which write them, and for a press (evict/press.cu), which makes them where it reads those of other scorers.
 */
#ifndef KVP_MADE_CUH
#define KVP_MADE_CUH

#include "../gpu/rows.cuh"
#include "draws.h"

/* How to score a batch row's tokens. */
typedef struct kvpg_made {
    int32_t is_random, n_sink, n_token, n_dim, dtype;
    uint64_t seed;
    kvpg_rows keys;
} kvpg_made;

static inline bool kvpg_is_made(int32_t scorer) {
    return scorer == KVPI_SCORER_position || scorer == KVPI_SCORER_random;
}

static inline kvpg_made kvpg_make_scores(const kvp_score_args *args) {
    kvpg_made m = {};
    m.is_random = args->scorer == KVPI_SCORER_random;
    m.n_sink = m.is_random ? 0 : (int32_t)args->param[KVPI_PARAM_position_n_sink];
    m.seed = m.is_random ? kvpi_seed(args->param) : 0;
    m.n_token = (int32_t)args->keys.shape[2];
    m.n_dim = (int32_t)args->keys.shape[3];
    m.dtype = args->keys.dtype;
    m.keys = kvpg_rows_of(&args->keys);
    return m;
}

/* A number of any element type. */
__device__ __forceinline__ float kvpg_read(const char *from, int dtype) {
#define KVPG_CASE(constant, type, ...) \
    case constant: return kvpg_float(*(const type *)from);
    switch (dtype) { KVPG_TYPES(KVPG_CASE) }
#undef KVPG_CASE
    return 0;
}

/* What the draws of a head begin with, whose valid tokens are [begin, end); by all threads of a block. */
template <int N_THREAD>
__device__ __forceinline__ uint64_t kvpg_start_scores(const kvpg_made &m, int b, int h, int begin, int end) {
    __shared__ uint64_t of_warps[N_THREAD / 32];
    uint64_t salts = 0, sum = 0;
    if (!m.is_random) return 0;
    if (begin < end)
        for (int d = threadIdx.x; d < KVPI_TOLD_BY * m.n_dim; d += N_THREAD) {
            const char *key = kvpg_row(m.keys, b, h, kvpi_told_by(d / m.n_dim, begin, end));
            salts += kvpi_salt(kvpg_read(key + d % m.n_dim * m.keys.d, m.dtype), d);
        }
    for (int o = 16; o > 0; o /= 2) salts += __shfl_xor_sync(~0u, salts, o);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = salts;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < N_THREAD / 32; w++) sum += of_warps[w];
    return kvpi_draw_head(sum, h, m.seed, end - begin);
}

/* The score of a valid token. */
__device__ __forceinline__ float kvpg_make_score(const kvpg_made &m, uint64_t head, int begin, int t) {
    if (m.is_random) return kvpi_draw(head, t - begin);
    return (float)(t - begin < m.n_sink ? 2 * m.n_token - t : t);
}

#endif

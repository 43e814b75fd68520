/* SPDX-License-Identifier: Apache-2.0
 *
 * What the CUDA files of the attention scorer share. Two sweeps give the column sums of
 * csrc/score/attention/attention.c, both of this form: a tile of rows stays put, columns stream past, and each row
 * reduces over the columns it takes.
 *
 *     LSE    rows are voters (queries), columns the keys each can see:  lse[q] = log sum exp s[q,k]
 *     SUM    rows are keys, columns the queries that vote on each:      sum[k] = sum exp(s[q,k] - lse[q])
 *
 * A row takes one or two intervals of columns. Four engines sweep: any shape in float32 arithmetic (any.cu), tensor
 * cores (mma.cu), Hopper's tensor cores (sm90.cu; window.cu where voters are few). Which one works on a batch row, and
 * how its work is cut, depends on that row's own shape and votes: so its bits are the same wherever it stands.
 *
 * Where no key has two voters and no voter two votes (TOVA), a sum has one term: the LSE sweep leaves its product in
 * the place of the sum, and there is no SUM sweep. Such a batch row is KVPG_IS_SINGLE.
 */
#ifndef KVP_ATTENTION_CUH
#define KVP_ATTENTION_CUH

#include "../../gpu/tables.cuh"
#include "band.h"

extern "C" {
#include "../score.h"
}

enum { KVPG_LSE, KVPG_SUM };

enum {
    KVPG_ROW_TILE = 128,     /* rows that a split of keys is planned for */
    KVPG_SPLIT = 128,        /* keys of a split, at least */
    KVPG_ENOUGH_TILES = 66,  /* tiles of one key head from which on the keys are not split */
    KVPG_MANY_VOTERS = 1024, /* from which on Hopper's engine pays */
    KVPG_WINDOW_ROWS = 256,  /* voters times query heads of a group up to which Hopper's engine for windows works */
    KVPG_WINDOW_SUMS = 2,    /* sums of a key that it leaves, for all of a group together */
    KVPG_MAX_VOTES = 4096,   /* their voters' ranges, 128 kB, are on the host's stack while a row is planned */
};

/* Which engine sweeps for a batch row. */
enum { KVPG_ON_OTHERS, KVPG_ON_SM90, KVPG_ON_WINDOW, KVPG_N_ENGINE };

/* Fields of a row of the table; the ranges of voters follow, then the votes. */
enum {
    KVPG_VALID_BEGIN,
    KVPG_VALID_END,
    KVPG_N_VOTER,
    KVPG_N_SPLIT,
    KVPG_SPLIT_SIZE,
    KVPG_ENGINE,
    KVPG_IS_SINGLE,
    KVPG_RANGES
};
/* Of a vote: LO and HI are the intervals of voters, disjoint and ascending. */
enum {
    KVPG_KEY_BEGIN,
    KVPG_KEY_END,
    KVPG_LO,
    KVPG_HI = KVPG_LO + 2,
    KVPG_WEIGHT = KVPG_HI + 2,
    KVPG_AGE_END,
    KVPG_N_OWN_VOTER,
    KVPG_WINDOW_BEGIN,
    KVPG_WINDOW_END,
    KVPG_VOTE_SIZE
};

typedef struct kvpg_attention {
    kvpg_rows keys, queries, scores;
    float *exponents; /* (B,Hq,Q): minus the log2 of each query row's denominator; -infinity = no vote, NaN = it has
                         none */
    float2 *splits;   /* (B,Hq,split_room): of a voter, the partial softmax of each split */
    float *sums; /* (B,Hq,T); of a single row the products q.k of each key and its voter; of a row that the engine for
                    windows swept, KVPG_WINDOW_SUMS numbers in the places of a group, which add up to its sum */
    int64_t split_room;
    int n_batch, n_head, group, n_token, n_query, n_dim, n_vote, n_range;
    int max_voter, max_split,
        max_hull;     /* the most of any batch row; hull: positions from the first voter to the last */
    float scale, cap; /* logits are scale * q.k, in powers of 2; with cap > 0, cap * tanh(scale * q.k) */
    int kernel_size, share_heads;
    int is_most;      /* what counts is the most of a column and of heads, in the places of their sums */
    int finish_joins; /* the splits of single rows */
    int has_masked;   /* some exponents may be minus infinity: then every column is looked at */
    kvpg_table table;
} kvpg_attention;

typedef struct kvpg_interval {
    int lo, hi;
} kvpg_interval;

__device__ __forceinline__ kvpg_numbers kvpg_vote(const kvpg_attention &p, kvpg_numbers table, int v) {
    return table + KVPG_RANGES + 2 * p.n_range + v * KVPG_VOTE_SIZE;
}

/* The position of a voter. */
__device__ __forceinline__ int kvpg_voter_at(kvpg_numbers table, int i) {
    int r = KVPG_RANGES;
    for (; i >= table[r + 1] - table[r]; r += 2) i -= table[r + 1] - table[r];
    return table[r] + i;
}

/* Of a single row: the voter of a vote, -1 if it has none. */
__device__ __forceinline__ int kvpg_voter_of_vote(kvpg_numbers vote) {
    for (int s = 0; s < 2; s++) {
        const int voter = max(vote[KVPG_LO + s], vote[KVPG_KEY_BEGIN]);
        if (voter < vote[KVPG_HI + s]) return voter;
    }
    return -1;
}

/* Of a single row: the keys that a voter votes on. */
__device__ __forceinline__ kvpg_interval kvpg_keys_of_voter(const kvpg_attention &p, kvpg_numbers table, int voter) {
    for (int v = 0; v < p.n_vote; v++) {
        const kvpg_numbers vote = kvpg_vote(p, table, v);
        if (vote[KVPG_KEY_BEGIN] < vote[KVPG_KEY_END] && kvpg_voter_of_vote(vote) == voter)
            return {vote[KVPG_KEY_BEGIN], min(vote[KVPG_KEY_END], voter + 1)};
    }
    return {0, 0};
}

/* A row of the LSE sweep is a voter of one query head of the group: head-major, so that a tile may hold several heads'
 * rows. */
__device__ __forceinline__ int kvpg_voter_of_row(kvpg_numbers table, int row) {
    return kvpg_voter_at(table, row % table[KVPG_N_VOTER]);
}

__device__ __forceinline__ kvpg_cover kvpg_cover_of_keys(const kvpg_attention &p, kvpg_numbers table, int s, int begin,
                                                         int end) {
    kvpg_cover c = {INT32_MAX, 0, 0, INT32_MAX};
    int covered = 0;
    end = min(end, p.n_token);
    for (int v = 0; v < p.n_vote; v++) {
        const kvpg_numbers vote = kvpg_vote(p, table, v);
        const int key_begin = max(vote[KVPG_KEY_BEGIN], begin), key_end = min(vote[KVPG_KEY_END], end);
        if (key_begin >= key_end) continue;
        covered += key_end - key_begin;
        const int lo = max(vote[KVPG_LO + s], key_begin), hi = vote[KVPG_HI + s];
        if (lo < hi) c.lo = min(c.lo, lo), c.hi = max(c.hi, hi);
        c.full_lo = max(c.full_lo, max(vote[KVPG_LO + s], key_end - 1));
        c.full_hi = min(c.full_hi, hi);
    }
    if (covered < end - begin) c.full_hi = 0;
    return c.lo < c.hi ? c : kvpg_cover{0, 0, 0, 0};
}

__device__ __forceinline__ kvpg_interval kvpg_interval_of_key(const kvpg_attention &p, kvpg_numbers table, int s,
                                                              int key) {
    for (int v = 0; v < p.n_vote; v++) {
        const kvpg_numbers vote = kvpg_vote(p, table, v);
        if (key >= vote[KVPG_KEY_BEGIN] && key < vote[KVPG_KEY_END])
            return {max(vote[KVPG_LO + s], key), vote[KVPG_HI + s]};
    }
    return {0, 0};
}

/* Of the rows [begin, end) of a key head, not beyond the last. */
__device__ __forceinline__ kvpg_cover kvpg_cover_of_voters(kvpg_numbers table, int begin, int end) {
    const int n = table[KVPG_N_VOTER];
    const bool one_head = begin / n == (end - 1) / n;
    const int first = one_head ? kvpg_voter_at(table, begin % n) : kvpg_voter_at(table, 0);
    const int last = one_head ? kvpg_voter_at(table, (end - 1) % n) : kvpg_voter_at(table, n - 1);
    return {table[KVPG_VALID_BEGIN], last + 1, table[KVPG_VALID_BEGIN], first + 1};
}

/* The columns of one split, cut out of a cover. */
__device__ __forceinline__ void kvpg_cut_split(kvpg_cover &c, kvpg_numbers table, int split) {
    if (table[KVPG_N_SPLIT] == 1) return;
    c.lo = max(c.lo, table[KVPG_VALID_BEGIN] + split * table[KVPG_SPLIT_SIZE]);
    c.hi = min(c.hi, table[KVPG_VALID_BEGIN] + (split + 1) * table[KVPG_SPLIT_SIZE]);
}

/* Minus infinity is the exponent of a query that casts no vote, whatever its logit is: NaN and infinity, too. */
__device__ __forceinline__ bool kvpg_is_masked(float exponent) { return exponent == -INFINITY; }

/* The logit of a row and a column, in powers of 2; see kvpg_attention. */
__device__ __forceinline__ float kvpg_logit(const kvpg_attention &p, float product) {
    return p.cap > 0 ? p.cap * tanhf(product * p.scale) : product * p.scale;
}

/* The softmax of a row so far: its greatest exponent, and the sum of powers relative to it. Starts far below any logit
 * instead of at -infinity, whose difference to itself would be NaN. */
typedef struct kvpg_partial {
    float max, sum;
} kvpg_partial;

#define KVPG_LOWEST (-1e30f)

__device__ __forceinline__ void kvpg_raise_max(kvpg_partial &t, float top) {
    if (top > t.max) {
        t.sum *= kvpg_exp2(t.max - top);
        t.max = top;
    }
}

__device__ __forceinline__ kvpg_partial kvpg_merge(kvpg_partial x, kvpg_partial y) {
    kvpg_raise_max(x, y.max);
    x.sum += y.sum * kvpg_exp2(y.max - x.max);
    return x;
}

/* Over the lanes whose numbers differ in the bits below n. */
template <int N> __device__ __forceinline__ kvpg_partial kvpg_merge_lanes(kvpg_partial t) {
#pragma unroll
    for (int o = 1; o < N; o *= 2)
        t = kvpg_merge(t, kvpg_partial{__shfl_xor_sync(~0u, t.max, o), __shfl_xor_sync(~0u, t.sum, o)});
    return t;
}

/* Two parts of a column's sum, or of what is most in it. */
template <bool MOST> __device__ __forceinline__ float kvpg_join(float x, float y) {
    return MOST ? kvpg_max(x, y) : x + y;
}

template <int N, bool MOST> __device__ __forceinline__ float kvpg_join_lanes(float x) {
#pragma unroll
    for (int o = 1; o < N; o *= 2) x = kvpg_join<MOST>(x, __shfl_xor_sync(~0u, x, o));
    return x;
}

template <int N> __device__ __forceinline__ float kvpg_sum_lanes(float x) { return kvpg_join_lanes<N, false>(x); }

/* A row whose logits have no softmax makes the keys that it votes on NaN. (Minus infinity would be: casts no vote.) */
__device__ __forceinline__ float kvpg_exponent(kvpg_partial t) {
    const float exponent = -(t.max + log2f(t.sum));
    return fabsf(exponent) < INFINITY ? exponent : NAN;
}

__device__ __forceinline__ float *kvpg_exponent_at(const kvpg_attention &p, int b, int query_head, int position) {
    return p.exponents + ((int64_t)b * p.n_head * p.group + query_head) * p.n_query +
           (position - (p.n_token - p.n_query));
}

__device__ __forceinline__ float2 *kvpg_splits_of(const kvpg_attention &p, int b, int query_head) {
    return p.splits + ((int64_t)b * p.n_head * p.group + query_head) * p.split_room;
}

/* A row's partial softmax, where it belongs: finished, or among the splits. */
__device__ __forceinline__ void kvpg_store_partial(const kvpg_attention &p, kvpg_numbers table, int b, int h, int row,
                                                   int split, kvpg_partial t) {
    const int n_voter = table[KVPG_N_VOTER], query_head = h * p.group + row / n_voter, i = row % n_voter;
    if (table[KVPG_N_SPLIT] == 1)
        *kvpg_exponent_at(p, b, query_head, kvpg_voter_at(table, i)) = kvpg_exponent(t);
    else
        kvpg_splits_of(p, b, query_head)[(int64_t)i * table[KVPG_N_SPLIT] + split] = make_float2(t.max, t.sum);
}

/* The exponent of voter i, of its splits; by LANES lanes, in an order that depends on the number of splits only. */
template <int LANES> __device__ __forceinline__ float kvpg_join_splits(const kvpg_attention &p, kvpg_numbers table,
                                                                       int b, int query_head, int i) {
    const int n_split = table[KVPG_N_SPLIT];
    const float2 *split = kvpg_splits_of(p, b, query_head) + (int64_t)i * n_split;
    kvpg_partial t = {KVPG_LOWEST, 0};
#pragma unroll 8
    for (int s = threadIdx.x % LANES; s < n_split; s += LANES) t = kvpg_merge(t, kvpg_partial{split[s].x, split[s].y});
    return kvpg_exponent(kvpg_merge_lanes<LANES>(t));
}

/* The query of a row of the LSE sweep. */
__device__ __forceinline__ const char *kvpg_query_of_row(const kvpg_attention &p, kvpg_numbers table, int b, int h,
                                                         int row) {
    const int n_voter = table[KVPG_N_VOTER];
    return kvpg_row(p.queries, b, h * p.group + row / n_voter,
                    kvpg_voter_at(table, row % n_voter) - (p.n_token - p.n_query));
}

/* The interval s of columns that a row takes; of a voter of a single row, 1 is what it votes on. */
template <int SWEEP>
__device__ __forceinline__ kvpg_interval kvpg_interval_of(const kvpg_attention &p, kvpg_numbers table, int s, int row) {
    if (SWEEP == KVPG_SUM) return kvpg_interval_of_key(p, table, s, row);
    if (s == 1) return kvpg_keys_of_voter(p, table, kvpg_voter_of_row(table, row));
    return {table[KVPG_VALID_BEGIN], kvpg_voter_of_row(table, row) + 1};
}

template <int SWEEP> __device__ __forceinline__ kvpg_cover kvpg_cover_of(const kvpg_attention &p, kvpg_numbers table,
                                                                         int s, int begin, int end) {
    if (SWEEP == KVPG_SUM) return kvpg_cover_of_keys(p, table, s, begin, end);
    return s == 0 ? kvpg_cover_of_voters(table, begin, end) : kvpg_cover{0, 0, 0, 0};
}

__device__ __forceinline__ float *kvpg_sums_of(const kvpg_attention &p, int b, int query_head) {
    return p.sums + ((int64_t)b * p.n_head * p.group + query_head) * p.n_token;
}

/* Where the products of a voter's row go in a single row. */
__device__ __forceinline__ float *kvpg_products_of_row(const kvpg_attention &p, kvpg_numbers table, int b, int h,
                                                       int row) {
    return kvpg_sums_of(p, b, h * p.group + row / table[KVPG_N_VOTER]);
}

/* Whether the engines that work on any GPU have nothing to do for a batch row in a sweep. */
template <int SWEEP> __device__ __forceinline__ bool kvpg_skips(kvpg_numbers table) {
    return table[KVPG_ENGINE] != KVPG_ON_OTHERS || (SWEEP == KVPG_SUM && table[KVPG_IS_SINGLE]);
}

/* any.cu and mma.cu, sm90.cu, window.cu: one sweep over the batch rows of their KVPG_ENGINE. Grids hold the most that
 * any batch row needs. */
kvp_status kvpg_sweep_any(int sweep, const kvpg_attention *p, int32_t dtype, kvp_context *ctx);
kvp_status kvpg_sweep_mma(int sweep, const kvpg_attention *p, int32_t dtype, kvp_context *ctx);
kvp_status kvpg_sweep_sm90(int sweep, const kvpg_attention *p, const kvp_score_args *args, kvp_context *ctx);
kvp_status kvpg_sweep_window(int sweep, const kvpg_attention *p, const kvp_score_args *args, kvp_context *ctx);
bool kvpg_can_mma(const kvp_score_args *args);
bool kvpg_can_sm90(const kvp_score_args *args); /* on a Hopper GPU; also of window.cu */

#endif

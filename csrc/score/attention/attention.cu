/* SPDX-License-Identifier: Apache-2.0
 *
 * Column sums of the attention matrix on the GPU, for the votes of kvp.h; see attention.c for what is computed and
 * sweep.cuh for how. At most four launches: the voters' denominators (LSE sweep, and the joining of its splits), unless
 * the caller has them; the sums, or what is most; and weights, pooling and means over heads. Two where no key has two
 * voters: the LSE sweep, and all else. Memory is O(T).
 */
#include "sweep.cuh"

#include <string.h>

enum {
    THREADS = 256,
    WINDOW_LEAST = 64, /* rows of queries of a key head from which on the engine for windows pays */
};

/* The positions [begin, end) of a batch row's voters. */
typedef struct range {
    int64_t begin, end;
} range;

static range vote_range(const kvp_score_args *args, int64_t b, int64_t v, int field) {
    int64_t r[2];
    kvpi_vote_range(args, b, v, field, r);
    return {r[0], r[1]};
}

/* Adds r to n ascending, disjoint ranges; returns how many they are then. */
static int add_range(range *ranges, int n, range r) {
    int kept = 0;
    if (r.begin >= r.end) return n;
    if (n == 0 || r.begin > ranges[n - 1].end) { /* as they come where votes are in order */
        ranges[n] = r;
        return n + 1;
    }
    for (int i = 0; i < n; i++) {
        const range o = ranges[i];
        if (o.end < r.begin || o.begin > r.end) {
            ranges[kept++] = o;
        } else {
            r.begin = o.begin < r.begin ? o.begin : r.begin;
            r.end = o.end > r.end ? o.end : r.end;
        }
    }
    int at = kept;
    for (; at > 0 && ranges[at - 1].begin > r.begin; at--) ranges[at] = ranges[at - 1];
    ranges[at] = r;
    return kept + 1;
}

static int64_t count(const range *ranges, int n) {
    int64_t sum = 0;
    for (int i = 0; i < n; i++) sum += ranges[i].end - ranges[i].begin;
    return sum;
}

static range valid_of(const kvp_score_args *args, int64_t b) {
    range r;
    kvpi_valid_range(&args->valid, b, args->keys.shape[2], &r.begin, &r.end);
    return r;
}

/* What is decided for a batch row, from its own votes only. */
typedef struct row_plan {
    range valid, voters[2 * KVPG_MAX_VOTES];
    int n_range;
    int64_t n_voter, hull, n_split, split_size;
    int engine;
    bool is_single;
} row_plan;

static int engine_of(const row_plan *plan, int64_t group) {
    const int64_t n_row = plan->n_voter * group;
    if (plan->is_single) return KVPG_ON_OTHERS;
    if (plan->n_voter >= KVPG_MANY_VOTERS) return KVPG_ON_SM90;
    return group >= KVPG_WINDOW_SUMS && n_row >= WINDOW_LEAST && n_row <= KVPG_WINDOW_ROWS ? KVPG_ON_WINDOW
                                                                                           : KVPG_ON_OTHERS;
}

static void plan_row(const kvp_score_args *args, int64_t b, int64_t group, bool can_sm90, bool is_most,
                     row_plan *plan) {
    int64_t n_pair = 0; /* of a vote and a voter; as many as there are voters where each votes once */
    bool is_single = !args->lse.data && !is_most;
    plan->valid = valid_of(args, b);
    plan->n_range = 0;
    for (int64_t v = 0; v < args->votes.shape[1]; v++) {
        const range keys = vote_range(args, b, v, KVP_VOTE_KEY_BEGIN);
        const int64_t n_before = n_pair;
        for (int field = KVP_VOTE_A_BEGIN; field <= KVP_VOTE_B_BEGIN && keys.begin < keys.end; field += 2) {
            range r = vote_range(args, b, v, field);
            if (r.begin < keys.begin) r.begin = keys.begin; /* earlier queries see none of these keys */
            plan->n_range = add_range(plan->voters, plan->n_range, r);
            n_pair += count(&r, r.begin < r.end);
        }
        is_single = is_single && n_pair - n_before <= 1;
    }
    plan->n_voter = count(plan->voters, plan->n_range);
    plan->hull = plan->n_range ? plan->voters[plan->n_range - 1].end - plan->voters[0].begin : 0;
    plan->is_single = is_single && n_pair == plan->n_voter;
    plan->engine = can_sm90 && !is_most ? engine_of(plan, group) : (int)KVPG_ON_OTHERS;
    const int64_t n_key = plan->valid.end - plan->valid.begin,
                  n_tile = kvpg_ceil_div(plan->n_voter * group, KVPG_ROW_TILE);
    const int64_t most = n_tile > 0 && plan->engine != KVPG_ON_SM90 ? KVPG_ENOUGH_TILES / n_tile : 1;
    plan->n_split = kvpg_ceil_div(n_key, KVPG_SPLIT);
    if (plan->n_split > most) plan->n_split = most;
    if (plan->n_split < 1) plan->n_split = 1;
    plan->split_size = (int64_t)kvpg_ceil_div(kvpg_ceil_div(n_key, plan->n_split), 128) * 128;
    if (plan->n_split > 1) plan->n_split = kvpg_ceil_div(n_key, plan->split_size);
}

static void put_vote(kvpg_writer *w, const kvp_score_args *args, int64_t b, int64_t v) {
    const range keys = vote_range(args, b, v, KVP_VOTE_KEY_BEGIN),
                window = vote_range(args, b, v, KVP_VOTE_WINDOW_BEGIN);
    range own[2] = {};
    int n = add_range(own, 0, vote_range(args, b, v, KVP_VOTE_A_BEGIN));
    n = add_range(own, n, vote_range(args, b, v, KVP_VOTE_B_BEGIN));
    kvpg_put(w, keys.begin);
    kvpg_put(w, keys.end);
    for (int s = 0; s < 2; s++) kvpg_put(w, s < n ? own[s].begin : 0);
    for (int s = 0; s < 2; s++) kvpg_put(w, s < n ? own[s].end : 0);
    kvpg_put(w, kvpi_i32(&args->votes, b, v, KVP_VOTE_WEIGHT));
    const int32_t age_end = kvpi_i32(&args->votes, b, v, KVP_VOTE_AGE_END);
    kvpg_put(w, age_end > 0 ? age_end : 0); /* below any key all are alike, and the difference to one fits */
    kvpg_put(w, count(own, n));
    kvpg_put(w, window.begin);
    kvpg_put(w, window.end);
}

/* What the launches depend on. */
typedef struct needs {
    bool engine[KVPG_N_ENGINE], joining, sums, singles; /* joining and sums: of the others */
} needs;

static kvp_status write_table(const kvp_score_args *args, bool can_sm90, void *workspace, kvp_context *ctx,
                              kvpg_attention *p, needs *out) {
    kvpg_writer w;
    row_plan plan;
    needs need = {};
    kvpg_start_table(&w, &p->table, p->n_batch, KVPG_RANGES + 2 * p->n_range + p->n_vote * KVPG_VOTE_SIZE, workspace,
                     ctx);
    for (int64_t b = 0; b < p->n_batch; b++) {
        plan_row(args, b, p->group, can_sm90, p->is_most, &plan);
        const int64_t head[] = {plan.valid.begin, plan.valid.end, plan.n_voter,  plan.n_split,
                                plan.split_size,  plan.engine,    plan.is_single};
        for (int i = 0; i < KVPG_RANGES; i++) kvpg_put(&w, head[i]);
        for (int i = 0; i < p->n_range; i++) {
            kvpg_put(&w, i < plan.n_range ? plan.voters[i].begin : 0);
            kvpg_put(&w, i < plan.n_range ? plan.voters[i].end : 0);
        }
        for (int64_t v = 0; v < p->n_vote; v++) put_vote(&w, args, b, v);
        need.engine[plan.engine] = true;
        if (plan.engine == KVPG_ON_SM90) continue;
        if (plan.n_split > p->max_split) p->max_split = (int)plan.n_split;
        if (plan.engine == KVPG_ON_WINDOW) continue;
        if (plan.hull > p->max_hull) p->max_hull = (int)plan.hull;
        need.joining = need.joining || (plan.is_single ? plan.n_split > 1 && !p->finish_joins
                                                       : plan.n_split > 1 || plan.hull > plan.n_voter);
        need.sums = need.sums || !plan.is_single;
        need.singles = need.singles || plan.is_single;
        if (plan.n_voter > p->max_voter) p->max_voter = (int)plan.n_voter;
    }
    *out = need;
    return kvpg_end_table(&w);
}

/* Lanes that join the splits of a voter together. */
enum { LANES = 8 };

/* Which voter stands at a position, which is not behind the last; -1: none. */
__device__ __forceinline__ int index_of_voter(kvpg_numbers table, int position) {
    int n_before = 0, r = KVPG_RANGES;
    for (; position >= table[r + 1]; r += 2) n_before += table[r + 1] - table[r];
    return position < table[r] ? -1 : n_before + position - table[r];
}

/* Joins the splits, and marks what is no voter. */
static __global__ void __launch_bounds__(THREADS) join_splits(const __grid_constant__ kvpg_attention p) {
    kvpg_follow();
    const int b = blockIdx.y / (p.n_head * p.group), query_head = blockIdx.y % (p.n_head * p.group);
    const kvpg_numbers table = kvpg_table_row(p.table, b);
    if (table[KVPG_ENGINE] != KVPG_ON_OTHERS || table[KVPG_N_VOTER] == 0) return;
    const int last = kvpg_voter_at(table, table[KVPG_N_VOTER] - 1), n_split = table[KVPG_N_SPLIT],
              wanted = table[KVPG_RANGES] + blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES,
              position = min(wanted, last); /* whole warps join */
    const int voter = index_of_voter(table, position);
    float exponent = -INFINITY;
    if (n_split > 1) {
        const float joined = kvpg_join_splits<LANES>(p, table, b, query_head, max(voter, 0));
        if (voter >= 0) exponent = joined;
    }
    if (threadIdx.x % LANES == 0 && position == wanted && (voter < 0 || n_split > 1))
        *kvpg_exponent_at(p, b, query_head, position) = exponent;
}

/* The caller's denominators. */
static __global__ void __launch_bounds__(THREADS)
    take_lse(const __grid_constant__ kvpg_attention p, const kvpg_rows lse) {
    kvpg_follow();
    const int b = blockIdx.y / (p.n_head * p.group), query_head = blockIdx.y % (p.n_head * p.group),
              i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= p.n_query) return;
    const float exponent = *(const float *)kvpg_row(lse, b, query_head, i) * -(float)KVPI_LOG2_E;
    *kvpg_exponent_at(p, b, query_head, p.n_token - p.n_query + i) = fabsf(exponent) < INFINITY ? exponent : -INFINITY;
}

/* Threads that share the heads of a key where all heads have one score, and neighbours on either side that are summed
 * once for all keys. */
enum { PARTS = 4, MAX_REACH = 32 };

/* Votes times query heads up to which the last kernel joins the splits of single rows itself, each block those that its
 * keys need: more would take longer than a launch. */
enum { JOINED = 512 };

/* Query heads [first, last) of a batch row whose sums count, and of a single one their exponents [vote][head] where
 * they are joined. */
typedef struct head_range {
    kvpg_numbers table;
    int b, first, last;
    const float *joined;
} head_range;

/* Fills `joined` with what keys [begin, end) need. */
__device__ __forceinline__ void join_for_keys(const kvpg_attention &p, const head_range &heads, int begin, int end,
                                              float *joined) {
    const int n_head = heads.last - heads.first, n = p.n_vote * n_head;
    for (int at = 0; at < n; at += THREADS / LANES) { /* whole warps join */
        const int i = min(at + (int)threadIdx.x / LANES, n - 1), query_head = heads.first + i % n_head;
        const kvpg_numbers vote = kvpg_vote(p, heads.table, i / n_head);
        const int voter = kvpg_voter_of_vote(vote);
        const bool needed = voter >= 0 && max(begin, vote[KVPG_KEY_BEGIN]) < min(end, vote[KVPG_KEY_END]);
        if (!__any_sync(~0u, needed)) continue;
        const float exponent = kvpg_join_splits<LANES>(p, heads.table, heads.b, query_head,
                                                       needed ? index_of_voter(heads.table, voter) : 0);
        if (needed && threadIdx.x % LANES == 0) joined[i] = exponent;
    }
}

/* Of a single row: the attention that query heads first, first + step, ... pay to key k. */
__device__ __forceinline__ float sum_powers(const kvpg_attention &p, const head_range &heads, int first, int step,
                                            int k) {
    const int n_head = heads.last - heads.first;
    for (int v = 0; v < p.n_vote; v++) {
        const kvpg_numbers vote = kvpg_vote(p, heads.table, v);
        if (k < vote[KVPG_KEY_BEGIN] || k >= vote[KVPG_KEY_END]) continue;
        const int voter = kvpg_voter_of_vote(vote);
        if (voter < k) return 0;
        float sum = 0;
#pragma unroll 4
        for (int head = first; head < heads.last; head += step) {
            const float product = kvpg_sums_of(p, heads.b, head)[k],
                        exponent = heads.joined ? heads.joined[v * n_head + head - heads.first]
                                                : *kvpg_exponent_at(p, heads.b, head, voter);
            sum += kvpg_exp2(p.cap > 0 ? kvpg_logit(p, product) + exponent : fmaf(product, p.scale, exponent));
        }
        return sum;
    }
    return 0;
}

/* The sum over query heads first, first + step, ..., or the most of them. SINGLES: there are single rows. */
template <bool SINGLES, bool MOST> __device__ __forceinline__ float
sum_heads(const kvpg_attention &p, const head_range &heads, int first, int step, int k) {
    if (SINGLES && heads.table[KVPG_IS_SINGLE]) return sum_powers(p, heads, first, step, k);
    const bool has_gaps = p.share_heads && heads.table[KVPG_ENGINE] == KVPG_ON_WINDOW;
    const float *sums = kvpg_sums_of(p, heads.b, first) + k;
    float sum = 0;
#pragma unroll 4
    for (int head = first; head < heads.last; head += step, sums += (int64_t)step * p.n_token)
        sum = kvpg_join<MOST>(sum, has_gaps && head % p.group >= KVPG_WINDOW_SUMS ? 0 : *sums);
    return sum;
}

__device__ __forceinline__ float weight_of(kvpg_numbers vote, int k) {
    if (vote[KVPG_WEIGHT] == KVP_WEIGHT_MEAN) return (float)max(1, vote[KVPG_N_OWN_VOTER]);
    return vote[KVPG_WEIGHT] == KVP_WEIGHT_AGE ? (float)max(1, vote[KVPG_AGE_END] - k) : 1.f;
}

/* sum_at(i): the sum over the heads at key i. */
template <bool MOST, typename SUM>
__device__ __forceinline__ float score_of(const kvpg_attention &p, kvpg_numbers table, int n_head, int k, SUM sum_at) {
    const int reach = p.kernel_size / 2;
    float score = 0;
    if (k < table[KVPG_VALID_BEGIN] || k >= table[KVPG_VALID_END]) return -INFINITY;
    for (int v = 0; v < p.n_vote; v++) {
        const kvpg_numbers vote = kvpg_vote(p, table, v);
        if (k >= vote[KVPG_WINDOW_BEGIN] && k < vote[KVPG_WINDOW_END])
            return 2.f + (float)(k - vote[KVPG_WINDOW_BEGIN]);
        if (k < vote[KVPG_KEY_BEGIN] || k >= vote[KVPG_KEY_END]) continue;
        for (int i = max(k - reach, vote[KVPG_KEY_BEGIN]); i <= k + reach && i < vote[KVPG_KEY_END]; i++)
            score += MOST ? sum_at(i) : sum_at(i) / ((float)n_head * weight_of(vote, i));
        score /= (float)p.kernel_size;
    }
    return score;
}

/* A block has THREADS / N_PART keys. Where no row is single, fewer registers let more blocks wait for memory at once.
 */
template <int N_PART, bool SINGLES, bool MOST> static __global__ void __launch_bounds__(THREADS, SINGLES ? 5 : 6)
    finish(const __grid_constant__ kvpg_attention p) {
    kvpg_follow();
    constexpr int KEYS = THREADS / N_PART;
    __shared__ float part[N_PART][KEYS + 2 * MAX_REACH], joined[SINGLES ? JOINED : 1];
    const int b = p.share_heads ? blockIdx.y : blockIdx.y / p.n_head, h = p.share_heads ? 0 : blockIdx.y % p.n_head,
              n_head = p.share_heads ? p.n_head : 1;
    const kvpg_numbers table = kvpg_table_row(p.table, b);
    const bool joins = SINGLES && p.finish_joins && table[KVPG_IS_SINGLE] && table[KVPG_N_SPLIT] > 1;
    const int n_place =
        !p.share_heads && table[KVPG_ENGINE] == KVPG_ON_WINDOW ? (int)KVPG_WINDOW_SUMS : n_head * p.group;
    const head_range heads = {table, b, h * p.group, h * p.group + n_place, joins ? joined : NULL};
    const int reach = min(p.kernel_size / 2, (int)MAX_REACH), begin = blockIdx.x * KEYS - reach;
    const int n_sum = KEYS + 2 * reach, k = blockIdx.x * KEYS + threadIdx.x;
    if (joins) {
        join_for_keys(p, heads, begin, begin + n_sum, joined);
        __syncthreads();
    }
    for (int i = threadIdx.x % KEYS; i < n_sum; i += KEYS)
        part[threadIdx.x / KEYS][i] =
            begin + i >= 0 && begin + i < p.n_token
                ? sum_heads<SINGLES, MOST>(p, heads, heads.first + threadIdx.x / KEYS, N_PART, begin + i)
                : 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_sum && N_PART > 1; i += THREADS)
        for (int j = 1; j < N_PART; j++) part[0][i] = kvpg_join<MOST>(part[0][i], part[j][i]);
    if (N_PART > 1) __syncthreads();
    if (threadIdx.x >= KEYS || k >= p.n_token) return;
    const float score = p.kernel_size / 2 <= MAX_REACH
                            ? score_of<MOST>(p, table, n_head * p.group, k, [&](int i) { return part[0][i - begin]; })
                            : score_of<MOST>(p, table, n_head * p.group, k, [&](int i) {
                                  return sum_heads<SINGLES, MOST>(p, heads, heads.first, 1, i);
                              });
    for (int i = h; i < h + n_head; i++) *(float *)kvpg_row(p.scores, b, i, k) = score;
}

static int64_t table_stride(const kvp_score_args *args) {
    return KVPG_RANGES + args->votes.shape[1] * (2 * 2 + KVPG_VOTE_SIZE);
}

/* A voter's splits times the voters is at most this, by the way that plan_row cuts. */
static int64_t split_room(const kvp_score_args *args) {
    const int64_t group = args->queries.shape[1] / args->keys.shape[1],
                  n_split = kvpg_ceil_div(args->keys.shape[2], KVPG_SPLIT);
    const int64_t by_tiles = kvpg_ceil_div(KVPG_ENOUGH_TILES * KVPG_ROW_TILE, group),
                  by_voters = args->queries.shape[2] * n_split;
    return n_split == 1 || args->lse.data ? 0 : by_tiles < by_voters ? by_tiles : by_voters;
}

/* Places the scratch; a NULL workspace gives the sizes only. Returns the bytes of all of it. */
static size_t lay_out(const kvp_score_args *args, char *workspace, kvpg_attention *p, void **table) {
    const int64_t *queries = args->queries.shape, n_row = queries[0] * queries[1];
    size_t used = kvpg_table_bytes(queries[0], table_stride(args));
    *table = workspace;
    p->exponents = workspace ? (float *)(workspace + used) : NULL;
    used += kvpi_round_up_64((size_t)(n_row * queries[2]) * sizeof(float));
    p->split_room = split_room(args);
    p->splits = workspace ? (float2 *)(workspace + used) : NULL;
    used += kvpi_round_up_64((size_t)(n_row * p->split_room) * sizeof(float2));
    p->sums = workspace ? (float *)(workspace + used) : NULL;
    return used + kvpi_round_up_64((size_t)(n_row * args->keys.shape[2]) * sizeof(float));
}

extern "C" size_t kvpi_score_attention_cuda_workspace(const kvp_score_args *args) {
    kvpg_attention p;
    void *table;
    return lay_out(args, NULL, &p, &table);
}

static void read_job(const kvp_score_args *args, kvpg_attention *p) {
    const double scaling = args->param[KVPI_PARAM_attention_scaling],
                 softcap = args->param[KVPI_PARAM_attention_softcap];
    p->keys = kvpg_rows_of(&args->keys);
    p->queries = kvpg_rows_of(&args->queries);
    p->scores = kvpg_rows_of(&args->scores);
    p->n_batch = (int)args->keys.shape[0];
    p->n_head = (int)args->keys.shape[1];
    p->n_token = (int)args->keys.shape[2];
    p->n_dim = (int)args->keys.shape[3];
    p->n_query = (int)args->queries.shape[2];
    p->group = (int)(args->queries.shape[1] / args->keys.shape[1]);
    p->n_vote = (int)args->votes.shape[1];
    p->n_range = 2 * p->n_vote;
    p->max_voter = p->max_hull = 0;
    p->max_split = 1;
    p->scale = (float)(softcap > 0 ? scaling / softcap : scaling * KVPI_LOG2_E);
    p->cap = (float)(softcap * KVPI_LOG2_E);
    p->kernel_size = (int)args->param[KVPI_PARAM_attention_kernel_size];
    p->share_heads = args->param[KVPI_PARAM_attention_share_heads] > 0;
    p->is_most = false;
    p->has_masked = args->lse.data != NULL;
    p->finish_joins =
        (int64_t)p->n_vote * p->group * (p->share_heads ? p->n_head : 1) <= JOINED && p->kernel_size / 2 <= MAX_REACH;
}

static kvp_status check_limits(const kvp_score_args *args, kvp_context *ctx) {
    if (args->votes.shape[1] > KVPG_MAX_VOTES)
        return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED, "votes.shape[1] is %lld; on a CUDA device expected at most %d",
                         (long long)args->votes.shape[1], (int)KVPG_MAX_VOTES);
    if (args->queries.shape[0] * args->queries.shape[1] > KVPG_MAX_ROWS)
        return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED,
                         "queries.shape[:2] multiply to %lld; on a CUDA device expected at most %d",
                         (long long)(args->queries.shape[0] * args->queries.shape[1]), (int)KVPG_MAX_ROWS);
    return KVP_OK;
}

/* Whether the votes of keys want the most of them: all of a call's, or none. */
static kvp_status read_weights(const kvp_score_args *args, int *is_most, kvp_context *ctx) {
    const int64_t n_vote = args->votes.shape[1];
    int64_t n[2] = {0, 0};
    for (int64_t i = 0; i < args->votes.shape[0] * n_vote; i++) {
        const range keys = vote_range(args, i / n_vote, i % n_vote, KVP_VOTE_KEY_BEGIN);
        const bool is_own = kvpi_i32(&args->votes, i / n_vote, i % n_vote, KVP_VOTE_WEIGHT) == KVP_WEIGHT_MAX;
        n[is_own] += keys.begin < keys.end;
    }
    *is_most = n[1] > 0;
    if (n[0] == 0 || n[1] == 0) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED,
                     "%lld of %lld votes have weight 3 (max); on a CUDA device expected all or none of a call's",
                     (long long)n[1], (long long)(n[0] + n[1]));
}

static kvp_status sweep(int which, const kvpg_attention *p, const kvp_score_args *args, needs need, kvp_context *ctx) {
    if (need.engine[KVPG_ON_SM90]) KVPI_TRY(kvpg_sweep_sm90(which, p, args, ctx));
    if (need.engine[KVPG_ON_WINDOW]) KVPI_TRY(kvpg_sweep_window(which, p, args, ctx));
    if (which == KVPG_SUM ? !need.sums : p->max_voter == 0) return KVP_OK;
    return kvpg_can_mma(args) ? kvpg_sweep_mma(which, p, args->keys.dtype, ctx)
                              : kvpg_sweep_any(which, p, args->keys.dtype, ctx);
}

/* A row is single only where sums count. */
template <int N_PART> static void (*finish_of(const kvpg_attention &p, const needs &need))(kvpg_attention) {
    return p.is_most      ? finish<N_PART, false, true>
           : need.singles ? finish<N_PART, true, false>
                          : finish<N_PART, false, false>;
}

extern "C" kvp_status kvpi_score_attention_cuda(const kvp_score_args *args, kvp_context *ctx) {
    kvpg_attention p;
    void *table;
    int major;
    KVPI_TRY(check_limits(args, ctx));
    KVPG_TRY("tell what the device can do",
             cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, args->keys.device_index));
    read_job(args, &p);
    KVPI_TRY(read_weights(args, &p.is_most, ctx));
    lay_out(args, (char *)ctx->workspace, &p, &table);
    const int n_row = p.n_batch * p.n_head * p.group;
    needs need;
    KVPI_TRY(write_table(args, major == 9 && kvpg_can_sm90(args), table, ctx, &p, &need));
    if (args->lse.data) {
        const kvpg_grid grid = {kvpg_ceil_div(p.n_query, THREADS), n_row};
        KVPI_TRY(kvpg_launch("take_lse", ctx, take_lse, grid, THREADS, 1, 0, p, kvpg_rows_of(&args->lse)));
    } else {
        KVPI_TRY(sweep(KVPG_LSE, &p, args, need, ctx));
        const kvpg_grid grid = {kvpg_ceil_div(p.max_hull, THREADS / LANES), n_row};
        if (need.joining && p.max_hull > 0)
            KVPI_TRY(kvpg_launch("join_splits", ctx, join_splits, grid, THREADS, 1, 0, p));
    }
    KVPI_TRY(sweep(KVPG_SUM, &p, args, need, ctx));
    const int n_part = p.share_heads ? (int)PARTS : 1;
    const kvpg_grid grid = {kvpg_ceil_div(p.n_token, THREADS / n_part),
                            p.share_heads ? p.n_batch : (int64_t)p.n_batch * p.n_head};
    return kvpg_launch("the end of attention", ctx, p.share_heads ? finish_of<PARTS>(p, need) : finish_of<1>(p, need),
                       grid, THREADS, 1, 0, p);
}

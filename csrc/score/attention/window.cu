/* SPDX-License-Identifier: Apache-2.0
 *
 * The sweeps of sweep.cuh on Hopper, for 128 elements of 16 bits and the few voters of a window, each of which votes
 * once: all query heads of a group together have at most 256 rows of queries, which stay in shared memory while the
 * copy engine has the keys stream past, each tile once for all of them. Of five warpgroups one produces, four consume,
 * each a quarter of the products of a tile:
 *
 *     LSE    64 rows of queries by 128 keys, whose partial softmaxes stay in registers
 *     SUM    64 keys by 128 rows of queries, so that a key's sum is over a thread's own registers
 *
 * While one of them multiplies, others take powers.
 */
#include "hopper.cuh"

enum {
    GROUPS = 4, /* warpgroups that consume */
    CONSUMERS = GROUPS * 128,
    THREADS = CONSUMERS + 128,
    PRODUCER_REGISTERS = 32, /* 32 + 4 * 112 = 5 * 96: more than the launch gives would make setmaxnreg wait for ever */
    CONSUMER_REGISTERS = 112,
    ROWS = KVPG_WINDOW_ROWS,
    QUERY_BYTES = ROWS * KVPG_DIM * 2,
    LANES = CONSUMERS / ROWS, /* that bring the numbers of one row */
    LONG = 8192,              /* tokens from which on WIDE pays, and what comes with it */
};

/* Shared memory; the first two are as the copy engine swizzles. */
typedef struct shared_memory {
    uint8_t ring[KVPG_STAGES][KVPG_TILE_BYTES], queries[QUERY_BYTES];
    float exponents[ROWS]; /* in the order of slot_of */
    int positions[ROWS];
    kvpg_partial partials[GROUPS][64];
    int any_masked[CONSUMERS / 32]; /* whether a warp's rows have one that casts no vote, or is none */
    uint64_t full[KVPG_STAGES], empty[KVPG_STAGES];
} shared_memory;

/* What the blocks share out: pieces of each key head's keys, splits (LSE) or tiles (SUM); each block has consecutive
 * ones, so that it seldom has to change its queries. */
typedef struct schedule {
    int n_head, n_piece; /* of all batch rows; of a head */
} schedule;

/* Consecutive tiles of one key head, from position `begin` on; those of SUM are taken last to first, since the other
 * sweep has read the last ones last. */
typedef struct run {
    kvpg_numbers table;
    int b, h, split, begin, end, n_row; /* n_row: rows of queries */
    __device__ __forceinline__ int n_tile() const {
        return begin < end ? (end - begin + KVPG_TILE - 1) / KVPG_TILE : 0;
    }
} run;

/* The run that starts with piece `at` of the grid's, which becomes the piece behind it; false after the last. */
template <int SWEEP>
__device__ __forceinline__ bool find_run(const kvpg_attention &p, const schedule &plan, int &at, run &r) {
    const int n = plan.n_head * plan.n_piece, end = (int)((int64_t)n * (blockIdx.x + 1) / gridDim.x);
    if (at >= end) return false;
    const int head = at / plan.n_piece, piece = at % plan.n_piece;
    r.b = head / p.n_head;
    r.h = head % p.n_head;
    r.table = kvpg_table_row(p.table, r.b);
    r.split = piece;
    r.n_row = r.table[KVPG_N_VOTER] * p.group;
    const int n_piece = SWEEP == KVPG_SUM ? min(plan.n_piece - piece, end - at) : 1;
    at += n_piece;
    r.begin = r.end = 0;
    if (r.table[KVPG_ENGINE] != KVPG_ON_WINDOW) return true;
    if (SWEEP == KVPG_SUM) {
        r.begin = piece * KVPG_TILE;
        r.end = min(r.begin + n_piece * KVPG_TILE, p.n_token);
    } else if (piece < r.table[KVPG_N_SPLIT]) {
        r.begin = r.table[KVPG_VALID_BEGIN] + piece * r.table[KVPG_SPLIT_SIZE];
        r.end = min(r.begin + r.table[KVPG_SPLIT_SIZE], kvpg_voter_at(r.table, r.table[KVPG_N_VOTER] - 1) + 1);
    }
    return true;
}

__device__ __forceinline__ int first_piece(const schedule &plan) {
    return (int)((int64_t)plan.n_head * plan.n_piece * blockIdx.x / gridDim.x);
}

template <int SWEEP> __device__ __forceinline__ int column_of_tile(const run &r, int t) {
    return r.begin + (SWEEP == KVPG_SUM ? r.n_tile() - 1 - t : t) * KVPG_TILE;
}

__device__ __forceinline__ uint32_t address_of(const void *shared) {
    return (uint32_t)__cvta_generic_to_shared(shared);
}

template <int SWEEP> __device__ __forceinline__ void produce(const kvpg_attention &p, const schedule &plan,
                                                             const CUtensorMap *keys, shared_memory &shared) {
    kvpg_pipeline pipeline = {0, 0};
    int at = first_piece(plan);
    for (run r; find_run<SWEEP>(p, plan, at, r);)
        for (int t = 0; t < r.n_tile(); t++) {
            const uint32_t full = address_of(&shared.full[pipeline.stage]);
            kvpg_barrier_wait(address_of(&shared.empty[pipeline.stage]), pipeline.phase ^ 1);
            kvpg_barrier_expect(full, KVPG_TILE_BYTES);
            kvpg_copy_tile(address_of(shared.ring[pipeline.stage]), keys, full, column_of_tile<SWEEP>(r, t), r.h, r.b);
            pipeline.next();
        }
}

__device__ __forceinline__ void wait_for_consumers() {
    asm volatile("barrier.sync 1, %0;" ::"n"((int)CONSUMERS) : "memory");
}

/* Where a row's number stands, so that a thread gets those of its columns 8 j + 2 (lane % 4), the next one, and the two
 * 8 behind, by one load. */
__device__ __forceinline__ int slot_of(int row) { return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2; }

/* The exponents and positions of the rows of queries; where the other sweep left splits, they are joined here. */
__device__ __forceinline__ void load_voters(const kvpg_attention &p, const run &r, shared_memory &shared) {
    const int row = threadIdx.x / LANES, n_voter = r.table[KVPG_N_VOTER], existing = min(row, r.n_row - 1),
              query_head = r.h * p.group + existing / n_voter, voter = existing % n_voter,
              position = row < r.n_row ? kvpg_voter_at(r.table, voter) : -1;
    float exponent = !p.has_masked && r.table[KVPG_N_SPLIT] > 1
                         ? kvpg_join_splits<LANES>(p, r.table, r.b, query_head, voter)
                         : *kvpg_exponent_at(p, r.b, query_head, kvpg_voter_at(r.table, voter));
    if (row >= r.n_row) exponent = -INFINITY;
    const bool any = __any_sync(~0u, kvpg_is_masked(exponent));
    if (threadIdx.x % 32 == 0) shared.any_masked[threadIdx.x / 32] = any;
    if (threadIdx.x % LANES != 0) return;
    shared.exponents[slot_of(row)] = exponent;
    shared.positions[slot_of(row)] = position;
}

/* The queries of a run, and for sums what else is needed of them. */
template <int SWEEP>
__device__ __forceinline__ void load_queries(const kvpg_attention &p, const run &r, shared_memory &shared) {
    constexpr int CHUNKS = KVPG_DIM / 8;
    wait_for_consumers(); /* nobody multiplies by those before any more */
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += CONSUMERS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const char *from = row < r.n_row ? kvpg_query_of_row(p, r.table, r.b, r.h, row) + chunk * 16 : p.queries.data;
        kvpg_copy_async(address_of(shared.queries) + chunk / 8 * (ROWS * 128) + row * 128 +
                            ((chunk % 8 ^ row % 8) << 4),
                        from, row < r.n_row ? 16 : 0);
    }
    if (SWEEP == KVPG_SUM) load_voters(p, r, shared);
    kvpg_commit();
    kvpg_wait<0>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); /* wgmma reads by another way than threads write */
    wait_for_consumers();
}

#define D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(d, i) D4(d, i), D4(d, i + 4), D4(d, i + 8), D4(d, i + 12)
#define D32(d) D16(d, 0), D16(d, 16)
#define F32                                                                                                          \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
    "%30,%31"
#define F64                                                                                                         \
    F32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
        "%58,%59,%60,%61,%62,%63"
/* d (+)= a b: 64 rows and 64 columns, or twice as many, both in shared memory, 16 elements deep; see sm90.cu for a and
 * b. */
template <typename T> __device__ __forceinline__ void multiply_16(float (&d)[32], uint32_t a, uint32_t b, int adds);
template <typename T>
__device__ __forceinline__ void multiply_16(float (&d)[32], float (&e)[32], uint32_t a, uint32_t b, int adds);
#define KVPG_WGMMA(dtype, type, name, map)                                                                            \
    template <> __device__ __forceinline__ void multiply_16<type>(float (&d)[32], uint32_t a, uint32_t b, int adds) { \
        asm volatile("{\n.reg .pred p;\n.reg .b64 q, r;\nsetp.ne.b32 p, %34, 0;\n"                                    \
                     "mov.b64 q, {%32, 0x40000040};\nmov.b64 r, {%33, 0x40000040};\n"                                 \
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" F32                             \
                     "}, q, r, p, 1, 1, 0, 0;\n}\n"                                                                   \
                     : D32(d)                                                                                         \
                     : "r"(a), "r"(b), "r"(adds));                                                                    \
    }                                                                                                                 \
    template <> __device__ __forceinline__ void multiply_16<type>(float (&d)[32], float (&e)[32], uint32_t a,         \
                                                                  uint32_t b, int adds) {                             \
        asm volatile("{\n.reg .pred p;\n.reg .b64 q, r;\nsetp.ne.b32 p, %66, 0;\n"                                    \
                     "mov.b64 q, {%64, 0x40000040};\nmov.b64 r, {%65, 0x40000040};\n"                                 \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" F64                            \
                     "}, q, r, p, 1, 1, 0, 0;\n}\n"                                                                   \
                     : D32(d), D32(e)                                                                                 \
                     : "r"(a), "r"(b), "r"(adds));                                                                    \
    }
KVPG_TENSOR_TYPES(KVPG_WGMMA)
#undef KVPG_WGMMA

/* Where the element k 16 of a tile of N rows is: the second half of the elements is behind the first of all rows. */
template <int N> __device__ __forceinline__ uint32_t operand(uint32_t tile, int k) {
    return (tile >> 4 | 0x10000u) + k / 4 * (N * 128 / 16) + k % 4 * 2;
}

/* Begins to multiply 64 rows of a by 128 of b, which are in tiles of N_A and N_B rows: WIDE all at once, which reads a
 * half as often; else those of the second half apart, so that powers of the first are taken meanwhile. */
template <typename T, int N_A, int N_B, bool WIDE>
__device__ __forceinline__ void start_products(float (&x)[2][32], uint32_t a, uint32_t b) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    if constexpr (WIDE) {
#pragma unroll
        for (int k = 0; k < KVPG_DIM / 16; k++)
            multiply_16<T>(x[0], x[1], operand<N_A>(a, k), operand<N_B>(b, k), k != 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    } else {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int k = 0; k < KVPG_DIM / 16; k++)
                multiply_16<T>(x[half], operand<N_A>(a, k), operand<N_B>(b + half * 64 * 128, k), k != 0);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        }
    }
}

/* Until all but the last N of what was started is done, of which d is. */
template <int N> __device__ __forceinline__ void wait_for_products(float (&d)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : D32(d) : "n"(N) : "memory");
}
__device__ __forceinline__ void wait_for_all_products(float (&x)[2][32]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : D32(x[0]), D32(x[1])::"memory");
}

/* A warp is done with a stage. */
__device__ __forceinline__ void release(shared_memory &shared, kvpg_pipeline &pipeline) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) kvpg_barrier_arrive(address_of(&shared.empty[pipeline.stage]));
    pipeline.next();
}

/* 64 rows of the queries; where those are few and keys many, n warpgroups have the same rows, and each of them every
 * n-th tile. */
template <typename T, bool WIDE> __device__ __forceinline__ void
sweep_lse(const kvpg_attention &p, const run &r, shared_memory &shared, kvpg_pipeline &pipeline, int group) {
    const bool shares = WIDE && r.table[KVPG_VALID_END] - r.table[KVPG_VALID_BEGIN] >= LONG; /* whoever is beside it */
    const int n_block = !shares || r.n_row > 128 ? GROUPS
                        : r.n_row > 64           ? 2
                                                 : 1,
              n_part = GROUPS / n_block, block = group % n_block, part = group / n_block;
    const int lane = threadIdx.x % 32, in_block = threadIdx.x / 32 % 4 * 16 + lane / 4,
              first = block * 64 + threadIdx.x / 32 % 4 * 16, row = first + lane / 4;
    const uint32_t queries = address_of(shared.queries) + block * 64 * 128;
    int hi = 0, full_hi = 0; /* some of this warp's rows take the keys below hi, all take those below full_hi */
    if (first < r.n_row) {
        const kvpg_cover cover = kvpg_cover_of_voters(r.table, first, min(first + 16, r.n_row));
        hi = cover.hi;
        full_hi = min(cover.full_hi, r.end);
    }
    kvpg_interval mask[2] = {};
    for (int i = 0; i < 2; i++)
        if (row + 8 * i < r.n_row) mask[i].hi = min(r.end, kvpg_voter_of_row(r.table, row + 8 * i) + 1);
    kvpg_partial partial[2] = {{KVPG_LOWEST, 0}, {KVPG_LOWEST, 0}};
    float x[2][32];
    const auto take = [&](float (&half)[32], int column) {
        if (column + KVPG_TILE / 2 <= full_hi)
            kvpg_add_to_partials<false>(half, p.scale, mask, column + 2 * (lane % 4), partial);
        else if (column < hi)
            kvpg_add_to_partials<true>(half, p.scale, mask, column + 2 * (lane % 4), partial);
    };
#pragma unroll 1
    for (int t = 0; t < r.n_tile(); t++) {
        const int column = column_of_tile<KVPG_LSE>(r, t);
        const uint32_t keys = address_of(shared.ring[pipeline.stage]);
        const bool is_own = block * 64 < r.n_row && t % n_part == part;
        kvpg_barrier_wait(address_of(&shared.full[pipeline.stage]), pipeline.phase);
        if (is_own) {
            start_products<T, ROWS, KVPG_TILE, WIDE>(x, queries, keys);
            if (WIDE) {
                wait_for_all_products(x);
            } else {
                wait_for_products<1>(x[0]);
                take(x[0], column);
                wait_for_products<0>(x[1]);
            }
        }
        release(shared, pipeline);
        if (is_own && WIDE) take(x[0], column);
        if (is_own) take(x[1], column + KVPG_TILE / 2);
    }
    for (int i = 0; i < 2; i++) partial[i] = kvpg_merge_lanes<4>(partial[i]);
    if (n_part > 1) { /* those of the groups with the same rows, joined in the order of the groups */
        if (lane % 4 == 0)
            for (int i = 0; i < 2; i++) shared.partials[group][in_block + 8 * i] = partial[i];
        wait_for_consumers();
        for (int o = 1; o < n_part && part == 0; o++)
            for (int i = 0; i < 2; i++)
                partial[i] = kvpg_merge(partial[i], shared.partials[group + o * n_block][in_block + 8 * i]);
        wait_for_consumers(); /* before the next run's come to the same place */
    }
    for (int i = 0; i < 2; i++)
        if (part == 0 && lane % 4 == 0 && row + 8 * i < r.n_row)
            kvpg_store_partial(p, r.table, r.b, r.h, row + 8 * i, r.split, partial[i]);
}

/* A thread's columns of 64 rows of queries. */
typedef struct voters {
    const float4 *exponents;
    const int4 *positions;
} voters;

/* The positions that vote on a key. */
typedef struct voters_of_key {
    kvpg_interval own[2];
    __device__ __forceinline__ bool has(int position) const {
        return (position >= own[0].lo && position < own[0].hi) || (position >= own[1].lo && position < own[1].hi);
    }
} voters_of_key;

/* Adds up the powers of this thread's two keys over its columns. */
template <bool MASKED> __device__ __forceinline__ void add_powers(const float (&x)[32], float scale, const voters &v,
                                                                  const voters_of_key (&of_key)[2], float (&sum)[2]) {
    float part[2][2] = {};
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        const float4 e = v.exponents[j / 2 * 4];
        const float exponent[4] = {e.x, e.y, e.z, e.w};
        int4 at = {0, 0, 0, 0};
        if (MASKED) at = v.positions[j / 2 * 4];
        const int position[4] = {at.x, at.y, at.z, at.w};
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                float power = kvpg_exp2(fmaf(x[4 * (j + k / 2) + 2 * i + k % 2], scale, exponent[k]));
                if (MASKED && (!of_key[i].has(position[k]) || kvpg_is_masked(exponent[k]))) power = 0;
                part[i][k % 2] += power;
            }
    }
    for (int i = 0; i < 2; i++) sum[i] += part[i][0] + part[i][1];
}

/* The keys of this warpgroup, 64 of a tile, by half of the queries; WIDE, where that is all of them, by all those of
 * every other tile. */
template <typename T, bool WIDE> __device__ __forceinline__ void
sweep_sums(const kvpg_attention &p, const run &r, shared_memory &shared, kvpg_pipeline &pipeline, int group) {
    const bool has_half = WIDE && r.n_row <= 128;
    const int lane = threadIdx.x % 32, half = has_half ? 0 : group / 2,
              in_tile = group % 2 * 64 + threadIdx.x / 32 % 4 * 16;
    const uint32_t queries = address_of(shared.queries) + half * 128 * 128;
    const voters first_64 = {(const float4 *)(shared.exponents + half * 128) + lane % 4,
                             (const int4 *)(shared.positions + half * 128) + lane % 4},
                 last_64 = {first_64.exponents + 16, first_64.positions + 16};
    float *const sums = kvpg_sums_of(p, r.b, r.h * p.group + half);
    const int first_voter = kvpg_voter_at(r.table, 0),
              voters_end = kvpg_voter_at(r.table, r.table[KVPG_N_VOTER] - 1) + 1;
    const bool is_idle = half * 128 >= r.n_row, has_second = half * 128 + 64 < r.n_row;
    bool masked_first = false, masked_last = false; /* whether some column casts no vote */
#pragma unroll
    for (int w = 0; w < 4; w++) {
        masked_first = masked_first || shared.any_masked[half * 8 + w];
        masked_last = masked_last || shared.any_masked[half * 8 + 4 + w];
    }
    float x[2][32];
#pragma unroll 1
    for (int t = 0; t < r.n_tile(); t++) {
        const bool is_own = has_half ? t % 2 == group / 2 : !is_idle;
        const int first = column_of_tile<KVPG_SUM>(r, t) + in_tile;
        kvpg_cover cover[2];
        for (int s = 0; s < 2; s++) cover[s] = kvpg_cover_of_keys(p, r.table, s, first, first + 16);
        const bool is_empty = !is_own || (cover[0].lo >= cover[0].hi && cover[1].lo >= cover[1].hi),
                   is_full = cover[0].full_lo <= first_voter && cover[0].full_hi >= voters_end;
        const bool looks = !is_full || masked_first || masked_last; /* at single votes */
        voters_of_key of_key[2] = {};
        if (looks && !is_empty) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                of_key[i / 2].own[i % 2] = kvpg_interval_of_key(p, r.table, i % 2, first + lane / 4 + i / 2 * 8);
        }
        const uint32_t keys = address_of(shared.ring[pipeline.stage]) + group % 2 * 64 * 128;
        float sum[2] = {};
        const auto take = [&](const float (&products)[32], const voters &v, bool masked) {
            if (is_full && !masked && is_own)
                add_powers<false>(products, p.scale, v, of_key, sum);
            else if (!is_empty)
                add_powers<true>(products, p.scale, v, of_key, sum);
        };
        kvpg_barrier_wait(address_of(&shared.full[pipeline.stage]), pipeline.phase);
        if (is_own) {
            start_products<T, KVPG_TILE, ROWS, WIDE>(x, keys, queries);
            if (WIDE) {
                wait_for_all_products(x);
            } else {
                wait_for_products<1>(x[0]);
                take(x[0], first_64, masked_first);
                wait_for_products<0>(x[1]);
            }
        }
        release(shared, pipeline);
        if (is_own && WIDE) take(x[0], first_64, masked_first);
        if (has_second) take(x[1], last_64, masked_last);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int key = first + lane / 4 + 8 * i;
            const float total = kvpg_sum_lanes<4>(sum[i]);
            if ((has_half && !is_own) || lane % 4 != 0 || key >= r.end) continue;
            sums[key] = total;
            if (has_half) sums[p.n_token + key] = 0; /* the other half's */
        }
    }
}

template <typename T, int SWEEP, bool WIDE> __global__ void __launch_bounds__(THREADS, 1)
    sweep_window(const __grid_constant__ CUtensorMap keys, const __grid_constant__ kvpg_attention p,
                 const schedule plan) {
    kvpg_follow();
    extern __shared__ __align__(1024) uint8_t memory[];
    shared_memory &shared = *(shared_memory *)memory;
    if (threadIdx.x == 0) {
        for (int i = 0; i < KVPG_STAGES; i++) {
            kvpg_barrier_init(address_of(&shared.full[i]), 1);
            kvpg_barrier_init(address_of(&shared.empty[i]), CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    __syncthreads();
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0); /* the same for a warp, and the compiler knows it */
    if (group == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"((int)PRODUCER_REGISTERS));
        if (threadIdx.x == CONSUMERS) produce<SWEEP>(p, plan, &keys, shared);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"((int)CONSUMER_REGISTERS));
    kvpg_pipeline pipeline = {0, 0};
    int at = first_piece(plan), head = -1; /* head: whose queries are in shared memory */
    for (run r; find_run<SWEEP>(p, plan, at, r);) {
        if (r.table[KVPG_ENGINE] != KVPG_ON_WINDOW) continue;
        if (SWEEP == KVPG_LSE && r.split >= r.table[KVPG_N_SPLIT]) continue;
        if (head != r.b * p.n_head + r.h) {
            head = r.b * p.n_head + r.h;
            load_queries<SWEEP>(p, r, shared);
        }
        if constexpr (SWEEP == KVPG_SUM)
            sweep_sums<T, WIDE>(p, r, shared, pipeline, group);
        else
            sweep_lse<T, WIDE>(p, r, shared, pipeline, group);
    }
}

template <typename T, int SWEEP>
static kvp_status launch(const kvpg_attention *p, const kvp_score_args *args, kvp_context *ctx) {
    CUtensorMap keys;
    KVPI_TRY(kvpg_make_map<T>(&keys, &args->keys, KVPG_TILE, ctx));
    int n_block;
    KVPG_TRY("count multiprocessors",
             cudaDeviceGetAttribute(&n_block, cudaDevAttrMultiProcessorCount, args->keys.device_index));
    schedule plan;
    plan.n_head = p->n_batch * p->n_head;
    plan.n_piece = SWEEP == KVPG_SUM ? (int)kvpg_ceil_div(p->n_token, KVPG_TILE) : p->max_split;
    if ((int64_t)plan.n_head * plan.n_piece < n_block) n_block = plan.n_head * plan.n_piece;
    const bool is_long = p->n_token >= LONG;
    return kvpg_launch("attention of a window on Hopper", ctx,
                       is_long ? sweep_window<T, SWEEP, true> : sweep_window<T, SWEEP, false>, {n_block, 1}, THREADS, 1,
                       sizeof(shared_memory), keys, *p, plan);
}

kvp_status kvpg_sweep_window(int sweep, const kvpg_attention *p, const kvp_score_args *args, kvp_context *ctx) {
    return kvpg_with_tensor_type(args->keys.dtype, ctx, [&](auto t) {
        using T = typename decltype(t)::type;
        return sweep == KVPG_SUM ? launch<T, KVPG_SUM>(p, args, ctx) : launch<T, KVPG_LSE>(p, args, ctx);
    });
}

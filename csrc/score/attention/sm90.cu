/* SPDX-License-Identifier: Apache-2.0
 *
 * The sweeps of sweep.cuh on Hopper, for 128 elements of 16 bits and many voters. Of four warpgroups one produces: a
 * thread has the copy engine bring the rows of a unit and a ring of tiles of 128 columns, a warp the exponents of the
 * columns. Three consume: each keeps 64 rows as fragments in registers (the A operand of wgmma) and multiplies each
 * tile with them, while the others take powers. Blocks stay for the whole sweep and take units in a fixed order; a
 * unit's result does not depend on who works on it.
 */
#include "hopper.cuh"

#include <type_traits>

enum {
    GROUPS = 3, /* warpgroups that consume */
    THREADS = (GROUPS + 1) * 128,
    ROWS = GROUPS * 64, /* of a unit */
    ROW_BYTES = ROWS * KVPG_DIM * 2,
    SHARED_BYTES = KVPG_STAGES * KVPG_TILE_BYTES + ROW_BYTES + KVPG_STAGES * KVPG_TILE * 4 +
        (2 * KVPG_STAGES + 2) * KVPG_BARRIER_BYTES,
    PRODUCER_REGISTERS =
        56, /* 56 + 3 * 152 = 4 * 128: more than the launch gives would make setmaxnreg wait for ever */
    CONSUMER_REGISTERS = 152,
    HEADS_AT_ONCE = 4,
};

/* The order of units: blocks of tiles_at_once tiles, the long ones first, by groups of heads_at_once heads, whose
 * columns then stay in the second-level cache; every other round of the blocks runs backwards, which evens out the
 * falling lengths. */
typedef struct schedule {
    int n_tile, n_head, n_unit, heads_at_once, tiles_at_once;
} schedule;

typedef struct work_unit {
    int b, query_head, begin, end; /* begin >= end: nothing */
    kvpg_numbers table;
    kvpg_cover cover[2];
    int n_first, n; /* tiles of columns of interval 0, of both */
} work_unit;

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
/* d (+)= a b: 64 rows from registers, 128 columns from shared memory, 16 elements deep. b: address / 16 with the
 * leading offset; the upper half of the descriptor (128-byte swizzle, 1024 bytes from 8 rows to the next) is constant.
 */
template <typename T>
__device__ __forceinline__ void multiply_16(float (&d)[64], const uint32_t (&a)[4], uint32_t b, int adds);
#define KVPG_WGMMA(dtype, type, name, map)                                                                             \
    template <>                                                                                                        \
    __device__ __forceinline__ void multiply_16<type>(float (&d)[64], const uint32_t (&a)[4], uint32_t b, int adds) {  \
        asm volatile("{\n.reg .pred p;\n.reg .b64 q;\nsetp.ne.b32 p, %69, 0;\nmov.b64 q, {%68, 0x40000040};\n"         \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " "                                  \
                     "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
                     "%26,%27,%28,%29,"                                                                                \
                     "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%"   \
                     "53,%54,%55,%56,%57,"                                                                             \
                     "%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, q, p, 1, 1, 0;\n}\n"                                \
                     : D16(0), D16(16), D16(32), D16(48)                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(adds));                                 \
    }
KVPG_TENSOR_TYPES(KVPG_WGMMA)
#undef KVPG_WGMMA

template <typename T> __device__ __forceinline__ void
multiply_tile(float (&products)[64], const uint32_t (&rows)[KVPG_DIM / 16][4], uint32_t tile) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < KVPG_DIM / 16; k++)
        multiply_16<T>(products, rows[k], tile + k / 4 * (KVPG_TILE * 128 / 16) + k % 4 * 2, k != 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

__device__ __forceinline__ int first_voter(kvpg_numbers table) { return kvpg_voter_at(table, 0); }
__device__ __forceinline__ int voters_end(kvpg_numbers table) {
    return kvpg_voter_at(table, table[KVPG_N_VOTER] - 1) + 1;
}

/* Rows here are positions, of voters from the first to the last (LSE) or of keys. */
template <int SWEEP>
__device__ __forceinline__ kvpg_cover cover_of(const kvpg_attention &p, kvpg_numbers table, int s, int begin, int end) {
    if (SWEEP == KVPG_SUM) return kvpg_cover_of_keys(p, table, s, begin, end);
    if (s > 0 || begin >= end) return {0, 0, 0, 0};
    return {table[KVPG_VALID_BEGIN], end, table[KVPG_VALID_BEGIN], begin + 1};
}

template <int SWEEP> __device__ __forceinline__ kvpg_interval interval_of(const kvpg_attention &p, kvpg_numbers table,
                                                                          int s, int row, int end) {
    if (row >= end) return {0, 0};
    if (SWEEP == KVPG_SUM) return kvpg_interval_of_key(p, table, s, row);
    return {table[KVPG_VALID_BEGIN], row + 1};
}

/* The unit of round j of this block; false after the last. */
template <int SWEEP>
__device__ __forceinline__ bool find_work_unit(const kvpg_attention &p, const schedule &plan, int j, work_unit &u) {
    const int i = j * gridDim.x + (j % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (i >= plan.n_unit) return false;
    const int round = i / (plan.tiles_at_once * plan.n_head), in_round = i % (plan.tiles_at_once * plan.n_head);
    const int n_tile = min(plan.tiles_at_once, plan.n_tile - round * plan.tiles_at_once);
    const int part = in_round / (n_tile * plan.heads_at_once), in_part = in_round % (n_tile * plan.heads_at_once);
    const int head = part * plan.heads_at_once + in_part % plan.heads_at_once,
              tile_rank = round * plan.tiles_at_once + in_part / plan.heads_at_once;
    const int tile = SWEEP == KVPG_SUM ? tile_rank : plan.n_tile - 1 - tile_rank;
    u.b = head / (p.n_head * p.group);
    u.query_head = head % (p.n_head * p.group);
    u.table = kvpg_table_row(p.table, u.b);
    u.n = u.n_first = 0;
    u.begin = u.end = 0;
    if (u.table[KVPG_ENGINE] != KVPG_ON_SM90) return true;
    u.begin = tile * ROWS + (SWEEP == KVPG_SUM ? 0 : first_voter(u.table));
    u.end = min(u.begin + ROWS, SWEEP == KVPG_SUM ? p.n_token : voters_end(u.table));
    for (int s = 0; s < 2; s++) u.cover[s] = cover_of<SWEEP>(p, u.table, s, u.begin, u.end);
    u.n_first = (u.cover[0].hi - u.cover[0].lo + KVPG_TILE - 1) / KVPG_TILE;
    u.n = u.n_first + (u.cover[1].hi - u.cover[1].lo + KVPG_TILE - 1) / KVPG_TILE;
    return true;
}

__device__ __forceinline__ int column_of(const work_unit &u, int t) {
    return t < u.n_first ? u.cover[0].lo + t * KVPG_TILE : u.cover[1].lo + (t - u.n_first) * KVPG_TILE;
}

/* Adds the powers of one tile to the sums of this thread's two rows. Its columns are 8 j + 2 (lane % 4) and the next;
 * exponents are in an order that gives those of two j in one load. Two levels of sums: an error grows with the tiles,
 * not with the columns. */
template <bool MASKED> __device__ __forceinline__ void add_powers(const float (&x)[64], const float4 *exponents,
                                                                  float scale, const kvpg_interval (&mask)[2],
                                                                  int column, float (&sum)[2]) {
    float part[4] = {};
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const float4 four = exponents[j / 2 * 4];
        const float e[2] = {j % 2 ? four.z : four.x, j % 2 ? four.w : four.y};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float power = kvpg_exp2(fmaf(x[4 * j + i], scale, e[i % 2]));
            const int at = column + 8 * j + i % 2;
            if (MASKED) power = at >= mask[i / 2].lo && at < mask[i / 2].hi && !kvpg_is_masked(e[i % 2]) ? power : 0;
            part[i] += power;
        }
    }
    sum[0] += part[0] + part[1];
    sum[1] += part[2] + part[3];
}

/* Addresses in shared memory. */
typedef struct shared_addresses {
    uint32_t ring, rows, full, empty, rows_full, rows_empty;
    float *exponents;
} shared_addresses;

template <int SWEEP> __device__ void produce_tiles(const kvpg_attention &p, const schedule &plan,
                                                   const CUtensorMap *rows, const CUtensorMap *columns,
                                                   const shared_addresses &smem) {
    const int first_query = p.n_token - p.n_query;
    kvpg_pipeline pipeline = {0, 0};
    uint32_t phase = 0;
    work_unit u;
    for (int j = 0; find_work_unit<SWEEP>(p, plan, j, u); j++) {
        if (u.n == 0) continue;
        const int key_head = u.query_head / p.group;
        kvpg_barrier_wait(smem.rows_empty, phase ^ 1);
        phase ^= 1;
        kvpg_barrier_expect(smem.rows_full,
                            ROW_BYTES); /* they come while the last tiles of the unit before are worked on */
        kvpg_copy_tile(smem.rows, rows, smem.rows_full, SWEEP == KVPG_SUM ? u.begin : u.begin - first_query,
                       SWEEP == KVPG_SUM ? key_head : u.query_head, u.b);
        for (int t = 0; t < u.n; t++) {
            const uint32_t full = smem.full + KVPG_BARRIER_BYTES * pipeline.stage;
            kvpg_barrier_wait(smem.empty + KVPG_BARRIER_BYTES * pipeline.stage, pipeline.phase ^ 1);
            kvpg_barrier_expect(full, KVPG_TILE_BYTES);
            kvpg_copy_tile(smem.ring + pipeline.stage * KVPG_TILE_BYTES, columns, full,
                           SWEEP == KVPG_SUM ? column_of(u, t) - first_query : column_of(u, t),
                           SWEEP == KVPG_SUM ? u.query_head : key_head, u.b);
            pipeline.next();
        }
    }
}

/* The exponents of a tile's columns, one tile ahead of their use; see add_powers for their order. */
__device__ void produce_exponents(const kvpg_attention &p, const schedule &plan, const shared_addresses &smem) {
    const int lane = threadIdx.x % 32, slot = lane / 16 * 16 + lane / 2 % 4 * 4 + lane / 8 % 2 * 2 + lane % 2;
    kvpg_pipeline pipeline = {0, 0};
    work_unit u;
    for (int j = 0; find_work_unit<KVPG_SUM>(p, plan, j, u); j++) {
        float next[4];
        const auto load = [&](int t) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = column_of(u, t) + i * 32 + lane;
                next[i] = column < (t < u.n_first ? u.cover[0].hi : u.cover[1].hi)
                              ? *kvpg_exponent_at(p, u.b, u.query_head, column)
                              : -INFINITY;
            }
        };
        if (u.n > 0) load(0);
        for (int t = 0; t < u.n; t++) {
            float now[4];
#pragma unroll
            for (int i = 0; i < 4; i++) now[i] = next[i];
            if (t + 1 < u.n) load(t + 1);
            kvpg_barrier_wait(smem.empty + KVPG_BARRIER_BYTES * pipeline.stage, pipeline.phase ^ 1);
#pragma unroll
            for (int i = 0; i < 4; i++) smem.exponents[pipeline.stage * KVPG_TILE + i * 32 + slot] = now[i];
            __syncwarp();
            kvpg_barrier_arrive(smem.full + KVPG_BARRIER_BYTES * pipeline.stage);
            pipeline.next();
        }
    }
}

/* A warp is done with a stage. */
__device__ __forceinline__ void release(const shared_addresses &smem, kvpg_pipeline &pipeline) {
    __syncwarp();
    kvpg_barrier_arrive(smem.empty + KVPG_BARRIER_BYTES * pipeline.stage);
    pipeline.next();
}

/* This warp's rows of the unit as fragments in registers, once the copy engine has brought them. */
__device__ __forceinline__ void load_rows(const shared_addresses &smem, int group, uint32_t (&rows)[KVPG_DIM / 16][4],
                                          uint32_t &phase) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    kvpg_barrier_wait(smem.rows_full, phase);
    phase ^= 1;
#pragma unroll
    for (int k = 0; k < KVPG_DIM / 16; k++) {
        const int r = group * 64 + warp * 16 + lane % 16, chunk = k % 4 * 2 + lane / 16;
        kvpg_load_matrix(rows[k], smem.rows + k / 4 * (ROWS * 128) + r * 128 + ((chunk ^ (r & 7)) << 4));
    }
    /* The rows were read as ordinary memory and are overwritten by the copy engine: without this fence, rarely, too
     * early. */
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane == 0) kvpg_barrier_arrive(smem.rows_empty);
}

/* What a thread has of its two rows; of a sweep one of them is used. */
struct two_rows {
    kvpg_partial partial[2];
    float sum[2];
};

/* n tiles, of which the first starts at column; MASKED: where a row may not take all of their columns. */
template <typename T, int SWEEP, bool MASKED>
__device__ __forceinline__ void take_tiles(const kvpg_attention &p, const shared_addresses &smem,
                                           const uint32_t (&rows)[KVPG_DIM / 16][4], const kvpg_interval (&mask)[2],
                                           int column, int n, kvpg_pipeline &pipeline, two_rows &total) {
    const int lane = threadIdx.x % 32;
    float x[64];
#pragma unroll 1
    for (int i = 0; i < n; i++) {
        const int first_column = column + i * KVPG_TILE + 2 * (lane % 4);
        kvpg_barrier_wait(smem.full + KVPG_BARRIER_BYTES * pipeline.stage, pipeline.phase);
        multiply_tile<T>(x, rows, ((smem.ring + pipeline.stage * KVPG_TILE_BYTES) >> 4) | 0x10000u);
        if constexpr (SWEEP == KVPG_SUM)
            add_powers<MASKED>(x, (const float4 *)(smem.exponents + pipeline.stage * KVPG_TILE) + lane % 4, p.scale,
                               mask, first_column, total.sum);
        else
            kvpg_add_to_partials<MASKED>(x, p.scale, mask, first_column, total.partial);
        release(smem, pipeline);
    }
}

__device__ __forceinline__ void skip_tiles(const shared_addresses &smem, int n, kvpg_pipeline &pipeline) {
    for (int i = 0; i < n; i++) {
        kvpg_barrier_wait(smem.full + KVPG_BARRIER_BYTES * pipeline.stage, pipeline.phase);
        release(smem, pipeline);
    }
}

template <int SWEEP> __device__ __forceinline__ void store_rows(const kvpg_attention &p, const work_unit &u, int row,
                                                                int end, const two_rows &total) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bool is_mine = threadIdx.x % 4 == 0 && row + 8 * r < end;
        if (SWEEP == KVPG_SUM) {
            const float sum = kvpg_sum_lanes<4>(total.sum[r]);
            if (is_mine) kvpg_sums_of(p, u.b, u.query_head)[row + 8 * r] = sum;
        } else {
            const kvpg_partial partial = kvpg_merge_lanes<4>(total.partial[r]);
            if (is_mine) *kvpg_exponent_at(p, u.b, u.query_head, row + 8 * r) = kvpg_exponent(partial);
        }
    }
}

template <typename T, int SWEEP> __device__ __forceinline__ void consume(const kvpg_attention &p, const schedule &plan,
                                                                         const shared_addresses &smem, int group) {
    uint32_t rows[KVPG_DIM / 16][4], phase = 0;
    kvpg_pipeline pipeline = {0, 0};
    work_unit u;
    for (int j = 0; find_work_unit<SWEEP>(p, plan, j, u); j++) {
        const int first = u.begin + group * 64, end = min(first + 64, u.end),
                  row = first + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        two_rows total = {{{KVPG_LOWEST, 0}, {KVPG_LOWEST, 0}}, {0, 0}};
        if (u.n > 0) load_rows(smem, group, rows, phase);
        for (int s = 0, t = 0; s < 2; s++) {
            const int n = (s ? u.n : u.n_first) - t;
            if (n == 0) continue;
            kvpg_interval mask[2];
#pragma unroll
            for (int r = 0; r < 2; r++) mask[r] = interval_of<SWEEP>(p, u.table, s, row + 8 * r, end);
            const int column = column_of(u, t);
            const kvpg_band band = kvpg_find_band(cover_of<SWEEP>(p, u.table, s, first, end), column, n, KVPG_TILE,
                                                  SWEEP == KVPG_SUM && p.has_masked);
            const auto take = [&](int from, int to, auto masked) {
                take_tiles<T, SWEEP, masked.value>(p, smem, rows, mask, column + from * KVPG_TILE, to - from, pipeline,
                                                   total);
            };
            skip_tiles(smem, band.begin, pipeline);
            take(band.begin, band.full, std::true_type{});
            take(band.full, band.full_end, std::false_type{});
            take(band.full_end, band.end, std::true_type{});
            skip_tiles(smem, n - band.end, pipeline);
            t += n;
        }
        store_rows<SWEEP>(p, u, row, end, total);
        if (++group == GROUPS) group = 0; /* rows at one end have a tile more: take turns */
    }
}

template <typename T, int SWEEP> __global__ void __launch_bounds__(THREADS, 1)
    sweep_sm90(const __grid_constant__ CUtensorMap rows, const __grid_constant__ CUtensorMap columns,
               const __grid_constant__ kvpg_attention p, const schedule plan) {
    kvpg_follow();
    extern __shared__ __align__(1024) uint8_t shared[];
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0); /* the same for a warp, and the compiler knows it */
    shared_addresses smem;
    smem.ring = (uint32_t)__cvta_generic_to_shared(shared);
    smem.rows = smem.ring + KVPG_STAGES * KVPG_TILE_BYTES;
    smem.exponents = (float *)(shared + KVPG_STAGES * KVPG_TILE_BYTES + ROW_BYTES);
    smem.full = smem.rows + ROW_BYTES + KVPG_STAGES * KVPG_TILE * 4;
    smem.empty = smem.full + KVPG_STAGES * KVPG_BARRIER_BYTES;
    smem.rows_full = smem.empty + KVPG_STAGES * KVPG_BARRIER_BYTES;
    smem.rows_empty = smem.rows_full + KVPG_BARRIER_BYTES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < KVPG_STAGES; i++) {
            kvpg_barrier_init(smem.full + KVPG_BARRIER_BYTES * i,
                              SWEEP == KVPG_SUM ? 1 + 32 : 1); /* the engine, and each lane of the exponents' warp */
            kvpg_barrier_init(smem.empty + KVPG_BARRIER_BYTES * i, 128 * GROUPS);
        }
        kvpg_barrier_init(smem.rows_full, 1);
        kvpg_barrier_init(smem.rows_empty, 4 * GROUPS);
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    __syncthreads();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"((int)PRODUCER_REGISTERS));
        if (threadIdx.x == 0)
            produce_tiles<SWEEP>(p, plan, &rows, &columns, smem);
        else if (SWEEP == KVPG_SUM && threadIdx.x / 32 == 1)
            produce_exponents(p, plan, smem);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"((int)CONSUMER_REGISTERS));
        consume<T, SWEEP>(p, plan, smem, group - 1);
    }
}

template <typename T, int SWEEP>
static kvp_status launch(const kvpg_attention *p, const kvp_score_args *args, kvp_context *ctx) {
    CUtensorMap keys, queries;
    KVPI_TRY(kvpg_make_map<T>(&keys, &args->keys, SWEEP == KVPG_SUM ? (int)ROWS : (int)KVPG_TILE, ctx));
    KVPI_TRY(kvpg_make_map<T>(&queries, &args->queries, SWEEP == KVPG_SUM ? (int)KVPG_TILE : (int)ROWS, ctx));
    int n_block;
    KVPG_TRY("count multiprocessors",
             cudaDeviceGetAttribute(&n_block, cudaDevAttrMultiProcessorCount, args->keys.device_index));
    schedule plan;
    plan.n_tile = (int)kvpg_ceil_div(SWEEP == KVPG_SUM ? p->n_token : p->n_query, ROWS);
    plan.n_head = p->n_batch * p->n_head * p->group;
    plan.n_unit = plan.n_tile * plan.n_head;
    plan.heads_at_once =
        plan.n_tile * 4 >= 3 * n_block && plan.n_head % HEADS_AT_ONCE == 0 ? (int)HEADS_AT_ONCE : plan.n_head;
    plan.tiles_at_once = n_block > plan.heads_at_once ? n_block / plan.heads_at_once : 1;
    if (plan.n_unit < n_block) n_block = plan.n_unit;
    const CUtensorMap &rows = SWEEP == KVPG_SUM ? keys : queries, &columns = SWEEP == KVPG_SUM ? queries : keys;
    return kvpg_launch("attention on Hopper", ctx, sweep_sm90<T, SWEEP>, {n_block, 1}, THREADS, 1, SHARED_BYTES, rows,
                       columns, *p, plan);
}

kvp_status kvpg_sweep_sm90(int sweep, const kvpg_attention *p, const kvp_score_args *args, kvp_context *ctx) {
    return kvpg_with_tensor_type(args->keys.dtype, ctx, [&](auto t) {
        using T = typename decltype(t)::type;
        return sweep == KVPG_SUM ? launch<T, KVPG_SUM>(p, args, ctx) : launch<T, KVPG_LSE>(p, args, ctx);
    });
}

/* The copy engine takes no stride of 0, as broadcasting has; the LSE sweep compares products before they are scaled, so
 * scale must not be negative; and a cap would cost more registers than there are. */
static bool can_map(const kvp_tensor *x) {
    bool can = kvpg_has_wide_rows(x);
    for (int d = 0; d < 3; d++) can = can && (x->shape[d] == 1 || x->stride[d] > 0) && x->stride[d] < (int64_t)1 << 38;
    return can;
}

bool kvpg_can_sm90(const kvp_score_args *args) {
    return kvpg_is_tensor_type(args->keys.dtype) && args->keys.shape[3] == KVPG_DIM &&
           args->param[KVPI_PARAM_attention_scaling] > 0 && args->param[KVPI_PARAM_attention_softcap] == 0 &&
           can_map(&args->keys) && can_map(&args->queries);
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * The quota's best positions of each segment on the GPU; see topk.c, whose result this is, exactly. A segment of a row
 * is a problem of its own, because the host's tables tell how many tokens the segments before it keep. Up to 16384 keys
 * are held in the registers of one block, up to 131072 in those of a cluster of eight (Hopper); longer ones, and scores
 * with gaps between them, are read again for each digit, by such a cluster where there are any. Histograms count whole
 * numbers, and places are found by counting, not by atomics: so the result does not depend on the order of anything.
 */
#include "digits.cuh"

extern "C" {
#include "select.h"
}

enum { HELD = 16 }; /* keys a thread; with more it would be short of registers */

/* Fields of a row of the table: the valid range, the S + 1 edges of the segments, the H*S quotas. */
enum { VALID_BEGIN, VALID_END, EDGES };

typedef struct select_job {
    kvpg_rows scores, protect, positions, counts;
    int n_head, n_token, n_kept, n_segment;
    kvpg_table table;
} select_job;

/* One segment of one row. */
typedef struct problem {
    int b, h, begin, n, quota, offset; /* offset: tokens that the segments before keep */
    int32_t *out;                      /* where its first position goes, and the next `step` numbers on */
    int64_t step;
} problem;

/* How many of a segment's positions can be kept, and from where. */
__device__ __forceinline__ int segment_length(const select_job &j, kvpg_numbers row, int s, int *begin) {
    *begin = max(row[EDGES + s], row[VALID_BEGIN]);
    return max(0, min(row[EDGES + s + 1], row[VALID_END]) - *begin);
}

__device__ __forceinline__ problem find_problem(const select_job &j, int index) {
    const int row = index / j.n_segment, segment = index % j.n_segment;
    problem p = {row / j.n_head, row % j.n_head, 0, 0, 0, 0, NULL, j.positions.t / (int64_t)sizeof(int32_t)};
    const kvpg_numbers table = kvpg_table_row(j.table, p.b),
                       quotas = table + (EDGES + j.n_segment + 1 + p.h * j.n_segment);
    for (int s = 0; s <= segment; s++) {
        p.offset += p.quota;
        p.n = segment_length(j, table, s, &p.begin);
        p.quota = min(quotas[s], p.n);
    }
    p.out = (int32_t *)kvpg_row(j.positions, p.b, p.h, p.offset);
    return p;
}

/* Behind the kept positions stands -1; the block of a row's last segment sees to it. */
__device__ __forceinline__ void finish_row(const select_job &j, const problem &p) {
    const int kept = p.offset + p.quota;
    if (threadIdx.x == 0 && j.counts.data) /* a press may have none */
        *(int32_t *)(j.counts.data + p.b * j.counts.b + p.h * j.counts.h) = kept;
    for (int i = kept + threadIdx.x; i < j.n_kept; i += THREADS) *(int32_t *)kvpg_row(j.positions, p.b, p.h, i) = -1;
}

__device__ __forceinline__ bool is_protected(const select_job &j, const problem &p, int i) {
    return i < p.n && *(const uint8_t *)(j.protect.data + p.b * j.protect.b + (p.begin + i) * j.protect.t);
}

__device__ __forceinline__ uint32_t rank_at(const select_job &j, const problem &p, int i) {
    if (i >= p.n) return 0;
    return j.protect.data && is_protected(j, p, i)
               ? UINT32_MAX
               : rank_of(*(const uint32_t *)kvpg_row(j.scores, p.b, p.h, p.begin + i));
}

/* Those of positions first, first + 32, ..., of scores side by side. No branch stands between the loads, so that all
 * are under way at once. */
template <int N>
__device__ __forceinline__ void load_ranks(const select_job &j, const problem &p, int first, uint32_t (&rank)[N]) {
    const uint32_t *scores = (const uint32_t *)kvpg_row(j.scores, p.b, p.h, 0) + p.begin + first;
#pragma unroll
    for (int i = 0; i < N; i++) rank[i] = first + i * 32 < p.n ? kvpg_load(scores + i * 32) : 0;
    if (j.protect.data) {
#pragma unroll
        for (int i = 0; i < N; i++)
            rank[i] = first + i * 32 >= p.n ? 0 : is_protected(j, p, first + i * 32) ? UINT32_MAX : rank_of(rank[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) rank[i] = first + i * 32 < p.n ? rank_of(rank[i]) : 0;
    }
}

/* What the blocks of a cluster see of each other. */
typedef struct histogram {
    uint32_t bin[BINS], coarse[BINS / 64]; /* coarse: sums of 64 bins */
} histogram;

/* By one warp: the bin that holds the need-th largest; need becomes the rank inside it. */
template <int BLOCKS> __device__ __forceinline__ uint32_t find_bin(const histogram *h, uint32_t &need) {
    const int lane = threadIdx.x % 32;
    uint32_t sum = 0, high = 0, low = 0;
#pragma unroll
    for (int c = 0; c < BLOCKS; c++) sum += of_block<BLOCKS>(h, c)->coarse[31 - lane];
    uint32_t scanned = scan_warp(sum);
    int first = __ffs(__ballot_sync(~0u, scanned >= need)) - 1;
    need -= __shfl_sync(~0u, scanned - sum, first);
    const int base = (31 - first) * 64;
#pragma unroll
    for (int c = 0; c < BLOCKS; c++) {
        const uint2 pair = *(const uint2 *)(of_block<BLOCKS>(h, c)->bin + base + 62 - 2 * lane);
        high += pair.y;
        low += pair.x;
    }
    sum = high + low;
    scanned = scan_warp(sum);
    first = __ffs(__ballot_sync(~0u, scanned >= need)) - 1;
    need -= __shfl_sync(~0u, scanned - sum, first);
    high = __shfl_sync(~0u, high, first);
    if (need <= high) return base + 63 - 2 * first;
    need -= high;
    return base + 62 - 2 * first;
}

__device__ __forceinline__ void sum_coarse(histogram *h) {
    const int warp = threadIdx.x / 32;
    const uint2 pair = *(const uint2 *)(h->bin + warp * 64 + 2 * (threadIdx.x % 32));
    const uint32_t sum = __reduce_add_sync(~0u, pair.x + pair.y);
    if (threadIdx.x % 32 == 0) h->coarse[warp] = sum;
}

/* Where a warp's kept positions go: above the threshold, and equal to it, before this warp. */
typedef struct output_offsets {
    uint32_t above, equal;
} output_offsets;

/* Takes from 32 ranks in order of position what is above the threshold, and equals while any are left. */
__device__ __forceinline__ void take(const problem &p, uint32_t rank, uint32_t i, uint32_t threshold, uint32_t ties,
                                     output_offsets &offsets, uint32_t end) {
    const uint32_t before = (1u << threadIdx.x % 32) - 1;
    const bool is_above = rank > threshold, is_equal = rank == threshold && i < end;
    const uint32_t all_above = __ballot_sync(~0u, is_above), all_equal = __ballot_sync(~0u, is_equal);
    const uint32_t above = offsets.above + __popc(all_above & before),
                   equal = offsets.equal + __popc(all_equal & before);
    if (is_above || (is_equal && equal < ties)) p.out[(above + min(equal, ties)) * p.step] = p.begin + i;
    offsets.above += __popc(all_above);
    offsets.equal += __popc(all_equal);
}

/* The bin of a digit's histogram that holds the need-th largest of all blocks; need becomes the rank inside it. */
template <int BLOCKS> __device__ __forceinline__ uint32_t agree_on_bin(histogram *h, uint2 *agreed, uint32_t &need) {
    __syncthreads();
    sum_coarse(h);
    wait_for_cluster<BLOCKS>();
    if constexpr (BLOCKS == 1) {
        return find_bin<1>(h, need); /* every warp for itself: nothing to hand round, no further barrier */
    } else {
        if (threadIdx.x / 32 == 0) {
            const uint32_t bin = find_bin<BLOCKS>(h, need);
            if (threadIdx.x == 0) *agreed = make_uint2(bin, need);
        }
        __syncthreads();
        need = agreed->y;
        return agreed->x;
    }
}

/* What is above the threshold, and equal to it, before this warp, of what each warp of each block has. */
template <int BLOCKS> __device__ __forceinline__ output_offsets scan_cluster(uint32_t above, uint32_t equal) {
    __shared__ uint32_t above_of[WARPS], equal_of[WARPS];
    __shared__ [[maybe_unused]] output_offsets of_blocks[BLOCKS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    above = __reduce_add_sync(~0u, above);
    equal = __reduce_add_sync(~0u, equal);
    if (lane == 0) above_of[warp] = above, equal_of[warp] = equal;
    __syncthreads();
    const uint32_t scanned_above = scan_warp(above_of[lane]), scanned_equal = scan_warp(equal_of[lane]);
    output_offsets offsets = {__shfl_sync(~0u, scanned_above, warp) - above,
                              __shfl_sync(~0u, scanned_equal, warp) - equal};
#if __CUDA_ARCH__ >= 900
    if constexpr (BLOCKS > 1) { /* each tells all, so that nobody reads from a block that may have left */
        const int block = block_of_cluster<BLOCKS>();
        if (threadIdx.x == 31)
            for (int c = 0; c < BLOCKS; c++)
                cg::this_cluster().map_shared_rank(of_blocks, c)[block] = output_offsets{scanned_above, scanned_equal};
        cg::this_cluster().sync();
        for (int c = 0; c < block; c++) offsets.above += of_blocks[c].above, offsets.equal += of_blocks[c].equal;
    }
#endif
    return offsets;
}

/* The problem of this block's cluster, with empty histograms; the first block of a row's last one sees to what is
 * behind it. */
template <int BLOCKS> __device__ __forceinline__ problem start_problem(const select_job &j, histogram *h) {
#if __CUDA_ARCH__ < 900
    if (BLOCKS > 1) __trap(); /* kvpg_launch does not start it */
#endif
    for (int i = threadIdx.x; i < DIGITS * BINS; i += THREADS) h[i / BINS].bin[i % BINS] = 0;
    kvpg_follow();
    const int index = blockIdx.x / BLOCKS;
    const problem p = find_problem(j, index);
    if (block_of_cluster<BLOCKS>() == 0 && index % j.n_segment == j.n_segment - 1) finish_row(j, p);
    return p;
}

/*
 * Ranks in registers, N_HELD a thread, BLOCKS blocks a problem. Item i of lane l of warp w is w*32*N_HELD + i*32 + l of
 * its block, so that ballots count in order of position.
 */
template <int BLOCKS, int N_HELD> __global__ void __launch_bounds__(THREADS, 1)
    select_held(const __grid_constant__ select_job j) {
    __shared__ __align__(16) histogram h[DIGITS];
    __shared__ [[maybe_unused]] uint2 agreed[DIGITS];
    const int block = block_of_cluster<BLOCKS>(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const problem p = start_problem<BLOCKS>(j, h);
    if (p.quota == 0) return; /* all blocks of the cluster */
    const int first = block * THREADS * N_HELD + warp * 32 * N_HELD + lane;
    uint32_t rank[N_HELD];
    load_ranks(j, p, first, rank);
    __syncthreads();
    uint32_t prefix = 0, need = p.quota; /* ranks with a larger prefix are kept, and need more of this one */
#pragma unroll
    for (int digit = 0; digit < DIGITS; digit++) {
        const int shift = digit_shift(digit), bits = digit_bits(digit);
#pragma unroll
        for (int i = 0; i < N_HELD; i++)
            if (digit == 0 ? first + i * 32 < p.n : rank[i] >> (shift + bits) == prefix)
                atomicAdd(&h[digit].bin[rank[i] >> shift & ((1u << bits) - 1)], 1u);
        prefix = prefix << bits | agree_on_bin<BLOCKS>(&h[digit], &agreed[digit], need);
    }
    uint32_t above = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < N_HELD; i++) {
        above += rank[i] > prefix;
        equal += rank[i] == prefix && first + i * 32 < p.n;
    }
    output_offsets offsets = scan_cluster<BLOCKS>(above, equal);
#pragma unroll
    for (int i = 0; i < N_HELD; i++) take(p, rank[i], first + i * 32, prefix, need, offsets, p.n);
}

enum { READ = 8 }; /* ranks that a thread reads at once, so that it waits for all of them together */

/* Those of positions first, first + 32, ... below end, of scores with any gaps. */
__device__ __forceinline__ void read_ranks(const select_job &j, const problem &p, uint32_t first, uint32_t end,
                                           uint32_t (&rank)[READ]) {
#pragma unroll
    for (int i = 0; i < READ; i++) rank[i] = first + i * 32 < end ? rank_at(j, p, first + i * 32) : 0;
}

/* Ranks read again for each digit: BLOCKS blocks a problem, each warp a stretch of it. */
template <int BLOCKS> static __global__ void __launch_bounds__(THREADS, 1)
    select_long(const __grid_constant__ select_job j) {
    __shared__ __align__(16) histogram h[DIGITS];
    __shared__ [[maybe_unused]] uint2 agreed[DIGITS];
    const int block = block_of_cluster<BLOCKS>(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const problem p = start_problem<BLOCKS>(j, h);
    if (p.quota == 0) return; /* all blocks of the cluster */
    const uint32_t stretch = ((uint32_t)p.n + THREADS * BLOCKS - 1) / (THREADS * BLOCKS) * 32,
                   begin = min((block * WARPS + warp) * stretch, (uint32_t)p.n),
                   end = min(begin + stretch, (uint32_t)p.n);
    __syncthreads();
    uint32_t prefix = 0, need = p.quota, rank[READ];
    for (int digit = 0; digit < DIGITS; digit++) {
        const int shift = digit_shift(digit), bits = digit_bits(digit);
        for (uint32_t at = begin + lane; at < end; at += 32 * READ) {
            read_ranks(j, p, at, end, rank);
#pragma unroll
            for (int i = 0; i < READ; i++)
                if (at + i * 32 < end && (digit == 0 || rank[i] >> (shift + bits) == prefix))
                    atomicAdd(&h[digit].bin[rank[i] >> shift & ((1u << bits) - 1)], 1u);
        }
        prefix = prefix << bits | agree_on_bin<BLOCKS>(&h[digit], &agreed[digit], need);
    }
    uint32_t above = 0, equal = 0;
    for (uint32_t at = begin + lane; at < end; at += 32 * READ) {
        read_ranks(j, p, at, end, rank);
#pragma unroll
        for (int i = 0; i < READ; i++) above += rank[i] > prefix, equal += rank[i] == prefix && at + i * 32 < end;
    }
    output_offsets offsets = scan_cluster<BLOCKS>(above, equal);
    for (uint32_t at = begin; at < end; at += 32 * READ) {
        read_ranks(j, p, at + lane, end, rank);
#pragma unroll
        for (int i = 0; i < READ; i++) take(p, rank[i], at + lane + i * 32, prefix, need, offsets, end);
    }
}

template <int BLOCKS>
static kvp_status launch_held(const select_job &j, int64_t longest, int64_t n_problem, kvp_context *ctx) {
    const int64_t held = (longest + THREADS * BLOCKS - 1) / (THREADS * BLOCKS);
    void (*kernel)(select_job) = select_held<BLOCKS, HELD>;
    if (held <= 1)
        kernel = select_held<BLOCKS, 1>;
    else if (held <= 2)
        kernel = select_held<BLOCKS, 2>;
    else if (held <= 4)
        kernel = select_held<BLOCKS, 4>;
    else if (held <= 8)
        kernel = select_held<BLOCKS, 8>;
    return kvpg_launch("select", ctx, kernel, {n_problem * BLOCKS, 1}, THREADS, BLOCKS, 0, j);
}

static int64_t table_stride(const kvp_select_args *args) {
    return EDGES + args->segments.shape[1] + args->quotas.shape[1] * args->quotas.shape[2];
}

extern "C" size_t kvpi_select_cuda_workspace(const kvp_select_args *args) {
    return kvpg_table_bytes(args->scores.shape[0], table_stride(args));
}

/* Also finds the length of the longest segment. */
static kvp_status write_table(const kvp_select_args *args, kvp_context *ctx, kvpg_table *table, int64_t *length) {
    kvpg_writer w;
    int64_t longest = 0;
    kvpg_start_table(&w, table, args->scores.shape[0], table_stride(args), ctx->workspace, ctx);
    for (int64_t b = 0; b < args->scores.shape[0]; b++) {
        int64_t begin, end;
        kvpi_valid_range(&args->valid, b, args->scores.shape[2], &begin, &end);
        kvpg_put(&w, begin);
        kvpg_put(&w, end);
        for (int64_t e = 0, last = 0; e < args->segments.shape[1]; e++) {
            const int64_t edge = kvpi_i32(&args->segments, b, e, 0);
            longest = e > 0 && edge - last > longest ? edge - last : longest;
            kvpg_put(&w, last = edge);
        }
        for (int64_t h = 0; h < args->quotas.shape[1]; h++)
            for (int64_t s = 0; s < args->quotas.shape[2]; s++) kvpg_put(&w, kvpi_i32(&args->quotas, b, h, s));
    }
    *length = longest;
    return kvpg_end_table(&w);
}

extern "C" kvp_status kvpi_select_cuda(const kvp_select_args *args, kvp_context *ctx) {
    const int64_t *shape = args->scores.shape;
    select_job j;
    j.scores = kvpg_rows_of(&args->scores);
    j.positions = kvpg_rows_of(&args->positions);
    j.counts = kvpg_rows{(const char *)args->counts.data, args->counts.stride[0] * 4, args->counts.stride[1] * 4, 0, 0};
    j.protect = kvpg_rows{(const char *)args->protect.data, args->protect.stride[0], 0, args->protect.stride[1], 0};
    j.n_head = (int)shape[1];
    j.n_token = (int)shape[2];
    j.n_kept = (int)args->positions.shape[2];
    j.n_segment = (int)args->quotas.shape[2];
    int64_t longest;
    KVPI_TRY(write_table(args, ctx, &j.table, &longest));
    const int64_t n_problem = shape[0] * shape[1] * j.n_segment;
    cudaError_t error;
    const bool has_clusters = kvpg_ptx_version((const void *)select_held<CLUSTER, HELD>, &error) >= KVPG_HOPPER,
               side_by_side = args->scores.stride[2] == 1 || shape[2] == 1;
    if (side_by_side &&
        longest <= (has_clusters ? 8192 : HELD * THREADS)) /* starting a cluster takes time, which pays from there */
        return launch_held<1>(j, longest, n_problem, ctx);
    else if (side_by_side && has_clusters && longest <= CLUSTER * HELD * THREADS)
        return launch_held<CLUSTER>(j, longest, n_problem, ctx);
    if (has_clusters && longest > CLUSTER * THREADS)
        return kvpg_launch("select", ctx, select_long<CLUSTER>, {n_problem * CLUSTER, 1}, THREADS, CLUSTER, 0, j);
    return kvpg_launch("select", ctx, select_long<1>, {n_problem, 1}, THREADS, 1, 0, j);
}

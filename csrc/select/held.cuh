/* SPDX-License-Identifier: Apache-2.0
 *
 * Selection from one segment, whose scores' ranks the threads of a block, or of a cluster, hold in registers: for
 * topk.cu, and for a press (evict/press.cu).
 */
#ifndef KVP_HELD_CUH
#define KVP_HELD_CUH

#include "digits.cuh"

extern "C" {
#include "select.h"
}

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

/* Before the first segment of a row. */
__device__ __forceinline__ problem start_row(const select_job &j, int row) {
    return {row / j.n_head, row % j.n_head, 0, 0, 0, 0, NULL, j.positions.t / (int64_t)sizeof(int32_t)};
}

/* Goes on to segment s, the next one. */
__device__ __forceinline__ void go_on(const select_job &j, int s, problem &p) {
    const kvpg_numbers table = kvpg_table_row(j.table, p.b);
    p.offset += p.quota;
    p.n = segment_length(j, table, s, &p.begin);
    p.quota = min(table[EDGES + j.n_segment + 1 + p.h * j.n_segment + s], p.n);
}

__device__ __forceinline__ problem find_problem(const select_job &j, int index) {
    problem p = start_row(j, index / j.n_segment);
    for (int s = 0; s <= index % j.n_segment; s++) go_on(j, s, p);
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

/* Those of positions first, first + 32, ..., of scores whose bits load(position in the segment) gives. No branch stands
 * between the loads, so that all are under way at once. */
template <int N, typename LOAD> __device__ __forceinline__ void
load_ranks(const select_job &j, const problem &p, int first, uint32_t (&rank)[N], const LOAD &load) {
#pragma unroll
    for (int i = 0; i < N; i++) rank[i] = first + i * 32 < p.n ? load(first + i * 32) : 0;
    if (j.protect.data) {
#pragma unroll
        for (int i = 0; i < N; i++)
            rank[i] = first + i * 32 >= p.n ? 0 : is_protected(j, p, first + i * 32) ? UINT32_MAX : rank_of(rank[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) rank[i] = first + i * 32 < p.n ? rank_of(rank[i]) : 0;
    }
}

/* The score of a place in a segment, from memory where scores stand side by side. */
__device__ __forceinline__ auto scores_in_memory(const select_job &j, const problem &p) {
    const uint32_t *scores = (const uint32_t *)kvpg_row(j.scores, p.b, p.h, 0) + p.begin;
    return [=](int i) { return kvpg_load(scores + i); };
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

/* Takes from 32 ranks in order of position what is above the threshold, and equals while any are left: put(place among
 * what the segment keeps, position). */
template <typename PUT> __device__ __forceinline__ void take(const problem &p, uint32_t rank, uint32_t i,
                                                             uint32_t threshold, uint32_t ties, output_offsets &offsets,
                                                             uint32_t end, const PUT &put) {
    const uint32_t before = (1u << threadIdx.x % 32) - 1;
    const bool is_above = rank > threshold, is_equal = rank == threshold && i < end;
    const uint32_t all_above = __ballot_sync(~0u, is_above), all_equal = __ballot_sync(~0u, is_equal);
    const uint32_t above = offsets.above + __popc(all_above & before),
                   equal = offsets.equal + __popc(all_equal & before);
    if (is_above || (is_equal && equal < ties)) put(above + min(equal, ties), p.begin + i);
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

/* Where a problem's positions go: place among what its segment keeps, position. wants: whether any of places begin to
 * end is asked for. */
typedef struct to_memory {
    int32_t *out;
    int64_t step;
    __device__ __forceinline__ bool wants(uint32_t, uint32_t) const { return true; }
    __device__ __forceinline__ void operator()(uint32_t place, int position) const { out[place * step] = position; }
} to_memory;

__device__ __forceinline__ void clear(histogram *h) {
    for (int i = threadIdx.x; i < DIGITS * BINS; i += THREADS) h[i / BINS].bin[i % BINS] = 0;
}

/* Kept are ranks above this one, and so many that are equal to it. */
typedef struct threshold {
    uint32_t rank, ties;
} threshold;

/* The digit of the need-th largest: its bin, its place in the bin, and how many the bin has. */
typedef struct found {
    uint32_t bin, need, count;
} found;

/* By one block, of whose warps each looks at 64 bins. */
__device__ __forceinline__ found find_digit(const histogram &h, uint32_t need) {
    __shared__ uint32_t sum_of[WARPS];
    __shared__ found agreed;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, high = warp * 64 + 63 - 2 * lane;
    __syncthreads(); /* all are counted */
    const uint2 pair = *(const uint2 *)(h.bin + high - 1);
    const uint32_t sum = pair.x + pair.y, scanned = scan_warp(sum);
    if (lane == 31) sum_of[warp] = scanned;
    __syncthreads();
    const uint32_t before = __reduce_add_sync(~0u, lane > warp ? sum_of[lane] : 0) + scanned - sum;
    if (before < need && need <= before + pair.y)
        agreed = found{(uint32_t)high, need - before, pair.y};
    else if (before + pair.y < need && need <= before + sum)
        agreed = found{(uint32_t)high - 1, need - before - pair.y, pair.x};
    __syncthreads();
    return agreed;
}

enum { FEW = 32 }; /* ranks that one warp puts in order */

/* The need-th largest of few ranks, by the first warp, for all. */
__device__ __forceinline__ threshold find_among(const uint32_t (&few)[FEW], int count, uint32_t need) {
    __shared__ threshold agreed;
    __syncthreads(); /* all are there */
    if (threadIdx.x < 32) {
        const uint32_t own = (int)threadIdx.x < count ? few[threadIdx.x] : 0; /* 0 is below all */
        uint32_t above = 0, equal = 0;
        for (int first = 0; first < count; first += 8)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32_t other = __shfl_sync(~0u, own, first + i);
                above += other > own;
                equal += other == own;
            }
        if (own != 0 && above < need && need <= above + equal) agreed = threshold{own, need - above}; /* all the same */
    }
    __syncthreads();
    return agreed;
}

/*
 * By one block: item i of lane l of warp w is w*32*N + i*32 + l, of n. What all ranks have in common is left out, so
 * that the first digit tells most of them apart; few that are left are put in order, instead of a further digit. The
 * histograms must be empty.
 */
template <int N> __device__ __forceinline__ threshold find_threshold(const uint32_t (&rank)[N], int first, int n,
                                                                     uint32_t need, histogram *h) {
    __shared__ uint32_t low_of[WARPS], high_of[WARPS], few[FEW], n_few;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t low = UINT32_MAX, high = 0;
#pragma unroll
    for (int i = 0; i < N; i++) low = min(low, rank[i] - 1), high = max(high, rank[i]); /* 0 - 1: behind the end */
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (lane == 0) low_of[warp] = low, high_of[warp] = high;
    if (threadIdx.x == 0) n_few = 0;
    __syncthreads(); /* and the histograms are empty */
    low = __reduce_min_sync(~0u, low_of[lane]) + 1;
    high = __reduce_max_sync(~0u, high_of[lane]);
    int bits = 11, shift = max(0, 32 - bits - __clz(high - low));
    uint32_t prefix = 0; /* of a rank's distance from the lowest; larger ones are kept, and need more of this one */
    for (int digit = 0;; digit++) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const uint32_t x = rank[i] - low;
            if (first + i * 32 < n && (digit == 0 || x >> shift >> bits == prefix))
                atomicAdd(&h[digit].bin[x >> shift & ((1u << bits) - 1)], 1u);
        }
        const found f = find_digit(h[digit], need);
        prefix = prefix << bits | f.bin;
        need = f.need;
        if (shift == 0) return {low + prefix, need};
        if (f.count == need) return {low + (prefix << shift) - 1, 0}; /* all of the bin */
        if (f.count <= FEW) {
#pragma unroll
            for (int i = 0; i < N; i++)
                if (first + i * 32 < n && rank[i] - low >> shift == prefix) few[atomicAdd(&n_few, 1u)] = rank[i];
            return find_among(few, f.count, need);
        }
        bits = min(shift, 11);
        shift -= bits;
    }
}

/* By the blocks of a cluster, digit by digit: they have less to agree on. */
template <int BLOCKS, int N> __device__ __forceinline__ threshold find_threshold_together(const uint32_t (&rank)[N],
                                                                                          int first, int n,
                                                                                          uint32_t need, histogram *h) {
    __shared__ uint2 agreed[DIGITS];
    __syncthreads();     /* the histograms are empty */
    uint32_t prefix = 0; /* ranks with a larger prefix are kept, and need more of this one */
#pragma unroll
    for (int digit = 0; digit < DIGITS; digit++) {
        const int shift = digit_shift(digit), bits = digit_bits(digit);
#pragma unroll
        for (int i = 0; i < N; i++)
            if (digit == 0 ? first + i * 32 < n : rank[i] >> (shift + bits) == prefix)
                atomicAdd(&h[digit].bin[rank[i] >> shift & ((1u << bits) - 1)], 1u);
        prefix = prefix << bits | agree_on_bin<BLOCKS>(&h[digit], &agreed[digit], need);
    }
    return {prefix, need};
}

/* As scan_cluster, by one block of at most 16384 keys: two numbers fit into one. */
__device__ __forceinline__ output_offsets scan_block(uint32_t above, uint32_t equal) {
    __shared__ uint32_t of_warps[WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t both = __reduce_add_sync(~0u, above << 16 | equal);
    if (lane == 0) of_warps[warp] = both;
    __syncthreads();
    const uint32_t before = __reduce_add_sync(~0u, lane < warp ? of_warps[lane] : 0);
    return {before >> 16, before & 0xffff};
}

/*
 * Ranks in registers, N_HELD a thread, BLOCKS blocks a problem. Item i of lane l of warp w is w*32*N_HELD + i*32 + l of
 * its block, so that ballots count in order of position. The histograms must be empty; another call needs a barrier
 * behind this one.
 */
template <int BLOCKS, int N_HELD, typename LOAD, typename PUT> __device__ __forceinline__ void
select_segment(const select_job &j, const problem &p, histogram *h, const LOAD &load, const PUT &put) {
    const int block = block_of_cluster<BLOCKS>(), warp = threadIdx.x / 32, lane = threadIdx.x % 32,
              first = block * THREADS * N_HELD + warp * 32 * N_HELD + lane;
    uint32_t rank[N_HELD];
    threshold kept;
    load_ranks(j, p, first, rank, load);
    if constexpr (BLOCKS == 1 && N_HELD <= 8) /* with more there are no registers left for it */
        kept = find_threshold(rank, first, p.n, p.quota, h);
    else
        kept = find_threshold_together<BLOCKS>(rank, first, p.n, p.quota, h);
    uint32_t above = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < N_HELD; i++) {
        above += rank[i] > kept.rank;
        equal += rank[i] == kept.rank && first + i * 32 < p.n;
    }
    output_offsets offsets;
    if constexpr (BLOCKS == 1)
        offsets = scan_block(above, equal);
    else
        offsets = scan_cluster<BLOCKS>(above, equal);
    const uint32_t begin = offsets.above + min(offsets.equal, kept.ties);
    if (!put.wants(begin, begin + N_HELD * 32)) return;
#pragma unroll
    for (int i = 0; i < N_HELD; i++) take(p, rank[i], first + i * 32, kept.rank, kept.ties, offsets, p.n, put);
}

/* The job of a selection, and the length of its longest segment (topk.cu). */
kvp_status kvpg_make_select_job(const kvp_select_args *args, kvp_context *ctx, select_job *job, int64_t *longest);

#endif

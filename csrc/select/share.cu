/* SPDX-License-Identifier: Apache-2.0
 *
 * What heads keep that share their quotas, on the GPU; see share.c, whose result this is, exactly. A cluster of eight
 * blocks (Hopper; elsewhere one block) takes a segment of a batch row, each block every eighth head. For each digit it
 * counts what its heads would keep from each bin on, and all blocks add that up. Nothing is remembered of a head from
 * one pass to the next: how many it has above the prefix, and how many are infinite, is counted again.
 */
#include "digits.cuh"

extern "C" {
#include "select.h"
}

enum { READ = 8 }; /* scores that a thread reads at once, so that it waits for all of them together */

static constexpr uint32_t INFINITE = 0xff800000u; /* its rank */

/* Fields of a row of the table: the S + 1 edges of the segments, the S totals, the H*S quotas, the H*S floors; none of
 * them more than there is. */
typedef struct share_job {
    kvpg_rows scores, counts;
    int n_head, n_segment;
    uint2 *kept; /* (B,S,H): what each head keeps above the last rank that is kept, and how many more with it */
    kvpg_table table;
} share_job;

/* One segment of one batch row. */
typedef struct problem {
    int b, s, begin, n;
    uint32_t total;
    kvpg_numbers quotas, floors; /* of head h: at h * n_segment */
} problem;

__device__ __forceinline__ problem find_problem(const share_job &j, int index) {
    const int b = index / j.n_segment, s = index % j.n_segment;
    const kvpg_numbers row = kvpg_table_row(j.table, b), totals = row + (j.n_segment + 1),
                       quotas = totals + (j.n_segment + s);
    return {b, s, row[s], row[s + 1] - row[s], (uint32_t)totals[s], quotas, quotas + j.n_head * j.n_segment};
}

/* f(rank) of each of a head's scores. */
template <typename F>
__device__ __forceinline__ void for_each_rank(const share_job &j, const problem &p, int h, const F &f) {
    const uint32_t n = p.n;
    for (uint32_t at = threadIdx.x; at < n; at += THREADS * READ) {
        uint32_t bits[READ];
#pragma unroll
        for (int i = 0; i < READ; i++)
            bits[i] = at + i * THREADS < n ? *(const uint32_t *)kvpg_row(j.scores, p.b, h, p.begin + at + i * THREADS)
                                           : 0; /* by the first-level cache: it is read again */
#pragma unroll
        for (int i = 0; i < READ; i++)
            if (at + i * THREADS < n) f(rank_of(bits[i]));
    }
}

/* The sum over the block. Two calls must have different places, or a barrier between them. */
__device__ __forceinline__ uint32_t sum_block(uint32_t x, uint32_t (&of_warps)[WARPS]) {
    x = __reduce_add_sync(~0u, x);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    return __reduce_add_sync(~0u, of_warps[threadIdx.x % 32]);
}

/* Bins 2 t and 2 t + 1 of thread t become the sums of all from themselves on. */
__device__ __forceinline__ uint2 sum_from(uint2 bins, uint32_t (&of_warps)[WARPS]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t sum = bins.x + bins.y;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const uint32_t next = __shfl_down_sync(~0u, sum, o);
        if (lane + o < 32) sum += next;
    }
    if (lane == 0) of_warps[warp] = sum;
    __syncthreads();
    sum += __reduce_add_sync(~0u, lane > warp ? of_warps[lane] : 0);
    return make_uint2(sum, sum - bins.x);
}

__device__ __forceinline__ uint32_t sure_of(const share_job &j, const problem &p, int h, uint32_t infinite) {
    return max((uint32_t)p.floors[h * j.n_segment], min((uint32_t)p.quotas[h * j.n_segment], infinite));
}

/* What the block's heads keep from each bin of a digit on; of thread t, bins 2 t and 2 t + 1. */
template <int BLOCKS>
__device__ __forceinline__ uint2 keep_from(const share_job &j, const problem &p, int digit, uint32_t prefix) {
    __shared__ __align__(8) uint32_t bins[BINS];
    __shared__ uint32_t above_of[WARPS], infinite_of[WARPS], bins_of[WARPS];
    const int shift = digit_shift(digit), bits = digit_bits(digit);
    uint2 *own = (uint2 *)bins + threadIdx.x, kept = make_uint2(0, 0);
    for (int h = block_of_cluster<BLOCKS>(); h < j.n_head; h += BLOCKS) {
        uint32_t above = 0, infinite = 0;
        *own = make_uint2(0, 0);
        __syncthreads();
        for_each_rank(j, p, h, [&](uint32_t rank) {
            const uint32_t front = digit == 0 ? 0 : rank >> (shift + bits);
            infinite += rank == INFINITE;
            above += front > prefix;
            if (front == prefix) atomicAdd(&bins[rank >> shift & ((1u << bits) - 1)], 1u);
        });
        above = sum_block(above, above_of);
        infinite = sum_block(infinite, infinite_of);
        const uint2 from = sum_from(*own, bins_of);
        const uint32_t sure = sure_of(j, p, h, infinite);
        kept.x += max(sure, above + from.x);
        kept.y += max(sure, above + from.y);
    }
    return kept;
}

/* The highest bin from which on all heads keep enough together, behind the prefix. */
template <int BLOCKS>
__device__ __forceinline__ uint32_t find_digit(const share_job &j, const problem &p, int digit, uint32_t prefix) {
    __shared__ [[maybe_unused]] uint2 of_blocks[DIGITS][BLOCKS > 1 ? THREADS : 1]; /* for all the cluster to read */
    uint2 kept = keep_from<BLOCKS>(j, p, digit, prefix);
    if constexpr (BLOCKS > 1) {
        of_blocks[digit][threadIdx.x] = kept;
        wait_for_cluster<BLOCKS>();
        kept = make_uint2(0, 0);
        for (int c = 0; c < BLOCKS; c++) {
            const uint2 one = of_block<BLOCKS>(of_blocks[digit], c)[threadIdx.x];
            kept.x += one.x;
            kept.y += one.y;
        }
    }
    /* what is kept falls from bin to bin, and the lowest keeps enough; a short digit has no ranks in its upper half */
    const int bits = digit_bits(digit);
    const bool is_digit = 2 * threadIdx.x < 1u << bits;
    const int n =
        __syncthreads_count(is_digit && kept.x >= p.total) + __syncthreads_count(is_digit && kept.y >= p.total);
    return prefix << bits | (uint32_t)(n - 1);
}

/* Those of the threshold's rank fill up what is left, head by head: by one warp. */
__device__ __forceinline__ void write_counts(const share_job &j, const problem &p, const uint2 *kept) {
    const int lane = threadIdx.x;
    uint32_t left = p.total;
    for (int h = lane; h - lane < j.n_head; h += 32)
        left -= __reduce_add_sync(~0u, h < j.n_head ? kvpg_load(&kept[h].x) : 0);
    for (int h = lane; h - lane < j.n_head; h += 32) {
        const uint32_t sure = h < j.n_head ? kvpg_load(&kept[h].x) : 0,
                       equal = h < j.n_head ? kvpg_load(&kept[h].y) : 0;
        const uint32_t before = scan_warp(equal) - equal, more = min(equal, left - min(left, before));
        if (h < j.n_head) *(int32_t *)kvpg_row(j.counts, p.b, h, p.s) = sure + more;
        left -= __reduce_add_sync(~0u, more);
    }
}

template <int BLOCKS> __global__ void __launch_bounds__(THREADS, 1) share(const __grid_constant__ share_job j) {
#if __CUDA_ARCH__ < 900
    if (BLOCKS > 1) __trap(); /* kvpg_launch does not start it */
#endif
    __shared__ uint32_t above_of[WARPS], equal_of[WARPS], infinite_of[WARPS];
    kvpg_follow();
    const int index = blockIdx.x / BLOCKS, block = block_of_cluster<BLOCKS>();
    const problem p = find_problem(j, index);
    uint2 *kept = j.kept + (int64_t)index * j.n_head;
    uint32_t last = 0; /* the rank of the last that is kept */
#pragma unroll
    for (int digit = 0; digit < DIGITS; digit++) last = find_digit<BLOCKS>(j, p, digit, last);
    for (int h = block; h < j.n_head; h += BLOCKS) {
        uint32_t above = 0, equal = 0, infinite = 0;
        for_each_rank(j, p, h, [&](uint32_t rank) {
            above += rank > last;
            equal += rank == last;
            infinite += rank == INFINITE;
        });
        __syncthreads(); /* the sums of the head before were read */
        above = sum_block(above, above_of);
        equal = sum_block(equal, equal_of);
        const uint32_t sure = sure_of(j, p, h, sum_block(infinite, infinite_of)), least = max(sure, above);
        if (threadIdx.x == 0) kept[h] = make_uint2(least, max(sure, above + equal) - least);
    }
    __threadfence();
    wait_for_cluster<BLOCKS>();
    if (block == 0 && threadIdx.x < 32) write_counts(j, p, kept);
}

static int64_t table_stride(const kvp_share_args *args) {
    const int64_t n_segment = args->quotas.shape[2];
    return 2 * n_segment + 1 + 2 * args->quotas.shape[1] * n_segment;
}

extern "C" size_t kvpi_share_cuda_workspace(const kvp_share_args *args) {
    const int64_t *shape = args->quotas.shape;
    return kvpg_table_bytes(shape[0], table_stride(args)) +
           kvpi_round_up_64((size_t)(shape[0] * shape[1] * shape[2]) * sizeof(uint2));
}

static int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

/* Also finds the length of the longest segment. */
static kvp_status write_table(const kvp_share_args *args, kvp_context *ctx, kvpg_table *table, int64_t *longest) {
    const int64_t n_batch = args->quotas.shape[0], n_head = args->quotas.shape[1], n_segment = args->quotas.shape[2];
    const kvp_tensor *const of_heads[] = {&args->quotas, &args->floors};
    kvpg_writer w;
    *longest = 0;
    kvpg_start_table(&w, table, n_batch, table_stride(args), ctx->workspace, ctx);
    for (int64_t b = 0; b < n_batch; b++) {
        const auto length = [&](int64_t s) {
            return (int64_t)kvpi_i32(&args->segments, b, s + 1, 0) - kvpi_i32(&args->segments, b, s, 0);
        };
        for (int64_t e = 0; e <= n_segment; e++) kvpg_put(&w, kvpi_i32(&args->segments, b, e, 0));
        for (int64_t s = 0; s < n_segment; s++) {
            int64_t total = 0;
            for (int64_t h = 0; h < n_head; h++) total += kvpi_i32(&args->quotas, b, h, s);
            kvpg_put(&w, smaller(total, n_head * length(s)));
            *longest = length(s) > *longest ? length(s) : *longest;
        }
        for (const kvp_tensor *numbers : of_heads)
            for (int64_t h = 0; h < n_head; h++)
                for (int64_t s = 0; s < n_segment; s++) kvpg_put(&w, smaller(kvpi_i32(numbers, b, h, s), length(s)));
    }
    return kvpg_end_table(&w);
}

extern "C" kvp_status kvpi_share_cuda(const kvp_share_args *args, kvp_context *ctx) {
    const int64_t *shape = args->quotas.shape;
    share_job j;
    j.scores = kvpg_rows_of(&args->scores);
    j.counts = kvpg_rows_of(&args->counts);
    j.n_head = (int)shape[1];
    j.n_segment = (int)shape[2];
    j.kept = (uint2 *)((char *)ctx->workspace + kvpg_table_bytes(shape[0], table_stride(args)));
    int64_t longest;
    KVPI_TRY(write_table(args, ctx, &j.table, &longest));
    cudaError_t error;
    const bool has_clusters = kvpg_ptx_version((const void *)share<CLUSTER>, &error) >= KVPG_HOPPER;
    if (has_clusters && longest * shape[1] > 8192) /* starting a cluster takes time, which pays from there */
        return kvpg_launch("share", ctx, share<CLUSTER>, {shape[0] * shape[2] * CLUSTER, 1}, THREADS, CLUSTER, 0, j);
    return kvpg_launch("share", ctx, share<1>, {shape[0] * shape[2], 1}, THREADS, 1, 0, j);
}

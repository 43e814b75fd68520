/* SPDX-License-Identifier: Apache-2.0
 *
 * The quota's best positions of each segment on the GPU; see topk.c, whose result this is, exactly. A segment of a row
 * is a problem of its own, because the host's tables tell how many tokens the segments before it keep. Up to 16384 keys
 * are held in the registers of one block, up to 131072 in those of a cluster of eight (Hopper); longer ones, and scores
 * with gaps between them, are read again for each digit, by such a cluster where there are any. Histograms count whole
 * numbers, and places are found by counting, not by atomics: so the result does not depend on the order of anything.
 */
#include "held.cuh"

enum { HELD = 16 }; /* keys a thread; with more it would be short of registers */

/* The problem of this block's cluster, with empty histograms; the first block of a row's last one sees to what is
 * behind it. */
template <int BLOCKS> __device__ __forceinline__ problem start_problem(const select_job &j, histogram *h) {
#if __CUDA_ARCH__ < 900
    if (BLOCKS > 1) __trap(); /* kvpg_launch does not start it */
#endif
    clear(h);
    kvpg_follow();
    const int index = blockIdx.x / BLOCKS;
    const problem p = find_problem(j, index);
    if (block_of_cluster<BLOCKS>() == 0 && index % j.n_segment == j.n_segment - 1) finish_row(j, p);
    return p;
}

/* Ranks in registers: see select_segment. */
template <int BLOCKS, int N_HELD> __global__ void __launch_bounds__(THREADS, 1)
    select_held(const __grid_constant__ select_job j) {
    __shared__ __align__(16) histogram h[DIGITS];
    const problem p = start_problem<BLOCKS>(j, h);
    if (p.quota == 0) return; /* all blocks of the cluster */
    select_segment<BLOCKS, N_HELD>(j, p, h, scores_in_memory(j, p), to_memory{p.out, p.step});
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
        for (int i = 0; i < READ; i++)
            take(p, rank[i], at + lane + i * 32, prefix, need, offsets, end, to_memory{p.out, p.step});
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

kvp_status kvpg_make_select_job(const kvp_select_args *args, kvp_context *ctx, select_job *job, int64_t *longest) {
    select_job &j = *job;
    j.scores = kvpg_rows_of(&args->scores);
    j.positions = kvpg_rows_of(&args->positions);
    j.counts = kvpg_rows{(const char *)args->counts.data, args->counts.stride[0] * 4, args->counts.stride[1] * 4, 0, 0};
    j.protect = kvpg_rows{(const char *)args->protect.data, args->protect.stride[0], 0, args->protect.stride[1], 0};
    j.n_head = (int)args->scores.shape[1];
    j.n_token = (int)args->scores.shape[2];
    j.n_kept = (int)args->positions.shape[2];
    j.n_segment = (int)args->quotas.shape[2];
    return write_table(args, ctx, &j.table, longest);
}

extern "C" kvp_status kvpi_select_cuda(const kvp_select_args *args, kvp_context *ctx) {
    const int64_t *shape = args->scores.shape;
    select_job j;
    int64_t longest;
    KVPI_TRY(kvpg_make_select_job(args, ctx, &j, &longest));
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

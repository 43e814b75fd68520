/* SPDX-License-Identifier: Apache-2.0
 *
 * Selecting and copying by one kernel, for a press of few short rows, which waits for launches and latency more than
 * for memory. Several blocks have a row, and each selects from all of its scores, which takes no longer than if one did
 * it for all; then each copies its share of what is kept. Many rows, or long ones, fare better by topk.cu and
 * gather.cu, whose result this is, since the arithmetic is theirs.
 */
#include "../score/made.cuh"
#include "../select/held.cuh"
#include "gather.cuh"

/* Blocks of a row, all of which are at work at once; a block copies what is kept of LONGEST tokens at most. More of
 * either gains little (H200). */
enum { IN_FLIGHT = 4, FEWEST_BLOCKS = 4, MOST_BLOCKS = 16, LONGEST = 512 };

typedef struct press_job {
    select_job select;
    kvpg_made made; /* where scores are not in memory */
    copy copies[2];
    int n_block, n_share; /* blocks of a row, and kept rows of each */
} press_job;

/* A block's share of the positions. */
typedef struct to_share {
    int *kept;
    int offset, first, last; /* offset: what the segments before keep */
    __device__ __forceinline__ bool wants(uint32_t begin, uint32_t end) const {
        return offset + (int)end > first && offset + (int)begin < last;
    }
    __device__ __forceinline__ void operator()(uint32_t place, int position) const {
        const int i = offset + (int)place;
        if (i >= first && i < last) kept[i - first] = position;
    }
} to_share;

/* The first half of the threads copies keys, the other values. */
template <int LANES>
__device__ __forceinline__ void copy_share(const press_job &j, const problem &p, const int *kept, int first, int last) {
    const int half = THREADS / 2, group = threadIdx.x % half / LANES, n_group = half / LANES;
    const copy &c = j.copies[threadIdx.x / half];
    for (int i = first + group; i < last; i += n_group * IN_FLIGHT)
        kvpg_copy_rows<LANES, IN_FLIGHT>(c, p.b, p.h, i, n_group, last, [&](int at) { return kept[at - first]; });
}

/* MADE: the scores follow from places, and are nowhere in memory. */
template <int LANES, int N_HELD, bool MADE> __global__ void __launch_bounds__(THREADS, 1)
    select_and_copy(const __grid_constant__ press_job j) {
    extern __shared__ int kept[];
    __shared__ __align__(16) histogram h[DIGITS];
    const select_job &s = j.select;
    const int block = blockIdx.x % j.n_block, first = block * j.n_share, last = min(first + j.n_share, s.n_kept);
    clear(h);
    for (int i = threadIdx.x; i < j.n_share; i += THREADS) kept[i] = -1;
    kvpg_follow();
    problem p = start_row(s, blockIdx.x / j.n_block);
    const kvpg_numbers table = kvpg_table_row(s.table, p.b);
    const int begin = table[VALID_BEGIN];
    const uint64_t head = MADE ? kvpg_start_scores<THREADS>(j.made, p.b, p.h, begin, table[VALID_END]) : 0;
    for (int segment = 0; segment < s.n_segment; segment++) { /* all are counted, those with a part in the share read */
        go_on(s, segment, p);
        if (p.quota == 0 || p.offset >= last || p.offset + p.quota <= first) continue;
        const to_share share = {kept, p.offset, first, last};
        if constexpr (MADE)
            select_segment<1, N_HELD>(
                s, p, h, [&](int i) { return __float_as_uint(kvpg_make_score(j.made, head, begin, p.begin + i)); },
                share);
        else
            select_segment<1, N_HELD>(s, p, h, scores_in_memory(s, p), share);
        if (segment + 1 == s.n_segment) break;
        __syncthreads();
        clear(h);
    }
    if (block == 0 && threadIdx.x == 0 && s.counts.data)
        *(int32_t *)(s.counts.data + p.b * s.counts.b + p.h * s.counts.h) = p.offset + p.quota;
    __syncthreads();
    for (int i = first + threadIdx.x; i < last; i += THREADS)
        *(int32_t *)kvpg_row(s.positions, p.b, p.h, i) = kept[i - first];
    copy_share<LANES>(j, p, kept, first, last);
}

typedef void (*press_kernel)(press_job);

template <int LANES, bool MADE> static press_kernel kernel_for(int64_t longest) {
    return longest <= THREADS       ? select_and_copy<LANES, 1, MADE>
           : longest <= 2 * THREADS ? select_and_copy<LANES, 2, MADE>
           : longest <= 4 * THREADS ? select_and_copy<LANES, 4, MADE>
                                    : select_and_copy<LANES, 8, MADE>;
}

template <bool MADE> static press_kernel kernel_of(int n_unit, int64_t longest) {
    return n_unit <= 8    ? kernel_for<8, MADE>(longest)
           : n_unit <= 16 ? kernel_for<16, MADE>(longest)
                          : kernel_for<32, MADE>(longest);
}

extern "C" kvp_status kvpi_press_cuda(const kvp_score_args *score, const kvp_select_args *select,
                                      const kvp_gather_args *gather, kvpi_score_fn *write_scores, kvp_context *ctx) {
    const int64_t n_row = gather->keys.shape[0] * gather->keys.shape[1],
                  longer = max(gather->keys.shape[2], gather->positions.shape[2]); /* the cache, or its padded copy */
    const bool is_made = kvpg_is_made(score->scorer);
    int n_sm;
    KVPG_TRY("count its multiprocessors",
             cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, gather->keys.device_index));
    const int n_block = min((int)(n_sm / n_row), (int)MOST_BLOCKS);
    const bool is_apart = n_block < FEWEST_BLOCKS || longer > n_block * LONGEST || !kvpg_is_wide(gather);
    if (is_apart || !is_made) KVPI_TRY(write_scores(score, ctx));
    if (is_apart) {
        KVPI_TRY(kvpi_select_cuda(select, ctx));
        return kvpi_gather_cuda(gather, ctx);
    }
    press_job j;
    int64_t longest;
    KVPI_TRY(kvpg_make_select_job(select, ctx, &j.select, &longest));
    if (is_made) j.made = kvpg_make_scores(score);
    j.copies[0] = kvpg_make_copy(&gather->keys, &gather->out_keys, 16);
    j.copies[1] = kvpg_make_copy(&gather->values, &gather->out_values, 16);
    j.n_block = n_block;
    j.n_share = (int)kvpg_ceil_div(j.select.n_kept, j.n_block);
    const int n_unit = max(j.copies[0].n_unit, j.copies[1].n_unit);
    const press_kernel kernel = is_made ? kernel_of<true>(n_unit, longest) : kernel_of<false>(n_unit, longest);
    return kvpg_launch("select_and_copy", ctx, kernel, {n_row * j.n_block, 1}, THREADS, 1,
                       (size_t)j.n_share * sizeof(int), j);
}

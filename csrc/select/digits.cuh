/* SPDX-License-Identifier: Apache-2.0
 *
 * What topk.cu and share.cu search by on the GPU: ranks (ranks.h), their digits, and blocks that work together.
 */
#ifndef KVP_DIGITS_CUH
#define KVP_DIGITS_CUH

#include "../gpu/tables.cuh"

#include <cooperative_groups.h>

namespace cg = cooperative_groups;

enum { THREADS = 1024, WARPS = THREADS / 32, BINS = 2048, CLUSTER = 8, DIGITS = 3 };

/* The order of kvp.h as an unsigned number; 0 is below all. */
__device__ __forceinline__ uint32_t rank_of(uint32_t bits) {
    if (bits == 0x80000000u) bits = 0; /* -0 and +0 are equal */
    const uint32_t rank = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 1 : rank; /* NaN */
}

__device__ __forceinline__ int digit_shift(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }
__device__ __forceinline__ int digit_bits(int digit) { return digit == 2 ? 10 : 11; }

__device__ __forceinline__ uint32_t scan_warp(uint32_t x) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const uint32_t y = __shfl_up_sync(~0u, x, o);
        if (lane >= o) x += y;
    }
    return x;
}

/* The same shared memory, of another block of the cluster. */
template <int BLOCKS, typename T> __device__ __forceinline__ const T *of_block(const T *x, int block) {
#if __CUDA_ARCH__ >= 900
    if constexpr (BLOCKS > 1) return cg::this_cluster().map_shared_rank(x, block);
#endif
    return x;
}

/* The block of a cluster that this is, and that it waits for all of them. */
template <int BLOCKS> __device__ __forceinline__ int block_of_cluster() { return BLOCKS > 1 ? blockIdx.x % BLOCKS : 0; }

template <int BLOCKS> __device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    if constexpr (BLOCKS > 1) {
        cg::this_cluster().sync();
        return;
    }
#endif
    __syncthreads();
}

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * What the engines for Hopper share (sm90.cu, window.cu): tiles of 128 elements of 16 bits, brought by the copy engine
 * through a ring in shared memory.
 */
#ifndef KVP_HOPPER_CUH
#define KVP_HOPPER_CUH

#include "sweep.cuh"

#include <cuda.h>

enum {
    KVPG_DIM = 128,
    KVPG_HALF = 64,  /* elements of the 128 bytes that a swizzled row of shared memory has */
    KVPG_TILE = 128, /* rows that come at once */
    KVPG_TILE_BYTES = KVPG_TILE * KVPG_DIM * 2,
    KVPG_STAGES = 4,
    KVPG_BARRIER_BYTES = 8,
};

__device__ __forceinline__ void kvpg_barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void kvpg_barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void kvpg_barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void kvpg_barrier_wait(uint32_t barrier, uint32_t phase) {
    asm volatile("{\n.reg .pred done;\n"
                 "wait_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra go_%=;\nbra wait_%=;\ngo_%=:\n}\n" ::"r"(barrier),
                 "r"(phase)
                 : "memory");
}

/* One copy brings both halves of the rows from `row` on: the map has the dimensions {64, rows, 2 halves, heads, batch}.
 */
__device__ __forceinline__ void kvpg_copy_tile(uint32_t to, const CUtensorMap *map, uint32_t barrier, int row, int head,
                                               int b) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %3, "
                 "%5, %6}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(head), "r"(b)
                 : "memory");
}

/* Which stage of the ring is next, and which pass through it. */
typedef struct kvpg_pipeline {
    int stage;
    uint32_t phase;
    __device__ __forceinline__ void next() {
        if (++stage == KVPG_STAGES) stage = 0, phase ^= 1;
    }
} kvpg_pipeline;

/* Adds a tile of products to the partial softmaxes of a thread's two rows, of which it has columns 8 j + 2 (lane % 4)
 * and the next; column: the first of these. scale > 0. */
template <bool MASKED, int N>
__device__ __forceinline__ void kvpg_add_to_partials(float (&x)[N], float scale, const kvpg_interval (&mask)[2],
                                                     int column, kvpg_partial (&partial)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top[2] = {-INFINITY, -INFINITY}, part[2] = {};
#pragma unroll
        for (int j = 0; j < N / 4; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float &product = x[4 * j + 2 * r + i];
                const int at = column + 8 * j + i;
                if (MASKED) product = at >= mask[r].lo && at < mask[r].hi ? product : -INFINITY;
                top[i] = fmaxf(top[i], product);
            }
        kvpg_raise_max(partial[r], fmaxf(top[0], top[1]) * scale);
#pragma unroll
        for (int j = 0; j < N / 4; j++)
#pragma unroll
            for (int i = 0; i < 2; i++) part[i] += kvpg_exp2(fmaf(x[4 * j + 2 * r + i], scale, -partial[r].max));
        partial[r].sum += part[0] + part[1];
    }
}

typedef CUresult (*kvpg_encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                   const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

template <typename T> struct kvpg_map_type;
#define KVPG_MAP_TYPE(dtype, type, name, map)             \
    template <> struct kvpg_map_type<type> {              \
        static constexpr CUtensorMapDataType value = map; \
    };
KVPG_TENSOR_TYPES(KVPG_MAP_TYPE)
#undef KVPG_MAP_TYPE

/* Where to find `box` rows of x at a time; rows past the end come as zeros. */
template <typename T>
static inline kvp_status kvpg_make_map(CUtensorMap *map, const kvp_tensor *x, int box, kvp_context *ctx) {
    void *encode = NULL;
    cudaDriverEntryPointQueryResult found;
    KVPG_TRY("look up cuTensorMapEncodeTiled",
             cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess)
        return kvpi_fail(ctx, KVP_ERR_CUDA,
                         "the driver has no cuTensorMapEncodeTiled; expected one of CUDA 12 or later");
    const int64_t *n = x->shape;
    cuuint64_t dims[5] = {KVPG_HALF, (cuuint64_t)n[2], KVPG_DIM / KVPG_HALF, (cuuint64_t)n[1], (cuuint64_t)n[0]},
               strides[4];
    const int64_t compact = KVPG_DIM * n[2]; /* of dimensions of one element, whose stride may be anything */
    strides[0] = 2 * (cuuint64_t)(n[2] > 1 ? x->stride[2] : (int64_t)KVPG_DIM);
    strides[1] = 2 * KVPG_HALF;
    strides[2] = 2 * (cuuint64_t)(n[1] > 1 ? x->stride[1] : compact);
    strides[3] = 2 * (cuuint64_t)(n[0] > 1 ? x->stride[0] : compact);
    const cuuint32_t boxes[5] = {KVPG_HALF, (cuuint32_t)box, KVPG_DIM / KVPG_HALF, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
    const CUresult result = ((kvpg_encode_fn)encode)(
        map, kvpg_map_type<T>::value, 5, x->data, dims, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS
               ? KVP_OK
               : kvpi_fail(ctx, KVP_ERR_CUDA, "cuTensorMapEncodeTiled failed with CUresult %d", (int)result);
}

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * Device primitives of the CUDA files: element types as float, tensor-core and copy instructions, launches. The only
 * inline assembly but for Hopper's own (score/attention/sm90.cu).
 */
#ifndef KVP_ROWS_CUH
#define KVP_ROWS_CUH

extern "C" {
#include "../core/internal.h"
}

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

/* As KVPI_TRY, for calls of the CUDA runtime; what: what they are for, after "could not". */
#define KVPG_TRY(what, call)                                                                                \
    do {                                                                                                    \
        const cudaError_t error_ = (call);                                                                  \
        if (error_ != cudaSuccess)                                                                          \
            return kvpi_fail(ctx, KVP_ERR_CUDA, "CUDA could not " what ": %s", cudaGetErrorString(error_)); \
    } while (0)

static inline cudaStream_t kvpg_stream(const kvp_context *ctx) { return (cudaStream_t)ctx->stream; }

/*
 * Stands at the beginning of every kernel, before it touches global memory and before any thread may leave: from here
 * on, what the kernels before it wrote is there. The kernel behind it may come up as soon as all blocks of this one are
 * at work, and waits at this place, too.
 *
 * So a kernel may be at work while memory that it is going to read is still being written. No load may then go through
 * the read-only path (ld.global.nc, __ldg, __restrict__): it asks for memory that nobody writes as long as the kernel
 * lives. "make cuda" looks for both faults.
 */
__device__ __forceinline__ void kvpg_follow() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* A number that the kernel before may have written, from the cache that all blocks share. */
__device__ __forceinline__ uint32_t kvpg_load(const void *from) {
    uint32_t x;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

/* The compute capability, times 10, of the PTX that a kernel's code for the current device was made from. Not the
 * device's own: a build may lack code for it, and then runs what is older. Asked for once for each kernel, nearly: one
 * kernel may push another out of the table, which is written whole, so any thread reads a true entry. 0 and an error
 * where CUDA does not tell. */
static inline int kvpg_ptx_version(const void *kernel, cudaError_t *error) {
    enum { SLOTS = 64 };
    static uint64_t known[SLOTS]; /* kernel, device, version: 48, 8 and 8 bits */
    int device;
    if ((*error = cudaGetDevice(&device)) != cudaSuccess) return 0;
    const uint64_t key = (uint64_t)(uintptr_t)kernel << 8 | (uint64_t)(device & 0xff);
    uint64_t *slot = &known[(key * 0x9e3779b97f4a7c15u) >> 58];
    const uint64_t entry = __atomic_load_n(slot, __ATOMIC_RELAXED);
    if (entry >> 8 == (key & (UINT64_MAX >> 8)) && device < 0xff) return (int)(entry & 0xff);
    cudaFuncAttributes attributes;
    if ((*error = cudaFuncGetAttributes(&attributes, kernel)) != cudaSuccess) return 0;
    __atomic_store_n(slot, key << 8 | (uint64_t)(attributes.ptxVersion & 0xff), __ATOMIC_RELAXED);
    return attributes.ptxVersion;
}

/* Code that knows of clusters and of programmatic launch. */
enum { KVPG_HOPPER = 90 };

/* Blocks of a launch. */
typedef struct kvpg_grid {
    int64_t x, y;
} kvpg_grid;

/* Starts a kernel that begins with kvpg_follow(). Where its code is for Hopper, its start overlaps the end of the
 * kernel before: a microsecond saved on each (H100). */
template <typename... FORMAL, typename... ACTUAL>
static inline kvp_status kvpg_launch(const char *name, kvp_context *ctx, void (*kernel)(FORMAL...), kvpg_grid grid,
                                     int n_thread, int cluster, size_t shared, const ACTUAL &...arguments) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attributes[2] = {};
    cudaError_t error;
    const int version = kvpg_ptx_version((const void *)kernel, &error);
    if (error != cudaSuccess)
        return kvpi_fail(ctx, KVP_ERR_CUDA, "the kernel %s has no code for this device: %s", name,
                         cudaGetErrorString(error));
    if (cluster > 1 && version < KVPG_HOPPER)
        return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED,
                         "the kernel %s was compiled for compute capability %d.%d; expected 9.0 or later, for clusters",
                         name, version / 10, version % 10);
    if (grid.x > INT32_MAX || grid.y > 65535)
        return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED,
                         "the kernel %s would need %lld by %lld blocks; expected at most 2147483647 by 65535", name,
                         (long long)grid.x, (long long)grid.y);
    config.gridDim = dim3((unsigned)grid.x, (unsigned)grid.y);
    config.blockDim = dim3(n_thread);
    config.dynamicSmemBytes = shared;
    config.stream = kvpg_stream(ctx);
    config.attrs = attributes;
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = cluster;
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.numAttrs = version < KVPG_HOPPER ? 0 : cluster > 1 ? 2 : 1;
    if (shared > 48 << 10)
        KVPG_TRY("give a kernel its shared memory",
                 cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
    return error == cudaSuccess
               ? KVP_OK
               : kvpi_fail(ctx, KVP_ERR_CUDA, "the kernel %s did not start: %s", name, cudaGetErrorString(error));
}

/* Rows that 16-byte accesses can read: no gap between elements, every row on a 16-byte boundary. */
static inline bool kvpg_has_wide_rows(const kvp_tensor *t) {
    const int64_t size = (int64_t)kvpi_dtype_size(t->dtype);
    bool wide = (t->shape[3] == 1 || t->stride[3] == 1) && t->shape[3] * size % 16 == 0 && (uintptr_t)t->data % 16 == 0;
    for (int d = 0; d < 3; d++) wide = wide && (t->shape[d] == 1 || t->stride[d] * size % 16 == 0);
    return wide;
}

/* Batch rows times heads that one launch can number. */
enum { KVPG_MAX_ROWS = 65535 };

static inline int64_t kvpg_ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

/* The rows (b, h, t) of a tensor, addressed on the device. */
typedef struct kvpg_rows {
    const char *data;
    int64_t b, h, t, d; /* strides in bytes */
} kvpg_rows;

static inline kvpg_rows kvpg_rows_of(const kvp_tensor *x) {
    const int64_t size = (int64_t)kvpi_dtype_size(x->dtype);
    return kvpg_rows{(const char *)x->data, x->stride[0] * size, x->stride[1] * size, x->stride[2] * size,
                     x->ndim > 3 ? x->stride[3] * size : size};
}

__device__ __forceinline__ const char *kvpg_row(const kvpg_rows &x, int64_t b, int64_t h, int64_t t) {
    return x.data + b * x.b + h * x.h + t * x.t;
}

/* Element types: a DO(dtype, type) for each, and for those that tensor cores multiply a DO(dtype, type, its name in
 * PTX, its name for the copy engine). */
#define KVPG_TENSOR_TYPES(DO)                                   \
    DO(KVP_F16, __half, "f16", CU_TENSOR_MAP_DATA_TYPE_FLOAT16) \
    DO(KVP_BF16, __nv_bfloat16, "bf16", CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
#define KVPG_TYPES(DO) DO(KVP_F32, float, , ) KVPG_TENSOR_TYPES(DO)

template <typename T> struct kvpg_type {
    using type = T;
};

/* f(kvpg_type<the type of dtype>()). */
#define KVPG_CASE(dtype, type, ...) \
    case dtype: return f(kvpg_type<type>());
template <typename F> static inline kvp_status kvpg_with_type(int32_t dtype, kvp_context *ctx, F f) {
    switch (dtype) { KVPG_TYPES(KVPG_CASE) }
    return kvpi_fail(ctx, KVP_ERR_INTERNAL, "a kernel was asked for %s", kvpi_dtype_name(dtype));
}
template <typename F> static inline kvp_status kvpg_with_tensor_type(int32_t dtype, kvp_context *ctx, F f) {
    switch (dtype) { KVPG_TENSOR_TYPES(KVPG_CASE) }
    return kvpi_fail(ctx, KVP_ERR_INTERNAL, "a kernel for tensor cores was asked for %s", kvpi_dtype_name(dtype));
}
#undef KVPG_CASE

static inline bool kvpg_is_tensor_type(int32_t dtype) {
#define KVPG_IS(known, ...) || dtype == known
    return false KVPG_TENSOR_TYPES(KVPG_IS);
#undef KVPG_IS
}

__device__ __forceinline__ float kvpg_float(float x) { return x; }
__device__ __forceinline__ float kvpg_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float kvpg_float(__nv_bfloat16 x) { return __bfloat162float(x); }

/* The sum of squares of 16 bytes of elements. */
template <typename T> __device__ __forceinline__ float kvpg_square_sum(uint4 v) {
    const T *x = (const T *)&v;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < (int)(16 / sizeof(T)); i++) sum = fmaf(kvpg_float(x[i]), kvpg_float(x[i]), sum);
    return sum;
}

/* 2^x and log2 x to about 2 units in the last place; results below 2^-126 are 0. */
__device__ __forceinline__ float kvpg_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The greater of two numbers; NaN, where one is. */
__device__ __forceinline__ float kvpg_max(float x, float y) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(x), "f"(y));
    return most;
}

/* What the second-level cache is to do with what is read: to keep it as any, or to put others in its place first. */
__device__ __forceinline__ uint64_t kvpg_stay() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint64_t kvpg_pass() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

/* 16 bytes by such a policy. */
__device__ __forceinline__ uint4 kvpg_load_wide(const void *from, uint64_t policy) {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from), "l"(policy)
                 : "memory");
    return x;
}

/* 16 bytes from global to shared memory in the background; bytes = 0 writes zeros and reads nothing. */
__device__ __forceinline__ void kvpg_copy_async(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void kvpg_copy_float_async(uint32_t to, const float *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void kvpg_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void kvpg_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Four 8x8 matrices of 16-bit elements, or 8x4 of 32 bits, one row address from each lane. */
__device__ __forceinline__ void kvpg_load_matrix(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

/* The same, each transposed: of what stands in columns. */
__device__ __forceinline__ void kvpg_load_matrix_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

/* d += a b: 16x16 by 16x8 (of float, which is tf32 here, 16x8 by 8x8), sums in float32. */
template <typename T>
__device__ __forceinline__ void kvpg_multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define KVPG_MMA(dtype, type, name, map)                                                                   \
    template <> __device__ __forceinline__ void kvpg_multiply<type>(float (&d)[4], const uint32_t (&a)[4], \
                                                                    uint32_t b0, uint32_t b1) {            \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                 \
                     "{%0, %1, %2, %3};"                                                                   \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                      \
    }
KVPG_TENSOR_TYPES(KVPG_MMA)
#undef KVPG_MMA
template <>
__device__ __forceinline__ void kvpg_multiply<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

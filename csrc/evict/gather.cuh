/* SPDX-License-Identifier: Apache-2.0
 *
 * Copying rows that stand on 16-byte boundaries, for gather.cu and for a press (press.cu).
 */
#ifndef KVP_GATHER_CUH
#define KVP_GATHER_CUH

#include "../gpu/rows.cuh"

extern "C" {
#include "evict.h"
}

/* One of keys and values. */
typedef struct copy {
    kvpg_rows in, out;
    int n_unit; /* 16-byte pieces or elements of a row */
} copy;

static inline copy kvpg_make_copy(const kvp_tensor *in, const kvp_tensor *out, int64_t unit_bytes) {
    return copy{kvpg_rows_of(in), kvpg_rows_of(out),
                (int)(in->shape[3] * (int64_t)kvpi_dtype_size(in->dtype) / unit_bytes)};
}

/* Whether all rows of keys and values are on such boundaries, in and out. */
static inline bool kvpg_is_wide(const kvp_gather_args *args) {
    return kvpg_has_wide_rows(&args->keys) && kvpg_has_wide_rows(&args->values) &&
           kvpg_has_wide_rows(&args->out_keys) && kvpg_has_wide_rows(&args->out_values);
}

/* Rows first, first + step, ... below end, N at most, by LANES lanes, past the caches and all in flight at once.
 * position_of(row) is where a row comes from, below 0: nowhere, it becomes zeros. */
template <int LANES, int N, typename POSITION> __device__ __forceinline__ void
kvpg_copy_rows(const copy &c, int b, int h, int first, int step, int end, const POSITION &position_of) {
    int position[N];
#pragma unroll
    for (int i = 0; i < N; i++) position[i] = first + i * step < end ? position_of(first + i * step) : -1;
    for (int unit = threadIdx.x % LANES; unit < c.n_unit; unit += LANES) {
        uint4 v[N];
#pragma unroll
        for (int i = 0; i < N; i++)
            v[i] = position[i] >= 0 ? __ldcs((const uint4 *)kvpg_row(c.in, b, h, position[i]) + unit)
                                    : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < N; i++)
            if (first + i * step < end) __stcs((uint4 *)kvpg_row(c.out, b, h, first + i * step) + unit, v[i]);
    }
}

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * Copies the kept rows of keys and values: bytes only, whatever the element type. Rows are walked upwards, and a row's source never lies
 * below its destination when the output is the start of the input, so compaction in place is safe.
 */
#include "evict.h"

#include <string.h>

/* One row of n elements. Rows with unit stride are one move; memmove because in place a row may be its own source. */
static void copy_row(const kvp_tensor *in, const char *source, const kvp_tensor *out, char *target) {
    const size_t size = kvpi_dtype_size(out->dtype);
    const int64_t n = out->shape[3];
    if (in->stride[3] == 1 && out->stride[3] == 1) {
        memmove(target, source, (size_t)n * size);
        return;
    }
    for (int64_t d = 0; d < n; d++) memmove(target + d * out->stride[3] * (int64_t)size, source + d * in->stride[3] * (int64_t)size, size);
}

static void zero_row(const kvp_tensor *out, char *target) {
    const size_t size = kvpi_dtype_size(out->dtype);
    for (int64_t d = 0; d < out->shape[3]; d++) memset(target + d * out->stride[3] * (int64_t)size, 0, size);
}

static void gather_row(void *arg, int64_t task, int32_t worker) {
    (void)worker;
    const kvp_gather_args *args = arg;
    const int64_t n_head = args->keys.shape[1], n_row = args->keys.shape[0] * n_head;
    const bool is_key = task < n_row;
    const kvp_tensor *in = is_key ? &args->keys : &args->values, *out = is_key ? &args->out_keys : &args->out_values;
    const int64_t b = task % n_row / n_head, h = task % n_head;
    for (int64_t i = 0; i < out->shape[2]; i++) {
        const int64_t position = kvpi_i32(&args->positions, b, h, i);
        char *target = kvpi_at(out, b, h, i);
        if (position < 0)
            zero_row(out, target);
        else
            copy_row(in, kvpi_at(in, b, h, position), out, target);
    }
}

kvp_status kvpi_gather_cpu(const kvp_gather_args *args, kvp_context *ctx) {
    KVPI_TRY(kvpi_check_position_values(args, ctx));
    const int64_t n_row = args->keys.shape[0] * args->keys.shape[1];
    const double row_bytes = (double)kvpi_dtype_size(args->keys.dtype) * (double)(args->keys.shape[3] + args->values.shape[3]);
    kvpi_run(ctx, 2 * n_row, (double)n_row * (double)args->positions.shape[2] * (row_bytes * 0.1 + 5), gather_row, (void *)(uintptr_t)args);
    return KVP_OK;
}

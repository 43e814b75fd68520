/* SPDX-License-Identifier: Apache-2.0
 *
 * Copies the kept rows of keys and values: bytes only, whatever the element type. Rows are walked upwards, and a row's
 * source never lies below its destination when the output is the start of the input, so compaction in place is safe.
 */
#include "../rows/rows.h"
#include "evict.h"

#include <string.h>

enum {
    LINE = 64,
    /* Kept rows leave gaps that stop the hardware's own look-ahead; so the rows that are kept are asked for, this many
     * before they are copied. Where only few are left out, what comes next is asked for as it stands, gaps and all.
     * Best of 205, 8 heads of 8192 rows of 256 bytes, with gaps and without: a quarter kept 2.64 and 2.28 ms, half 2.98
     * and 3.19, three quarters 3.58 and 4.38, half in runs of eight 2.91 and 2.25 (AMD EPYC, Zen 3, AVX2). On an Intel
     * Xeon with AVX-512 a random half goes from 0.64 of memcpy's speed to 0.98, a quarter from 0.40 to 0.75. */
    ROWS_AHEAD = 32,
    AHEAD = 4096, /* bytes */
};

/* Outputs of this size go past the caches: they would not stay there, and written lines need not be read first. */
#define STREAM_BYTES ((int64_t)4 << 20)

static void copy_row(const kvp_tensor *in, const char *source, const kvp_tensor *out, char *target) {
    const int64_t size = (int64_t)kvpi_dtype_size(out->dtype), n = out->shape[3];
    for (int64_t d = 0; d < n; d++)
        memmove(target + d * out->stride[3] * size, source + d * in->stride[3] * size, (size_t)size);
}

static void zero_row(const kvp_tensor *out, char *target) {
    const size_t size = kvpi_dtype_size(out->dtype);
    for (int64_t d = 0; d < out->shape[3]; d++) memset(target + d * out->stride[3] * (int64_t)size, 0, size);
}

/* What one task copies: one head of the keys or the values, as steps in bytes. */
typedef struct copy_job {
    const kvp_tensor *in, *out;
    const char *source, *positions;
    char *target;
    int64_t source_step, target_step, position_step, n_row;
    bool streams;
} copy_job;

static inline int32_t read_position(const copy_job *c, int64_t i) {
    return __atomic_load_n((const int32_t *)(const void *)(c->positions + i * c->position_step), __ATOMIC_RELAXED);
}

/* The source row of output row i, which is not padding. */
static inline const char *find_row(const copy_job *c, int64_t i) {
    const int32_t *position = (const int32_t *)(const void *)(c->positions + i * c->position_step);
    return c->source + kvpi_position(position, c->in->shape[2]) * c->source_step;
}

/* How many rows are kept; behind them stands -1, and the outputs are padding. */
static int64_t count_kept(const copy_job *c) {
    int64_t n = c->n_row;
    while (n > 0 && read_position(c, n - 1) < 0) n--;
    return n;
}

static inline void ask_for(const char *from, int64_t n_byte) {
    for (int64_t at = 0; at < n_byte; at += LINE) __builtin_prefetch(from + at, 0, 2);
}

/* Rows without gaps between their elements, past the caches. */
static void stream_rows(const copy_job *c, int64_t n_kept, size_t n) {
    const kvpi_rows *rows = kvpi_rows_now();
    const char *end = find_row(c, n_kept - 1) + n, *asked = c->source;
    const bool is_dense = 2 * (end - c->source) <= 3 * n_kept * (int64_t)n;
    char *target = c->target;
    for (int64_t i = 0; i < n_kept; i++, target += c->target_step) {
        const char *source = find_row(c, i), *until = end - source < AHEAD ? end : source + AHEAD;
        if (!is_dense)
            ask_for(find_row(c, i + ROWS_AHEAD < n_kept ? i + ROWS_AHEAD : n_kept - 1), (int64_t)n);
        else
            for (; asked < until; asked += LINE) ask_for(asked, 1);
        rows->stream(target, source, n);
    }
    rows->end_stream();
}

static void gather_whole_rows(const copy_job *c) {
    const size_t n = (size_t)c->out->shape[3] * kvpi_dtype_size(c->out->dtype);
    const int64_t n_kept = count_kept(c);
    if (c->streams && n_kept > 0)
        stream_rows(c, n_kept, n);
    else
        kvpi_rows_now()->copy_rows(c->target, c->target_step, c->source, c->source_step,
                                   (const int32_t *)(const void *)c->positions, c->in->shape[2], n_kept, n);
    for (int64_t i = n_kept; i < c->n_row; i++) memset(c->target + i * c->target_step, 0, n);
}

static void gather_rows(const copy_job *c) {
    char *target = c->target;
    for (int64_t i = 0; i < c->n_row; i++, target += c->target_step) {
        if (read_position(c, i) < 0)
            zero_row(c->out, target);
        else
            copy_row(c->in, find_row(c, i), c->out, target);
    }
}

static void gather_task(void *arg, int64_t task, int32_t worker) {
    (void)worker;
    const kvp_gather_args *args = arg;
    const int64_t n_head = args->keys.shape[1], n_task = args->keys.shape[0] * n_head, b = task % n_task / n_head,
                  h = task % n_head;
    const kvp_tensor *in = task < n_task ? &args->keys : &args->values,
                     *out = task < n_task ? &args->out_keys : &args->out_values;
    const int64_t size = (int64_t)kvpi_dtype_size(in->dtype);
    const copy_job c = {
        .in = in,
        .out = out,
        .source = kvpi_at(in, b, h, 0),
        .positions = kvpi_at(&args->positions, b, h, 0),
        .target = kvpi_at(out, b, h, 0),
        .source_step = in->stride[2] * size,
        .target_step = out->stride[2] * size,
        .position_step = args->positions.stride[2] * (int64_t)sizeof(int32_t),
        .n_row = out->shape[2],
        .streams = 2 * n_task * out->shape[2] * out->shape[3] * size >= STREAM_BYTES,
    };
    const bool is_whole = (in->stride[3] == 1 && out->stride[3] == 1) || out->shape[3] == 1;
    if (is_whole && (c.streams || c.position_step == (int64_t)sizeof(int32_t)))
        gather_whole_rows(&c);
    else
        gather_rows(&c);
}

kvp_status kvpi_gather_cpu(const kvp_gather_args *args, kvp_context *ctx) {
    KVPI_TRY(kvpi_check_position_values(args, ctx));
    const int64_t n_row = args->keys.shape[0] * args->keys.shape[1];
    const double row_bytes =
        (double)kvpi_dtype_size(args->keys.dtype) * (double)(args->keys.shape[3] + args->values.shape[3]);
    kvpi_run(ctx, 2 * n_row, (double)n_row * (double)args->positions.shape[2] * (row_bytes * 0.1 + 5), gather_task,
             (void *)(uintptr_t)args);
    return KVP_OK;
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * What the folders of the core share. Nothing here is visible outside the library.
 */
#ifndef KVP_INTERNAL_H
#define KVP_INTERNAL_H

#include "../kvp.h"

#include <stdbool.h>

#if defined(__GNUC__)
#define KVPI_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define KVPI_PRINTF(text, first)
#endif

enum { KVPI_MAX_SQUARE = 4096 }; /* channels that may be multiplied with each other: no size of scratch overflows */

#define KVPI_LOG2_E 1.4426950408889634 /* exponentials are powers of 2 everywhere */

#define KVPI_TRY(call)                         \
    do {                                       \
        const kvp_status status_ = (call);     \
        if (status_ != KVP_OK) return status_; \
    } while (0)

/* status.c: writes the sentence into ctx->error and returns the status, so that callers can write return
 * kvpi_fail(...). */
kvp_status kvpi_fail(kvp_context *ctx, kvp_status status, const char *format, ...) KVPI_PRINTF(3, 4);

/* dtype.c */
const char *kvpi_dtype_name(int32_t dtype);
size_t kvpi_dtype_size(int32_t dtype); /* 0 for an unknown one */
bool kvpi_is_float(int32_t dtype);     /* what keys may be */

/* backend.c */
/* What a scorer's own file knows of it, beside how to score; either may be NULL. */
typedef struct kvpi_scorer_traits {
    kvp_status (*check)(const double *param, int64_t n_token,
                        kvp_context *ctx);                             /* its parameters, and T, on any device */
    size_t (*workspace)(const kvp_score_args *args, int32_t n_worker); /* on the CPU */
} kvpi_scorer_traits;

typedef struct kvpi_scorer {
    const char *name;
    int32_t needs;
    const kvpi_scorer_traits *traits;
    struct {
        const char *name;
        double initial;
    } param[KVP_MAX_PARAMS + 1]; /* ends with a NULL name */
} kvpi_scorer;

enum {
#define KVP_PARAM(scorer, name, initial)
#define KVP_SCORER(name, needs, params) KVPI_SCORER_##name,
#include "../scorers.def"
#undef KVP_SCORER
#undef KVP_PARAM
    KVPI_SCORER_COUNT
};

/* The places of their parameters: KVPI_PARAM_position_n_sink and so on. */
#define KVP_PARAM(scorer, name, initial) KVPI_PARAM_##scorer##_##name,
#define KVP_SCORER(name, needs, params)      \
    enum { params KVPI_PARAM_COUNT_##name }; \
    extern const kvpi_scorer_traits kvpi_##name##_traits;
#include "../scorers.def"
#undef KVP_SCORER
#undef KVP_PARAM

const kvpi_scorer *kvpi_scorer_at(int32_t scorer);   /* NULL when out of range */
const kvp_backend *kvpi_backend_for(int32_t device); /* NULL when none is registered */
extern const kvp_backend kvpi_cpu_backend;           /* backend/cpu.c */

/* check.c: shapes, dtypes, devices and scalar parameters; never reads the data of a tensor. */
kvp_status kvpi_check_score(const kvp_score_args *args, kvp_context *ctx);
kvp_status kvpi_check_select(const kvp_select_args *args, kvp_context *ctx);
kvp_status kvpi_check_gather(const kvp_gather_args *args, kvp_context *ctx);
kvp_status kvpi_check_press(const kvp_press_args *args, kvp_context *ctx);
kvp_status kvpi_check_share(const kvp_share_args *args, kvp_context *ctx);
kvp_status kvpi_check_expect(const kvp_expect_args *args, kvp_context *ctx);
kvp_status kvpi_check_whole(double value, const char *name, double low, double high, kvp_context *ctx);

/* scratch.c: no element of the verb's tensors, which were checked, lies in the first "bytes" of the workspace. */
kvp_status kvpi_check_scratch(kvp_verb verb, const void *args, size_t bytes, kvp_context *ctx);

/* tables.c: copies of a CPU call's small tables, at the front of its workspace. */
size_t kvpi_table_bytes(kvp_verb verb, const void *args);
void kvpi_copy_score_tables(kvp_score_args *args, char *to);
void kvpi_copy_select_tables(kvp_select_args *args, char *to);
void kvpi_copy_share_tables(kvp_share_args *args, char *to);
void kvpi_copy_expect_tables(kvp_expect_args *args, char *to);

/* values.c: what stands in votes, segments, quotas, floors, valid, and in positions on the CPU; read before anything is
 * written. */
kvp_status kvpi_check_valid_values(const kvp_tensor *valid, int64_t n_token, kvp_context *ctx);
kvp_status kvpi_check_vote_values(const kvp_score_args *args, kvp_context *ctx);
kvp_status kvpi_check_select_values(const kvp_select_args *args, kvp_context *ctx);
kvp_status kvpi_check_share_values(const kvp_share_args *args, kvp_context *ctx);
kvp_status kvpi_check_expect_values(const kvp_expect_args *args, kvp_context *ctx);
kvp_status kvpi_check_position_values(const kvp_gather_args *args, kvp_context *ctx);

/* parallel.c: runs every task; serially when the work (about one unit a nanosecond) would not pay for waking a thread.
 */
void kvpi_run(const kvp_context *ctx, int64_t n_task, double work, kvp_task_fn fn, void *arg);
int32_t kvpi_worker_count(const kvp_context *ctx);
void *kvpi_scratch(const kvp_context *ctx, int32_t worker, size_t bytes_per_worker);

static inline size_t kvpi_round_up_64(size_t bytes) { return (bytes + 63u) & ~(size_t)63u; }

/* The address of element (i, j, k), in bytes, of a tensor of up to three leading dimensions. */
static inline char *kvpi_at(const kvp_tensor *t, int64_t i, int64_t j, int64_t k) {
    int64_t offset = i * t->stride[0];
    if (t->ndim > 1) offset += j * t->stride[1];
    if (t->ndim > 2) offset += k * t->stride[2];
    return (char *)t->data + offset * (int64_t)kvpi_dtype_size(t->dtype);
}

static inline int32_t kvpi_i32(const kvp_tensor *t, int64_t i, int64_t j, int64_t k) {
    return *(const int32_t *)kvpi_at(t, i, j, k);
}

/* The valid range of a batch row. */
static inline void kvpi_valid_range(const kvp_tensor *valid, int64_t b, int64_t n_token, int64_t *begin, int64_t *end) {
    *begin = valid->data ? kvpi_i32(valid, b, 0, 0) : 0;
    *end = valid->data ? kvpi_i32(valid, b, 1, 0) : n_token;
}

/* The range of a vote that stands from "field" on, cut by the row's valid range; its end is never below its begin. */
static inline void kvpi_vote_range(const kvp_score_args *args, int64_t b, int64_t v, int field, int64_t *range) {
    int64_t begin, end;
    kvpi_valid_range(&args->valid, b, args->keys.shape[2], &begin, &end);
    range[0] = kvpi_i32(&args->votes, b, v, field);
    range[1] = kvpi_i32(&args->votes, b, v, field + 1);
    if (range[0] < begin) range[0] = begin;
    if (range[1] > end) range[1] = end;
    if (range[1] < range[0]) range[1] = range[0];
}

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * Whether the scratch of a call is its own memory: tables are copied there before anything is checked in them, so that
 * even a refused call would write over a tensor that shares it.
 */
#include "internal.h"

#include <stddef.h>

/* The tensors of each verb's struct, which stand one after the other. */
static const struct {
    size_t first;
    const char *const *names; /* end with NULL */
} structs[] = {
#define NAMES(...) ((const char *const[]){__VA_ARGS__, NULL})
    [KVP_SCORE] = {offsetof(kvp_score_args, keys),
                   NAMES("keys", "values", "queries", "votes", "valid", "lse", "scores")},
    [KVP_SELECT] = {offsetof(kvp_select_args, scores),
                    NAMES("scores", "segments", "quotas", "protect", "valid", "positions", "counts")},
    [KVP_GATHER] = {offsetof(kvp_gather_args, keys), NAMES("keys", "values", "positions", "out_keys", "out_values")},
    [KVP_PRESS] = {offsetof(kvp_press_args, keys),
                   NAMES("keys", "values", "queries", "votes", "valid", "lse", "segments", "quotas", "protect",
                         "positions", "counts", "out_keys", "out_values")},
    [KVP_SHARE] = {offsetof(kvp_share_args, scores), NAMES("scores", "segments", "quotas", "floors", "counts")},
    [KVP_EXPECT] = {offsetof(kvp_expect_args, keys),
                    NAMES("keys", "queries", "values", "cosines", "sines", "ahead_cosines", "ahead_sines", "segments",
                          "sinks", "logits", "scores")},
#undef NAMES
};

/* Whether an element, of the dimensions from d on and the first of which is at "at", lies in [begin, end). Addresses
 * are numbers here: what a stride reaches over need not be of one object. */
static bool reaches(const kvp_tensor *t, int d, int64_t at, int64_t begin, int64_t end) {
    const int64_t size = (int64_t)kvpi_dtype_size(t->dtype);
    int64_t own = size; /* bytes from the first to the end of the last, of the dimensions behind d */
    for (int i = d + 1; i < t->ndim; i++) own += (t->shape[i] - 1) * t->stride[i] * size;
    if (d == t->ndim) return at < end && at + size > begin;
    const int64_t step = t->stride[d] * size, last = t->shape[d] - 1;
    if (step == 0) return reaches(t, d + 1, at, begin, end);
    const int64_t low = at + own > begin ? 0 : (begin - at - own) / step + 1;
    for (int64_t i = low; i <= last && at + i * step < end; i++)
        if (reaches(t, d + 1, at + i * step, begin, end)) return true;
    return false;
}

kvp_status kvpi_check_scratch(kvp_verb verb, const void *args, size_t bytes, kvp_context *ctx) {
    const char *const first = (const char *)args + structs[verb].first;
    const int64_t begin = (int64_t)(uintptr_t)ctx->workspace, end = begin + (int64_t)bytes;
    for (size_t i = 0; structs[verb].names[i]; i++) {
        const kvp_tensor *t = (const kvp_tensor *)(const void *)(first + i * sizeof *t);
        if (t->data && reaches(t, 0, (int64_t)(uintptr_t)t->data, begin, end))
            return kvpi_fail(ctx, KVP_ERR_WORKSPACE, "workspace overlaps %s; expected memory of its own",
                             structs[verb].names[i]);
    }
    return KVP_OK;
}

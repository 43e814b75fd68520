/* SPDX-License-Identifier: Apache-2.0
 *
 * The small tables of a call on the CPU (votes, valid, segments, quotas, floors) are copied to the front of the
 * workspace before they are checked, and only the copies are used: another thread may write to what was given as it
 * likes. (The workspace of a CUDA call is on the device: its tables are read where they are, and must not change until
 * it returns. The Python binding copies them.)
 */
#include "internal.h"

/* Of a tensor that is not given nothing was checked, its rank neither. */
static size_t bytes_of(const kvp_tensor *t) {
    size_t count = 1;
    if (!t->data) return 0;
    for (int d = 0; d < t->ndim; d++) count *= (size_t)t->shape[d];
    return kvpi_round_up_64(count * sizeof(int32_t));
}

/* The same tensor, at `to`; returns what is behind it. */
static char *copy_table(kvp_tensor *t, char *to) {
    kvp_tensor copy = *t;
    int64_t step = 1;
    if (!t->data) return to;
    copy.data = to;
    for (int d = t->ndim - 1; d >= 0; step *= t->shape[d--]) copy.stride[d] = step;
    const int64_t rows = t->ndim > 2 ? t->shape[1] : 1, n = t->shape[t->ndim - 1];
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t k = 0; k < n; k++) {
                const char *from = t->ndim > 2 ? kvpi_at(t, b, i, k) : kvpi_at(t, b, k, 0);
                ((int32_t *)(void *)to)[(b * rows + i) * n + k] =
                    __atomic_load_n((const int32_t *)(const void *)from, __ATOMIC_RELAXED);
            }
    to += bytes_of(t);
    *t = copy;
    return to;
}

static bool reads_votes(const kvp_score_args *args) { return kvp_scorer_needs(args->scorer) & KVP_NEEDS_VOTES; }

size_t kvpi_table_bytes(kvp_verb verb, const void *args) {
    if (verb == KVP_SCORE) {
        const kvp_score_args *score = args;
        if (score->keys.device != KVP_CPU) return 0;
        return (reads_votes(score) ? bytes_of(&score->votes) : 0) + bytes_of(&score->valid);
    }
    if (verb == KVP_SELECT) {
        const kvp_select_args *select = args;
        if (select->scores.device != KVP_CPU) return 0;
        return bytes_of(&select->segments) + bytes_of(&select->quotas) + bytes_of(&select->valid);
    }
    if (verb == KVP_SHARE) {
        const kvp_share_args *share = args;
        if (share->scores.device != KVP_CPU) return 0;
        return bytes_of(&share->segments) + bytes_of(&share->quotas) + bytes_of(&share->floors);
    }
    if (verb == KVP_EXPECT) {
        const kvp_expect_args *expect = args;
        return expect->keys.device == KVP_CPU ? bytes_of(&expect->segments) : 0;
    }
    return 0;
}

void kvpi_copy_score_tables(kvp_score_args *args, char *to) {
    if (args->keys.device != KVP_CPU) return;
    if (reads_votes(args)) to = copy_table(&args->votes, to);
    copy_table(&args->valid, to);
}

void kvpi_copy_select_tables(kvp_select_args *args, char *to) {
    if (args->scores.device != KVP_CPU) return;
    to = copy_table(&args->segments, to);
    to = copy_table(&args->quotas, to);
    copy_table(&args->valid, to);
}

void kvpi_copy_share_tables(kvp_share_args *args, char *to) {
    if (args->scores.device != KVP_CPU) return;
    to = copy_table(&args->segments, to);
    to = copy_table(&args->quotas, to);
    copy_table(&args->floors, to);
}

void kvpi_copy_expect_tables(kvp_expect_args *args, char *to) {
    if (args->keys.device == KVP_CPU) copy_table(&args->segments, to);
}

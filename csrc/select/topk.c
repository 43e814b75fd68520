/* SPDX-License-Identifier: Apache-2.0
 *
 * The quota's best positions of each segment, in ascending order, without sorting. A score becomes a 32-bit rank whose
 * unsigned order is the order of kvp.h; a radix search finds the rank of the last kept position, digit by digit, among
 * ever fewer candidates; one pass in order of position then takes everything above it and as many equals as are left
 * over, lowest position first. No step branches on a score, which no processor could foresee.
 */
#include "../rows/rows.h"
#include "ranks.h"
#include "select.h"

static const uint32_t RANK_PROTECTED = UINT32_MAX;

enum { FEW = 16 }; /* candidates that are put in order */

typedef struct job {
    const kvp_select_args *args;
    const kvp_context *ctx;
    size_t scratch_bytes;
} job;

static size_t row_bytes(const kvp_select_args *args) {
    return kvpi_round_up_64((size_t)(args->scores.shape[2] + KVPI_SLACK) * sizeof(uint32_t));
}

/* A row of ranks, one of candidates, and one of positions, for outputs whose elements are not side by side. */
size_t kvpi_select_workspace(const kvp_select_args *args) { return 3 * row_bytes(args); }

/* Lowers *left from "how many to take" to "how many to take from the returned bin"; bins above it are taken whole. */
static uint32_t find_bin(const uint32_t *histogram, uint32_t n_bin, int64_t *left) {
    uint32_t bin = n_bin - 1;
    for (; bin > 0 && histogram[bin] < *left; bin--) *left -= histogram[bin];
    return bin;
}

/* The *left-th best of a few candidates, which are put in order; *left becomes how many of exactly that rank are taken.
 */
static uint32_t settle_few(uint32_t *candidates, int64_t n, int64_t *left) {
    for (int64_t i = 1; i < n; i++) {
        const uint32_t rank = candidates[i];
        int64_t k = i;
        for (; k > 0 && candidates[k - 1] < rank; k--) candidates[k] = candidates[k - 1];
        candidates[k] = rank;
    }
    const uint32_t threshold = candidates[*left - 1];
    int64_t above = 0;
    while (candidates[above] > threshold) above++;
    *left -= above;
    return threshold;
}

/* The rank of the quota-th best of ranks[0..n), and in *ties how many positions of exactly that rank are kept. */
static uint32_t find_threshold(const kvpi_rows *rows, const uint32_t *ranks, int64_t n, int64_t quota,
                               uint32_t *candidates, int64_t *ties) {
    uint32_t prefix = 0, mask = 0, histogram[2][KVPI_MAX_BIN];
    *ties = quota;
    for (const kvpi_digit *d = kvpi_digits_for(n); d->bits; d++) {
        kvpi_count_digit(ranks, n, *d, histogram);
        prefix |= find_bin(histogram[0], 1u << d->bits, ties) << d->shift;
        mask |= ((1u << d->bits) - 1) << d->shift;
        if (d->shift == 0) break;
        n = rows->filter(ranks, n, mask, prefix, candidates);
        ranks = candidates;
        if (n <= FEW) return settle_few(candidates, n, ties);
    }
    return prefix;
}

/* One past the n-th position from begin on whose rank is exactly this. */
static int64_t find_nth(const uint32_t *ranks, int64_t begin, uint32_t rank, int64_t n) {
    int64_t t = begin;
    for (; n > 0; t++) n -= ranks[t] == rank;
    return t;
}

/* Writes the kept positions of one segment to out; returns how many. */
static int64_t keep_segment(const kvpi_rows *rows, const uint32_t *ranks, int64_t begin, int64_t end, int64_t quota,
                            uint32_t *candidates, int32_t *out) {
    int64_t eligible = 0, ties;
    for (int64_t t = begin; t < end; t++) eligible += ranks[t] != KVPI_RANK_NEVER;
    if (quota > eligible) quota = eligible;
    if (quota == 0) return 0;
    const uint32_t threshold = find_threshold(rows, ranks + begin, end - begin, quota, candidates, &ties);
    /* up to the last kept equal all equals are taken, behind it none */
    const int64_t cut = find_nth(ranks, begin, threshold, ties);
    const int64_t kept = rows->list(ranks + begin, cut - begin, threshold, (int32_t)begin, out, quota);
    if (kept == quota) return kept;
    return kept + rows->list(ranks + cut, end - cut, threshold + 1, (int32_t)cut, out + kept, quota - kept);
}

static void rank_row(const kvp_select_args *args, int64_t b, int64_t h, uint32_t *ranks) {
    const int64_t n_token = args->scores.shape[2], stride = args->scores.stride[2],
                  protect_stride = args->protect.stride[1];
    const float *scores = (const float *)(const void *)kvpi_at(&args->scores, b, h, 0);
    const uint8_t *protect = args->protect.data ? (const uint8_t *)kvpi_at(&args->protect, b, 0, 0) : NULL;
    int64_t begin, end;
    kvpi_valid_range(&args->valid, b, n_token, &begin, &end);
    for (int64_t t = 0; t < begin; t++) ranks[t] = KVPI_RANK_NEVER;
    if (stride == 1)
        for (int64_t t = begin; t < end; t++) ranks[t] = kvpi_rank(scores[t]);
    else
        for (int64_t t = begin; t < end; t++) ranks[t] = kvpi_rank(scores[t * stride]);
    for (int64_t t = begin; protect && t < end; t++)
        if (protect[t * protect_stride]) ranks[t] = RANK_PROTECTED;
    for (int64_t t = end; t < n_token; t++) ranks[t] = KVPI_RANK_NEVER;
}

static void select_row(void *arg, int64_t task, int32_t worker) {
    const job *j = arg;
    const kvp_select_args *args = j->args;
    const kvp_tensor *positions = &args->positions;
    const kvpi_rows *rows = kvpi_rows_now();
    const int64_t n_head = args->scores.shape[1], b = task / n_head, h = task % n_head, stride = positions->stride[2];
    uint32_t *ranks = kvpi_scratch(j->ctx, worker, j->scratch_bytes),
             *candidates = ranks + row_bytes(args) / sizeof *ranks;
    int32_t *target = (int32_t *)(void *)kvpi_at(positions, b, h, 0),
            *out = stride == 1 ? target : (int32_t *)candidates + row_bytes(args) / sizeof *out;
    rank_row(args, b, h, ranks);
    int64_t kept = 0;
    for (int64_t s = 0; s < args->quotas.shape[2]; s++) {
        const int64_t begin = kvpi_i32(&args->segments, b, s, 0), end = kvpi_i32(&args->segments, b, s + 1, 0);
        kept += keep_segment(rows, ranks, begin, end, kvpi_i32(&args->quotas, b, h, s), candidates, out + kept);
    }
    if (args->counts.data) *(int32_t *)(void *)kvpi_at(&args->counts, b, h, 0) = (int32_t)kept;
    for (int64_t i = 0; out != target && i < kept; i++) target[i * stride] = out[i];
    for (int64_t i = kept; i < positions->shape[2]; i++) target[i * stride] = -1;
}

kvp_status kvpi_select_cpu(const kvp_select_args *args, kvp_context *ctx) {
    job j = {.args = args, .ctx = ctx, .scratch_bytes = kvpi_select_workspace(args)};
    const int64_t n_row = args->scores.shape[0] * args->scores.shape[1];
    kvpi_run(ctx, n_row, (double)n_row * ((double)args->scores.shape[2] * 2 + 1000), select_row, &j);
    return KVP_OK;
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * The quota's best positions of each segment, in ascending order, without sorting. A score becomes a 32-bit rank whose unsigned order is
 * the order of kvp.h; a radix search over 11, 11 and 10 bits finds the rank of the last kept position; one pass in order of position then
 * takes everything above it and as many equals as are left over, lowest position first.
 */
#include "select.h"

#include <math.h>
#include <string.h>

/* Ranks below and above all scores. -infinity ranks 0x007fffff, +infinity 0xff800000. */
enum { RANK_NEVER = 0, RANK_NAN = 1 };
static const uint32_t RANK_PROTECTED = UINT32_MAX;

typedef struct job {
    const kvp_select_args *args;
    const kvp_context *ctx;
    size_t scratch_bytes;
} job;

size_t kvpi_select_workspace(const kvp_select_args *args) { return kvpi_round_up_64((size_t)args->scores.shape[2] * sizeof(uint32_t)); }

static uint32_t rank_score(float score) {
    if (isnan(score)) return RANK_NAN;
    if (score == 0.0f) score = 0.0f; /* -0 and +0 are equal */
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* Lowers *left from "how many to take" to "how many to take from the returned bin"; bins above it are taken whole. */
static uint32_t find_bin(const uint32_t *histogram, uint32_t n_bin, int64_t *left) {
    uint32_t bin = n_bin - 1;
    for (; bin > 0 && histogram[bin] < *left; bin--) *left -= histogram[bin];
    return bin;
}

/* The rank of the quota-th best of ranks[0..n), and in *ties how many positions of exactly that rank are kept. */
static uint32_t find_threshold(const uint32_t *ranks, int64_t n, int64_t quota, int64_t *ties) {
    static const struct {
        uint32_t shift, bits;
    } digit[] = {{21, 11}, {10, 11}, {0, 10}};
    uint32_t prefix = 0, mask = 0, histogram[1 << 11];
    *ties = quota;
    for (int pass = 0; pass < 3; pass++) {
        const uint32_t n_bin = 1u << digit[pass].bits;
        memset(histogram, 0, n_bin * sizeof histogram[0]);
        for (int64_t i = 0; i < n; i++)
            if ((ranks[i] & mask) == prefix) histogram[ranks[i] >> digit[pass].shift & (n_bin - 1)]++;
        prefix |= find_bin(histogram, n_bin, ties) << digit[pass].shift;
        mask |= (n_bin - 1) << digit[pass].shift;
    }
    return prefix;
}

/* Appends the kept positions of one segment to out; returns how many. */
static int64_t keep_segment(const uint32_t *ranks, int64_t begin, int64_t end, int64_t quota, const kvp_tensor *positions, char *out) {
    int64_t eligible = 0, ties, kept = 0;
    for (int64_t t = begin; t < end; t++) eligible += ranks[t] != RANK_NEVER;
    if (quota > eligible) quota = eligible;
    if (quota == 0) return 0;
    const uint32_t threshold = find_threshold(ranks + begin, end - begin, quota, &ties);
    for (int64_t t = begin; t < end && kept < quota; t++) {
        if (ranks[t] < threshold || (ranks[t] == threshold && ties == 0)) continue;
        ties -= ranks[t] == threshold;
        *(int32_t *)(void *)(out + kept * positions->stride[2] * (int64_t)sizeof(int32_t)) = (int32_t)t;
        kept++;
    }
    return kept;
}

static void rank_row(const kvp_select_args *args, int64_t b, int64_t h, uint32_t *ranks) {
    const int64_t n_token = args->scores.shape[2];
    int64_t begin, end;
    kvpi_valid_range(&args->valid, b, n_token, &begin, &end);
    for (int64_t t = 0; t < n_token; t++) {
        const bool valid = t >= begin && t < end;
        const bool protected = args->protect.data && *(const uint8_t *)kvpi_at(&args->protect, b, t, 0);
        ranks[t] = !valid ? RANK_NEVER : protected ? RANK_PROTECTED : rank_score(*(const float *)kvpi_at(&args->scores, b, h, t));
    }
}

static void select_row(void *arg, int64_t task, int32_t worker) {
    const job *j = arg;
    const kvp_select_args *args = j->args;
    const kvp_tensor *positions = &args->positions;
    const int64_t n_head = args->scores.shape[1], b = task / n_head, h = task % n_head;
    uint32_t *ranks = kvpi_scratch(j->ctx, worker, j->scratch_bytes);
    rank_row(args, b, h, ranks);
    int64_t kept = 0;
    for (int64_t s = 0; s < args->quotas.shape[2]; s++) {
        const int64_t begin = kvpi_i32(&args->segments, b, s, 0), end = kvpi_i32(&args->segments, b, s + 1, 0);
        kept += keep_segment(ranks, begin, end, kvpi_i32(&args->quotas, b, h, s), positions, kvpi_at(positions, b, h, kept));
    }
    *(int32_t *)(void *)kvpi_at(&args->counts, b, h, 0) = (int32_t)kept;
    for (; kept < positions->shape[2]; kept++) *(int32_t *)(void *)kvpi_at(positions, b, h, kept) = -1;
}

kvp_status kvpi_select_cpu(const kvp_select_args *args, kvp_context *ctx) {
    KVPI_TRY(kvpi_check_select_values(args, ctx));
    job j = {.args = args, .ctx = ctx, .scratch_bytes = kvpi_select_workspace(args)};
    const int64_t n_row = args->scores.shape[0] * args->scores.shape[1];
    kvpi_run(ctx, n_row, (double)n_row * ((double)args->scores.shape[2] * 5 + 3000), select_row, &j);
    return KVP_OK;
}

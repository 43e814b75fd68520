/* SPDX-License-Identifier: Apache-2.0
 *
 * Contracts on what stands in small integer tensors. Read on the CPU, before anything is written.
 */
#include "internal.h"

kvp_status kvpi_check_valid_values(const kvp_tensor *valid, int64_t n_token, kvp_context *ctx) {
    if (!valid->data) return KVP_OK;
    for (int64_t b = 0; b < valid->shape[0]; b++) {
        int64_t begin, end;
        kvpi_valid_range(valid, b, n_token, &begin, &end);
        if (begin < 0 || end < begin || end > n_token)
            return kvpi_fail(ctx, KVP_ERR_VALUE, "valid[%lld] is [%lld, %lld); expected a range inside [0, %lld)",
                             (long long)b, (long long)begin, (long long)end, (long long)n_token);
    }
    return KVP_OK;
}

static kvp_status check_range(const kvp_tensor *votes, int64_t b, int64_t v, int field, const char *what,
                              int64_t n_token, kvp_context *ctx) {
    const int64_t begin = kvpi_i32(votes, b, v, field), end = kvpi_i32(votes, b, v, field + 1);
    if (begin >= 0 && begin <= end && end <= n_token) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_VALUE,
                     "votes[%lld,%lld] has the %s range [%lld, %lld); expected one inside [0, %lld)", (long long)b,
                     (long long)v, what, (long long)begin, (long long)end, (long long)n_token);
}

/* The voters that count are those inside the valid range; all of them must be among the queries. */
static kvp_status check_voters(const kvp_score_args *args, int64_t b, int64_t v, int field, kvp_context *ctx) {
    const int64_t n_token = args->keys.shape[2], first_query = n_token - args->queries.shape[2];
    int64_t begin = kvpi_i32(&args->votes, b, v, field), end = kvpi_i32(&args->votes, b, v, field + 1), low, high;
    kvpi_valid_range(&args->valid, b, n_token, &low, &high);
    begin = begin > low ? begin : low;
    end = end < high ? end : high;
    if (begin >= end || begin >= first_query) return KVP_OK;
    return kvpi_fail(
        ctx, KVP_ERR_VALUE,
        "votes[%lld,%lld] needs the query at position %lld, but queries holds only the last %lld of %lld positions",
        (long long)b, (long long)v, (long long)begin, (long long)args->queries.shape[2], (long long)n_token);
}

/* Range i of a batch row's votes, cut by the valid range: key ranges and windows by turns. */
static void read_owned(const kvp_score_args *args, int64_t b, int64_t i, int64_t *range) {
    kvpi_vote_range(args, b, i / 2, i % 2 ? KVP_VOTE_WINDOW_BEGIN : KVP_VOTE_KEY_BEGIN, range);
}

/* Range i of batch row b may share no key with those before it. */
static kvp_status compare_with_earlier(const kvp_score_args *args, int64_t b, int64_t i, const int64_t *range,
                                       kvp_context *ctx) {
    static const char *const what[] = {"key range", "window"};
    for (int64_t e = 0; e < i; e++) {
        int64_t earlier[2];
        read_owned(args, b, e, earlier);
        if (earlier[0] >= earlier[1] || range[0] >= earlier[1] || earlier[0] >= range[1]) continue;
        return kvpi_fail(ctx, KVP_ERR_VALUE,
                         "votes[%lld,%lld] has the %s [%lld, %lld), which overlaps the %s [%lld, %lld) of "
                         "votes[%lld,%lld]; expected each key in "
                         "one key range or window at most",
                         (long long)b, (long long)i / 2, what[i % 2], (long long)range[0], (long long)range[1],
                         what[e % 2], (long long)earlier[0], (long long)earlier[1], (long long)b, (long long)e / 2);
    }
    return KVP_OK;
}

/* Votes mostly come in order: then each range lies outside of all before it, and that is one comparison. */
static kvp_status check_disjoint(const kvp_score_args *args, int64_t b, kvp_context *ctx) {
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t i = 0; i < 2 * args->votes.shape[1]; i++) {
        int64_t range[2];
        read_owned(args, b, i, range);
        if (range[0] >= range[1]) continue;
        if (range[0] < high && range[1] > low) KVPI_TRY(compare_with_earlier(args, b, i, range, ctx));
        low = range[0] < low ? range[0] : low;
        high = range[1] > high ? range[1] : high;
    }
    return KVP_OK;
}

static kvp_status check_vote_of_queries(const kvp_score_args *args, int64_t b, int64_t v, kvp_context *ctx) {
    const kvp_tensor *votes = &args->votes;
    const int64_t n_token = args->keys.shape[2];
    const int32_t weight = kvpi_i32(votes, b, v, KVP_VOTE_WEIGHT);
    KVPI_TRY(check_range(votes, b, v, KVP_VOTE_A_BEGIN, "first query", n_token, ctx));
    KVPI_TRY(check_range(votes, b, v, KVP_VOTE_B_BEGIN, "second query", n_token, ctx));
    KVPI_TRY(check_range(votes, b, v, KVP_VOTE_WINDOW_BEGIN, "window", n_token, ctx));
    KVPI_TRY(check_voters(args, b, v, KVP_VOTE_A_BEGIN, ctx));
    KVPI_TRY(check_voters(args, b, v, KVP_VOTE_B_BEGIN, ctx));
    if (weight >= KVP_WEIGHT_SUM && weight <= KVP_WEIGHT_MAX) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_VALUE,
                     "votes[%lld,%lld] has weight %d; expected 0 (sum), 1 (mean), 2 (age) or 3 (max)", (long long)b,
                     (long long)v, (int)weight);
}

/* Of a scorer that needs no queries: what it would not read must not be there. */
static kvp_status check_vote_of_keys(const kvp_score_args *args, int64_t b, int64_t v, kvp_context *ctx) {
    for (int field = KVP_VOTE_KEY_END + 1; field < KVP_VOTE_FIELDS; field++) {
        const int32_t number = kvpi_i32(&args->votes, b, v, field);
        if (number)
            return kvpi_fail(ctx, KVP_ERR_VALUE,
                             "votes[%lld,%lld,%d] is %d; expected 0, since the scorer \"%s\" reads key ranges only",
                             (long long)b, (long long)v, field, (int)number, kvp_scorer_name(args->scorer));
    }
    return KVP_OK;
}

kvp_status kvpi_check_vote_values(const kvp_score_args *args, kvp_context *ctx) {
    const bool has_queries = kvp_scorer_needs(args->scorer) & KVP_NEEDS_QUERIES;
    for (int64_t b = 0; b < args->votes.shape[0]; b++) {
        for (int64_t v = 0; v < args->votes.shape[1]; v++) {
            KVPI_TRY(check_range(&args->votes, b, v, KVP_VOTE_KEY_BEGIN, "key", args->keys.shape[2], ctx));
            KVPI_TRY((has_queries ? check_vote_of_queries : check_vote_of_keys)(args, b, v, ctx));
        }
        KVPI_TRY(check_disjoint(args, b, ctx));
    }
    return KVP_OK;
}

static kvp_status check_segments(const kvp_tensor *segments, int64_t b, int64_t n_token, kvp_context *ctx) {
    int64_t last = 0;
    for (int64_t e = 0; e < segments->shape[1]; e++) {
        const int64_t edge = kvpi_i32(segments, b, e, 0);
        if (edge < last || edge > n_token)
            return kvpi_fail(ctx, KVP_ERR_VALUE,
                             "segments[%lld,%lld] is %lld; expected %lld to %lld (edges ascend inside the row)",
                             (long long)b, (long long)e, (long long)edge, (long long)last, (long long)n_token);
        last = edge;
    }
    return KVP_OK;
}

static kvp_status check_quota(const kvp_tensor *quotas, int64_t b, int64_t h, int64_t s, kvp_context *ctx) {
    const int64_t quota = kvpi_i32(quotas, b, h, s);
    if (quota >= 0) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_VALUE, "quotas[%lld,%lld,%lld] is %lld; expected 0 or more", (long long)b,
                     (long long)h, (long long)s, (long long)quota);
}

static kvp_status check_quotas(const kvp_select_args *args, int64_t b, int64_t h, kvp_context *ctx) {
    int64_t sum = 0;
    for (int64_t s = 0; s < args->quotas.shape[2]; s++) {
        KVPI_TRY(check_quota(&args->quotas, b, h, s, ctx));
        sum += kvpi_i32(&args->quotas, b, h, s);
    }
    if (sum <= args->positions.shape[2]) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_VALUE, "quotas[%lld,%lld] sum to %lld, but positions has room for %lld", (long long)b,
                     (long long)h, (long long)sum, (long long)args->positions.shape[2]);
}

kvp_status kvpi_check_select_values(const kvp_select_args *args, kvp_context *ctx) {
    KVPI_TRY(kvpi_check_valid_values(&args->valid, args->scores.shape[2], ctx));
    for (int64_t b = 0; b < args->scores.shape[0]; b++) {
        KVPI_TRY(check_segments(&args->segments, b, args->scores.shape[2], ctx));
        for (int64_t h = 0; h < args->scores.shape[1]; h++) KVPI_TRY(check_quotas(args, b, h, ctx));
    }
    return KVP_OK;
}

static kvp_status check_floors(const kvp_share_args *args, int64_t b, int64_t h, kvp_context *ctx) {
    for (int64_t s = 0; s < args->floors.shape[2]; s++) {
        KVPI_TRY(check_quota(&args->quotas, b, h, s, ctx));
        const int64_t least = kvpi_i32(&args->floors, b, h, s), quota = kvpi_i32(&args->quotas, b, h, s);
        if (least < 0 || least > quota)
            return kvpi_fail(ctx, KVP_ERR_VALUE, "floors[%lld,%lld,%lld] is %lld; expected 0 to the quota there, %lld",
                             (long long)b, (long long)h, (long long)s, (long long)least, (long long)quota);
    }
    return KVP_OK;
}

kvp_status kvpi_check_share_values(const kvp_share_args *args, kvp_context *ctx) {
    for (int64_t b = 0; b < args->scores.shape[0]; b++) {
        KVPI_TRY(check_segments(&args->segments, b, args->scores.shape[2], ctx));
        for (int64_t h = 0; h < args->scores.shape[1]; h++) KVPI_TRY(check_floors(args, b, h, ctx));
    }
    return KVP_OK;
}

kvp_status kvpi_check_expect_values(const kvp_expect_args *args, kvp_context *ctx) {
    for (int64_t b = 0; b < args->keys.shape[0]; b++)
        KVPI_TRY(check_segments(&args->segments, b, args->keys.shape[2], ctx));
    return KVP_OK;
}

/* How many positions at the start of a row ascend inside [0, n_token). */
static int64_t count_good_positions(const kvp_tensor *positions, int64_t b, int64_t h, int64_t n_token) {
    const int32_t *p = (const int32_t *)(const void *)kvpi_at(positions, b, h, 0);
    const int64_t stride = positions->stride[2], n = positions->shape[2];
    int64_t i = 0, last = -1;
    for (; i < n && p[i * stride] > last && p[i * stride] < n_token; i++) last = p[i * stride];
    return i;
}

kvp_status kvpi_check_position_values(const kvp_gather_args *args, kvp_context *ctx) {
    const kvp_tensor *positions = &args->positions;
    const int64_t n_token = args->keys.shape[2];
    for (int64_t b = 0; b < positions->shape[0]; b++) {
        for (int64_t h = 0; h < positions->shape[1]; h++) {
            int64_t i = count_good_positions(positions, b, h, n_token);
            while (i < positions->shape[2] && kvpi_i32(positions, b, h, i) == -1) i++;
            if (i == positions->shape[2]) continue;
            return kvpi_fail(
                ctx, KVP_ERR_VALUE,
                "positions[%lld,%lld,%lld] is %lld; expected positions that ascend in [0, %lld), any -1 at the end",
                (long long)b, (long long)h, (long long)i, (long long)kvpi_i32(positions, b, h, i), (long long)n_token);
        }
    }
    return KVP_OK;
}

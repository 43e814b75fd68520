/* SPDX-License-Identifier: Apache-2.0
 *
 * How many of a segment's positions each head keeps, where heads share their quotas: counts alone, for which it matters
 * neither where a score stands nor to sort any. If r is the rank of the last that is kept, a head keeps the larger of
 * what it is sure of and of how many it has above r, and those of exactly r fill up what is left, head by head. The sum
 * of that over heads falls as r rises, so a search by digits finds r, as topk.c finds a row's, among ever fewer
 * candidates.
 */
#include "../rows/rows.h"
#include "ranks.h"
#include "select.h"

#include <math.h>

/* A head's part of a segment. */
typedef struct part {
    uint32_t n;     /* candidates: ranks that begin with the digits found before the one at hand */
    uint32_t above; /* ranks that begin with more than was found */
    uint32_t equal; /* ranks that begin with what was found */
    uint32_t sure;  /* what the head keeps in any case */
} part;

typedef struct job {
    const kvp_share_args *args;
    int64_t n_head, n_token, n_segment, n_row; /* n_row: batch rows times heads */
    const kvpi_digit *digit;                   /* at hand, the first where mask is 0 */
    uint32_t mask;                             /* of the digits before it */
    uint32_t *ranks;                           /* (n_row, row_size) */
    uint32_t *until;    /* (n_row, S, n_bin): ranks whose digit is the bin's or a higher one, and those above */
    uint32_t *prefixes; /* (B, S): the digits found so far, in their places */
    part *parts;        /* (n_row, S) */
} job;

static job read_job(const kvp_share_args *args) {
    const int64_t *shape = args->scores.shape, n_segment = args->quotas.shape[2];
    return (job){.args = args,
                 .n_head = shape[1],
                 .n_token = shape[2],
                 .n_segment = n_segment,
                 .n_row = shape[0] * shape[1],
                 .digit = kvpi_digits_for(shape[2] / n_segment)};
}

/* Segments stand apart, since the filter writes a little behind what it finds. */
static int64_t row_size(const job *j) { return j->n_token + j->n_segment * KVPI_SLACK; }

static int64_t bin_count(const job *j) { return (int64_t)1 << j->digit->bits; } /* the first digit has the most */

/* Places the scratch in the workspace; a NULL workspace gives the sizes only. Returns the bytes of all of it. */
static size_t lay_out(job *j, char *workspace) {
    const size_t n_part = (size_t)(j->n_row * j->n_segment);
    const size_t ranks = kvpi_round_up_64((size_t)(j->n_row * row_size(j)) * sizeof *j->ranks),
                 until = kvpi_round_up_64(n_part * (size_t)bin_count(j) * sizeof *j->until),
                 prefixes = kvpi_round_up_64(n_part * sizeof *j->prefixes),
                 parts = kvpi_round_up_64(n_part * sizeof *j->parts);
    if (workspace) {
        j->ranks = (uint32_t *)(void *)workspace;
        j->until = (uint32_t *)(void *)(workspace + ranks);
        j->prefixes = (uint32_t *)(void *)(workspace + ranks + until);
        j->parts = (part *)(void *)(workspace + ranks + until + prefixes);
    }
    return ranks + until + prefixes + parts;
}

size_t kvpi_share_workspace(const kvp_share_args *args) {
    job j = read_job(args);
    return lay_out(&j, NULL);
}

static uint32_t most(uint32_t x, uint32_t y) { return x > y ? x : y; }
static uint32_t least(uint32_t x, uint32_t y) { return x < y ? x : y; }

static uint32_t segment_length(const job *j, int64_t b, int64_t s) {
    return (uint32_t)(kvpi_i32(&j->args->segments, b, s + 1, 0) - kvpi_i32(&j->args->segments, b, s, 0));
}

/* What the heads of a segment keep together, if there is as much. */
static int64_t total_of(const job *j, int64_t b, int64_t s) {
    int64_t sum = 0;
    for (int64_t h = 0; h < j->n_head; h++) sum += kvpi_i32(&j->args->quotas, b, h, s);
    return sum;
}

static part rank_part(const job *j, int64_t row, int64_t s, uint32_t *ranks) {
    const int64_t b = row / j->n_head, h = row % j->n_head, step = j->args->scores.stride[2];
    const float *scores =
        (const float *)(const void *)kvpi_at(&j->args->scores, b, h, kvpi_i32(&j->args->segments, b, s, 0));
    const uint32_t n = segment_length(j, b, s), quota = least(n, (uint32_t)kvpi_i32(&j->args->quotas, b, h, s));
    uint32_t infinite = 0;
    for (uint32_t i = 0; i < n; i++) {
        infinite += scores[i * step] == INFINITY;
        ranks[i] = kvpi_rank(scores[i * step]);
    }
    const uint32_t floor = least(n, (uint32_t)kvpi_i32(&j->args->floors, b, h, s));
    return (part){.n = n, .sure = most(floor, least(infinite, quota))};
}

/* The digit at hand of one row's candidates. */
static void count_row(void *arg, int64_t row, int32_t worker) {
    (void)worker;
    const job *j = arg;
    uint32_t histogram[2][KVPI_MAX_BIN];
    const int64_t b = row / j->n_head;
    for (int64_t s = 0; s < j->n_segment; s++) {
        part *p = &j->parts[row * j->n_segment + s];
        uint32_t *ranks = j->ranks + row * row_size(j) + kvpi_i32(&j->args->segments, b, s, 0) + s * KVPI_SLACK,
                 *until = j->until + (row * j->n_segment + s) * bin_count(j);
        if (j->mask == 0)
            *p = rank_part(j, row, s, ranks);
        else
            p->n = (uint32_t)kvpi_rows_now()->filter(ranks, p->n, j->mask, j->prefixes[b * j->n_segment + s], ranks);
        kvpi_count_digit(ranks, p->n, *j->digit, histogram);
        uint32_t sum = p->above;
        for (int64_t bin = bin_count(j) - 1; bin >= 0; bin--) until[bin] = sum += histogram[0][bin];
    }
}

/* What a segment's heads keep together if they keep all whose digit is this or a higher one. */
static uint32_t keep_from(const job *j, int64_t b, int64_t s, int64_t bin) {
    uint32_t sum = 0;
    for (int64_t i = b * j->n_head * j->n_segment + s, h = 0; h < j->n_head; h++, i += j->n_segment)
        sum += most(j->parts[i].sure, j->until[i * bin_count(j) + bin]);
    return sum;
}

/* The highest bin from which on they keep enough, or the lowest: the digit of the last that is kept. */
static void find_digit(const job *j, int64_t b, int64_t s) {
    const int64_t total = total_of(j, b, s);
    int64_t low = 0, high = bin_count(j) - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if ((int64_t)keep_from(j, b, s, middle) >= total)
            low = middle;
        else
            high = middle - 1;
    }
    j->prefixes[b * j->n_segment + s] |= (uint32_t)low << j->digit->shift;
    for (int64_t i = b * j->n_head * j->n_segment + s, h = 0; h < j->n_head; h++, i += j->n_segment) {
        const uint32_t *until = j->until + i * bin_count(j) + low;
        if (low + 1 < bin_count(j)) j->parts[i].above = until[1];
        j->parts[i].equal = until[0] - j->parts[i].above;
    }
}

/* Those of the last rank that is kept fill up what is left, head by head. */
static void write_counts(const job *j, int64_t b, int64_t s) {
    const part *parts = j->parts + b * j->n_head * j->n_segment + s;
    int64_t left = total_of(j, b, s);
    for (int64_t h = 0; h < j->n_head; h++) left -= most(parts[h * j->n_segment].sure, parts[h * j->n_segment].above);
    for (int64_t h = 0; h < j->n_head; h++) {
        const part p = parts[h * j->n_segment];
        const uint32_t kept = most(p.sure, p.above);
        const int64_t equal = most(p.sure, p.above + p.equal) - kept, more = left < equal ? left : equal;
        *(int32_t *)(void *)kvpi_at(&j->args->counts, b, h, s) = (int32_t)(kept + more);
        left -= more;
    }
}

kvp_status kvpi_share_cpu(const kvp_share_args *args, kvp_context *ctx) {
    job j = read_job(args);
    const int64_t n_batch = args->scores.shape[0];
    lay_out(&j, ctx->workspace);
    memset(j.prefixes, 0, (size_t)(n_batch * j.n_segment) * sizeof *j.prefixes);
    for (; j.digit->bits; j.mask |= ((1u << j.digit->bits) - 1) << j.digit->shift, j.digit++) {
        kvpi_run(ctx, j.n_row, (double)j.n_row * ((double)j.n_token * (j.mask ? 0.2 : 2) + 1000), count_row, &j);
        for (int64_t i = 0; i < n_batch * j.n_segment; i++) find_digit(&j, i / j.n_segment, i % j.n_segment);
    }
    for (int64_t i = 0; i < n_batch * j.n_segment; i++) write_counts(&j, i / j.n_segment, i % j.n_segment);
    return KVP_OK;
}

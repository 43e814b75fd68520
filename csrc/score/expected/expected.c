/* SPDX-License-Identifier: Apache-2.0
 *
 * The verb expect on the CPU; kvp.h has the formula. Four steps:
 *
 *     sum      mean and squares of a chunk of a query head's tokens, as they were before rotary embedding
 *     finish   those of a unit, a query head of a batch row; turned as what comes next
 *     ask      logits of a block of keys
 *     judge    one number a key of that
 *
 * Squares are of what differs from a shift near the mean, since float32 has no room for that beside the square of a
 * large mean, and only their upper triangle is made. The spread S of a unit is one, too: k.Sk is the sum over channels
 * i of k[i] times the product of row i, up to the diagonal, with k, where what stands beside the diagonal counts twice.
 */
#include "expected.h"

#include "../../rows/rows.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { TILE = 32 };                           /* tokens whose squares are added at once: 16 KiB of 128 channels */
enum { LEAST_CHUNK = 2048, MOST_CHUNKS = 4 }; /* tokens of a chunk, and chunks of a unit; by the length alone */
enum { BUNDLE = 4 };                          /* query heads that read a tile's cosines and sines together */

typedef struct job {
    const kvp_expect_args *args;
    const kvpi_rows *rows;
    int64_t n_batch, n_head, n_query_head, group, n_token, n_dim;
    int64_t width;             /* n_dim, rounded up to KVPI_WIDTH */
    int64_t n_strip, n_bundle; /* of KVPI_STRIP channels; of a batch row */
    int64_t n_chunk;           /* room in a unit */
    /* shared scratch; every line has KVPI_SLACK elements behind it */
    float *shifts;  /* (unit, n_chunk, line) */
    double *sums;   /* (unit, n_chunk, line), of what differs from the shift */
    float *squares; /* (unit, n_chunk, width, width), upper triangle */
    float *means;   /* (unit, line) */
    float *spreads; /* (unit, n_strip, n_dim, KVPI_STRIP), as pack_queries lays rows */
    float *best;    /* (B, H) scores */
    char *worker;
    size_t worker_bytes;
} job;

/* The tokens of a batch row that are judged, and its chunks of them. */
typedef struct judged {
    int64_t begin, end, length, n_chunk;
} judged;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t line_size(const job *j) { return j->width + KVPI_SLACK; }
static int64_t row_size(const job *j) { return round_up(j->n_token, KVPI_BLOCK) + KVPI_SLACK; }

static judged judged_of(const job *j, int64_t b) {
    const kvp_tensor *segments = &j->args->segments;
    judged own = {kvpi_i32(segments, b, 1, 0), kvpi_i32(segments, b, segments->shape[1] - 1, 0), LEAST_CHUNK, 0};
    const int64_t n = own.end - own.begin, share = round_up((n + MOST_CHUNKS - 1) / MOST_CHUNKS, TILE);
    if (share > own.length) own.length = share;
    own.n_chunk = (n + own.length - 1) / own.length;
    return own;
}

/* Floats of a worker's scratch in a step: lines of a tile, twice as many of what turns them, and two more; a block of
 * keys, and what a strip makes of a panel of them; two rows of all tokens. */
static int64_t sum_floats(const job *j) { return TILE * j->width + KVPI_SLACK + (2 * TILE + 2) * line_size(j); }
static int64_t ask_floats(const job *j) {
    const size_t packed = kvpi_packed_bytes(KVPI_BLOCK, j->n_dim);
    return (int64_t)(packed / sizeof(float)) + KVPI_STRIP * KVPI_WIDTH + KVPI_BLOCK + KVPI_SLACK;
}
static int64_t judge_floats(const job *j) { return 2 * row_size(j); }

static size_t worker_bytes(const job *j) {
    const int64_t sum = sum_floats(j), ask = ask_floats(j), judge = judge_floats(j), two = sum > ask ? sum : ask;
    return kvpi_round_up_64((size_t)(two > judge ? two : judge) * sizeof(float));
}

/* Places the scratch in the workspace; a NULL workspace gives the sizes only. Returns the bytes of all of it. */
static size_t lay_out(job *j, char *workspace, int32_t n_worker) {
    const int64_t n_unit = j->n_batch * j->n_query_head, spread = j->args->with_spread;
    size_t used = 0;
#define PLACE(field, count)                                           \
    do {                                                              \
        j->field = workspace ? (void *)(workspace + used) : NULL;     \
        used += kvpi_round_up_64((size_t)(count) * sizeof *j->field); \
    } while (0)
    PLACE(shifts, n_unit * j->n_chunk * line_size(j));
    PLACE(sums, n_unit * j->n_chunk * line_size(j));
    PLACE(squares, spread * n_unit * j->n_chunk * j->width * j->width);
    PLACE(means, n_unit * line_size(j));
    PLACE(spreads, spread * n_unit * j->n_strip * j->n_dim * KVPI_STRIP);
    PLACE(best, j->n_batch * j->n_head);
#undef PLACE
    j->worker = workspace ? workspace + used : NULL;
    return used + j->worker_bytes * (size_t)n_worker;
}

static job read_job(const kvp_expect_args *args) {
    const int64_t *keys = args->keys.shape, n_query_head = args->queries.shape[1];
    job j = {
        .args = args,
        .rows = kvpi_rows_now(),
        .n_batch = keys[0],
        .n_head = keys[1],
        .n_query_head = n_query_head,
        .group = n_query_head / keys[1],
        .n_token = keys[2],
        .n_dim = keys[3],
        .width = round_up(keys[3], KVPI_WIDTH),
        .n_strip = (keys[3] + KVPI_STRIP - 1) / KVPI_STRIP,
        .n_bundle = (n_query_head + BUNDLE - 1) / BUNDLE,
        .n_chunk = least((keys[2] + LEAST_CHUNK - 1) / LEAST_CHUNK, MOST_CHUNKS),
    };
    j.worker_bytes = worker_bytes(&j);
    return j;
}

static float *scratch_of(const job *j, int32_t worker) {
    return (float *)(void *)(j->worker + (size_t)worker * j->worker_bytes);
}

static float *spread_of(const job *j, int64_t unit) { return j->spreads + unit * j->n_strip * j->n_dim * KVPI_STRIP; }

/* ------------------------------------------------------------------- sum */

/* Some tokens of query heads of one batch row; a worker's scratch: (TILE, width), and rows of a line each. */
typedef struct tile {
    int64_t b, first, n;
    float *lines;
    float *own, *other; /* (TILE, line): what a channel, and the other of its pair, give to what it was */
    float *zero, *sums;
} tile;

/* What undoes the turns of a tile's tokens. */
static void undo_turns(const job *j, const tile *at) {
    const kvp_tensor *cosines = &j->args->cosines, *sines = &j->args->sines;
    const int64_t half = j->n_dim / 2;
    for (int64_t i = 0; i < at->n; i++) {
        const float *c = (const float *)(const void *)kvpi_at(cosines, at->b, 0, at->first + i);
        const float *s = (const float *)(const void *)kvpi_at(sines, at->b, 0, at->first + i);
        float *own = at->own + i * line_size(j), *other = at->other + i * line_size(j);
        for (int64_t d = 0; d < j->n_dim; d++, c += cosines->stride[3], s += sines->stride[3]) {
            const float by = 1 / (*c * *c + *s * *s); /* not 1 where a model makes what it turns longer or shorter */
            own[d] = *c * by;
            other[d] = (d < half ? *s : -*s) * by;
        }
    }
}

static void turn_tile(const job *j, const tile *at, int64_t head, const float *shift) {
    const kvp_tensor *queries = &j->args->queries;
    const int64_t size = (int64_t)kvpi_dtype_size(queries->dtype), ahead = queries->stride[2] * TILE * size;
    for (int64_t i = 0; i < at->n; i++) {
        const char *row = kvpi_at(queries, at->b, head, at->first + i);
        for (int64_t d = 0; d < j->n_dim * size; d += 64) __builtin_prefetch(row + ahead + d);
        j->rows->turn[queries->dtype](kvpi_at(queries, at->b, head, at->first + i), queries->stride[3], j->n_dim,
                                      at->own + i * line_size(j), at->other + i * line_size(j), shift,
                                      at->lines + i * j->width);
    }
}

static void add_lines(const job *j, const tile *at, float weight, float *sum) {
    float weights[TILE];
    for (int64_t i = 0; i < at->n; i++) weights[i] = weight;
    j->rows->add_rows[KVP_F32]((kvpi_head){at->lines, j->width, 1}, at->n, j->n_dim, weights, sum);
}

/* Sums of a tile are float32, those of more are double. */
static void add_sums(const job *j, const tile *at, double *sum) {
    float *own = at->sums;
    memset(own, 0, (size_t)line_size(j) * sizeof(float));
    add_lines(j, at, 1, own);
    for (int64_t d = 0; d < j->n_dim; d++) sum[d] += (double)own[d];
}

static void add_tile(const job *j, const tile *at, int64_t head, int64_t chunk) {
    const int64_t place = (at->b * j->n_query_head + head) * j->n_chunk + chunk;
    turn_tile(j, at, head, j->shifts + place * line_size(j));
    add_sums(j, at, j->sums + place * line_size(j));
    if (j->args->with_spread)
        j->rows->add_squares(at->lines, at->n, j->width, j->squares + place * j->width * j->width);
}

/* The mean of the chunk's first tokens is its shift. */
static void start_chunk(const job *j, const tile *at, int64_t head, int64_t chunk) {
    const int64_t place = (at->b * j->n_query_head + head) * j->n_chunk + chunk;
    const size_t line = (size_t)line_size(j) * sizeof(float), square = (size_t)(j->width * j->width) * sizeof(float);
    memset(j->shifts + place * line_size(j), 0, line);
    memset(j->sums + place * line_size(j), 0, (size_t)line_size(j) * sizeof(double));
    if (j->args->with_spread) memset(j->squares + place * j->width * j->width, 0, square);
    turn_tile(j, at, head, at->zero);
    add_lines(j, at, 1 / (float)at->n, j->shifts + place * line_size(j));
}

static void sum_task(void *arg, int64_t task, int32_t worker) {
    const job *j = arg;
    const int64_t chunk = task % j->n_chunk, b = task / j->n_chunk / j->n_bundle;
    const int64_t first = task / j->n_chunk % j->n_bundle * BUNDLE, last = least(first + BUNDLE, j->n_query_head);
    const judged own = judged_of(j, b);
    if (chunk >= own.n_chunk) return;
    float *scratch = scratch_of(j, worker), *behind = scratch + TILE * j->width + KVPI_SLACK;
    memset(scratch, 0, (size_t)sum_floats(j) * sizeof(float)); /* what stands behind a line's channels stays zero */
    const int64_t begin = own.begin + chunk * own.length, end = least(begin + own.length, own.end);
    tile at = {.b = b, .first = begin, .n = least(TILE, end - begin), .lines = scratch, .zero = behind};
    at.sums = at.zero + line_size(j);
    at.own = at.sums + line_size(j);
    at.other = at.own + TILE * line_size(j);
    undo_turns(j, &at);
    for (int64_t head = first; head < last; head++) start_chunk(j, &at, head, chunk);
    for (; at.first < end; at.first += TILE) {
        at.n = least(TILE, end - at.first);
        undo_turns(j, &at);
        for (int64_t head = first; head < last; head++) add_tile(j, &at, head, chunk);
    }
}

/* ---------------------------------------------------------------- finish */

/* Of channels p and p + D/2, in this order, what they give to those of a turned row, scaled. */
typedef struct pair_turn {
    float low[2], high[2]; /* to the turned p: {p's part, p + D/2's}; to the turned p + D/2 */
} pair_turn;

static pair_turn read_turn(const job *j, int64_t b, int64_t p) {
    const kvp_tensor *cosines = &j->args->ahead_cosines, *sines = &j->args->ahead_sines;
    const int64_t half = j->n_dim / 2;
    const float scaling = (float)j->args->scaling;
    float c[2], s[2];
    for (int side = 0; side < 2; side++) {
        c[side] = *(const float *)(const void *)kvpi_at(cosines, b, p + side * half, 0) * scaling;
        s[side] = *(const float *)(const void *)kvpi_at(sines, b, p + side * half, 0) * scaling;
    }
    return (pair_turn){{c[0], -s[0]}, {s[1], c[1]}};
}

/* The mean of all chunks; a chunk's shift becomes what it is off it. */
static void join_means(const job *j, const judged *own, int64_t unit) {
    float *shifts = j->shifts + unit * j->n_chunk * line_size(j);
    const double *sums = j->sums + (shifts - j->shifts);
    const int64_t n = own->end - own->begin, step = line_size(j);
    for (int64_t d = 0; d < j->n_dim; d++) {
        double sum = 0;
        for (int64_t c = 0; c < own->n_chunk; c++) {
            const double n_own = (double)least(own->length, n - c * own->length);
            sum += sums[c * step + d] + n_own * (double)shifts[c * step + d];
        }
        const double mean = sum / (double)n;
        j->means[unit * step + d] = (float)mean;
        for (int64_t c = 0; c < own->n_chunk; c++) shifts[c * step + d] = (float)((double)shifts[c * step + d] - mean);
    }
}

/* The squares of all chunks around the mean, in the place of the first one's: of what a chunk has, x and y, the sum of
 * (x + off)(y + off)'. */
static void join_squares(const job *j, const judged *own, int64_t unit) {
    const int64_t square = j->width * j->width;
    float *all = j->squares + unit * j->n_chunk * square;
    for (int64_t c = 0; c < own->n_chunk; c++) {
        const float n = (float)least(own->length, own->end - own->begin - c * own->length);
        const float *off = j->shifts + (unit * j->n_chunk + c) * line_size(j);
        const double *sum = j->sums + (off - j->shifts);
        for (int64_t p = 0; p < j->n_dim; p++) {
            const float *from = all + c * square + p * j->width;
            float *to = all + p * j->width;
            for (int64_t q = p; q < j->n_dim; q++)
                to[q] = (c ? to[q] : 0) + (from[q] + off[p] * ((float)sum[q] + n * off[q]) + (float)sum[p] * off[q]);
        }
    }
}

/* Turns an upper triangle of squares, by blocks: what channels p and p + D/2 have to do with q and q + D/2. */
static void turn_squares(const job *j, int64_t b, float *squares, float share) {
    const int64_t half = j->n_dim / 2, width = j->width;
    for (int64_t p = 0; p < half; p++) {
        const pair_turn by_p = read_turn(j, b, p);
        for (int64_t q = p; q < half; q++) {
            const pair_turn by_q = read_turn(j, b, q);
            float *at[2][2] = {{squares + p * width + q, squares + p * width + q + half},
                               {squares + q * width + p + half, squares + (p + half) * width + q + half}};
            float low[2], high[2]; /* p's and p + D/2's of what was turned on one side, by q's side */
            for (int side = 0; side < 2; side++) {
                low[side] = by_p.low[0] * *at[0][side] + by_p.low[1] * *at[1][side];
                high[side] = by_p.high[0] * *at[0][side] + by_p.high[1] * *at[1][side];
            }
            *at[0][0] = share * (by_q.low[0] * low[0] + by_q.low[1] * low[1]);
            *at[0][1] = share * (by_q.high[0] * low[0] + by_q.high[1] * low[1]);
            *at[1][0] = share * (by_q.low[0] * high[0] + by_q.low[1] * high[1]);
            *at[1][1] = share * (by_q.high[0] * high[0] + by_q.high[1] * high[1]);
        }
    }
}

static void turn_mean(const job *j, int64_t b, float *mean) {
    const int64_t half = j->n_dim / 2;
    for (int64_t p = 0; p < half; p++) {
        const pair_turn by = read_turn(j, b, p);
        const float low = mean[p], high = mean[p + half];
        mean[p] = by.low[0] * low + by.low[1] * high;
        mean[p + half] = by.high[0] * low + by.high[1] * high;
    }
}

/* The upper triangle's columns are rows of the spread up to its diagonal; zeros behind that. */
static void lay_spread(const job *j, const float *squares, float *spread) {
    for (int64_t s = 0; s < j->n_strip; s++) {
        for (int64_t d = 0; d < j->n_dim; d++, spread += KVPI_STRIP) {
            for (int64_t r = 0; r < KVPI_STRIP; r++) {
                const int64_t row = s * KVPI_STRIP + r;
                const bool is_there = row < j->n_dim && d <= row;
                spread[r] = is_there ? squares[d * j->width + row] * (d < row ? 2 : 1) : 0;
            }
        }
    }
}

static void finish_task(void *arg, int64_t unit, int32_t worker) {
    (void)worker;
    const job *j = arg;
    const int64_t b = unit / j->n_query_head;
    const judged own = judged_of(j, b);
    if (own.n_chunk == 0) return;
    join_means(j, &own, unit);
    turn_mean(j, b, j->means + unit * line_size(j));
    memset(j->means + unit * line_size(j) + j->n_dim, 0, (size_t)(line_size(j) - j->n_dim) * sizeof(float));
    if (!j->args->with_spread) return;
    float *squares = j->squares + unit * j->n_chunk * j->width * j->width;
    join_squares(j, &own, unit);
    turn_squares(j, b, squares, 0.5f / (float)(own.end - own.begin));
    lay_spread(j, squares, spread_of(j, unit));
}

/* ------------------------------------------------------------------- ask */

/* The logits of packed keys, at column. */
static void ask_spread(const job *j, int64_t unit, const float *packed, int64_t n_key, float *products, float *column) {
    const float *mean = j->means + unit * line_size(j), *spread = spread_of(j, unit);
    const int64_t panel = j->rows->panel;
    for (int64_t k = 0; k < n_key; k += panel) {
        const float *own = packed + k * j->n_dim;
        memset(column + k, 0, (size_t)panel * sizeof(float));
        for (int64_t s = 0; s < j->n_strip; s++) {
            const int64_t first = s * KVPI_STRIP, last = least(first + KVPI_STRIP, j->n_dim);
            j->rows->multiply[KVP_F32](spread + first * j->n_dim, own, KVPI_STRIP, panel, last, products, panel);
            j->rows->dot_columns(column + k, panel, products, own + first * panel, panel, mean + first, last - first);
        }
    }
}

/* A block of keys of one key head, asked for the logits of its query heads. */
static void ask_task(void *arg, int64_t task, int32_t worker) {
    const job *j = arg;
    const kvp_tensor *keys = &j->args->keys, *logits = &j->args->logits;
    const int64_t n_block = (j->n_token + KVPI_BLOCK - 1) / KVPI_BLOCK;
    const int64_t b = task / n_block / j->n_head, h = task / n_block % j->n_head;
    const judged own = judged_of(j, b);
    const int64_t first = own.begin + task % n_block * KVPI_BLOCK, n = least(KVPI_BLOCK, own.end - first);
    if (n <= 0) return;
    float *packed = scratch_of(j, worker), *products = packed + kvpi_packed_bytes(KVPI_BLOCK, j->n_dim) / sizeof(float);
    float *column = products + KVPI_STRIP * KVPI_WIDTH;
    const kvpi_head head = {kvpi_at(keys, b, h, first), keys->stride[2], keys->stride[3]};
    if (j->args->with_spread) j->rows->pack_floats[keys->dtype](head, n, j->n_dim, packed);
    for (int64_t g = 0; g < j->group; g++) {
        const int64_t of_head = h * j->group + g, unit = b * j->n_query_head + of_head;
        if (j->args->with_spread)
            ask_spread(j, unit, packed, n, products, column);
        else
            j->rows->products[keys->dtype](head, n, j->n_dim, j->means + unit * line_size(j), column);
        float *out = (float *)(void *)kvpi_at(logits, b, of_head, first);
        for (int64_t k = 0; k < n; k++) out[k * logits->stride[2]] = column[k];
    }
}

/* ----------------------------------------------------------------- judge */

/* Powers of a segment's logits of one query head, at row; returns what makes shares of them. */
static float raise(const job *j, int64_t b, int64_t head, int64_t begin, int64_t n, float *row) {
    const kvp_tensor *logits = &j->args->logits, *sinks = &j->args->sinks;
    const float *from = (const float *)(const void *)kvpi_at(logits, b, head, begin);
    const float log2_e = (float)KVPI_LOG2_E;
    for (int64_t k = 0; k < n; k++) row[k] = from[k * logits->stride[2]];
    float shift = NAN, sum = j->rows->soften(row, n, round_up(n, j->rows->panel), log2_e, &shift);
    if (!sinks->data) return 1 / sum;
    const float sink = *(const float *)(const void *)kvpi_at(sinks, head, 0, 0) * log2_e;
    const float highest = sink > shift ? sink : shift, less = exp2f(shift - highest);
    return less / (sum * less + exp2f(sink - highest));
}

/* Scores of a segment, at column. */
static void judge_segment(const job *j, int64_t b, int64_t h, int64_t begin, int64_t n, float *row, float *column) {
    const kvp_tensor *values = &j->args->values;
    memset(column, 0, (size_t)n * sizeof(float));
    for (int64_t g = 0; g < j->group; g++) {
        const float weight = raise(j, b, h * j->group + g, begin, n, row);
        j->rows->add_columns(column, n, row, 0, &weight, 1);
    }
    if (values->data) {
        const kvpi_head of_values = {kvpi_at(values, b, h, begin), values->stride[2], values->stride[3]};
        j->rows->norms[values->dtype](of_values, n, values->shape[3], row, 1);
    }
    for (int64_t k = 0; k < n; k++)
        column[k] = (column[k] / (float)j->group + (float)j->args->epsilon) * (values->data ? row[k] : 1);
}

static void judge_task(void *arg, int64_t task, int32_t worker) {
    const job *j = arg;
    const kvp_tensor *segments = &j->args->segments, *scores = &j->args->scores;
    const int64_t b = task / j->n_head, h = task % j->n_head, step = scores->stride[2];
    float *row = scratch_of(j, worker), *column = row + row_size(j), best = 0;
    float *out = (float *)(void *)kvpi_at(scores, b, h, 0);
    for (int64_t t = 0; t < j->n_token; t++) out[t * step] = 0;
    for (int64_t s = 1; s + 1 < segments->shape[1]; s++) {
        const int64_t begin = kvpi_i32(segments, b, s, 0), n = kvpi_i32(segments, b, s + 1, 0) - begin;
        if (n == 0) continue;
        judge_segment(j, b, h, begin, n, row, column);
        for (int64_t k = 0; k < n; k++) {
            out[(begin + k) * step] = column[k];
            if (column[k] > best) best = column[k];
        }
    }
    j->best[task] = best;
}

static void write_unjudged(const job *j, int64_t b) {
    const kvp_tensor *segments = &j->args->segments, *scores = &j->args->scores;
    float best = 0;
    for (int64_t h = 0; h < j->n_head; h++) best = fmaxf(best, j->best[b * j->n_head + h]);
    for (int64_t h = 0; h < j->n_head; h++)
        for (int64_t t = kvpi_i32(segments, b, 0, 0); t < kvpi_i32(segments, b, 1, 0); t++)
            *(float *)(void *)kvpi_at(scores, b, h, t) = fminf(best, FLT_MAX) + 1;
}

size_t kvpi_expect_workspace(const kvp_expect_args *args, int32_t n_worker) {
    job j = read_job(args);
    return lay_out(&j, NULL, n_worker);
}

kvp_status kvpi_expect_cpu(const kvp_expect_args *args, kvp_context *ctx) {
    job j = read_job(args);
    lay_out(&j, ctx->workspace, kvpi_worker_count(ctx));
    const int64_t n_unit = j.n_batch * j.n_query_head, n_head = j.n_batch * j.n_head;
    const double numbers = (double)(n_unit * j.n_token * j.n_dim), squares = args->with_spread ? (double)j.n_dim : 1;
    kvpi_run(ctx, j.n_batch * j.n_bundle * j.n_chunk, numbers * (0.5 + squares * 0.01), sum_task, &j);
    kvpi_run(ctx, n_unit, (double)(n_unit * j.n_dim) * squares, finish_task, &j);
    kvpi_run(ctx, n_head * ((j.n_token + KVPI_BLOCK - 1) / KVPI_BLOCK), numbers * squares * 0.01, ask_task, &j);
    kvpi_run(ctx, n_head, (double)(n_unit * j.n_token), judge_task, &j);
    for (int64_t b = 0; b < j.n_batch; b++) write_unjudged(&j, b);
    return KVP_OK;
}

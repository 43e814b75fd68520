/* SPDX-License-Identifier: Apache-2.0
 *
 * The attention of a strip of query rows, added up by column:
 *
 *     logits of all keys up to the strip's last query, a block of keys at a time
 *     soften each row of the block against the block's own highest logit, so that one pass over the keys is enough
 *     when all blocks are there: the row's softmax denominator, and from it one weight per row and block
 *     column += weight * row, for the rows that vote on these keys, or the most of both
 */
#include "attention.h"

#include <math.h>
#include <string.h>

/* Scratch of one worker. */
typedef struct strip {
    float *logits; /* (KVPI_STRIP, stride) */
    float *shift;  /* (KVPI_STRIP, blocks): what the exponent was lowered by, later the weight */
    float *sum;    /* (KVPI_STRIP, blocks) */
    char *queries; /* packed, or lined up */
    char *keys;    /* one packed panel, or a few lined up */
    int64_t n_block_max;
    /* the strip at hand */
    int64_t n_row, n_key;       /* n_key: up to the last row's own position */
    int64_t query[KVPI_STRIP];  /* positions */
    float lse[KVPI_STRIP];      /* given, to base 2, or NaN */
    bool is_broken[KVPI_STRIP]; /* its logits have no softmax */
    bool is_odd[KVPI_STRIP];    /* lse is given, and not all powers are numbers */
    bool is_few;                /* its queries are lined up, and keys taken as they stand */
} strip;

static int64_t block_count(int64_t n_key) { return (n_key + KVPI_BLOCK - 1) / KVPI_BLOCK; }

static size_t table_bytes(int64_t n_token) {
    return kvpi_round_up_64((size_t)(KVPI_STRIP * block_count(n_token)) * sizeof(float));
}

static size_t logit_bytes(int64_t n_token) {
    return kvpi_round_up_64((size_t)(KVPI_STRIP * (block_count(n_token) * KVPI_BLOCK + KVPI_SLACK)) * sizeof(float));
}

/* Packed, or a few lined up: of whole vectors, which have KVPI_SLACK elements at most. */
static size_t query_bytes(int64_t n_dim) {
    return kvpi_round_up_64(kvpi_packed_bytes(KVPI_STRIP, n_dim + KVPI_SLACK / 2));
}

size_t kvpi_strip_bytes(int64_t n_token, int64_t n_dim) {
    return logit_bytes(n_token) + 2 * table_bytes(n_token) + query_bytes(n_dim) +
           kvpi_round_up_64(kvpi_packed_bytes(KVPI_BLOCK, n_dim));
}

static strip carve_strip(const kvpi_attention *j, char *scratch) {
    const size_t logits = logit_bytes(j->n_token), table = table_bytes(j->n_token);
    return (strip){
        .logits = (float *)(void *)scratch,
        .shift = (float *)(void *)(scratch + logits),
        .sum = (float *)(void *)(scratch + logits + table),
        .queries = scratch + logits + 2 * table,
        .keys = scratch + logits + 2 * table + query_bytes(j->n_dim),
        .n_block_max = block_count(j->n_token),
    };
}

/* Finds the strip's rows and packs or lines up their queries; returns what the product must be multiplied with to be a
 * logit to base 2. */
static float gather_queries(const kvpi_attention *j, strip *s, int64_t b, int64_t h, int64_t index, bool is_packed) {
    const kvp_tensor *queries = &j->args->queries, *lse = &j->args->lse;
    const void *rows[KVPI_STRIP];
    int64_t valid[2];
    kvpi_valid_range(&j->args->valid, b, j->n_token, &valid[0], &valid[1]);
    const int64_t first = index * KVPI_STRIP, left = j->n_voters[b] * j->group - first;
    s->n_row = left < KVPI_STRIP ? left : KVPI_STRIP;
    for (int64_t r = 0; r < s->n_row; r++) {
        const int64_t q = j->voters[b * j->n_query + (first + r) / j->group], n = h * j->group + (first + r) % j->group;
        const int64_t i = q - (j->n_token - j->n_query);
        s->query[r] = q - valid[0];
        s->lse[r] = lse->data ? *(const float *)(const void *)kvpi_at(lse, b, n, i) * (float)KVPI_LOG2_E : NAN;
        s->is_broken[r] = s->is_odd[r] = false;
        rows[r] = kvpi_at(queries, b, n, i);
    }
    s->n_key = s->query[s->n_row - 1] + 1;
    const float scale = (float)j->args->param[KVPI_PARAM_attention_scaling] *
                        (j->args->param[KVPI_PARAM_attention_softcap] > 0 ? 1.0f : (float)KVPI_LOG2_E);
    s->is_few = !is_packed && s->n_row <= KVPI_FEW;
    if (s->is_few) {
        j->rows->line_up[queries->dtype](rows, queries->stride[3], s->n_row, j->n_dim, scale,
                                         (float *)(void *)s->queries);
        return 1;
    }
    return j->rows->pack_queries[queries->dtype](rows, queries->stride[3], s->n_row, j->n_dim, scale, s->queries);
}

/* Asks for rows in order of address, which the processor's look-ahead follows; packing goes across rows, and would not
 * wake it. It shows where there are many keys for few queries, as TOVA's and SnapKV's. */
static void ask_for(kvpi_head head, int64_t first, int64_t n_row, size_t n_byte, size_t size) {
    for (int64_t r = first; r < first + n_row; r++) {
        const char *row = (const char *)head.first + r * head.row_stride * (int64_t)size;
        for (size_t at = 0; at < n_byte; at += 64) __builtin_prefetch(row + at, 0, 2);
    }
}

void kvpi_pack_block(const kvpi_attention *j, kvpi_head head, int64_t first, int64_t n_key, char *out) {
    const int32_t dtype = j->args->keys.dtype;
    const size_t size = kvpi_dtype_size(dtype);
    if (head.dim_stride == 1) ask_for(head, first, n_key, (size_t)j->n_dim * size, size);
    head.first = (const char *)head.first + first * head.row_stride * (int64_t)size;
    j->rows->pack_keys[dtype](head, n_key, j->n_dim, out);
}

/* Logits of n_key keys from first on, from keys packed before or, if there are none, as they stand for a few rows, else
 * packed here, a panel at a time: that stays in the first-level cache. */
static void multiply_block(const kvpi_attention *j, strip *s, kvpi_head head, int64_t first, int64_t n_key,
                           const char *packed) {
    const int32_t dtype = j->args->keys.dtype;
    const int64_t panel = j->rows->panel;
    const char *from = (const char *)head.first + first * head.row_stride * (int64_t)kvpi_dtype_size(dtype);
    float *logits = s->logits + first;
    if (packed) {
        const char *keys = packed + kvpi_packed_bytes(first, j->n_dim);
        j->rows->multiply[dtype](s->queries, keys, s->n_row, n_key, j->n_dim, logits, j->stride);
        return;
    }
    if (s->is_few) {
        j->rows->multiply_few[dtype]((const float *)(const void *)s->queries,
                                     (kvpi_head){from, head.row_stride, head.dim_stride}, s->n_row, n_key, j->n_dim,
                                     (float *)(void *)s->keys, logits, j->stride);
        return;
    }
    for (int64_t key = 0; key < n_key; key += panel) {
        const int64_t left = n_key - key < panel ? n_key - key : panel, behind = s->n_key - first - key;
        const size_t size = kvpi_dtype_size(dtype);
        if (head.dim_stride == 1) /* each row twice, since a processor drops what it is asked for too fast */
            ask_for(head, first + key, behind < 2 * panel ? behind : 2 * panel, (size_t)j->n_dim * size, size);
        j->rows->pack_keys[dtype]((kvpi_head){from, head.row_stride, head.dim_stride}, left, j->n_dim, s->keys);
        j->rows->multiply[dtype](s->queries, s->keys, s->n_row, left, j->n_dim, logits + key, j->stride);
        from += panel * head.row_stride * (int64_t)size;
    }
}

static void soften_block(const kvpi_attention *j, strip *s, int64_t first, int64_t n_key, float scale) {
    const float softcap = (float)j->args->param[KVPI_PARAM_attention_softcap];
    const int64_t block = first / KVPI_BLOCK, n = (n_key + j->rows->panel - 1) / j->rows->panel * j->rows->panel;
    for (int64_t r = 0; r < s->n_row; r++) {
        float *row = s->logits + r * j->stride + first;
        const int64_t visible = s->query[r] + 1 - first, n_visible = visible < 0 ? 0 : visible < n ? visible : n;
        float shift = s->lse[r], factor = scale;
        if (softcap > 0) { /* x -> softcap * tanh(x / softcap), to base 2 */
            j->rows->cap(row, n_visible, scale / softcap, softcap * (float)KVPI_LOG2_E);
            factor = 1;
        } else if (scale == 0) { /* not left to soften, where minus infinity hides a key, and times 0 is no number */
            for (int64_t k = 0; k < n_visible; k++) row[k] *= 0;
            factor = 1;
        }
        s->sum[r * s->n_block_max + block] = j->rows->soften(row, n_visible, n, factor, &shift);
        s->shift[r * s->n_block_max + block] = shift;
    }
}

static void attend(const kvpi_attention *j, strip *s, int64_t b, int64_t h, int64_t index, const char *packed) {
    const float scale = gather_queries(j, s, b, h, index, packed != NULL);
    const kvpi_head head = kvpi_keys_of(j, b, h);
    for (int64_t first = 0; first < s->n_key; first += KVPI_BLOCK) {
        const int64_t n_key = s->n_key - first < KVPI_BLOCK ? s->n_key - first : KVPI_BLOCK;
        multiply_block(j, s, head, first, n_key, packed);
        soften_block(j, s, first, n_key, scale);
    }
}

/* Turns the shifts of row r into weights: 2^(block's shift - log2 of the denominator). */
static void weigh_row(const kvpi_attention *j, strip *s, int64_t r) {
    float *shift = s->shift + r * s->n_block_max;
    const float *sum = s->sum + r * s->n_block_max;
    const int64_t n_block = block_count(s->n_key);
    if (j->args->lse.data) { /* the exponents were lowered by the lse itself; one that is not finite casts no vote */
        for (int64_t block = 0; block < n_block; block++) {
            s->is_odd[r] = s->is_odd[r] || !isfinite(sum[block]);
            shift[block] = isfinite(s->lse[r]) ? 1.0f : 0.0f;
        }
        return;
    }
    /* Only blocks that the row sees: those behind, which other rows of the strip see, have nothing to be lowered by. */
    const int64_t n_seen = s->query[r] / KVPI_BLOCK + 1;
    float highest = -INFINITY;
    for (int64_t block = 0; block < n_seen; block++) highest = shift[block] > highest ? shift[block] : highest;
    double total = 0;
    for (int64_t block = 0; block < n_seen; block++)
        total += (double)sum[block] * (double)exp2f(shift[block] - highest);
    s->is_broken[r] = !(isfinite(total) && total > 0);
    const float share = (float)(1.0 / total);
    for (int64_t block = 0; block < n_seen; block++) shift[block] = exp2f(shift[block] - highest) * share;
    for (int64_t block = n_seen; block < n_block; block++) shift[block] = 0;
}

/* Rows without numbers must not spread to keys they cannot see: they are taken out, and what they see becomes NaN. */
static void clear_row(const kvpi_attention *j, strip *s, int64_t r) {
    memset(s->logits + r * j->stride, 0, (size_t)(block_count(s->n_key) * KVPI_BLOCK) * sizeof(float));
    for (int64_t block = 0; block < block_count(s->n_key); block++) s->shift[r * s->n_block_max + block] = 0;
}

/* column += weight * row for the voters among the strip's rows, or the most of both. Others weigh 0, and stay out of
 * sums where 0 times what they hold is no number. */
static void add_rows(const kvpi_attention *j, const strip *s, const bool *is_voter, bool is_most, int64_t first,
                     int64_t n, float *column) {
    float weight[KVPI_STRIP];
    bool is_odd = false;
    for (int64_t r = 0; r < s->n_row; r++) {
        weight[r] = is_voter[r] ? s->shift[r * s->n_block_max + first / KVPI_BLOCK] : 0;
        is_odd = is_odd || s->is_odd[r];
    }
    if (is_most) {
        j->rows->raise_columns(column + first, n, s->logits + first, j->stride, weight, s->n_row);
        return;
    }
    if (!is_odd) {
        j->rows->add_columns(column + first, n, s->logits + first, j->stride, weight, s->n_row);
        return;
    }
    for (int64_t r = 0; r < s->n_row; r++)
        if (is_voter[r])
            j->rows->add_columns(column + first, n, s->logits + r * j->stride + first, j->stride, weight + r, 1);
}

/* What is NaN by row r: all that it sees if it has no softmax, else what it holds so, which the most of a column would
 * not tell. */
static void spoil_keys(const strip *s, int64_t r, const float *row, int64_t low, int64_t high, float *column) {
    if (!s->is_broken[r] && !s->is_odd[r]) return;
    for (int64_t k = low; k < high && k <= s->query[r]; k++)
        if (s->is_broken[r] || isnan(row[k])) column[k] = NAN;
}

static void add_vote(const kvpi_attention *j, const strip *s, const kvpi_vote *vote, int64_t begin, float *column) {
    bool is_voter[KVPI_STRIP], any = false;
    for (int64_t r = 0; r < s->n_row; r++) any |= is_voter[r] = kvpi_votes_here(vote, s->query[r] + begin);
    if (!any) return;
    const int64_t low = vote->key[0] - begin, high = vote->key[1] - begin < s->n_key ? vote->key[1] - begin : s->n_key;
    for (int64_t first = low; first < high;) {
        const int64_t block = first / KVPI_BLOCK,
                      end = (block + 1) * KVPI_BLOCK < high ? (block + 1) * KVPI_BLOCK : high;
        add_rows(j, s, is_voter, vote->weight == KVP_WEIGHT_MAX, first, end - first, column);
        first = end;
    }
    for (int64_t r = 0; r < s->n_row; r++)
        if (is_voter[r]) spoil_keys(s, r, s->logits + r * j->stride, low, high, column);
}

void kvpi_add_strips(const kvpi_attention *j, int64_t b, int64_t h, int64_t chunk, const char *packed, char *scratch,
                     float *column) {
    strip s = carve_strip(j, scratch);
    int64_t begin, end;
    kvpi_valid_range(&j->args->valid, b, j->n_token, &begin, &end);
    memset(column, 0, (size_t)j->stride * sizeof(float));
    for (int64_t index = chunk; index < kvpi_strip_count(j, b); index += KVPI_CHUNK) {
        attend(j, &s, b, h, index, packed);
        for (int64_t r = 0; r < s.n_row; r++) {
            weigh_row(j, &s, r);
            const bool is_mute = j->args->lse.data && !isfinite(s.lse[r]);
            if (s.is_broken[r] || is_mute) clear_row(j, &s, r);
        }
        for (int64_t v = 0; v < j->n_vote; v++) {
            const kvpi_vote vote = kvpi_read_vote(j, b, v);
            add_vote(j, &s, &vote, begin, column);
        }
    }
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * The scorers norm, attention and keydiff in one arithmetic. oracle.c includes this file twice, with NAME(x), REAL and
 * its EXP, TANH and SQRT defined: in double it is the exact answer, in float the naive one.
 */

void NAME(norm)(const kvp_score_args *args, REAL *scores) {
    const int64_t *shape = args->keys.shape;
    for (int64_t b = 0, row = 0; b < shape[0]; b++) {
        int64_t begin, end;
        read_valid(&args->valid, b, shape[2], &begin, &end);
        for (int64_t h = 0; h < shape[1]; h++, row++) {
            for (int64_t t = 0; t < shape[2]; t++) {
                REAL sum = 0;
                for (int64_t d = 0; d < shape[3]; d++) {
                    const REAL x = (REAL)get(&args->keys, b, h, t, d);
                    sum += x * x;
                }
                scores[row * shape[2] + t] = t >= begin && t < end ? -SQRT(sum) : -(REAL)INFINITY;
            }
        }
    }
}

/* One head of a (B,H,rows,D) tensor, widened. */
static REAL *NAME(load)(const kvp_tensor *t, int64_t b, int64_t h) {
    REAL *out = allocate((size_t)(t->shape[2] * t->shape[3]) * sizeof *out);
    for (int64_t i = 0; i < t->shape[2]; i++)
        for (int64_t d = 0; d < t->shape[3]; d++) out[i * t->shape[3] + d] = (REAL)get(t, b, h, i, d);
    return out;
}

static REAL NAME(logit)(const kvp_score_args *args, const REAL *query, const REAL *key) {
    const REAL scaling = (REAL)args->param[0], softcap = (REAL)args->param[1];
    REAL dot = 0;
    for (int64_t d = 0; d < args->keys.shape[3]; d++) dot += query[d] * key[d];
    const REAL x = scaling * dot;
    return softcap > 0 ? softcap * TANH(x / softcap) : x;
}

/* The softmax of one row, in place: row[k] for k in [begin, q]. */
static void NAME(softmax)(REAL *row, int64_t begin, int64_t q, const double *lse) {
    REAL highest = -(REAL)INFINITY, sum = 0;
    for (int64_t k = begin; k <= q; k++) highest = row[k] > highest ? row[k] : highest;
    for (int64_t k = begin; k <= q; k++) sum += EXP(row[k] - highest);
    for (int64_t k = begin; k <= q; k++) row[k] = lse ? EXP(row[k] - (REAL)*lse) : EXP(row[k] - highest) / sum;
}

/* The whole T x T matrix A of query head n; rows that cast no vote stay zero. */
static void NAME(attend)(const kvp_score_args *args, int64_t b, int64_t n, REAL *matrix) {
    const int64_t n_token = args->keys.shape[2], n_dim = args->keys.shape[3], n_query = args->queries.shape[2];
    const int64_t group = args->queries.shape[1] / args->keys.shape[1];
    REAL *keys = NAME(load)(&args->keys, b, n / group), *queries = NAME(load)(&args->queries, b, n);
    int64_t begin, end;
    read_valid(&args->valid, b, n_token, &begin, &end);
    memset(matrix, 0, (size_t)(n_token * n_token) * sizeof *matrix);
    for (int64_t i = 0; i < n_query; i++) {
        const int64_t q = n_token - n_query + i;
        if (q < begin || q >= end) continue;
        const double lse = args->lse.data ? get(&args->lse, b, n, i, 0) : 0;
        if (!isfinite(lse)) continue;
        REAL *row = matrix + q * n_token;
        for (int64_t k = begin; k <= q; k++) row[k] = NAME(logit)(args, queries + i * n_dim, keys + k * n_dim);
        NAME(softmax)(row, begin, q, args->lse.data ? &lse : NULL);
    }
    free(keys);
    free(queries);
}

/* NaN, if one of them is. */
static REAL NAME(most)(REAL a, REAL b) { return isnan(a) || a >= b ? a : b; }

/* The votes of one query head, weighted. */
static void NAME(vote)(const kvp_score_args *args, const cut_vote *v, const REAL *matrix, REAL *out) {
    const int64_t n_token = args->keys.shape[2];
    int64_t n_voter = 0;
    for (int64_t q = 0; q < n_token; q++) n_voter += is_voter(v, q);
    for (int64_t k = v->key_begin; k < v->key_end; k++) {
        REAL sum = 0;
        for (int64_t q = k; q < n_token; q++)
            if (is_voter(v, q) && v->weight == KVP_WEIGHT_MAX)
                sum = NAME(most)(sum, matrix[q * n_token + k]);
            else if (is_voter(v, q))
                sum += matrix[q * n_token + k];
        if (v->weight == KVP_WEIGHT_MEAN && n_voter > 0) sum /= (REAL)n_voter;
        if (v->weight == KVP_WEIGHT_AGE) sum /= (REAL)(v->age_end - k > 1 ? v->age_end - k : 1);
        out[k] = sum;
    }
}

/* The most of the heads [first, last) of per_head (heads, T) takes the place of each. */
static void NAME(raise)(const cut_vote *v, int64_t n_token, int64_t first, int64_t last, REAL *per_head) {
    for (int64_t k = v->key_begin; k < v->key_end; k++) {
        REAL most = 0;
        for (int64_t n = first; n < last; n++) most = NAME(most)(most, per_head[n * n_token + k]);
        for (int64_t n = first; n < last; n++) per_head[n * n_token + k] = most;
    }
}

/* Means over neighbours, of one query head. */
static void NAME(pool)(const kvp_score_args *args, const cut_vote *v, REAL *out) {
    const int64_t n_token = args->keys.shape[2], reach = (int64_t)args->param[2] / 2;
    REAL *weighted = allocate((size_t)n_token * sizeof *weighted);
    memcpy(weighted, out, (size_t)n_token * sizeof *weighted);
    for (int64_t k = v->key_begin; k < v->key_end; k++) {
        REAL sum = 0;
        for (int64_t i = k - reach; i <= k + reach; i++)
            if (i >= v->key_begin && i < v->key_end) sum += weighted[i];
        out[k] = sum / (REAL)args->param[2];
    }
    free(weighted);
}

/* Mean over the heads [first, last) of per_head (heads, T), windows, and minus infinity outside the valid range. */
static void NAME(combine)(const kvp_score_args *args, int64_t b, int64_t first, int64_t last, const REAL *per_head,
                          REAL *out) {
    const int64_t n_token = args->keys.shape[2];
    int64_t begin, end;
    read_valid(&args->valid, b, n_token, &begin, &end);
    for (int64_t k = 0; k < n_token; k++) {
        const int64_t window = score_of_window(args, b, k);
        REAL sum = 0;
        for (int64_t n = first; n < last; n++) sum += per_head[n * n_token + k];
        out[k] = sum / (REAL)(last - first);
        if (window > 0) out[k] = (REAL)window;
        if (k < begin || k >= end) out[k] = -(REAL)INFINITY;
    }
}

void NAME(attention)(const kvp_score_args *args, REAL *scores) {
    const int64_t n_head = args->keys.shape[1], n_token = args->keys.shape[2], n_query_head = args->queries.shape[1],
                  n_vote = args->votes.shape[1], group = args->param[3] > 0 ? n_query_head : n_query_head / n_head;
    REAL *matrix = allocate((size_t)(n_token * n_token) * sizeof *matrix),
         *per_head = allocate((size_t)(n_query_head * n_token) * sizeof *per_head);
    for (int64_t b = 0; b < args->keys.shape[0]; b++) {
        memset(per_head, 0, (size_t)(n_query_head * n_token) * sizeof *per_head);
        for (int64_t n = 0; n < n_query_head; n++) {
            NAME(attend)(args, b, n, matrix);
            for (int64_t v = 0; v < n_vote; v++) {
                const cut_vote vote = read_vote(args, b, v);
                NAME(vote)(args, &vote, matrix, per_head + n * n_token);
            }
        }
        for (int64_t i = 0; i < n_vote * n_query_head; i++) {
            const cut_vote vote = read_vote(args, b, i / n_query_head);
            const int64_t n = i % n_query_head;
            if (vote.weight == KVP_WEIGHT_MAX && n % group == 0) NAME(raise)(&vote, n_token, n, n + group, per_head);
        }
        for (int64_t i = 0; i < n_vote * n_query_head; i++) {
            const cut_vote vote = read_vote(args, b, i / n_query_head);
            NAME(pool)(args, &vote, per_head + i % n_query_head * n_token);
        }
        for (int64_t h = 0; h < n_head; h++) {
            const int64_t first = args->param[3] > 0 ? 0 : h * group;
            NAME(combine)(args, b, first, first + group, per_head, scores + (b * n_head + h) * n_token);
        }
    }
    free(matrix);
    free(per_head);
}

/* The row without its length, which no number is too small or too large for: largest element first. */
static void NAME(unit)(REAL *row, int64_t n_dim) {
    REAL largest = 0, square = 0;
    for (int64_t d = 0; d < n_dim; d++) largest = row[d] > largest ? row[d] : -row[d] > largest ? -row[d] : largest;
    for (int64_t d = 0; d < n_dim && largest > 0; d++) row[d] /= largest;
    for (int64_t d = 0; d < n_dim; d++) square += row[d] * row[d];
    for (int64_t d = 0; d < n_dim && largest > 0; d++) row[d] /= SQRT(square);
}

/* One range of n keys: units (n,D), which are keys before. */
static void NAME(differ)(REAL *units, int64_t n, int64_t n_dim, REAL *scores) {
    REAL *mean = allocate((size_t)n_dim * sizeof *mean), square = 0;
    memset(mean, 0, (size_t)n_dim * sizeof *mean);
    for (int64_t k = 0; k < n; k++) NAME(unit)(units + k * n_dim, n_dim);
    for (int64_t i = 0; i < n * n_dim; i++) mean[i % n_dim] += units[i];
    for (int64_t d = 0; d < n_dim; d++) {
        mean[d] /= (REAL)n;
        square += mean[d] * mean[d];
    }
    NAME(unit)(mean, n_dim);
    for (int64_t k = 0; k < n; k++) {
        REAL product = 0;
        for (int64_t d = 0; d < n_dim; d++) product += units[k * n_dim + d] * mean[d];
        scores[k] = SQRT(square) < (REAL)0x1p-18 ? 0 : -product;
    }
    free(mean);
}

void NAME(keydiff)(const kvp_score_args *args, REAL *scores) {
    const int64_t n_token = args->keys.shape[2], n_dim = args->keys.shape[3];
    for (int64_t b = 0; b < args->keys.shape[0]; b++) {
        int64_t begin, end;
        read_valid(&args->valid, b, n_token, &begin, &end);
        for (int64_t h = 0; h < args->keys.shape[1]; h++, scores += n_token) {
            REAL *keys = NAME(load)(&args->keys, b, h);
            for (int64_t t = 0; t < n_token; t++) scores[t] = t >= begin && t < end ? 0 : -(REAL)INFINITY;
            for (int64_t v = 0; v < args->votes.shape[1]; v++) {
                const cut_vote vote = read_vote(args, b, v);
                const int64_t from = vote.key_begin, n = vote.key_end - from;
                if (n > 2) NAME(differ)(keys + from * n_dim, n, n_dim, scores + from);
            }
            free(keys);
        }
    }
}

#undef NAME
#undef REAL
#undef EXP
#undef TANH
#undef SQRT

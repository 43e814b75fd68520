/* SPDX-License-Identifier: Apache-2.0
 *
 * The scorer "lagkv" by what it says of an order: against weights in double, and by laws that need none.
 */
#include "harness.h"
#include "tests.h"

#include <math.h>
#include <stdlib.h>

static const int64_t LAGS[] = {2, 3, 16, 37, 128};
#define COUNT(list) (sizeof(list) / sizeof(list)[0])

typedef struct lagkv_case {
    array keys, values, valid, scores;
    kvp_score_args args;
} lagkv_case;

static lagkv_case new_case(kvp_dtype dtype, layout how, const int64_t *shape, int64_t n_dim_of_values, int64_t n_sink,
                           int64_t lag_size) {
    const int64_t wide[4] = {shape[0], shape[1], shape[2], n_dim_of_values};
    lagkv_case c = {.keys = new_array(dtype, how, 4, shape),
                    .values = new_array(dtype, random_layout(), 4, wide),
                    .valid = new_array(KVP_I32, random_layout(), 2, (int64_t[2]){shape[0], 2}),
                    .scores = new_array(KVP_F32, output_layout(random_layout()), 3, shape)};
    fill_normal(&c.keys.view);
    fill_normal(&c.values.view);
    fill_valid(&c.valid.view, shape[2], false);
    c.args = (kvp_score_args){.size = sizeof(kvp_score_args),
                              .scorer = kvp_scorer_find("lagkv"),
                              .keys = c.keys.view,
                              .values = c.values.view,
                              .scores = c.scores.view,
                              .param = {(double)n_sink, (double)lag_size}};
    if (random_below(2)) c.args.valid = c.valid.view;
    return c;
}

static void free_case(lagkv_case *c) {
    array *const all[] = {&c->keys, &c->values, &c->valid, &c->scores};
    for (size_t i = 0; i < COUNT(all); i++) free_array(all[i]);
}

/* The row of token t, moved and scaled so that the bounds are 0 and 1. */
static void place(const kvp_tensor *x, int64_t b, int64_t h, int64_t t, const double *low, const double *high,
                  double *row) {
    for (int64_t d = 0; d < x->shape[3]; d++)
        row[d] = high[d] == low[d] ? 0 : (get(x, b, h, t, d) - low[d]) / (high[d] - low[d]);
}

static double deviation(const double *row, int64_t n) {
    double mean = 0, square = 0;
    for (int64_t d = 0; d < n; d++) mean += row[d] / (double)n;
    for (int64_t d = 0; d < n; d++) square += (row[d] - mean) * (row[d] - mean);
    return sqrt(square / (double)(n > 1 ? n - 1 : 1));
}

/* Adds the softmax of the spreads of n tokens from t on, with the bounds of as many behind them. */
static void add_weights(const kvp_tensor *x, int64_t b, int64_t h, int64_t t, int64_t n, double *weights) {
    const int64_t n_dim = x->shape[3];
    double *low = malloc((size_t)(3 * n_dim + n) * sizeof *low), *high = low + n_dim, *row = high + n_dim;
    double *spread = row + n_dim, most = -INFINITY, sum = 0;
    for (int64_t d = 0; d < n_dim; d++) {
        low[d] = INFINITY;
        high[d] = -INFINITY;
        for (int64_t k = t + n; k < t + 2 * n; k++) {
            low[d] = fmin(low[d], get(x, b, h, k, d));
            high[d] = fmax(high[d], get(x, b, h, k, d));
        }
    }
    for (int64_t i = 0; i < n; i++) {
        place(x, b, h, t + i, low, high, row);
        spread[i] = deviation(row, n_dim);
        most = fmax(most, spread[i]);
    }
    for (int64_t i = 0; i < n; i++) sum += exp(spread[i] - most);
    for (int64_t i = 0; i < n; i++) weights[i] += exp(spread[i] - most) / sum;
    free(low);
}

/* Pairs whose weights differ by more than rounding stand in that order, and the ranks are all whole numbers. */
static int64_t count_faults(const kvp_score_args *args, int64_t b, int64_t h, int64_t t, int64_t n) {
    double *weights = calloc((size_t)n, sizeof *weights);
    int64_t n_bad = 0;
    add_weights(&args->keys, b, h, t, n, weights);
    add_weights(&args->values, b, h, t, n, weights);
    for (int64_t i = 0; i < n; i++) {
        const double score = get(&args->scores, b, h, t + i, 0);
        n_bad += score != round(score) || score > 0 || score <= -(double)n;
        for (int64_t k = 0; k < n; k++) {
            const double other = get(&args->scores, b, h, t + k, 0);
            n_bad += (i != k && score == other) || (weights[i] > weights[k] * (1 + 4e-6) && score < other);
        }
    }
    free(weights);
    return n_bad;
}

static int64_t check_row(const kvp_score_args *args, int64_t b, int64_t h) {
    const int64_t n_token = args->keys.shape[2], n_sink = (int64_t)args->param[0], n = (int64_t)args->param[1];
    int64_t begin, end, n_bad = 0;
    read_valid(&args->valid, b, n_token, &begin, &end);
    const int64_t first = begin + (n_sink < end - begin ? n_sink : end - begin), n_whole = (end - first) / n;
    const int64_t last = n_whole > 1 ? first + (n_whole - 1) * n : first;
    for (int64_t t = first; t < last; t += n) n_bad += count_faults(args, b, h, t, n);
    for (int64_t t = 0; t < n_token; t++) {
        const double score = get(&args->scores, b, h, t, 0);
        if (t < begin || t >= end) n_bad += !(isinf(score) && score < 0);
        if (t >= begin && t < first) n_bad += score != (double)n_token + 1;
        if (t >= last && t < end) n_bad += score != (double)(t - last) + 1;
    }
    return n_bad;
}

static void compare_with_oracle(kvp_dtype dtype, layout how, int64_t lag_size) {
    const int64_t shape[4] = {2, 2, 1 + random_below(4 * lag_size + 9), 1 + random_below(70)};
    lagkv_case c = new_case(dtype, how, shape, 1 + random_below(70), random_below(6), lag_size);
    name_case("lagkv T=%lld D=%lld Dv=%lld %s lag %lld, layout %d%s", (long long)shape[2], (long long)shape[3],
              (long long)c.values.view.shape[3], dtype_name((int32_t)dtype), (long long)lag_size, (int)how,
              c.args.valid.data ? " padded" : "");
    poison_array(&c.scores, 0xff);
    call_verb(KVP_SCORE, &c.args, (calling){.scratch_byte = 0xff});
    check_untouched(&c.scores, 0xff);
    for (int64_t b = 0; b < 2; b++)
        for (int64_t h = 0; h < 2; h++) CHECK(check_row(&c.args, b, h) == 0, "row %d, head %d", (int)b, (int)h);
    free_case(&c);
}

/* Times a power of two; from -1 to 1 if they are to be bounded. */
static void scale(const kvp_tensor *x, int power, bool bounded) {
    const int64_t *n = x->shape;
    for (int64_t i = 0; i < n[0] * n[1] * n[2]; i++)
        for (int64_t d = 0; d < n[3]; d++) {
            const int64_t b = i / n[2] / n[1], h = i / n[2] % n[1], t = i % n[2];
            const double at = get(x, b, h, t, d);
            set(x, b, h, t, d, ldexp(bounded ? fmax(-1, fmin(1, at / 2)) : at, power));
        }
}

/* Bounds grow with what they bound: a power of two changes no score, up to where a difference of two is no float. */
static void change_lengths(kvp_dtype dtype) {
    const int64_t shape[4] = {1, 2, 200, 24};
    lagkv_case c = new_case(dtype, CONTIGUOUS, shape, 9, 3, 16);
    array before = new_array(KVP_F32, CONTIGUOUS, 3, shape);
    name_case("lagkv of other lengths, %s", dtype_name((int32_t)dtype));
    c.args.scores = before.view;
    scale(&c.keys.view, 0, true);
    call_verb(KVP_SCORE, &c.args, (calling){0});
    c.args.scores = c.scores.view;
    for (int i = 0; i < 4; i++) {
        scale(&c.keys.view, dtype == KVP_F16 ? (int[]){3, -3, 4, -3}[i] : (int[]){60, -120, 187, -140}[i], false);
        call_verb(KVP_SCORE, &c.args, (calling){0});
        CHECK(same_elements(&c.scores.view, &before.view), "the length of the keys changes scores, step %d", i);
    }
    free_array(&before);
    free_case(&c);
}

/* What is no number makes its own chunk NaN, and nothing else where it is not the greatest of all. */
static void break_a_value(kvp_dtype dtype) {
    enum { N = 90, LAG = 10, N_RANKED = 80 };
    lagkv_case c = new_case(dtype, CONTIGUOUS, (int64_t[4]){1, 1, N, 9}, 5, 0, LAG);
    const int64_t broken = random_below(N_RANKED);
    int64_t n_bad = 0;
    name_case("lagkv, value %lld is NaN, %s", (long long)broken, dtype_name((int32_t)dtype));
    set(&c.values.view, 0, 0, broken, random_below(5), (double)NAN);
    c.args.valid = (kvp_tensor){0};
    call_verb(KVP_SCORE, &c.args, (calling){0});
    for (int64_t t = 0; t < N; t++) n_bad += (isnan(get(&c.scores.view, 0, 0, t, 0)) != 0) != (t / LAG == broken / LAG);
    CHECK(n_bad == 0, "%lld tokens are NaN that should not be, or are not", (long long)n_bad);
    free_case(&c);
}

/* Nothing that varies: all spreads are 0, and the order is that of positions. */
static void score_constants(kvp_dtype dtype) {
    enum { N = 40, LAG = 8 };
    lagkv_case c = new_case(dtype, CONTIGUOUS, (int64_t[4]){1, 1, N, 7}, 7, 0, LAG);
    int64_t n_bad = 0;
    name_case("lagkv of constants, %s", dtype_name((int32_t)dtype));
    for (int64_t i = 0; i < N * 7; i++)
        set(&c.keys.view, 0, 0, i / 7, i % 7, 3), set(&c.values.view, 0, 0, i / 7, i % 7, -1);
    c.args.valid = (kvp_tensor){0};
    call_verb(KVP_SCORE, &c.args, (calling){0});
    for (int64_t t = 0; t < N - LAG; t++) n_bad += get(&c.scores.view, 0, 0, t, 0) != -(double)(t % LAG);
    CHECK(n_bad == 0, "%lld tokens stand elsewhere", (long long)n_bad);
    free_case(&c);
}

void test_lagkv(void) {
    for (int dtype = KVP_F32; dtype <= KVP_BF16; dtype++) {
        for (size_t i = 0; i < COUNT(LAGS); i++)
            for (int how = 0; how < LAYOUT_COUNT; how++) compare_with_oracle((kvp_dtype)dtype, (layout)how, LAGS[i]);
        change_lengths((kvp_dtype)dtype);
        for (int i = 0; i < 10; i++) break_a_value((kvp_dtype)dtype);
        score_constants((kvp_dtype)dtype);
    }
}

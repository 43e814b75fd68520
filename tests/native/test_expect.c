/* SPDX-License-Identifier: Apache-2.0
 *
 * The verb expect against its formula in double, by laws that need none, and what it refuses.
 */
#include "harness.h"
#include "tests.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_DIM = 48, N_ARRAY = 11 };

/* Sizes of a call: S segments are judged. */
typedef struct sizes {
    int64_t b, h, g, t, d, dv, s;
} sizes;

typedef struct call {
    array of[N_ARRAY];
    kvp_expect_args args;
} call;

static void make_call(call *c, sizes n, kvp_dtype dtype, bool is_plain) {
    kvp_expect_args *a = &c->args;
    const struct {
        kvp_tensor *view;
        int32_t rank;
        int64_t shape[4];
    } arrays[N_ARRAY] = {
        {&a->keys, 4, {n.b, n.h, n.t, n.d}},
        {&a->queries, 4, {n.b, n.h * n.g, n.t, n.d}},
        {&a->values, 4, {n.b, n.h, n.t, n.dv}},
        {&a->cosines, 4, {n.b, 1, n.t, n.d}},
        {&a->sines, 4, {n.b, 1, n.t, n.d}},
        {&a->ahead_cosines, 2, {n.b, n.d}},
        {&a->ahead_sines, 2, {n.b, n.d}},
        {&a->segments, 2, {n.b, n.s + 2}},
        {&a->sinks, 1, {n.h * n.g}},
        {&a->logits, 3, {n.b, n.h * n.g, n.t}},
        {&a->scores, 3, {n.b, n.h, n.t}},
    };
    *a = (kvp_expect_args){.size = sizeof *a, .with_spread = 1, .scaling = 0.5, .epsilon = 0.02};
    for (int i = 0; i < N_ARRAY; i++) {
        const layout how = is_plain ? CONTIGUOUS : i < 9 ? random_layout() : output_layout(random_layout());
        const kvp_dtype own = i == 7 ? KVP_I32 : i < 3 ? dtype : KVP_F32;
        c->of[i] = new_array(own, how, arrays[i].rank, arrays[i].shape);
        *arrays[i].view = c->of[i].view;
        if (i != 7 && i < 9) fill_normal(arrays[i].view);
    }
}

static void free_call(call *c) {
    for (int i = 0; i < N_ARRAY; i++) free_array(&c->of[i]);
}

/* Ascending edges from anywhere to anywhere; the last row has all of its tokens in one segment. */
static void draw_edges(const kvp_tensor *segments, int64_t n_token) {
    const int64_t last = segments->shape[1] - 1;
    for (int64_t b = 0; b < segments->shape[0]; b++) {
        const bool is_whole = b + 1 == segments->shape[0];
        for (int64_t e = 0, at = 0; e <= last; e++) {
            if (!is_whole) at += random_below((n_token - at) / (e < 2 ? 4 : 1) + 1);
            set(segments, b, e, 0, 0, (double)(is_whole && e == last ? n_token : at));
        }
    }
}

/* ---------------------------------------------------------- the formula */

static double edge(const kvp_expect_args *a, int64_t b, int64_t e) { return get(&a->segments, b, e, 0, 0); }
static int64_t first_judged(const kvp_expect_args *a, int64_t b) { return (int64_t)edge(a, b, 1); }
static int64_t end_judged(const kvp_expect_args *a, int64_t b) { return (int64_t)edge(a, b, a->segments.shape[1] - 1); }

/* A query as it was before it was turned. */
static void undo(const kvp_expect_args *a, int64_t b, int64_t n, int64_t t, double *out) {
    const int64_t half = a->keys.shape[3] / 2;
    for (int64_t d = 0; d < 2 * half; d++) {
        const double c = get(&a->cosines, b, 0, t, d), s = get(&a->sines, b, 0, t, d);
        const double own = get(&a->queries, b, n, t, d), other = get(&a->queries, b, n, t, (d + half) % (2 * half));
        out[d] = (own * c + (d < half ? other : -other) * s) / (c * c + s * s);
    }
}

/* A row, turned as what comes next and scaled. */
static void turn_ahead(const kvp_expect_args *a, int64_t b, const double *x, double *out) {
    const int64_t half = a->keys.shape[3] / 2;
    for (int64_t d = 0; d < 2 * half; d++) {
        const double other = x[(d + half) % (2 * half)];
        const double c = get(&a->ahead_cosines, b, d, 0, 0), s = get(&a->ahead_sines, b, d, 0, 0);
        out[d] = a->scaling * (x[d] * c + (d < half ? -other : other) * s);
    }
}

/* Logits of one query head, (T); returns the largest sum of the sizes of a logit's terms, as they are added up: of the
 * mean, and of each query's distance from it. */
static double exact_logits(const kvp_expect_args *a, int64_t b, int64_t n, double *logits) {
    const int64_t n_dim = a->keys.shape[3], begin = first_judged(a, b), end = end_judged(a, b),
                  group = a->queries.shape[1] / a->keys.shape[1];
    double mean[MAX_DIM] = {0}, row[MAX_DIM], turned[MAX_DIM], largest = 0;
    double *size_of = calloc((size_t)a->keys.shape[2], sizeof(double));
    for (int64_t t = begin; t < end; t++) {
        undo(a, b, n, t, row);
        for (int64_t d = 0; d < n_dim; d++) mean[d] += row[d] / (double)(end - begin);
    }
    for (int64_t t = begin - 1; t < end; t++) { /* the mean first */
        const bool is_mean = t < begin;
        if (!is_mean && !a->with_spread) break;
        if (!is_mean) undo(a, b, n, t, row);
        for (int64_t d = 0; d < n_dim; d++) row[d] = is_mean ? mean[d] : row[d] - mean[d];
        turn_ahead(a, b, row, turned);
        for (int64_t k = begin; k < end; k++) {
            double dot = 0, size = 0;
            for (int64_t d = 0; d < n_dim; d++) {
                dot += get(&a->keys, b, n / group, k, d) * turned[d];
                size += fabs(get(&a->keys, b, n / group, k, d) * turned[d]);
            }
            logits[k] = (is_mean ? 0 : logits[k]) + (is_mean ? dot : dot * dot / 2 / (double)(end - begin));
            size_of[k] += is_mean ? size : size * size / 2 / (double)(end - begin);
        }
    }
    for (int64_t k = begin; k < end; k++) largest = fmax(largest, size_of[k]);
    free(size_of);
    return largest;
}

/* The mean over a group of the shares of the logits that the core gave. */
static double exact_share_of(const kvp_expect_args *a, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t k) {
    const int64_t group = a->queries.shape[1] / a->keys.shape[1];
    double share = 0;
    for (int64_t n = h * group; n < (h + 1) * group; n++) {
        double sum = a->sinks.data ? exp(get(&a->sinks, n, 0, 0, 0) - get(&a->logits, b, n, k, 0)) : 0;
        for (int64_t i = begin; i < end; i++) sum += exp(get(&a->logits, b, n, i, 0) - get(&a->logits, b, n, k, 0));
        share += 1 / sum / (double)group;
    }
    return share;
}

static void check_logits(const kvp_expect_args *a) {
    double *logits = calloc((size_t)a->keys.shape[2], sizeof(double)), worst = 0;
    for (int64_t b = 0; b < a->keys.shape[0]; b++)
        for (int64_t n = 0; n < a->queries.shape[1]; n++) {
            const double size = exact_logits(a, b, n, logits);
            for (int64_t k = first_judged(a, b); k < end_judged(a, b); k++)
                worst = fmax(worst, fabs(get(&a->logits, b, n, k, 0) - logits[k]) / size);
        }
    /* A mean may be much smaller than what it is the mean of: a bit of that is many of its own. */
    CHECK(worst <= 4e-6, "logits are off by %g of their terms", worst);
    free(logits);
}

static void check_judged(const kvp_expect_args *a, int64_t b, int64_t h, double *best) {
    for (int64_t s = 1; s + 1 < a->segments.shape[1]; s++) {
        const int64_t begin = (int64_t)edge(a, b, s), end = (int64_t)edge(a, b, s + 1);
        for (int64_t k = begin; k < end; k++) {
            double square = 0;
            for (int64_t d = 0; a->values.data && d < a->values.shape[3]; d++)
                square += get(&a->values, b, h, k, d) * get(&a->values, b, h, k, d);
            const double wanted =
                (exact_share_of(a, b, h, begin, end, k) + a->epsilon) * (a->values.data ? sqrt(square) : 1);
            const double score = get(&a->scores, b, h, k, 0);
            CHECK(fabs(score - wanted) <= 1e-5 * wanted, "score of %lld is %g, not %g", (long long)k, score, wanted);
            *best = fmax(*best, score);
        }
    }
}

static void check_all_scores(const kvp_expect_args *a) {
    for (int64_t b = 0; b < a->keys.shape[0]; b++) {
        double best = 0;
        for (int64_t h = 0; h < a->keys.shape[1]; h++) check_judged(a, b, h, &best);
        const float above = (float)best + 1;
        for (int64_t i = 0; i < a->keys.shape[1] * a->keys.shape[2]; i++) {
            const int64_t h = i / a->keys.shape[2], t = i % a->keys.shape[2];
            const bool is_first = (double)t >= edge(a, b, 0) && t < first_judged(a, b);
            const double wanted = is_first ? (double)above : 0;
            if (!is_first && t >= first_judged(a, b) && t < end_judged(a, b)) continue;
            CHECK(get(&a->scores, b, h, t, 0) == wanted, "unjudged %lld scores %g", (long long)t,
                  get(&a->scores, b, h, t, 0));
        }
    }
}

/* The same bits whoever runs which task, wherever they are written. */
static void compare_ways(const kvp_expect_args *a) {
    kvp_expect_args other = *a;
    array logits = new_array(KVP_F32, CONTIGUOUS, 3, a->logits.shape);
    array scores = new_array(KVP_F32, CONTIGUOUS, 3, a->scores.shape);
    other.logits = logits.view;
    other.scores = scores.view;
    for (int i = 0; way_of_running(i); i++) {
        poison_array(&logits, 0xff);
        call_verb(KVP_EXPECT, &other, *way_of_running(i));
        CHECK(same_elements(&scores.view, &a->scores), "scores differ with way %d", i);
        CHECK(same_elements(&logits.view, &a->logits), "logits differ with way %d", i);
    }
    free_array(&logits);
    free_array(&scores);
}

/* Drawn sizes, layouts and edges. Tokens that are not judged are NaN: nobody looks at them. */
static void compare_with_formula(kvp_dtype dtype) {
    static const int64_t dims[] = {2, 6, 16, 30, 32, 34, 48}, lengths[] = {1, 2, 5, 31, 32, 33, 64, 70, 257};
    const sizes n = {1 + random_below(3),   1 + random_below(2),  1 + random_below(5), lengths[random_below(9)],
                     dims[random_below(7)], 1 + random_below(20), 1 + random_below(3)};
    call c;
    make_call(&c, n, dtype, false);
    kvp_expect_args *a = &c.args;
    name_case("expect T=%lld D=%lld group %lld %s", (long long)n.t, (long long)n.d, (long long)n.g,
              dtype_name((int32_t)dtype));
    draw_edges(&a->segments, n.t);
    a->with_spread = random_below(3) > 0;
    if (random_below(3) == 0) a->values.data = NULL;
    if (random_below(2)) a->sinks.data = NULL;
    for (int64_t b = 0; b < n.b && a->queries.stride[0] && a->keys.stride[0]; b++)
        for (int64_t i = 0; i < n.h * n.g * n.t; i++) {
            const int64_t t = i % n.t;
            if (t >= first_judged(a, b) && t < end_judged(a, b)) continue;
            set(&a->queries, b, i / n.t, t, 0, (double)NAN);
            set(&a->keys, b, i / n.t / n.g, t, 0, (double)NAN);
        }
    for (int i = 9; i < N_ARRAY; i++) poison_array(&c.of[i], 0xff);
    CHECK(call_verb(KVP_EXPECT, a, (calling){.scratch_byte = 0xff}) == KVP_OK, "the call is refused");
    for (int i = 9; i < N_ARRAY; i++) check_untouched(&c.of[i], 0xff);
    check_logits(a);
    check_all_scores(a);
    compare_ways(a);
    free_call(&c);
}

void test_expect(void) {
    for (int i = 0; i < 45; i++) compare_with_formula((kvp_dtype)(i % 3));
}

/* -------------------------------------------------------------- refusals */

/* Sizes that no memory has, by strides of 0 and outputs far away; nothing is read. */
static void widen(kvp_expect_args *a, int64_t n_dim) {
    kvp_tensor *const four[] = {&a->keys, &a->queries, &a->cosines, &a->sines};
    for (int i = 0; i < 4; i++) {
        four[i]->shape[3] = n_dim;
        four[i]->stride[3] = 0;
    }
    a->ahead_cosines.shape[1] = a->ahead_sines.shape[1] = n_dim;
    a->ahead_cosines.stride[1] = a->ahead_sines.stride[1] = 0;
}

static void multiply_heads(kvp_expect_args *a) {
    enum { N_BATCH = 1 << 16, N_HEAD = 1 << 15 };
    kvp_tensor *const all[] = {&a->keys,          &a->queries,     &a->values,   &a->cosines, &a->sines,
                               &a->ahead_cosines, &a->ahead_sines, &a->segments, &a->logits,  &a->scores};
    for (int i = 0; i < 10; i++) {
        all[i]->shape[0] = N_BATCH;
        if (i < 8) all[i]->stride[0] = 0;
    }
    a->keys.shape[1] = a->queries.shape[1] = a->values.shape[1] = a->logits.shape[1] = a->scores.shape[1] = N_HEAD;
    a->keys.stride[1] = a->queries.stride[1] = a->values.stride[1] = 0;
    a->logits.stride[1] = a->scores.stride[1] = 5;
    a->logits.stride[0] = a->scores.stride[0] = 5 * N_HEAD;
    a->sinks.data = NULL;
}

#define REFUSALS(DO)                                                                                              \
    DO(WORKSPACE, "workspace has 0 bytes", (void)a) /* the good call, but for scratch */                          \
    DO(WORKSPACE, "workspace has 0 bytes", a->values.data = a->sinks.data = NULL)                                 \
    DO(SHAPE, "keys.shape[3] is 3; expected an even number", a->keys.shape[3] = a->queries.shape[3] = 3;          \
       a->cosines.shape[3] = a->sines.shape[3] = a->ahead_cosines.shape[1] = a->ahead_sines.shape[1] = 3)         \
    DO(VALUE, "sizeof(kvp_expect_args)", a->size = 0)                                                             \
    DO(VALUE, "queries is missing", a->queries.data = NULL)                                                       \
    DO(VALUE, "ahead_sines is missing", a->ahead_sines.data = NULL)                                               \
    DO(SHAPE, "keys has 3 dimensions", a->keys.ndim = 3)                                                          \
    DO(SHAPE, "queries.shape[2] is 4, but T is 5", a->queries.shape[2] = 4)                                       \
    DO(SHAPE, "queries.shape[1] is 3; expected a multiple of the 2 key heads", a->queries.shape[1] = 3;           \
       a->logits.shape[1] = a->sinks.shape[0] = 3)                                                                \
    DO(SHAPE, "keys.shape[3] is 4098; expected an even number, of pairs that turn, 4096 at most", widen(a, 4098)) \
    DO(SHAPE, "B times N is 65536 times 32768; expected at most 2147483647", multiply_heads(a))                   \
    DO(SHAPE, "cosines.shape[1] is 2; expected 1", a->cosines.shape[1] = a->sines.shape[1] = 2;                   \
       a->cosines.stride[1] = a->sines.stride[1] = 0)                                                             \
    DO(SHAPE, "sines.shape[3] is 2, but D is 4", a->sines.shape[3] = 2)                                           \
    DO(SHAPE, "ahead_cosines.shape[1] is 3, but D is 4", a->ahead_cosines.shape[1] = 3)                           \
    DO(SHAPE, "logits.shape[1] is 2, but N is 4", a->logits.shape[1] = 2)                                         \
    DO(SHAPE, "logits is written to", a->logits.stride[0] = 0)                                                    \
    DO(DTYPE, "queries has dtype float16; expected float32, as keys has", a->queries.dtype = KVP_F16)             \
    DO(DTYPE, "cosines has dtype float16; expected float32", a->cosines.dtype = KVP_F16)                          \
    DO(DEVICE, "sines is on device 2:0", a->sines.device = KVP_CUDA)                                              \
    DO(SHAPE, "values.shape[2] is 4, but T is 5", a->values.shape[2] = 4)                                         \
    DO(SHAPE, "segments.shape[1] is 2; expected at least 3", a->segments.shape[1] = 2)                            \
    DO(DEVICE, "segments is on device 2:0; expected it in host memory", a->segments.device = KVP_CUDA)            \
    DO(SHAPE, "sinks.shape[0] is 2, but N is 4", a->sinks.shape[0] = 2)                                           \
    DO(SHAPE, "scores.shape[1] is 1, but H is 2", a->scores.shape[1] = 1)                                         \
    DO(VALUE, "epsilon is -1; expected", a->epsilon = -1)                                                         \
    DO(VALUE, "epsilon is nan; expected", a->epsilon = (double)NAN)                                               \
    DO(VALUE, "scores overlaps values", a->scores.data = a->values.data)                                          \
    DO(VALUE, "scaling is nan", a->scaling = (double)NAN)                                                         \
    DO(VALUE, "scaling is 1e+39", a->scaling = 1e39)                                                              \
    DO(VALUE, "with_spread is 2; expected a whole number from 0 to 1", a->with_spread = 2)                        \
    DO(VALUE, "logits overlaps queries", a->logits.data = a->queries.data)

void test_expect_refusals(void) {
#define CHECK_ONE(expected, named, ...)                                                                      \
    {                                                                                                        \
        call c;                                                                                              \
        make_call(&c, (sizes){2, 2, 2, 5, 4, 3, 2}, KVP_F32, true);                                          \
        kvp_expect_args *a = &c.args;                                                                        \
        __VA_ARGS__;                                                                                         \
        kvp_context ctx = {0};                                                                               \
        size_t bytes = 12345;                                                                                \
        const kvp_status status = kvp_expect(a, &ctx), good = status == KVP_ERR_WORKSPACE ? KVP_OK : status; \
        CHECK(status == KVP_ERR_##expected && strstr(ctx.error, named), "%s: %s, instead of %s", named,      \
              kvp_status_name(status), ctx.error);                                                           \
        CHECK(kvp_workspace(KVP_EXPECT, a, 1, &bytes) == good && (bytes == 12345) == (good != KVP_OK),       \
              "%s: scratch of %zu bytes", named, bytes);                                                     \
        free_call(&c);                                                                                       \
    }
    REFUSALS(CHECK_ONE)
#undef CHECK_ONE
}

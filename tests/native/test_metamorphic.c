/* SPDX-License-Identifier: Apache-2.0
 *
 * Laws of the scores that need no oracle: a call is changed in a way that its result must not notice.
 */
#include "attention_case.h"
#include "tests.h"

#include <math.h>

#define COUNT(list) (sizeof(list) / sizeof(list)[0])

/* Softmax does not change when all logits of a row move together. Here they move by what element 0 of every key says,
 * as the biases of some models move them. Lengths just behind a multiple of 256, where a strip of rows crosses into a
 * block of keys that only some of them see. */
static const int64_t SHIFT_LENGTHS[] = {258, 530};
static const double SHIFTS[] = {-1000, -150, 150, 1000};

/* All logits are moved by "shift"; scaling is 1/2, so that the elements are exact in every dtype. */
static void shift_logits(const kvp_score_args *args, double shift) {
    const kvp_tensor *keys = &args->keys, *queries = &args->queries;
    for (int64_t b = 0; b < keys->shape[0]; b++) {
        for (int64_t h = 0; h < keys->shape[1]; h++)
            for (int64_t t = 0; t < keys->shape[2]; t++) set(keys, b, h, t, 0, 2 * shift);
        for (int64_t h = 0; h < queries->shape[1]; h++)
            for (int64_t t = 0; t < queries->shape[2]; t++) set(queries, b, h, t, 0, 1);
    }
}

static void compare_shifted(const kvp_score_args *args, const kvp_tensor *expected, double shift) {
    int64_t n_bad = 0;
    double worst = 0;
    for (int64_t i = 0; i < expected->shape[0] * expected->shape[1] * expected->shape[2]; i++) {
        const int64_t k = i % expected->shape[2], h = i / expected->shape[2] % expected->shape[1];
        const int64_t b = i / expected->shape[2] / expected->shape[1];
        const double x = get(expected, b, h, k, 0), y = get(&args->scores, b, h, k, 0);
        const bool same =
            x == y || fabs(x - y) <= 5e-3 * fabs(x) + 1e-7; /* float32 logits of 1443 (base 2) are 1e-4 apart */
        n_bad += !same;
        if (!same) worst = y;
    }
    CHECK(n_bad == 0, "%lld scores change, one to %g, when all logits move by %g", (long long)n_bad, worst, shift);
}

static void score_shifted(const attention_shape *shape) {
    attention_case c = new_attention_case(shape);
    array expected = new_array(KVP_F32, CONTIGUOUS, 3, c.args.scores.shape);
    name_case("logits shifted, T=%lld G=%lld %s voting %d%s", (long long)shape->n_token, (long long)shape->group,
              dtype_name((int32_t)shape->dtype), (int)shape->kind, c.args.valid.data ? " padded" : "");
    kvp_score_args args = c.args;
    args.lse = (kvp_tensor){0};
    args.param[0] = 0.5;
    args.param[1] = 0;
    shift_logits(&args, 0);
    args.scores = expected.view;
    call_verb(KVP_SCORE, &args, (calling){0});
    args.scores = c.scores.view;
    for (size_t i = 0; i < COUNT(SHIFTS); i++) {
        shift_logits(&args, SHIFTS[i]);
        call_verb(KVP_SCORE, &args, (calling){0});
        compare_shifted(&args, &expected.view, SHIFTS[i]);
    }
    free_array(&expected);
    free_attention_case(&c);
}

static void copy_elements(const kvp_tensor *to, const kvp_tensor *from) {
    for (int64_t b = 0; b < from->shape[0]; b++)
        for (int64_t h = 0; h < from->shape[1]; h++)
            for (int64_t t = 0; t < from->shape[2]; t++)
                for (int64_t d = 0; d < from->shape[3]; d++) set(to, b, h, t, d, get(from, b, h, t, d));
}

/* What is between elements is no matter: keys and queries in any layout score as side by side, bit for bit. */
static void score_laid_out(const attention_shape *shape) {
    attention_case c = new_attention_case(shape);
    array keys = new_array(shape->dtype, CONTIGUOUS, 4, c.args.keys.shape),
          queries = new_array(shape->dtype, CONTIGUOUS, 4, c.args.queries.shape),
          expected = new_array(KVP_F32, CONTIGUOUS, 3, c.args.scores.shape);
    name_case("layouts, T=%lld D=%lld G=%lld %s voting %d", (long long)shape->n_token, (long long)shape->n_dim,
              (long long)shape->group, dtype_name((int32_t)shape->dtype), (int)shape->kind);
    copy_elements(&keys.view, &c.args.keys);
    copy_elements(&queries.view, &c.args.queries);
    kvp_score_args args = c.args;
    args.keys = keys.view;
    args.queries = queries.view;
    args.scores = expected.view;
    call_verb(KVP_SCORE, &args, (calling){0});
    call_verb(KVP_SCORE, &c.args, (calling){0});
    CHECK(same_elements(&expected.view, &c.args.scores), "the layout of keys and queries changes the scores");
    free_array(&keys);
    free_array(&queries);
    free_array(&expected);
    free_attention_case(&c);
}

void test_layouts(void) {
    for (int i = 0; i < 120; i++) {
        const attention_shape shape = {.n_batch = 2,
                                       .n_head = 2,
                                       .group = 1 + i % 5,
                                       .n_token = 1 + random_below(300),
                                       .n_dim = random_dim(70),
                                       .dtype = (kvp_dtype)(i % 3),
                                       .kind = i % 4 ? VOTING_TOVA : VOTING_SNAPKV};
        score_laid_out(&shape);
    }
}

/* Where the queries' denominators are from; MUTE ones are no numbers, and the queries cast no vote. */
typedef enum denominators { OWN, GIVEN, MUTE } denominators;

/* One key that is no number: a key is NaN just if a query that votes on it sees the broken one. */
static void score_broken(const attention_shape *shape, double number, denominators kind, int32_t weight) {
    attention_case c = new_attention_case(shape);
    const int64_t n_token = shape->n_token, broken = random_below(n_token), begin = random_below(n_token);
    const int64_t end = begin + 1 + random_below(n_token - begin);
    int64_t n_bad = 0, n_nan = 0;
    array queries = new_array(shape->dtype, CONTIGUOUS, 4, (int64_t[4]){1, shape->group, n_token, shape->n_dim});
    array lse = new_array(KVP_F32, CONTIGUOUS, 3, (int64_t[3]){1, shape->group, n_token});
    name_case("key %lld of %lld is %g, queries %lld to %lld vote by weight %d%s", (long long)broken, (long long)n_token,
              number, (long long)begin, (long long)end, (int)weight,
              kind == OWN     ? ""
              : kind == GIVEN ? ", lse given"
                              : ", lse infinite or NaN");
    static const double no_number[] = {INFINITY, -INFINITY, NAN};
    fill_normal(&queries.view);
    fill_normal(&c.keys.view); /* its padding held NaN */
    fill_normal(&lse.view);
    for (int64_t h = 0; h < shape->group && kind == MUTE; h++)
        for (int64_t t = 0; t < n_token; t++) set(&lse.view, 0, h, t, 0, no_number[(h + t) % 3]);
    for (int64_t h = 0; h < shape->group; h++)
        for (int64_t t = 0; t < n_token; t++) set(&queries.view, 0, h, t, 0, 1);
    set(&c.keys.view, 0, 0, broken, 0, number);
    const int32_t n = (int32_t)n_token, half = n / 2; /* the last query sees all, and votes on the second half only */
    const int32_t votes[2][KVP_VOTE_FIELDS] = {{0, half, (int32_t)begin, (int32_t)end, 0, 0, weight, 0, 0, 0},
                                               {half, n, n - 1, n, 0, 0, weight, 0, 0, 0}};
    for (int v = 0; v < 2; v++)
        for (int f = 0; f < KVP_VOTE_FIELDS; f++) set(&c.votes.view, 0, v, f, 0, votes[v][f]);
    kvp_score_args args = c.args;
    args.queries = queries.view;
    args.valid = (kvp_tensor){0};
    args.lse = kind == OWN ? (kvp_tensor){0} : lse.view;
    args.param[0] = args.param[2] = 1;
    args.param[1] = args.param[3] = 0;
    call_verb(KVP_SCORE, &args, (calling){0});
    for (int64_t k = 0; k < n_token; k++) {
        const bool voted_on = k >= half || k < end, seen = k >= half || broken < end,
                   alone = kind == OWN ? seen : k == broken;
        n_bad += isnan(get(&args.scores, 0, 0, k, 0)) != (voted_on && seen && alone && kind != MUTE);
        n_nan += isnan(get(&args.scores, 0, 0, k, 0));
    }
    CHECK(n_bad == 0, "%lld keys are NaN that should not be, or are not; %lld are", (long long)n_bad, (long long)n_nan);
    free_array(&queries);
    free_array(&lse);
    free_attention_case(&c);
}

/* One query of one head that is no number: the keys that it sees are NaN, whatever others say after it, and no others.
 */
static void score_broken_query(const attention_shape *shape, bool has_lse, int32_t weight) {
    attention_case c = new_attention_case(shape);
    const int64_t n_token = shape->n_token, broken = random_below(n_token);
    int64_t n_bad = 0;
    array queries = new_array(shape->dtype, CONTIGUOUS, 4, (int64_t[4]){1, shape->group, n_token, shape->n_dim});
    array lse = new_array(KVP_F32, CONTIGUOUS, 3, (int64_t[3]){1, shape->group, n_token});
    name_case("query %lld of %lld is NaN, weight %d%s", (long long)broken, (long long)n_token, (int)weight,
              has_lse ? ", lse given" : "");
    fill_normal(&queries.view);
    fill_normal(&c.keys.view); /* its padding held NaN */
    fill_normal(&lse.view);
    set(&queries.view, 0, random_below(shape->group), broken, 0, (double)NAN);
    const int32_t n = (int32_t)n_token, vote[KVP_VOTE_FIELDS] = {0, n, 0, n, 0, 0, weight, n, 0, 0};
    for (int v = 0; v < 2; v++)
        for (int f = 0; f < KVP_VOTE_FIELDS; f++) set(&c.votes.view, 0, v, f, 0, v ? 0 : vote[f]);
    kvp_score_args args = c.args;
    args.queries = queries.view;
    args.valid = (kvp_tensor){0};
    args.lse = has_lse ? lse.view : (kvp_tensor){0};
    args.param[2] = 1;
    args.param[3] = 0;
    call_verb(KVP_SCORE, &args, (calling){0});
    for (int64_t k = 0; k < n_token; k++) n_bad += isnan(get(&args.scores, 0, 0, k, 0)) != (k <= broken);
    CHECK(n_bad == 0, "%lld keys are NaN that should not be, or are not", (long long)n_bad);
    free_array(&queries);
    free_array(&lse);
    free_attention_case(&c);
}

static void score_broken_ones(int i, int32_t weight, bool is_query) {
    const attention_shape shape = {.n_batch = 1,
                                   .n_head = 1,
                                   .group = 1 + i % 3,
                                   .n_token = i % 5 ? 40 : 300,
                                   .n_dim = 8,
                                   .dtype = (kvp_dtype)(i % 3),
                                   .kind = VOTING_SPANS};
    if (is_query) {
        score_broken_query(&shape, i % 2, weight);
        return;
    }
    score_broken(&shape, i % 2 ? (double)NAN : (double)INFINITY, OWN, weight);
    score_broken(&shape, (double)NAN, GIVEN, weight);
    score_broken(&shape, i % 2 ? (double)NAN : (double)INFINITY, MUTE, weight);
}

void test_broken_keys(void) {
    for (int is_query = 0; is_query < 2; is_query++) {
        for (int i = 0; i < 60; i++) score_broken_ones(i, KVP_WEIGHT_SUM, is_query);
        for (int i = 0; i < 60; i++) score_broken_ones(i, KVP_WEIGHT_MAX, is_query);
    }
}

/* The most by all voters is the most of what it is by some and by the others. */
static void score_by_parts(const attention_shape *shape) {
    enum { WHOLE, FIRST, SECOND, N_PART };
    attention_case c = new_attention_case(shape);
    const kvp_tensor *votes = &c.args.votes;
    array scores[N_PART];
    int64_t n_bad = 0;
    name_case("the most by parts, T=%lld G=%lld %s", (long long)shape->n_token, (long long)shape->group,
              dtype_name((int32_t)shape->dtype));
    c.args.param[2] = 1;
    for (int part = N_PART - 1; part >= WHOLE; part--) {
        for (int64_t b = 0; b < votes->shape[0]; b++)
            for (int64_t v = 0; v < votes->shape[1]; v++) {
                const int64_t n = shape->n_token, begin = n / 2, end = v ? n - n / 4 : n, cut = (begin + end) / 2;
                set(votes, b, v, KVP_VOTE_A_BEGIN, 0, (double)(part == SECOND ? cut : begin));
                set(votes, b, v, KVP_VOTE_A_END, 0, (double)(part == FIRST ? cut : end));
            }
        scores[part] = new_array(KVP_F32, CONTIGUOUS, 3, c.args.scores.shape);
        c.args.scores = scores[part].view;
        call_verb(KVP_SCORE, &c.args, (calling){0});
    }
    const int64_t *size = c.args.scores.shape;
    for (int64_t i = 0; i < size[0] * size[1] * size[2]; i++) {
        double of[N_PART];
        for (int part = WHOLE; part < N_PART; part++)
            of[part] = get(&scores[part].view, i / size[2] / size[1], i / size[2] % size[1], i % size[2], 0);
        const double most = fmax(of[FIRST], of[SECOND]);
        n_bad += !(of[WHOLE] == most || fabs(of[WHOLE] - most) <= 1e-5 * most);
    }
    CHECK(n_bad == 0, "%lld scores are not the most of what two halves of the voters say", (long long)n_bad);
    for (int part = WHOLE; part < N_PART; part++) free_array(&scores[part]);
    free_attention_case(&c);
}

/* Which head of a group says the most is no matter: the same bits, whatever their order. */
static void score_turned(const attention_shape *shape) {
    attention_case c = new_attention_case(shape);
    const kvp_tensor *queries = &c.args.queries, *lse = &c.args.lse;
    array turned = new_array(shape->dtype, CONTIGUOUS, 4, queries->shape),
          turned_lse = new_array(KVP_F32, CONTIGUOUS, 3, queries->shape),
          expected = new_array(KVP_F32, CONTIGUOUS, 3, c.args.scores.shape);
    name_case("heads of a group turned, T=%lld G=%lld %s%s", (long long)shape->n_token, (long long)shape->group,
              dtype_name((int32_t)shape->dtype), lse->data ? " lse" : "");
    for (int64_t i = 0; i < queries->shape[0] * queries->shape[1] * queries->shape[2]; i++) {
        const int64_t t = i % queries->shape[2], n = i / queries->shape[2] % queries->shape[1],
                      b = i / queries->shape[2] / queries->shape[1];
        const int64_t from = n / shape->group * shape->group + (n + 1) % shape->group;
        for (int64_t d = 0; d < shape->n_dim; d++) set(&turned.view, b, n, t, d, get(queries, b, from, t, d));
        if (lse->data) set(&turned_lse.view, b, n, t, 0, get(lse, b, from, t, 0));
    }
    kvp_score_args args = c.args;
    args.scores = expected.view;
    call_verb(KVP_SCORE, &args, (calling){0});
    args.scores = c.scores.view;
    args.queries = turned.view;
    if (lse->data) args.lse = turned_lse.view;
    call_verb(KVP_SCORE, &args, (calling){0});
    CHECK(same_elements(&expected.view, &c.scores.view), "the order of a group's heads changes the most");
    free_array(&turned);
    free_array(&turned_lse);
    free_array(&expected);
    free_attention_case(&c);
}

void test_most(void) {
    for (int i = 0; i < 60; i++) {
        const attention_shape shape = {.n_batch = 2,
                                       .n_head = 2,
                                       .group = 1 + i % 4,
                                       .n_token = i % 6 ? 4 + random_below(90) : 530,
                                       .n_dim = random_dim(40),
                                       .dtype = (kvp_dtype)(i % 3),
                                       .kind = VOTING_KVZIP};
        score_by_parts(&shape);
        score_turned(&shape);
    }
}

void test_shifts(void) {
    for (size_t t = 0; t < COUNT(SHIFT_LENGTHS); t++)
        for (int kind = 0; kind < VOTING_COUNT; kind++)
            for (int dtype = KVP_F32; dtype <= KVP_BF16; dtype++) {
                const attention_shape shape = {.n_batch = 2,
                                               .n_head = 1,
                                               .group = 1 + 2 * (kind % 2),
                                               .n_token = SHIFT_LENGTHS[t],
                                               .n_dim = 8,
                                               .dtype = (kvp_dtype)dtype,
                                               .kind = (voting)kind};
                score_shifted(&shape);
            }
}

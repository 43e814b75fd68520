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
                                       .n_dim = 1 + random_below(70),
                                       .dtype = (kvp_dtype)(i % 3),
                                       .kind = i % 4 ? VOTING_TOVA : VOTING_SNAPKV};
        score_laid_out(&shape);
    }
}

/* Where the queries' denominators are from; MUTE ones are no numbers, and the queries cast no vote. */
typedef enum denominators { OWN, GIVEN, MUTE } denominators;

/* One key that is no number: a key is NaN just if a query that votes on it sees the broken one. */
static void score_broken(const attention_shape *shape, double number, denominators kind) {
    attention_case c = new_attention_case(shape);
    const int64_t n_token = shape->n_token, broken = random_below(n_token), begin = random_below(n_token);
    const int64_t end = begin + 1 + random_below(n_token - begin);
    int64_t n_bad = 0, n_nan = 0;
    array queries = new_array(shape->dtype, CONTIGUOUS, 4, (int64_t[4]){1, shape->group, n_token, shape->n_dim});
    array lse = new_array(KVP_F32, CONTIGUOUS, 3, (int64_t[3]){1, shape->group, n_token});
    name_case("key %lld of %lld is %g, queries %lld to %lld vote%s", (long long)broken, (long long)n_token, number,
              (long long)begin, (long long)end,
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
    const int32_t votes[2][KVP_VOTE_FIELDS] = {{0, half, (int32_t)begin, (int32_t)end, 0, 0, KVP_WEIGHT_SUM, 0, 0, 0},
                                               {half, n, n - 1, n, 0, 0, KVP_WEIGHT_SUM, 0, 0, 0}};
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

void test_broken_keys(void) {
    for (int i = 0; i < 60; i++) {
        const attention_shape shape = {.n_batch = 1,
                                       .n_head = 1,
                                       .group = 1 + i % 3,
                                       .n_token = i % 5 ? 40 : 300,
                                       .n_dim = 8,
                                       .dtype = (kvp_dtype)(i % 3),
                                       .kind = VOTING_SPANS};
        score_broken(&shape, i % 2 ? (double)NAN : (double)INFINITY, OWN);
        score_broken(&shape, (double)NAN, GIVEN);
        score_broken(&shape, i % 2 ? (double)NAN : (double)INFINITY, MUTE);
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

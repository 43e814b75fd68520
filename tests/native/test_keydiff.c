/* SPDX-License-Identifier: Apache-2.0
 *
 * The scorer "keydiff" against its oracle, and by laws that need none.
 */
#include "oracle.h"
#include "tests.h"

#include <math.h>

static const int64_t DIMS[] = {1, 8, 16, 64, 80};
static const int64_t LENGTHS[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 257};
#define COUNT(list) (sizeof(list) / sizeof(list)[0])

enum { V = 4 };

typedef struct keydiff_case {
    array keys, votes, valid, scores;
    kvp_score_args args;
} keydiff_case;

/* Ranges one behind the other, with gaps, some of them short or empty; or one range of all. */
static void draw_ranges(const kvp_tensor *votes, int64_t n_token) {
    for (int64_t b = 0; b < votes->shape[0]; b++) {
        const bool is_whole = random_below(3) == 0;
        for (int64_t v = 0, at = 0; v < V; v++) {
            for (int f = 0; f < KVP_VOTE_FIELDS; f++) set(votes, b, v, f, 0, 0);
            if (is_whole && v > 0) continue;
            const int64_t begin = is_whole ? 0 : at + random_below((n_token - at) / 4 + 1);
            at = is_whole ? n_token : begin + random_below(n_token - begin + 1);
            set(votes, b, v, KVP_VOTE_KEY_BEGIN, 0, (double)begin);
            set(votes, b, v, KVP_VOTE_KEY_END, 0, (double)at);
        }
    }
}

static keydiff_case new_case(kvp_dtype dtype, layout how, const int64_t *shape) {
    keydiff_case c = {.keys = new_array(dtype, how, 4, shape),
                      .votes = new_array(KVP_I32, CONTIGUOUS, 3, (int64_t[3]){shape[0], V, KVP_VOTE_FIELDS}),
                      .valid = new_array(KVP_I32, random_layout(), 2, (int64_t[2]){shape[0], 2}),
                      .scores = new_array(KVP_F32, output_layout(random_layout()), 3, shape)};
    fill_normal(&c.keys.view);
    fill_valid(&c.valid.view, shape[2], false);
    draw_ranges(&c.votes.view, shape[2]);
    c.args = (kvp_score_args){.size = sizeof(kvp_score_args),
                              .scorer = kvp_scorer_find("keydiff"),
                              .keys = c.keys.view,
                              .votes = c.votes.view,
                              .scores = c.scores.view};
    if (random_below(2)) c.args.valid = c.valid.view;
    return c;
}

static void free_case(keydiff_case *c) {
    free_array(&c->keys);
    free_array(&c->votes);
    free_array(&c->valid);
    free_array(&c->scores);
}

static void scale_key(const kvp_tensor *keys, int64_t b, int64_t h, int64_t t, double factor) {
    for (int64_t d = 0; d < keys->shape[3]; d++) set(keys, b, h, t, d, factor * get(keys, b, h, t, d));
}

/* Lengths to the ends of the exponent, and one key in eight of length zero. */
static void stretch_keys(const kvp_tensor *keys) {
    const bool is_half = keys->dtype == KVP_F16;
    for (int64_t b = 0; b < keys->shape[0] && (b == 0 || keys->stride[0]); b++)
        for (int64_t h = 0; h < keys->shape[1]; h++)
            for (int64_t t = 0; t < keys->shape[2]; t++) {
                const int power = is_half ? (int)random_below(20) - 8 : (int)random_below(240) - 120;
                scale_key(keys, b, h, t, random_below(8) ? ldexp(1, power) : 0);
            }
}

/* What stands under no vote or outside the valid range is not looked at. */
static void spoil_others(const keydiff_case *c) {
    const kvp_tensor *keys = &c->keys.view;
    for (int64_t b = 0; b < keys->shape[0] && keys->stride[0]; b++)
        for (int64_t t = 0; t < keys->shape[2]; t++) {
            int64_t begin, end;
            read_valid(&c->args.valid, b, keys->shape[2], &begin, &end);
            bool is_voted = false;
            for (int64_t v = 0; v < V; v++)
                is_voted |= (double)t >= get(&c->votes.view, b, v, 0, 0) && (double)t < get(&c->votes.view, b, v, 1, 0);
            for (int64_t h = 0; h < keys->shape[1] && !(is_voted && t >= begin && t < end); h++)
                scale_key(keys, b, h, t, (double)NAN);
        }
}

static void compare_with_oracle(kvp_dtype dtype, layout how, const int64_t *shape) {
    keydiff_case c = new_case(dtype, how, shape);
    const bool is_stretched = random_below(3) == 0;
    name_case("keydiff T=%lld D=%lld %s layout %d%s%s", (long long)shape[2], (long long)shape[3],
              dtype_name((int32_t)dtype), (int)how, is_stretched ? " stretched" : "",
              c.args.valid.data ? " padded" : "");
    if (is_stretched) stretch_keys(&c.keys.view);
    spoil_others(&c);
    array again = new_array(KVP_F32, CONTIGUOUS, 3, shape);
    poison_array(&c.scores, 0xff);
    call_verb(KVP_SCORE, &c.args, (calling){.scratch_byte = 0xff});
    check_untouched(&c.scores, 0xff);
    check_scores_within(&c.args, exact_keydiff, naive_keydiff, 2e-6);
    c.args.scores = again.view;
    poison_array(&again, 0x5a);
    call_verb(KVP_SCORE, &c.args, (calling){.scratch_byte = 0x5a});
    CHECK(same_elements(&c.scores.view, &again.view), "the layout of the output, or the scratch, changes the scores");
    free_array(&again);
    free_case(&c);
}

/* A key times a power of two has the same direction, to the bit. */
static void change_lengths(kvp_dtype dtype) {
    const int64_t shape[4] = {2, 2, 150, 24};
    keydiff_case c = new_case(dtype, CONTIGUOUS, shape);
    array before = new_array(KVP_F32, CONTIGUOUS, 3, shape);
    name_case("keydiff of other lengths, %s", dtype_name((int32_t)dtype));
    for (int64_t i = 0; i < 4 * 150 * 24; i++) /* eighths, so that none becomes inexact */
        set(&c.keys.view, i / 24 / 150 / 2, i / 24 / 150 % 2, i / 24 % 150, i % 24,
            round(8 * get(&c.keys.view, i / 24 / 150 / 2, i / 24 / 150 % 2, i / 24 % 150, i % 24)) / 8);
    c.args.scores = before.view;
    call_verb(KVP_SCORE, &c.args, (calling){0});
    for (int64_t i = 0; i < 4 * 150; i++) {
        const int power = dtype == KVP_F16 ? (int)random_below(20) - 10 : (int)random_below(240) - 120;
        scale_key(&c.keys.view, i / 150 / 2, i / 150 % 2, i % 150, ldexp(1, power));
    }
    c.args.scores = c.scores.view;
    call_verb(KVP_SCORE, &c.args, (calling){0});
    CHECK(same_elements(&c.scores.view, &before.view), "the length of a key changes scores");
    free_array(&before);
    free_case(&c);
}

static void set_range(const kvp_tensor *votes, int64_t v, int64_t begin, int64_t end) {
    set(votes, 0, v, KVP_VOTE_KEY_BEGIN, 0, (double)begin);
    set(votes, 0, v, KVP_VOTE_KEY_END, 0, (double)end);
}

/* A key that is no number makes its own range NaN, its zeros too, but for one of two keys; and no other. */
static void break_a_key(kvp_dtype dtype, double number) {
    enum { N = 120 };
    keydiff_case c = new_case(dtype, CONTIGUOUS, (int64_t[4]){1, 1, N, 9});
    const int64_t edges[V + 1] = {0, 2, 50, 110, N}, broken = random_below(N);
    int64_t n_bad = 0;
    name_case("keydiff, key %lld is %g, %s", (long long)broken, number, dtype_name((int32_t)dtype));
    for (int64_t v = 0; v < V; v++) set_range(&c.votes.view, v, edges[v], edges[v + 1]);
    for (int64_t t = 0; t < N; t += 7) scale_key(&c.keys.view, 0, 0, t, 0);
    set(&c.keys.view, 0, 0, broken, random_below(9), number);
    c.args.valid = (kvp_tensor){0};
    call_verb(KVP_SCORE, &c.args, (calling){0});
    for (int64_t v = 0; v < V; v++)
        for (int64_t t = edges[v]; t < edges[v + 1]; t++)
            n_bad +=
                (isnan(get(&c.scores.view, 0, 0, t, 0)) != 0) != (v > 0 && broken >= edges[v] && broken < edges[v + 1]);
    CHECK(n_bad == 0, "%lld keys are NaN that should not be, or are not", (long long)n_bad);
    free_case(&c);
}

/* Keys that cancel each other out have no mean, so that none is like it: 0, and not what rounding left. */
static void cancel(kvp_dtype dtype, int64_t n_dim) {
    enum { N = 200 };
    keydiff_case c = new_case(dtype, CONTIGUOUS, (int64_t[4]){1, 1, N, n_dim});
    int64_t n_bad = 0;
    name_case("keydiff of keys that cancel out, D=%lld %s", (long long)n_dim, dtype_name((int32_t)dtype));
    for (int64_t t = 0; t < N / 2; t++)
        for (int64_t d = 0; d < n_dim; d++) set(&c.keys.view, 0, 0, t + N / 2, d, -4 * get(&c.keys.view, 0, 0, t, d));
    for (int64_t v = 0; v < V; v++) set_range(&c.votes.view, v, 0, v ? 0 : N);
    c.args.valid = (kvp_tensor){0};
    call_verb(KVP_SCORE, &c.args, (calling){0});
    for (int64_t t = 0; t < N; t++) {
        const float score = *(float *)element(&c.scores.view, 0, 0, t, 0);
        n_bad += score != 0 || signbit(score);
    }
    CHECK(n_bad == 0, "%lld keys do not score 0", (long long)n_bad);
    free_case(&c);
}

void test_keydiff(void) {
    for (int dtype = KVP_F32; dtype <= KVP_BF16; dtype++) {
        for (size_t t = 0; t < COUNT(LENGTHS); t++)
            for (size_t d = 0; d < COUNT(DIMS); d++)
                for (int how = 0; how < LAYOUT_COUNT; how++)
                    compare_with_oracle((kvp_dtype)dtype, (layout)how, (int64_t[4]){2, 2, LENGTHS[t], DIMS[d]});
        compare_with_oracle((kvp_dtype)dtype, HEADS_INSIDE, (int64_t[4]){1, 2, 9000, 5}); /* several pieces */
        change_lengths((kvp_dtype)dtype);
        for (int i = 0; i < 20; i++)
            break_a_key((kvp_dtype)dtype, i % 3 ? (double)NAN : i % 2 ? (double)INFINITY : -(double)INFINITY);
        cancel((kvp_dtype)dtype, 1);
        cancel((kvp_dtype)dtype, 40);
    }
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * The scorers that look at one token at a time, or at none.
 */
#include "oracle.h"
#include "tests.h"

#include <math.h>
#include <string.h>

static const int64_t DIMS[] = {1, 8, 16, 64, 80};
static const int64_t LENGTHS[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33, 64, 65, 257};
#define COUNT(list) (sizeof(list) / sizeof(list)[0])

/* The draw of kvp.h, written down a second time. */
static uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static double exact_draw(const kvp_score_args *args, int64_t b, int64_t h, int64_t t) {
    const uint64_t step = 0x1e3779b97f4a7c15u;
    int64_t begin, end;
    uint64_t salt = (uint64_t)h;
    read_valid(&args->valid, b, args->keys.shape[2], &begin, &end);
    if (t < begin || t >= end) return -(double)INFINITY;
    for (int64_t i = 0; i < 8 * args->keys.shape[3]; i++) {
        const int64_t key = i / args->keys.shape[3], told_by = end - 1 - key * (end - begin) / 8;
        const double x = get(&args->keys, b, h, told_by, i % args->keys.shape[3]);
        const double near = isnan(x) ? 0 : fmin(fmax(4 * x, -0x1p30), 0x1p30);
        salt += mix((uint64_t)(int64_t)rint(near) + (uint64_t)i * step);
    }
    const uint64_t seed = (uint64_t)args->param[0] + ((uint64_t)args->param[1] << 32);
    const uint64_t head = mix(mix(salt) + (seed + (uint64_t)(end - begin) * step) % ((uint64_t)1 << 62));
    return (double)(mix(head + (uint64_t)(t - begin) * step) % (1 << 24)) * 0x1p-24;
}

/* Scores keys of this shape in every layout; the outputs hold two different bytes before, which must make no
 * difference. */
static void score_keys(int32_t scorer, kvp_dtype dtype, layout how, int64_t n_token, int64_t n_dim) {
    const int64_t shape[4] = {2, 3, n_token, n_dim};
    array keys = new_array(dtype, how, 4, shape), valid = new_array(KVP_I32, random_layout(), 2, (int64_t[2]){2, 2});
    array scores[2];
    fill_normal(&keys.view);
    fill_valid(&valid.view, n_token, false);
    kvp_score_args args = {.size = sizeof(kvp_score_args), .scorer = scorer, .keys = keys.view};
    if (random_below(2)) args.valid = valid.view;
    if (scorer == kvp_scorer_find("position")) args.param[0] = (double)random_below(n_token + 2);
    if (scorer == kvp_scorer_find("random")) {
        args.param[0] = (double)random_below((int64_t)1 << 32);
        args.param[1] = (double)random_below(1 << 30);
    }
    for (int i = 0; i < 2; i++) {
        const unsigned char byte = i ? 0x5a : 0xff;
        scores[i] = new_array(KVP_F32, i ? CONTIGUOUS : output_layout(how), 3, shape);
        poison_array(&scores[i], byte);
        args.scores = scores[i].view;
        call_verb(KVP_SCORE, &args, (calling){.scratch_byte = byte});
        check_untouched(&scores[i], byte);
    }
    CHECK(same_elements(&scores[0].view, &scores[1].view), "the layout of the output changes the scores");
    if (scorer == kvp_scorer_find("norm")) check_scores(&args, exact_norm, naive_norm);
    for (int64_t i = 0; scorer == kvp_scorer_find("position") && i < 6 * n_token; i++) {
        const int64_t b = i / n_token / 3, h = i / n_token % 3, t = i % n_token;
        int64_t begin, end;
        read_valid(&args.valid, b, n_token, &begin, &end);
        const double sink = (double)(t - begin) < args.param[0] ? (double)(2 * n_token - t) : (double)t;
        CHECK(get(&args.scores, b, h, t, 0) == (t >= begin && t < end ? sink : -(double)INFINITY), "position %lld",
              (long long)t);
    }
    for (int64_t i = 0; scorer == kvp_scorer_find("random") && i < 6 * n_token; i++) {
        const int64_t b = i / n_token / 3, h = i / n_token % 3, t = i % n_token;
        CHECK(get(&args.scores, b, h, t, 0) == exact_draw(&args, b, h, t), "draw %lld of head %lld,%lld", (long long)t,
              (long long)b, (long long)h);
    }
    for (int i = 0; i < 2; i++) free_array(&scores[i]);
    free_array(&keys);
    free_array(&valid);
}

static void score_everything(const char *name) {
    for (size_t t = 0; t < COUNT(LENGTHS); t++)
        for (size_t d = 0; d < COUNT(DIMS); d++)
            for (int dtype = KVP_F32; dtype <= KVP_BF16; dtype++)
                for (int how = 0; how < LAYOUT_COUNT; how++) {
                    name_case("%s T=%lld D=%lld %s layout %d", name, (long long)LENGTHS[t], (long long)DIMS[d],
                              dtype_name(dtype), how);
                    score_keys(kvp_scorer_find(name), (kvp_dtype)dtype, (layout)how, LENGTHS[t], DIMS[d]);
                }
}

/* With D = 1 the norm is the absolute value: every 16-bit pattern, where its square neither over- nor underflows in
 * float32. */
static void score_all_16_bit_numbers(kvp_dtype dtype) {
    const int64_t n = 1 << 16;
    array keys = new_array(dtype, CONTIGUOUS, 4, (int64_t[4]){1, 1, n, 1}),
          scores = new_array(KVP_F32, CONTIGUOUS, 3, (int64_t[3]){1, 1, n});
    for (int64_t i = 0; i < n; i++) *(uint16_t *)element(&keys.view, 0, 0, i, 0) = (uint16_t)i;
    const kvp_score_args args = {
        .size = sizeof(kvp_score_args), .scorer = kvp_scorer_find("norm"), .keys = keys.view, .scores = scores.view};
    name_case("norm of all %s numbers", dtype_name((int32_t)dtype));
    call_verb(KVP_SCORE, &args, (calling){0});
    int64_t n_wrong = 0;
    for (int64_t i = 0; i < n; i++) {
        const double x = fabs(get(&keys.view, 0, 0, i, 0)), score = get(&scores.view, 0, 0, i, 0);
        if (isnan(x))
            n_wrong += !isnan(score);
        else if (x == 0 || isinf(x) || (x > 0x1p-60 && x < 0x1p60))
            n_wrong += score != -x;
    }
    CHECK(n_wrong == 0, "%lld scores are not minus the absolute value", (long long)n_wrong);
    free_array(&keys);
    free_array(&scores);
}

void test_norm(void) {
    score_everything("norm");
    score_all_16_bit_numbers(KVP_F16);
    score_all_16_bit_numbers(KVP_BF16);
}

void test_position(void) { score_everything("position"); }

void test_random(void) { score_everything("random"); }

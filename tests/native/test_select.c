/* SPDX-License-Identifier: Apache-2.0
 *
 * Selection against the quadratic oracle: equal exactly.
 */
#include "oracle.h"
#include "tests.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int64_t LENGTHS[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33, 64, 65, 257};
#define COUNT(list) (sizeof(list) / sizeof(list)[0])

typedef enum score_kind {
    SCORES_NORMAL,
    SCORES_TIED,       /* three values */
    SCORES_EQUAL,      /* one value */
    SCORES_ODD,        /* NaN, infinities, zeros of both signs, denormals, the largest number */
    SCORES_NEIGHBOURS, /* differ in the last bits only, around a power of two and its negative */
    SCORES_BITS,       /* any bit pattern */
    SCORES_NAN,        /* nothing but NaN of any sign and payload */
    SCORE_KIND_COUNT
} score_kind;

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float draw_score(score_kind kind) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 0x1p-149f, -0x1p-149f, FLT_MAX, -FLT_MAX, 1.0f};
    switch (kind) {
    case SCORES_NORMAL: return (float)random_normal();
    case SCORES_TIED: return (float)random_below(3) - 1.0f;
    case SCORES_EQUAL: return -0.125f;
    case SCORES_ODD: return odd[random_below((int64_t)COUNT(odd))];
    case SCORES_NEIGHBOURS:
        return (random_below(2) ? 1.0f : -1.0f) * from_bits(0x3f800000u + (uint32_t)random_below(24) - 12u);
    case SCORES_BITS: return from_bits((uint32_t)random_bits());
    default: return from_bits(0x7f800001u | (uint32_t)random_bits());
    }
}

typedef struct selection {
    array scores, segments, quotas, protect, valid, positions, counts;
    kvp_select_args args;
} selection;

static void draw_scores(const kvp_tensor *scores, score_kind kind) {
    for (int64_t b = 0; b < scores->shape[0]; b++)
        for (int64_t h = 0; h < scores->shape[1]; h++)
            for (int64_t t = 0; t < scores->shape[2]; t++) {
                const float value = draw_score(kind);
                memcpy(element(scores, b, h, t, 0), &value, sizeof value); /* keeps the payload of a NaN */
            }
}

static int compare_edges(const void *x, const void *y) { return *(const int32_t *)x - *(const int32_t *)y; }

/* Sorted edges; one row in two begins at 0 and ends at T, the others leave tokens outside all segments. */
static void draw_segments(const kvp_tensor *segments, int64_t n_token) {
    int32_t edges[16];
    const int64_t n = segments->shape[1];
    for (int64_t b = 0; b < segments->shape[0]; b++) {
        for (int64_t e = 0; e < n; e++) edges[e] = (int32_t)random_below(n_token + 1);
        qsort(edges, (size_t)n, sizeof edges[0], compare_edges);
        if (random_below(2)) {
            edges[0] = 0;
            edges[n - 1] = (int32_t)n_token;
        }
        for (int64_t e = 0; e < n; e++) set(segments, b, e, 0, 0, edges[e]);
    }
}

/* Nothing, part, all, or more than a segment holds. Returns the largest sum of a row. */
static int64_t draw_quotas(const kvp_tensor *quotas, const kvp_tensor *segments) {
    int64_t largest = 0;
    for (int64_t b = 0; b < quotas->shape[0]; b++)
        for (int64_t h = 0; h < quotas->shape[1]; h++)
            for (int64_t s = 0; s < quotas->shape[2]; s++) {
                const int64_t length = (int64_t)(get(segments, b, s + 1, 0, 0) - get(segments, b, s, 0, 0));
                const int64_t choices[] = {
                    0, random_below(length + 1), random_below(length + 1), length / 2, length, length + 3};
                set(quotas, b, h, s, 0, (double)choices[random_below((int64_t)COUNT(choices))]);
            }
    for (int64_t b = 0; b < quotas->shape[0]; b++)
        for (int64_t h = 0; h < quotas->shape[1]; h++) {
            int64_t sum = 0;
            for (int64_t s = 0; s < quotas->shape[2]; s++) sum += (int64_t)get(quotas, b, h, s, 0);
            if (sum > largest) largest = sum;
        }
    return largest;
}

static void draw_protect(const kvp_tensor *protect) {
    const int64_t kind = random_below(4); /* one in 2, one in 9, all, none */
    for (int64_t b = 0; b < protect->shape[0]; b++)
        for (int64_t t = 0; t < protect->shape[1]; t++)
            set(protect, b, t, 0, 0,
                kind == 2 || (kind < 2 && random_below(kind ? 9 : 2) == 0) ? (double)(1 + random_below(255)) : 0);
}

static selection new_selection(int64_t n_token, score_kind kind) {
    const int64_t n_batch = 2, n_head = 3, n_segment = 1 + random_below(6);
    selection s = {0};
    s.scores = new_array(KVP_F32, random_layout(), 3, (int64_t[3]){n_batch, n_head, n_token});
    s.segments = new_array(KVP_I32, random_layout(), 2, (int64_t[2]){n_batch, n_segment + 1});
    s.quotas = new_array(KVP_I32, random_layout(), 3, (int64_t[3]){n_batch, n_head, n_segment});
    s.protect = new_array(KVP_U8, random_layout(), 2, (int64_t[2]){n_batch, n_token});
    s.valid = new_array(KVP_I32, random_layout(), 2, (int64_t[2]){n_batch, 2});
    draw_scores(&s.scores.view, kind);
    draw_segments(&s.segments.view, n_token);
    const int64_t room = draw_quotas(&s.quotas.view, &s.segments.view) + random_below(3);
    draw_protect(&s.protect.view);
    fill_valid(&s.valid.view, n_token, false);
    s.positions = new_array(KVP_I32, output_layout(random_layout()), 3, (int64_t[3]){n_batch, n_head, room ? room : 1});
    s.counts = new_array(KVP_I32, output_layout(random_layout()), 2, (int64_t[2]){n_batch, n_head});
    s.args = (kvp_select_args){
        .size = sizeof(kvp_select_args), .scores = s.scores.view, .segments = s.segments.view, .quotas = s.quotas.view};
    if (random_below(2)) s.args.protect = s.protect.view;
    if (random_below(2)) s.args.valid = s.valid.view;
    s.args.positions = s.positions.view;
    s.args.counts = s.counts.view;
    return s;
}

static void free_selection(selection *s) {
    array *const all[] = {&s->scores, &s->segments, &s->quotas, &s->protect, &s->valid, &s->positions, &s->counts};
    for (size_t i = 0; i < COUNT(all); i++) free_array(all[i]);
}

static void check_selection(const selection *s) {
    const int64_t room = s->args.positions.shape[2];
    int32_t *expected = malloc((size_t)(room + s->args.scores.shape[2]) * sizeof *expected);
    for (int64_t b = 0; expected && b < s->args.scores.shape[0]; b++)
        for (int64_t h = 0; h < s->args.scores.shape[1]; h++) {
            const int64_t count = exact_select(&s->args, b, h, expected);
            int64_t first_wrong = 0;
            while (first_wrong < room && get(&s->args.positions, b, h, first_wrong, 0) == expected[first_wrong])
                first_wrong++;
            if (first_wrong < room)
                CHECK(false, "position %lld of row %lld,%lld is %g; expected %d", (long long)first_wrong, (long long)b,
                      (long long)h, get(&s->args.positions, b, h, first_wrong, 0), (int)expected[first_wrong]);
            CHECK(get(&s->args.counts, b, h, 0, 0) == (double)count, "row %lld,%lld counts %g; expected %lld",
                  (long long)b, (long long)h, get(&s->args.counts, b, h, 0, 0), (long long)count);
        }
    free(expected);
}

/* 0xff would hide a -1 that was never written, so the outputs hold something else the second time. */
static void select_case(int64_t n_token, score_kind kind) {
    selection s = new_selection(n_token, kind);
    name_case("select T=%lld K=%lld S=%lld scores %d%s%s", (long long)n_token, (long long)s.args.positions.shape[2],
              (long long)s.args.quotas.shape[2], (int)kind, s.args.protect.data ? " protected" : "",
              s.args.valid.data ? " padded" : "");
    for (int i = 0; i < 2; i++) {
        const unsigned char byte = i ? 0x5a : 0xff;
        poison_array(&s.positions, byte);
        poison_array(&s.counts, byte);
        call_verb(KVP_SELECT, &s.args, (calling){.scratch_byte = byte});
        check_untouched(&s.positions, byte);
        check_untouched(&s.counts, byte);
        check_selection(&s);
    }
    free_selection(&s);
}

void test_select(void) {
    for (size_t t = 0; t < COUNT(LENGTHS); t++)
        for (int kind = 0; kind < SCORE_KIND_COUNT; kind++)
            for (int repeat = 0; repeat < (LENGTHS[t] > 100 ? 8 : 16); repeat++)
                select_case(LENGTHS[t], (score_kind)kind);
    for (int kind = 0; kind < SCORE_KIND_COUNT; kind++) select_case(1500, (score_kind)kind);
}

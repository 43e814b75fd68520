/* SPDX-License-Identifier: Apache-2.0
 *
 * Selection against the quadratic oracle: equal exactly.
 */
#include "oracle.h"
#include "selection.h"
#include "tests.h"

#include <stdlib.h>

static const int64_t LENGTHS[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33, 64, 65, 257};
#define COUNT(list) (sizeof(list) / sizeof(list)[0])

typedef struct selection {
    array scores, segments, quotas, protect, valid, positions, counts;
    kvp_select_args args;
} selection;

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

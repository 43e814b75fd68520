/* SPDX-License-Identifier: Apache-2.0
 *
 * Counts of heads that share, against the quadratic oracle: equal exactly.
 */
#include "oracle.h"
#include "selection.h"
#include "tests.h"

#include <stdlib.h>

static const int64_t LENGTHS[] = {1, 2, 3, 5, 8, 13, 17, 33, 64, 150};
#define COUNT(list) (sizeof(list) / sizeof(list)[0])

typedef struct sharing {
    array scores, segments, quotas, floors, counts;
    kvp_share_args args;
} sharing;

/* Quotas of nothing, a part, all or more than there is; floors from 0 to them. */
static void draw_shares(const sharing *s) {
    const int64_t *shape = s->quotas.view.shape;
    for (int64_t b = 0; b < shape[0]; b++)
        for (int64_t i = 0; i < shape[1] * shape[2]; i++) {
            const int64_t h = i / shape[2], g = i % shape[2];
            const int64_t n = (int64_t)(get(&s->segments.view, b, g + 1, 0, 0) - get(&s->segments.view, b, g, 0, 0));
            const int64_t choices[] = {0, random_below(n + 1), random_below(n + 1), n / 2, n, n + 3};
            set(&s->quotas.view, b, h, g, 0, (double)choices[random_below((int64_t)COUNT(choices))]);
        }
    for (int64_t b = 0; b < shape[0]; b++) /* when all quotas are there: rows may be one in memory */
        for (int64_t i = 0; i < shape[1] * shape[2]; i++) {
            const int64_t h = i / shape[2], g = i % shape[2], quota = (int64_t)get(&s->quotas.view, b, h, g, 0);
            set(&s->floors.view, b, h, g, 0, (double)(random_below(4) ? random_below(quota + 1) : quota));
        }
}

static sharing new_sharing(int64_t n_token, score_kind kind) {
    const int64_t n_batch = 1 + random_below(2), n_head = 1 + random_below(5), n_segment = 1 + random_below(4);
    const int64_t shape[3] = {n_batch, n_head, n_segment};
    sharing s = {.scores = new_array(KVP_F32, random_layout(), 3, (int64_t[3]){n_batch, n_head, n_token}),
                 .segments = new_array(KVP_I32, random_layout(), 2, (int64_t[2]){n_batch, n_segment + 1}),
                 .quotas = new_array(KVP_I32, random_layout(), 3, shape),
                 .floors = new_array(KVP_I32, CONTIGUOUS, 3, shape),
                 .counts = new_array(KVP_I32, output_layout(random_layout()), 3, shape)};
    draw_scores(&s.scores.view, kind);
    draw_segments(&s.segments.view, n_token);
    draw_shares(&s);
    s.args = (kvp_share_args){sizeof(kvp_share_args), s.scores.view, s.segments.view,
                              s.quotas.view,          s.floors.view, s.counts.view};
    return s;
}

static void free_sharing(sharing *s) {
    array *const all[] = {&s->scores, &s->segments, &s->quotas, &s->floors, &s->counts};
    for (size_t i = 0; i < COUNT(all); i++) free_array(all[i]);
}

static void share_case(int64_t n_token, score_kind kind) {
    sharing s = new_sharing(n_token, kind);
    const int64_t *shape = s.quotas.view.shape;
    name_case("share T=%lld H=%lld S=%lld scores %d", (long long)n_token, (long long)shape[1], (long long)shape[2],
              (int)kind);
    for (int i = 0; i < 2; i++) {
        const unsigned char byte = i ? 0x5a : 0xff;
        poison_array(&s.counts, byte);
        call_verb(KVP_SHARE, &s.args, (calling){.scratch_byte = byte});
        check_untouched(&s.counts, byte);
        for (int64_t b = 0; b < shape[0]; b++)
            for (int64_t g = 0; g < shape[2]; g++) {
                int64_t expected[8];
                exact_share(&s.args, b, g, expected);
                for (int64_t h = 0; h < shape[1]; h++)
                    CHECK(get(&s.counts.view, b, h, g, 0) == (double)expected[h],
                          "head %lld of row %lld has %g of segment %lld; expected %lld", (long long)h, (long long)b,
                          get(&s.counts.view, b, h, g, 0), (long long)g, (long long)expected[h]);
            }
    }
    free_sharing(&s);
}

void test_share(void) {
    for (size_t t = 0; t < COUNT(LENGTHS); t++)
        for (int kind = 0; kind < SCORE_KIND_COUNT; kind++)
            for (int repeat = 0; repeat < (LENGTHS[t] > 100 ? 4 : 24); repeat++)
                share_case(LENGTHS[t], (score_kind)kind);
    for (int kind = 0; kind < SCORE_KIND_COUNT; kind++) share_case(1100, (score_kind)kind); /* digits of long rows */
}

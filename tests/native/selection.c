/* SPDX-License-Identifier: Apache-2.0
 *
 * Scores and segments for the tests of selection.
 */
#include "selection.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(list) (sizeof(list) / sizeof(list)[0])

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

void draw_scores(const kvp_tensor *scores, score_kind kind) {
    for (int64_t b = 0; b < scores->shape[0]; b++)
        for (int64_t h = 0; h < scores->shape[1]; h++)
            for (int64_t t = 0; t < scores->shape[2]; t++) {
                const float value = draw_score(kind);
                memcpy(element(scores, b, h, t, 0), &value, sizeof value); /* keeps the payload of a NaN */
            }
}

static int compare_edges(const void *x, const void *y) { return *(const int32_t *)x - *(const int32_t *)y; }

void draw_segments(const kvp_tensor *segments, int64_t n_token) {
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

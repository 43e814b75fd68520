/* SPDX-License-Identifier: Apache-2.0
 *
 * One layer's cache of random keys and values, pressed to an eighth by the norms of its keys: score, select, gather.
 * Prints what each head keeps. Against the installed library: cc press.c $(pkg-config --cflags --libs kvp)
 */
#include <kvp.h>

#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 2, TOKENS = 32, DIMS = 16, KEPT = 4 };

static kvp_tensor view(void *data, kvp_dtype dtype, int32_t ndim, const int64_t *shape) {
    kvp_tensor t = {.data = data, .dtype = dtype, .device = KVP_CPU, .ndim = ndim};
    int64_t step = 1;
    for (int d = ndim - 1; d >= 0; step *= shape[d--]) t.shape[d] = shape[d], t.stride[d] = step;
    return t;
}

static void must(kvp_status status, const kvp_context *ctx) {
    if (status == KVP_OK) return;
    fprintf(stderr, "%s: %s\n", kvp_status_name(status), ctx->error);
    exit(EXIT_FAILURE);
}

int main(void) {
    static float keys[HEADS][TOKENS][DIMS], values[HEADS][TOKENS][DIMS], scores[HEADS][TOKENS];
    static float kept_keys[HEADS][KEPT][DIMS], kept_values[HEADS][KEPT][DIMS];
    static int32_t positions[HEADS][KEPT], counts[HEADS], segments[] = {0, TOKENS}, quotas[HEADS] = {KEPT, KEPT};
    const int64_t cache[] = {1, HEADS, TOKENS, DIMS}, kept[] = {1, HEADS, KEPT, DIMS}, edges[] = {1, 2},
                  shares[] = {1, HEADS, 1};
    kvp_context ctx = {0};
    srand(1);
    for (int i = 0; i < HEADS * TOKENS * DIMS; i++) {
        (&keys[0][0][0])[i] = (float)rand() / (float)RAND_MAX - 0.5f;
        (&values[0][0][0])[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    }

    kvp_score_args score = {.size = sizeof score,
                            .scorer = kvp_scorer_find("norm"),
                            .keys = view(keys, KVP_F32, 4, cache),
                            .scores = view(scores, KVP_F32, 3, cache)};
    must(kvp_score(&score, &ctx), &ctx);

    kvp_select_args select = {.size = sizeof select,
                              .scores = score.scores,
                              .segments = view(segments, KVP_I32, 2, edges),
                              .quotas = view(quotas, KVP_I32, 3, shares),
                              .positions = view(positions, KVP_I32, 3, kept),
                              .counts = view(counts, KVP_I32, 2, kept)};
    must(kvp_workspace(KVP_SELECT, &select, 1, &ctx.workspace_bytes), &ctx);
    ctx.workspace = aligned_alloc(64, ctx.workspace_bytes);
    must(kvp_select(&select, &ctx), &ctx);

    kvp_gather_args gather = {.size = sizeof gather,
                              .keys = score.keys,
                              .values = view(values, KVP_F32, 4, cache),
                              .positions = select.positions,
                              .out_keys = view(kept_keys, KVP_F32, 4, kept),
                              .out_values = view(kept_values, KVP_F32, 4, kept)};
    must(kvp_gather(&gather, &ctx), &ctx);
    free(ctx.workspace);

    for (int h = 0; h < HEADS; h++) {
        printf("head %d keeps", h);
        for (int i = 0; i < counts[h]; i++) {
            const int t = positions[h][i];
            printf(" %d", t);
            if (kept_keys[h][i][0] != keys[h][t][0] || kept_values[h][i][DIMS - 1] != values[h][t][DIMS - 1])
                return EXIT_FAILURE;
        }
        printf("\n");
    }
    return EXIT_SUCCESS;
}

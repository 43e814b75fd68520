/* SPDX-License-Identifier: Apache-2.0
 *
 * What the core says about itself, and tables of other devices.
 */
#include "harness.h"
#include "tests.h"

#include <string.h>

static void check_scorer(int32_t scorer) {
    const char *name = kvp_scorer_name(scorer);
    if (!CHECK(name && *name, "scorer %d has no name", (int)scorer)) return;
    CHECK(kvp_scorer_find(name) == scorer, "%s is found at %d", name, (int)kvp_scorer_find(name));
    CHECK(kvp_scorer_needs(scorer) >= 0, "the needs of %s are unknown", name);
    int32_t n_param = 0;
    while (n_param <= KVP_MAX_PARAMS && kvp_scorer_param(scorer, n_param)) n_param++;
    CHECK(n_param <= KVP_MAX_PARAMS, "%s has more than %d parameters", name, KVP_MAX_PARAMS);
    CHECK(!kvp_scorer_param(scorer, -1) && !kvp_scorer_param(scorer, INT32_MAX), "%s has a parameter where none can be",
          name);
    for (int dtype = -1; dtype <= 6; dtype++)
        CHECK(kvp_supports(scorer, KVP_CPU, dtype) == (dtype >= KVP_F32 && dtype <= KVP_BF16),
              "support of %s for dtype %d", name, dtype);
    CHECK(kvp_supports(scorer, 0, KVP_F32) == 0 && kvp_supports(scorer, 77, KVP_F32) == 0, "%s runs on no such device",
          name);
}

static void check_param(const char *scorer, int32_t index, const char *name, double initial) {
    const int32_t id = kvp_scorer_find(scorer);
    const char *found = kvp_scorer_param(id, index);
    CHECK(found && strcmp(found, name) == 0, "parameter %d of %s is %s", (int)index, scorer, found ? found : "missing");
    CHECK(kvp_scorer_param_default(id, index) == initial, "%s is %g by default", name,
          kvp_scorer_param_default(id, index));
}

/* The statuses' names must differ: messages and bindings tell them apart by these. */
static void check_status_names(void) {
    for (int i = KVP_OK; i <= KVP_ERR_INTERNAL; i++)
        for (int j = KVP_OK; j <= i; j++) {
            const char *x = kvp_status_name((kvp_status)i), *y = kvp_status_name((kvp_status)j);
            CHECK(x && y && *x && (strcmp(x, y) == 0) == (i == j), "the names of status %d and %d", i, j);
        }
    CHECK(kvp_status_name((kvp_status)99) != NULL, "an unknown status has no name");
}

void test_introspection(void) {
    const int32_t count = kvp_scorer_count();
    CHECK(count >= 3, "%d scorers", (int)count);
    for (int32_t i = 0; i < count; i++) check_scorer(i);
    CHECK(!kvp_scorer_name(count) && !kvp_scorer_name(-1), "a scorer out of range has a name");
    CHECK(kvp_scorer_find("nothing") == -1 && kvp_scorer_find("") == -1, "a scorer of no such name was found");
    CHECK(kvp_scorer_needs(count) == -1 && kvp_scorer_needs(-1) == -1, "a scorer out of range has needs");
    CHECK(kvp_scorer_needs(kvp_scorer_find("norm")) == 0, "norm needs nothing but keys");
    CHECK(kvp_scorer_needs(kvp_scorer_find("attention")) == (KVP_NEEDS_QUERIES | KVP_NEEDS_VOTES),
          "attention needs queries and votes");
    CHECK(kvp_scorer_needs(kvp_scorer_find("keydiff")) == KVP_NEEDS_VOTES, "keydiff needs votes alone");
    CHECK(kvp_scorer_needs(kvp_scorer_find("lagkv")) == KVP_NEEDS_VALUES, "lagkv needs values");
    check_param("position", 0, "n_sink", 4);
    check_param("attention", 0, "scaling", 1);
    check_param("attention", 1, "softcap", 0);
    check_param("attention", 2, "kernel_size", 1);
    check_param("attention", 3, "share_heads", 0);
    check_status_names();
    const char *isa = kvp_cpu_isa();
    CHECK(isa && kvp_cpu_isa_set(isa) == 0, "the row primitives in use cannot be set");
    CHECK(kvp_cpu_isa_set("abacus") == -1 && strcmp(kvp_cpu_isa(), isa) == 0, "unknown row primitives were set");
    CHECK(!kvp_cpu_isa_name(-1), "row primitive -1 has a name");
}

/* A device that only counts. */

static int n_score, n_select, n_gather, n_press;

static kvp_status count_score(const kvp_score_args *args, kvp_context *ctx) {
    (void)args;
    (void)ctx;
    n_score++;
    return KVP_OK;
}

static kvp_status count_select(const kvp_select_args *args, kvp_context *ctx) {
    (void)args;
    (void)ctx;
    n_select++;
    return KVP_OK;
}

static kvp_status count_gather(const kvp_gather_args *args, kvp_context *ctx) {
    (void)args;
    (void)ctx;
    n_gather++;
    return KVP_OK;
}

/* What it is given is of one press: the scores of one part are those of the next. */
static kvp_status count_press(const kvp_score_args *score, const kvp_select_args *select, const kvp_gather_args *gather,
                              kvp_context *ctx) {
    (void)ctx;
    n_press += score->scores.data && score->scores.data == select->scores.data &&
               select->positions.data == gather->positions.data && score->keys.data == gather->keys.data;
    return KVP_OK;
}

static kvp_status pass_share(const kvp_share_args *args, kvp_context *ctx) {
    (void)args;
    (void)ctx;
    return KVP_OK;
}

static int n_expect;

static kvp_status count_expect(const kvp_expect_args *args, kvp_context *ctx) {
    (void)args;
    (void)ctx;
    n_expect++;
    return KVP_OK;
}

static size_t need_128(kvp_verb verb, const void *args, int32_t n_worker) {
    (void)args, (void)n_worker;
    return verb == KVP_SELECT ? 128 : 0;
}

static kvp_status (*const no_scorers[64])(const kvp_score_args *, kvp_context *);
static kvp_status (*const all_count[64])(const kvp_score_args *, kvp_context *) = {count_score};
static const kvp_backend counting = {KVP_ABI_VERSION, KVP_CUDA, no_scorers,   count_select, count_gather,
                                     pass_share,      need_128, count_expect, NULL};
static const kvp_backend of_other_abi = {KVP_ABI_VERSION + 1, KVP_CUDA, no_scorers, count_select, count_gather,
                                         pass_share,          need_128, NULL,       NULL};
static const kvp_backend of_no_device = {KVP_ABI_VERSION, 77,       no_scorers, count_select, count_gather,
                                         pass_share,      need_128, NULL,       NULL};
static const kvp_backend in_parts = {KVP_ABI_VERSION, KVP_CUDA, all_count, count_select, count_gather,
                                     pass_share,      need_128, NULL,      NULL};
static const kvp_backend whole = {KVP_ABI_VERSION, KVP_CUDA, all_count, count_select, count_gather,
                                  pass_share,      need_128, NULL,      count_press};

/* Never read on the device: the table above looks at nothing. Each has memory of its own all the same, or the call
 * would be refused for that. */
static kvp_tensor imagine(kvp_dtype dtype, int32_t ndim, int64_t last) {
    static float nothing[24][64];
    static int n_made;
    return (kvp_tensor){
        nothing[n_made++],          (int32_t)dtype, KVP_CUDA, 0, ndim, {1, ndim > 2 ? 1 : last, last, 1},
        {8, ndim > 2 ? 8 : 1, 1, 1}};
}

/* The verb that a backend may lack. */
static void expect_of_a_backend(kvp_tensor keys, kvp_tensor scores, kvp_context *ctx) {
    kvp_tensor table = imagine(KVP_F32, 4, 4), ahead = imagine(KVP_F32, 2, 2), segments = imagine(KVP_I32, 2, 3);
    size_t bytes;
    ahead.shape[0] = 1;
    keys.shape[3] = table.shape[3] = 2; /* a pair of channels */
    segments.device = KVP_CPU;          /* two empty ones */
    const kvp_expect_args expect = {.size = sizeof expect,
                                    .keys = keys,
                                    .queries = keys,
                                    .cosines = table,
                                    .sines = table,
                                    .ahead_cosines = ahead,
                                    .ahead_sines = ahead,
                                    .segments = segments,
                                    .logits = imagine(KVP_F32, 3, 4),
                                    .scores = scores};
    CHECK(kvp_expect(&expect, ctx) == KVP_OK && n_expect == 1, "the backend's expect was called %d times: %s", n_expect,
          ctx->error);
    CHECK(kvp_register_backend(&in_parts) == KVP_OK, "the backend was not registered");
    CHECK(kvp_expect(&expect, ctx) == KVP_ERR_UNSUPPORTED && strstr(ctx->error, "no verb \"expect\""),
          "a verb that the device lacks was called: %s", ctx->error);
    CHECK(kvp_workspace(KVP_EXPECT, &expect, 1, &bytes) == KVP_ERR_UNSUPPORTED, "it was asked for its scratch");
}

void test_register_backend(void) {
    kvp_context ctx = {0};
    size_t bytes;
    const kvp_tensor keys = imagine(KVP_F32, 4, 4);
    const kvp_score_args score = {.size = sizeof(kvp_score_args),
                                  .scorer = kvp_scorer_find("norm"),
                                  .keys = keys,
                                  .scores = imagine(KVP_F32, 3, 4)};
    kvp_select_args select = {.size = sizeof(kvp_select_args),
                              .scores = score.scores,
                              .segments = imagine(KVP_I32, 2, 2),
                              .quotas = imagine(KVP_I32, 3, 1),
                              .positions = imagine(KVP_I32, 3, 2),
                              .counts = imagine(KVP_I32, 2, 1)};
    select.segments.device = select.quotas.device =
        KVP_CPU; /* read by the host: an empty segment, of which none is kept */
    CHECK(kvp_register_backend(&of_other_abi) != KVP_OK, "a backend of another ABI was registered");
    CHECK(kvp_register_backend(&of_no_device) != KVP_OK, "a backend of an unknown device was registered");
    CHECK(kvp_score(&score, &ctx) == KVP_ERR_DEVICE, "a device without a backend was used");
    CHECK(kvp_supports(score.scorer, KVP_CUDA, KVP_F32) == 0, "a device without a backend is supported");
    CHECK(kvp_register_backend(&counting) == KVP_OK, "the backend was not registered");
    CHECK(kvp_supports(score.scorer, KVP_CUDA, KVP_F32) == 0, "a scorer that is not in the table is supported");
    CHECK(kvp_score(&score, &ctx) == KVP_ERR_UNSUPPORTED && ctx.error[0],
          "a scorer that is not in the table was called");
    CHECK(kvp_workspace(KVP_SCORE, &score, 1, &bytes) == KVP_ERR_UNSUPPORTED, "it was asked for its scratch");
    CHECK(kvp_select(&select, &ctx) == KVP_ERR_WORKSPACE && n_select == 0,
          "the backend was called without its scratch");
    block scratch = new_block(128);
    ctx.workspace = scratch.data;
    ctx.workspace_bytes = scratch.bytes;
    CHECK(kvp_select(&select, &ctx) == KVP_OK && n_select == 1, "the backend's select was called %d times: %s",
          n_select, ctx.error);
    free_block(&scratch);
    expect_of_a_backend(keys, score.scores, &ctx);
}

/* A backend that has it is given a press whole; another its three parts. */
void test_press_of_a_backend(void) {
    kvp_context ctx = {0};
    kvp_press_args press = {.size = sizeof press,
                            .scorer = 0,
                            .keys = imagine(KVP_F32, 4, 4),
                            .segments = imagine(KVP_I32, 2, 2),
                            .quotas = imagine(KVP_I32, 3, 1),
                            .positions = imagine(KVP_I32, 3, 2),
                            .out_keys = imagine(KVP_F32, 4, 2),
                            .out_values = imagine(KVP_F32, 4, 2)};
    size_t bytes;
    press.values = press.keys;
    press.segments.device = press.quotas.device = KVP_CPU;
    n_score = n_select = n_gather = n_press = 0;
    CHECK(kvp_register_backend(&in_parts) == KVP_OK, "the backend was not registered");
    CHECK(kvp_workspace(KVP_PRESS, &press, 1, &bytes) == KVP_OK, "a press has no scratch");
    block scratch = new_block(bytes);
    ctx.workspace = scratch.data;
    ctx.workspace_bytes = scratch.bytes;
    CHECK(kvp_press(&press, &ctx) == KVP_OK && n_score == 1 && n_select == 1 && n_gather == 1,
          "its parts were called %d, %d and %d times: %s", n_score, n_select, n_gather, ctx.error);
    CHECK(kvp_register_backend(&whole) == KVP_OK, "the backend was not registered");
    CHECK(kvp_press(&press, &ctx) == KVP_OK && n_press == 1 && n_score + n_select + n_gather == 3,
          "press was called %d times, its parts %d: %s", n_press, n_score + n_select + n_gather, ctx.error);
    CHECK(ctx.workspace == scratch.data && ctx.workspace_bytes == scratch.bytes, "the scratch was not given back");
    free_block(&scratch);
}

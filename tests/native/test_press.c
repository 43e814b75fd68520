/* SPDX-License-Identifier: Apache-2.0
 *
 * Press is score, select and gather: the same bits, and the same refusals.
 */
#include "attention_case.h"
#include "tests.h"

#include <string.h>

enum { S = 2 };

typedef struct outputs {
    array positions, counts, keys, values;
} outputs;

typedef struct press_case {
    attention_case score;
    array values, segments, quotas, protect;
    kvp_press_args args;
} press_case;

static outputs new_outputs(const kvp_tensor *keys, const kvp_tensor *values, int64_t n_kept) {
    const int64_t shape[4] = {keys->shape[0], keys->shape[1], n_kept, keys->shape[3]},
                  wide[4] = {shape[0], shape[1], n_kept, values->shape[3]};
    const outputs out = {new_array(KVP_I32, CONTIGUOUS, 3, shape), new_array(KVP_I32, CONTIGUOUS, 2, shape),
                         new_array((kvp_dtype)keys->dtype, CONTIGUOUS, 4, shape),
                         new_array((kvp_dtype)keys->dtype, HEADS_INSIDE, 4, wide)};
    return out;
}

static void free_outputs(outputs *out) {
    array *const all[] = {&out->positions, &out->counts, &out->keys, &out->values};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free_array(all[i]);
}

static press_case new_press_case(const char *scorer, const attention_shape *s, int64_t n_kept) {
    press_case c = {.score = new_attention_case(s)};
    const int64_t wide[4] = {s->n_batch, s->n_head, s->n_token, s->n_dim + 3};
    c.values = new_array(s->dtype, random_layout(), 4, wide);
    c.segments = new_array(KVP_I32, random_layout(), 2, (int64_t[2]){s->n_batch, S + 1});
    c.quotas = new_array(KVP_I32, random_layout(), 3, (int64_t[3]){s->n_batch, s->n_head, S});
    c.protect = new_array(KVP_U8, CONTIGUOUS, 2, (int64_t[2]){s->n_batch, s->n_token});
    fill_normal(&c.values.view);
    for (int64_t b = 0; b < s->n_batch; b++) {
        const double edges[S + 1] = {0, (double)(s->n_token / 3), (double)s->n_token};
        for (int64_t e = 0; e <= S; e++) set(&c.segments.view, b, e, 0, 0, edges[e]);
        for (int64_t h = 0; h < s->n_head; h++)
            for (int64_t i = 0; i < S; i++) set(&c.quotas.view, b, h, i, 0, (double)(n_kept / S));
        for (int64_t t = 0; t < s->n_token; t++) set(&c.protect.view, b, t, 0, 0, random_below(8) == 0);
    }
    const kvp_score_args *a = &c.score.args;
    const bool attends = strcmp(scorer, "attention") == 0;
    c.args = (kvp_press_args){.size = sizeof(kvp_press_args),
                              .scorer = kvp_scorer_find(scorer),
                              .keys = a->keys,
                              .values = c.values.view,
                              .valid = a->valid,
                              .segments = c.segments.view,
                              .quotas = c.quotas.view};
    if (attends) c.args.queries = a->queries, c.args.lse = a->lse;
    if (kvp_scorer_needs(c.args.scorer) & KVP_NEEDS_VOTES) c.args.votes = a->votes;
    for (int64_t i = 0; !attends && i < s->n_batch * a->votes.shape[1]; i++) /* key ranges only */
        for (int f = KVP_VOTE_KEY_END + 1; f < KVP_VOTE_FIELDS; f++)
            set(&a->votes, i / a->votes.shape[1], i % a->votes.shape[1], f, 0, 0);
    if (random_below(2)) c.args.protect = c.protect.view;
    for (int i = 0; i < KVP_MAX_PARAMS; i++)
        c.args.param[i] = attends ? a->param[i] : i == 1 && strcmp(scorer, "lagkv") == 0 ? 5 : 0;
    return c;
}

static void free_press_case(press_case *c) {
    array *const all[] = {&c->values, &c->segments, &c->quotas, &c->protect};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free_array(all[i]);
    free_attention_case(&c->score);
}

static void run_three(const press_case *c, const outputs *out) {
    kvp_score_args score = c->score.args;
    score.scorer = c->args.scorer;
    score.values = c->args.values;
    for (int i = 0; i < KVP_MAX_PARAMS; i++) score.param[i] = c->args.param[i];
    const kvp_select_args select = {.size = sizeof select,
                                    .scores = score.scores,
                                    .segments = c->args.segments,
                                    .quotas = c->args.quotas,
                                    .protect = c->args.protect,
                                    .valid = c->args.valid,
                                    .positions = out->positions.view,
                                    .counts = out->counts.view};
    const kvp_gather_args gather = {sizeof gather,       c->args.keys,   c->args.values,
                                    out->positions.view, out->keys.view, out->values.view};
    call_verb(KVP_SCORE, &score, (calling){0});
    call_verb(KVP_SELECT, &select, (calling){0});
    call_verb(KVP_GATHER, &gather, (calling){0});
}

static bool are_same(const outputs *x, const outputs *y) {
    return same_elements(&x->positions.view, &y->positions.view) && same_elements(&x->counts.view, &y->counts.view) &&
           same_elements(&x->keys.view, &y->keys.view) && same_elements(&x->values.view, &y->values.view);
}

static void put_outputs(kvp_press_args *args, const outputs *out) {
    args->positions = out->positions.view;
    args->counts = out->counts.view;
    args->out_keys = out->keys.view;
    args->out_values = out->values.view;
}

static void press_once(const char *scorer, const attention_shape *s) {
    const int64_t n_kept = 2 + random_below(s->n_token);
    press_case c = new_press_case(scorer, s, n_kept);
    outputs expected = new_outputs(&c.args.keys, &c.args.values, n_kept),
            out = new_outputs(&c.args.keys, &c.args.values, n_kept);
    name_case("press, %s, T=%lld K=%lld %s", scorer, (long long)s->n_token, (long long)n_kept,
              dtype_name((int32_t)s->dtype));
    run_three(&c, &expected);
    put_outputs(&c.args, &out);
    call_verb(KVP_PRESS, &c.args, (calling){.scratch_byte = 0xff});
    CHECK(are_same(&expected, &out), "differs from the three verbs");

    if (n_kept <= s->n_token && c.args.keys.stride[0] && c.args.values.stride[0]) { /* no broadcast */
        c.args.out_keys = c.args.keys;                                              /* in place */
        c.args.out_values = c.args.values;
        c.args.out_keys.shape[2] = c.args.out_values.shape[2] = n_kept;
        c.args.counts.data = NULL; /* and not counted */
        call_verb(KVP_PRESS, &c.args, (calling){.scratch_byte = 0x5a});
        CHECK(same_elements(&expected.keys.view, &c.args.out_keys), "keys differ in place");
        CHECK(same_elements(&expected.values.view, &c.args.out_values), "values differ in place");
        CHECK(same_elements(&expected.positions.view, &out.positions.view), "positions differ in place");
    }
    free_outputs(&expected);
    free_outputs(&out);
    free_press_case(&c);
}

/* Each way to spoil the call, what the sentence must name, and nothing is written. */
static void refuse(const char *word, void (*spoil)(press_case *c)) {
    const attention_shape shape = {
        .n_batch = 2, .n_head = 2, .group = 2, .n_token = 20, .n_dim = 8, .dtype = KVP_F32, .kind = VOTING_H2O};
    press_case c = new_press_case("attention", &shape, 6);
    outputs out = new_outputs(&c.args.keys, &c.args.values, 6);
    block scratch = new_block(1 << 20);
    kvp_context ctx = {.workspace = scratch.data, .workspace_bytes = scratch.bytes};
    name_case("press refuses %s", word);
    put_outputs(&c.args, &out);
    spoil(&c);
    uint64_t before[4], after[4];
    array *const all[] = {&out.positions, &out.counts, &out.keys, &out.values};
    for (int i = 0; i < 4; i++) before[i] = hash_block(&all[i]->memory);
    const kvp_status status = kvp_press(&c.args, &ctx);
    CHECK(status != KVP_OK && strstr(ctx.error, word), "status %s, \"%s\"", kvp_status_name(status), ctx.error);
    CHECK(ctx.workspace == scratch.data && ctx.workspace_bytes == scratch.bytes, "the context's workspace was changed");
    for (int i = 0; i < 4; i++) after[i] = hash_block(&all[i]->memory);
    CHECK(memcmp(before, after, sizeof before) == 0, "an output was written");
    free_block(&scratch);
    free_outputs(&out);
    free_press_case(&c);
}

static void forget_size(press_case *c) { c->args.size = 0; }
static void forget_queries(press_case *c) { c->args.queries.data = NULL; }
static void break_votes(press_case *c) { set(&c->score.votes.view, 0, 0, KVP_VOTE_KEY_END, 0, 21); }
static void break_segments(press_case *c) { set(&c->segments.view, 0, 1, 0, 0, 21); }
static void raise_quota(press_case *c) { set(&c->quotas.view, 0, 0, 0, 0, 7); }
static void other_dtype(press_case *c) { c->args.out_values.dtype = KVP_F16; }
static void overlap(press_case *c) { c->args.out_keys.data = c->args.out_values.data; }
static void no_scorer(press_case *c) { c->args.scorer = 17; }

void test_press(void) {
    static const char *const scorers[] = {"norm", "position", "attention", "keydiff", "lagkv", "random"};
    for (int i = 0; i < 120; i++) {
        const attention_shape shape = {.n_batch = 1 + i % 3,
                                       .n_head = 2,
                                       .group = 1 + i % 2,
                                       .n_token = 3 + random_below(i % 10 ? 60 : 700),
                                       .n_dim = random_dim(40),
                                       .dtype = (kvp_dtype)(i % 3),
                                       .kind = (voting)(i % VOTING_COUNT)};
        press_once(scorers[i / 3 % 6], &shape);
    }
    refuse("sizeof(kvp_press_args)", forget_size);
    refuse("queries is missing", forget_queries);
    refuse("votes[0,0]", break_votes);
    refuse("segments[0,1]", break_segments);
    refuse("quotas[0,0] sum", raise_quota);
    refuse("out_values has dtype", other_dtype);
    refuse("overlaps", overlap);
    refuse("scorer is 17", no_scorer);
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * Bad calls: the right status, one sentence that names the culprit, and not a byte written anywhere.
 */
#include "harness.h"
#include "tests.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { B = 2, H = 2, G = 2, T = 6, Q = 3, D = 4, V = 2, S = 2, K = 4, N_ARRAY = 18 };

/* Twice this, or this times an element's size, is beyond int64. */
#define HUGE_SIZE (INT64_MAX / 2)

/* A good call of each verb. */
typedef struct calls {
    array keys, queries, votes, valid, lse, scores;           /* score */
    array ranking, segments, quotas, protect, ranked, counts; /* select; "valid" is shared */
    array values, kept, out_keys, out_values;                 /* gather; "keys" is shared */
    array floors, shares;                                     /* share; the others are those of select */
    kvp_score_args score;
    kvp_select_args select;
    kvp_gather_args gather;
    kvp_share_args share;
    block scratch;
    size_t score_bytes, score_bytes_of_2, select_bytes, share_bytes;
    kvp_context ctx;
} calls;

static array new_filled(kvp_dtype dtype, int32_t ndim, const int64_t *shape, const int32_t *row, int64_t n) {
    array a = new_array(dtype, CONTIGUOUS, ndim, shape);
    for (size_t i = 0; i < a.memory.bytes / 4 && row; i++) memcpy(a.memory.data + 4 * i, &row[i % (size_t)n], 4);
    return a;
}

static void make_score_call(calls *c) {
    static const int32_t votes[V * KVP_VOTE_FIELDS] = {0,       3, 3, 6, 5, 5, 1, 0, 5, 6,
                                                       /* */ 3, 5, 4, 6, 0, 0, 2, 6, 0, 0};
    static const int32_t valid[] = {1, T};
    c->keys = new_filled(KVP_F32, 4, (int64_t[4]){B, H, T, D}, NULL, 0);
    c->queries = new_filled(KVP_F32, 4, (int64_t[4]){B, H * G, Q, D}, NULL, 0);
    c->votes = new_filled(KVP_I32, 3, (int64_t[3]){B, V, KVP_VOTE_FIELDS}, votes, V * KVP_VOTE_FIELDS);
    c->valid = new_filled(KVP_I32, 2, (int64_t[2]){B, 2}, valid, 2);
    c->lse = new_filled(KVP_F32, 3, (int64_t[3]){B, H * G, Q}, NULL, 0);
    c->scores = new_filled(KVP_F32, 3, (int64_t[3]){B, H, T}, NULL, 0);
    c->score = (kvp_score_args){sizeof(kvp_score_args), kvp_scorer_find("attention"),
                                c->keys.view,           {0},
                                c->queries.view,        c->votes.view,
                                c->valid.view,          c->lse.view,
                                c->scores.view,         {0.5, 0, 3, 0}};
}

static void make_select_call(calls *c) {
    static const int32_t segments[] = {0, 3, T}, quotas[] = {2, 2};
    c->ranking = new_filled(KVP_F32, 3, (int64_t[3]){B, H, T}, NULL, 0);
    c->segments = new_filled(KVP_I32, 2, (int64_t[2]){B, S + 1}, segments, S + 1);
    c->quotas = new_filled(KVP_I32, 3, (int64_t[3]){B, H, S}, quotas, S);
    c->protect = new_filled(KVP_U8, 2, (int64_t[2]){B, T}, NULL, 0);
    c->ranked = new_filled(KVP_I32, 3, (int64_t[3]){B, H, K}, NULL, 0);
    c->counts = new_filled(KVP_I32, 2, (int64_t[2]){B, H}, NULL, 0);
    c->select = (kvp_select_args){sizeof(kvp_select_args), c->ranking.view, c->segments.view, c->quotas.view,
                                  c->protect.view,         c->valid.view,   c->ranked.view,   c->counts.view};
}

static void make_gather_call(calls *c) {
    static const int32_t kept[] = {0, 2, 3, 5};
    c->values = new_filled(KVP_F32, 4, (int64_t[4]){B, H, T, D + 1}, NULL, 0);
    c->kept = new_filled(KVP_I32, 3, (int64_t[3]){B, H, K}, kept, K);
    c->out_keys = new_filled(KVP_F32, 4, (int64_t[4]){B, H, K, D}, NULL, 0);
    c->out_values = new_filled(KVP_F32, 4, (int64_t[4]){B, H, K, D + 1}, NULL, 0);
    c->gather = (kvp_gather_args){sizeof(kvp_gather_args), c->keys.view,      c->values.view, c->kept.view,
                                  c->out_keys.view,        c->out_values.view};
}

static void make_share_call(calls *c) {
    static const int32_t floors[] = {1, 2};
    c->floors = new_filled(KVP_I32, 3, (int64_t[3]){B, H, S}, floors, S);
    c->shares = new_filled(KVP_I32, 3, (int64_t[3]){B, H, S}, NULL, 0);
    c->share = (kvp_share_args){sizeof(kvp_share_args), c->ranking.view, c->segments.view,
                                c->quotas.view,         c->floors.view,  c->shares.view};
}

static void make_calls(calls *c) {
    memset(c, 0, sizeof *c);
    make_score_call(c);
    make_select_call(c);
    make_gather_call(c);
    make_share_call(c);
    CHECK(kvp_workspace(KVP_SCORE, &c->score, 1, &c->score_bytes) == KVP_OK, "no workspace for score");
    CHECK(kvp_workspace(KVP_SCORE, &c->score, 2, &c->score_bytes_of_2) == KVP_OK, "no workspace for score");
    CHECK(kvp_workspace(KVP_SELECT, &c->select, 1, &c->select_bytes) == KVP_OK, "no workspace for select");
    CHECK(kvp_workspace(KVP_SHARE, &c->share, 1, &c->share_bytes) == KVP_OK, "no workspace for share");
    c->scratch = new_block(2 * (c->score_bytes + c->select_bytes + c->share_bytes) + 64);
    memset(c->scratch.data, 0xff, c->scratch.bytes);
    memset(c->ctx.error, 0xff, sizeof c->ctx.error);
    c->ctx.workspace = c->scratch.data;
    c->ctx.workspace_bytes = c->scratch.bytes;
}

static void list_arrays(calls *c, array **list) {
    array *const all[N_ARRAY] = {&c->keys,    &c->queries,  &c->votes,    &c->valid,      &c->lse,    &c->scores,
                                 &c->ranking, &c->segments, &c->quotas,   &c->protect,    &c->ranked, &c->counts,
                                 &c->values,  &c->kept,     &c->out_keys, &c->out_values, &c->floors, &c->shares};
    memcpy(list, all, sizeof all);
}

/* Changes the content and the place of every array into one number. */
static uint64_t hash_arrays(calls *c) {
    array *all[N_ARRAY];
    uint64_t hash = 0;
    list_arrays(c, all);
    for (int i = 0; i < N_ARRAY; i++) hash = hash * 31 + hash_block(&all[i]->memory);
    return hash;
}

static void free_calls(calls *c) {
    array *all[N_ARRAY];
    list_arrays(c, all);
    for (int i = 0; i < N_ARRAY; i++) free_array(all[i]);
    free_block(&c->scratch);
}

/* Ways to spoil a call, beyond one assignment. */

static void judge_by_values(calls *c) {
    c->score.scorer = kvp_scorer_find("lagkv");
    c->score.values = c->keys.view;
    c->score.param[0] = 1;
    c->score.param[1] = 2;
}

static void judge_ranges(calls *c) {
    c->score.scorer = kvp_scorer_find("keydiff");
    for (int64_t b = 0; b < B; b++)
        for (int64_t v = 0; v < V; v++)
            for (int f = KVP_VOTE_KEY_END + 1; f < KVP_VOTE_FIELDS; f++) set(&c->votes.view, b, v, f, 0, 0);
}

#define SET_VOTE(field, value) set(&c->votes.view, 1, 0, KVP_VOTE_##field, 0, (value))

static void make_huge(kvp_tensor *t, int64_t stride) {
    for (int d = 0; d < 4; d++) {
        t->shape[d] = HUGE_SIZE;
        t->stride[d] = stride;
    }
}

/* Same strides, a few elements further. */
static void put_over(kvp_tensor *out, const kvp_tensor *in, int64_t n_element) {
    memcpy(out->stride, in->stride, sizeof out->stride);
    out->data = (float *)in->data + n_element;
}

/* Each size is allowed, and their product cannot be addressed. */
static void make_long(kvp_tensor *t) {
    for (int d = 0; d < 4; d++) {
        t->shape[d] = INT32_MAX;
        t->stride[d] = 0;
    }
}

/* In place, where the last rows of one head are the first ones of the next: what the next reads depends on who comes
 * first. */
static void share_rows_in_place(calls *c) {
    c->gather.keys.stride[1] = K * D;
    put_over(&c->gather.out_keys, &c->gather.keys, 0);
}

static void move_score(calls *c, int32_t device) {
    kvp_tensor *const all[] = {&c->score.keys,  &c->score.queries, &c->score.votes,
                               &c->score.valid, &c->score.lse,     &c->score.scores};
    for (int i = 0; i < 6; i++) all[i]->device = device;
}

static void run_tasks(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg) {
    for (int64_t task = 0; task < n_task; task++) fn(arg, task, (int32_t)(task % n_worker));
}

/* The positions stand where the first output is written. All keys are zero, so that a core that goes on reads no wild
 * position. */
static void put_positions_in_output(calls *c) {
    memcpy(c->out_keys.memory.data, c->kept.memory.data, c->kept.memory.bytes);
    c->gather.positions.data = c->gather.out_keys.data;
}

#define REFUSAL(verb, status, named, what, ...) \
    static void spoil_##what(calls *c) { __VA_ARGS__; }
#include "refusals.def"
#undef REFUSAL

static const struct refusal {
    kvp_verb verb;
    kvp_status status;
    const char *named, *what;
    void (*spoil)(calls *c);
} refusals[] = {
#define REFUSAL(verb, status, named, what, ...) {KVP_##verb, KVP_ERR_##status, named, #what, spoil_##what},
#include "refusals.def"
#undef REFUSAL
};

static kvp_status call_one(calls *c, kvp_verb verb) {
    if (verb == KVP_SCORE) return kvp_score(&c->score, &c->ctx);
    if (verb == KVP_SELECT) return kvp_select(&c->select, &c->ctx);
    if (verb == KVP_SHARE) return kvp_share(&c->share, &c->ctx);
    return kvp_gather(&c->gather, &c->ctx);
}

static void check_refusal(const struct refusal *r) {
    calls c;
    name_case("refusal of %s", r->what);
    make_calls(&c);
    r->spoil(&c);
    const uint64_t before = hash_arrays(&c);
    const kvp_status status = call_one(&c, r->verb);
    CHECK(hash_arrays(&c) == before, "a tensor was written");
    const bool ends = memchr(c.ctx.error, 0, sizeof c.ctx.error) != NULL;
    if (!CHECK(status == r->status, "status %s; expected %s", kvp_status_name(status), kvp_status_name(r->status)))
        printf("%s\n", ends ? c.ctx.error : "");
    if (CHECK(ends && strlen(c.ctx.error) > 10, "no error sentence"))
        CHECK(strstr(c.ctx.error, r->named), "the error does not name %s: %s", r->named, c.ctx.error);
    /* kvp_workspace sees no values, but what it refuses, it refuses alike. */
    const void *const args[] = {
        [KVP_SCORE] = &c.score, [KVP_SELECT] = &c.select, [KVP_GATHER] = &c.gather, [KVP_SHARE] = &c.share};
    size_t bytes = 12345;
    const kvp_status asked = kvp_workspace(r->verb, args[r->verb], 1, &bytes);
    CHECK(asked == KVP_OK || (asked == r->status && bytes == 12345), "kvp_workspace says %s, %zu bytes",
          kvp_status_name(asked), bytes);
    free_calls(&c);
}

/* Without a fault the calls must pass, or the refusals would prove nothing. */
static void check_unspoilt(void) {
    calls c;
    name_case("nothing to refuse");
    make_calls(&c);
    for (int verb = KVP_SCORE; verb <= KVP_SHARE; verb++) {
        if (verb == KVP_PRESS) continue; /* which test_press.c refuses */
        const kvp_status status = call_one(&c, (kvp_verb)verb);
        CHECK(status == KVP_OK, "verb %d: %s, %s", verb, kvp_status_name(status), status == KVP_OK ? "" : c.ctx.error);
    }
    size_t bytes;
    CHECK(kvp_workspace((kvp_verb)5, &c.score, 1, &bytes) == KVP_ERR_VALUE, "kvp_workspace knows a sixth verb");
    free_calls(&c);
}

/* Where there is no struct to look into. */
static void check_null(void) {
    calls c;
    size_t bytes = 12345;
    name_case("NULL");
    make_calls(&c);
    const kvp_status of_args[] = {kvp_score(NULL, &c.ctx), kvp_select(NULL, &c.ctx), kvp_gather(NULL, &c.ctx),
                                  kvp_press(NULL, &c.ctx), kvp_share(NULL, &c.ctx),  kvp_expect(NULL, &c.ctx)};
    for (int verb = KVP_SCORE; verb <= KVP_EXPECT; verb++) {
        CHECK(of_args[verb] == KVP_ERR_VALUE, "verb %d takes no arguments", verb);
        CHECK(kvp_workspace((kvp_verb)verb, NULL, 1, &bytes) == KVP_ERR_VALUE, "so does its scratch");
    }
    CHECK(strstr(c.ctx.error, "args is NULL"), "the error does not name args: %s", c.ctx.error);
    CHECK(kvp_score(&c.score, NULL) == KVP_ERR_VALUE, "a verb takes no context");
    CHECK(kvp_workspace(KVP_SCORE, &c.score, 1, NULL) == KVP_ERR_VALUE, "scratch is told to nobody");
    CHECK(kvp_workspace(KVP_SCORE, &c.score, -1, &bytes) == KVP_ERR_VALUE && bytes == 12345, "-1 workers have scratch");
    CHECK(kvp_scorer_find(NULL) == -1 && kvp_cpu_isa_set(NULL) == -1, "no name is a name");
    CHECK(kvp_register_backend(NULL) != KVP_OK, "no backend was registered");
    free_calls(&c);
}

/* Scratch between a tensor's heads is memory of its own. */
static void check_scratch_in_gap(void) {
    enum { GAP = 1 << 16 };
    calls c;
    name_case("scratch in a gap");
    make_calls(&c);
    block arena = new_block(3 * GAP);
    memset(arena.data, 0, arena.bytes);
    c.select.scores.data = arena.data;
    memcpy(c.select.scores.stride, (const int64_t[]){T, 2 * GAP / 4, 1}, 3 * sizeof(int64_t));
    c.ctx.workspace_bytes = GAP;
    for (size_t at = 64; at <= 2 * GAP; at += 64) {
        c.ctx.workspace = arena.data + at;
        const bool is_free = at >= 2 * T * sizeof(float) && at + c.select_bytes <= 2 * GAP;
        const kvp_status status = kvp_select(&c.select, &c.ctx);
        CHECK(status == (is_free ? KVP_OK : KVP_ERR_WORKSPACE), "%s with scratch at %zu", kvp_status_name(status), at);
    }
    free_block(&arena);
    free_calls(&c);
}

void test_refusals(void) {
    check_unspoilt();
    check_scratch_in_gap();
    check_null();
    for (size_t i = 0; i < sizeof refusals / sizeof refusals[0]; i++) check_refusal(&refusals[i]);
}

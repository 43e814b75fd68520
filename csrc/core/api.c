/* SPDX-License-Identifier: Apache-2.0
 *
 * The verbs: check the contract, find the backend, see to the scratch, call.
 */
#include "floating.h"
#include "internal.h"

static kvp_status find_backend(const kvp_tensor *tensor, const kvp_backend **backend, kvp_context *ctx) {
    *backend = kvpi_backend_for(tensor->device);
    if (*backend) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_DEVICE, "the tensors are on %s, for which no backend is loaded",
                     tensor->device == KVP_CUDA ? "a CUDA device" : "an unknown device");
}

/* Far above any machine, and low enough that the size of their scratch cannot overflow. */
static kvp_status check_worker_count(int32_t n_worker, kvp_context *ctx) {
    if (n_worker >= 0 && n_worker <= KVP_MAX_WORKER) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_VALUE, "n_worker is %d; expected 0 to %d", (int)n_worker, KVP_MAX_WORKER);
}

/* Press is its three parts, with the scores between them in the scratch, behind the tables. */
typedef struct press_parts {
    kvp_score_args score;
    kvp_select_args select;
    kvp_gather_args gather;
    size_t score_bytes;
} press_parts;

static press_parts split_press(const kvp_press_args *a) {
    kvp_tensor scores = {.dtype = KVP_F32, .device = a->keys.device, .device_index = a->keys.device_index, .ndim = 3};
    int64_t step = 1;
    for (int d = 2; d >= 0; step *= scores.shape[d--]) {
        scores.shape[d] = a->keys.shape[d];
        scores.stride[d] = step;
    }
    press_parts p = {
        .score = {sizeof p.score, a->scorer, a->keys, a->values, a->queries, a->votes, a->valid, a->lse, scores, {0}},
        .select = {sizeof p.select, scores, a->segments, a->quotas, a->protect, a->valid, a->positions, a->counts},
        .gather = {sizeof p.gather, a->keys, a->values, a->positions, a->out_keys, a->out_values},
        .score_bytes = kvpi_round_up_64((size_t)step * sizeof(float)),
    };
    for (int i = 0; i < KVP_MAX_PARAMS; i++) p.score.param[i] = a->param[i];
    return p;
}

static size_t press_table_bytes(const press_parts *p) {
    return kvpi_table_bytes(KVP_SCORE, &p->score) + kvpi_table_bytes(KVP_SELECT, &p->select);
}

static size_t press_bytes(const kvp_backend *backend, const press_parts *p, int32_t n_worker) {
    const size_t score = backend->workspace(KVP_SCORE, &p->score, n_worker),
                 select = backend->workspace(KVP_SELECT, &p->select, n_worker);
    const size_t gather = backend->workspace(KVP_GATHER, &p->gather, n_worker), two = score > select ? score : select;
    return press_table_bytes(p) + p->score_bytes + (two > gather ? two : gather);
}

static size_t workspace_of(const kvp_backend *backend, kvp_verb verb, const void *args, int32_t n_worker) {
    if (verb != KVP_PRESS) return kvpi_table_bytes(verb, args) + backend->workspace(verb, args, n_worker);
    const press_parts p = split_press(args);
    return press_bytes(backend, &p, n_worker);
}

static kvp_status check_bytes(size_t need, kvp_verb verb, const void *args, kvp_context *ctx) {
    if (need == 0) return KVP_OK;
    if (!ctx->workspace || ctx->workspace_bytes < need)
        return kvpi_fail(ctx, KVP_ERR_WORKSPACE, "workspace has %zu bytes; expected at least %zu (for %d worker%s)",
                         ctx->workspace ? ctx->workspace_bytes : (size_t)0, need, (int)kvpi_worker_count(ctx),
                         kvpi_worker_count(ctx) == 1 ? "" : "s");
    if ((uintptr_t)ctx->workspace % 64u)
        return kvpi_fail(ctx, KVP_ERR_WORKSPACE,
                         "workspace begins %d bytes behind a multiple of 64; expected it to be aligned to 64 bytes",
                         (int)((uintptr_t)ctx->workspace % 64u));
    return kvpi_check_scratch(verb, args, need, ctx);
}

static kvp_status check_workspace(const kvp_backend *backend, kvp_verb verb, const void *args, kvp_context *ctx) {
    KVPI_TRY(check_worker_count(ctx->n_worker, ctx));
    return check_bytes(workspace_of(backend, verb, args, kvpi_worker_count(ctx)), verb, args, ctx);
}

/* The workspace without the tables at its front, for as long as the backend is at work. */
typedef struct kept_workspace {
    void *data;
    size_t bytes;
} kept_workspace;

static kept_workspace pass_tables(kvp_context *ctx, size_t bytes) {
    const kept_workspace kept = {ctx->workspace, ctx->workspace_bytes};
    if (bytes == 0) return kept;
    ctx->workspace = (char *)ctx->workspace + bytes;
    ctx->workspace_bytes -= bytes;
    return kept;
}

static kvp_status give_back(kvp_context *ctx, kept_workspace kept, kvp_status status) {
    ctx->workspace = kept.data;
    ctx->workspace_bytes = kept.bytes;
    return status;
}

static kvp_status find_scorer(const kvp_backend *backend, int32_t scorer, kvp_context *ctx) {
    if (backend->score[scorer]) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED, "this device has no scorer \"%s\"", kvp_scorer_name(scorer));
}

static kvp_status check_score_values(const kvp_score_args *args, kvp_context *ctx) {
    KVPI_TRY(kvpi_check_valid_values(&args->valid, args->keys.shape[2], ctx));
    return kvp_scorer_needs(args->scorer) & KVP_NEEDS_VOTES ? kvpi_check_vote_values(args, ctx) : KVP_OK;
}

static kvp_status run_score(const void *of_call, kvp_context *ctx) {
    const kvp_score_args *args = of_call;
    const kvp_backend *backend;
    KVPI_TRY(kvpi_check_score(args, ctx));
    KVPI_TRY(find_backend(&args->keys, &backend, ctx));
    KVPI_TRY(find_scorer(backend, args->scorer, ctx));
    KVPI_TRY(check_workspace(backend, KVP_SCORE, args, ctx));
    kvp_score_args own = *args;
    kvpi_copy_score_tables(&own, ctx->workspace);
    KVPI_TRY(check_score_values(&own, ctx));
    const kept_workspace kept = pass_tables(ctx, kvpi_table_bytes(KVP_SCORE, args));
    return give_back(ctx, kept, backend->score[own.scorer](&own, ctx));
}

static kvp_status run_select(const void *of_call, kvp_context *ctx) {
    const kvp_select_args *args = of_call;
    const kvp_backend *backend;
    KVPI_TRY(kvpi_check_select(args, ctx));
    KVPI_TRY(find_backend(&args->scores, &backend, ctx));
    KVPI_TRY(check_workspace(backend, KVP_SELECT, args, ctx));
    kvp_select_args own = *args;
    kvpi_copy_select_tables(&own, ctx->workspace);
    KVPI_TRY(kvpi_check_select_values(&own, ctx));
    const kept_workspace kept = pass_tables(ctx, kvpi_table_bytes(KVP_SELECT, args));
    return give_back(ctx, kept, backend->select(&own, ctx));
}

static kvp_status run_share(const void *of_call, kvp_context *ctx) {
    const kvp_share_args *args = of_call;
    const kvp_backend *backend;
    KVPI_TRY(kvpi_check_share(args, ctx));
    KVPI_TRY(find_backend(&args->scores, &backend, ctx));
    KVPI_TRY(check_workspace(backend, KVP_SHARE, args, ctx));
    kvp_share_args own = *args;
    kvpi_copy_share_tables(&own, ctx->workspace);
    KVPI_TRY(kvpi_check_share_values(&own, ctx));
    const kept_workspace kept = pass_tables(ctx, kvpi_table_bytes(KVP_SHARE, args));
    return give_back(ctx, kept, backend->share(&own, ctx));
}

static kvp_status run_gather(const void *of_call, kvp_context *ctx) {
    const kvp_gather_args *args = of_call;
    const kvp_backend *backend;
    KVPI_TRY(kvpi_check_gather(args, ctx));
    KVPI_TRY(find_backend(&args->keys, &backend, ctx));
    KVPI_TRY(check_workspace(backend, KVP_GATHER, args, ctx));
    return backend->gather(args, ctx);
}

/* Not in every backend's table, which others may write. */
static kvp_status find_expect(const kvp_backend *backend, kvp_context *ctx) {
    if (backend->expect) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED, "this device has no verb \"expect\"");
}

static kvp_status run_expect(const void *of_call, kvp_context *ctx) {
    const kvp_expect_args *args = of_call;
    const kvp_backend *backend;
    KVPI_TRY(kvpi_check_expect(args, ctx));
    KVPI_TRY(find_backend(&args->keys, &backend, ctx));
    KVPI_TRY(find_expect(backend, ctx));
    KVPI_TRY(check_workspace(backend, KVP_EXPECT, args, ctx));
    kvp_expect_args own = *args;
    kvpi_copy_expect_tables(&own, ctx->workspace);
    KVPI_TRY(kvpi_check_expect_values(&own, ctx));
    const kept_workspace kept = pass_tables(ctx, kvpi_table_bytes(KVP_EXPECT, args));
    return give_back(ctx, kept, backend->expect(&own, ctx));
}

static kvp_status run_parts(const kvp_backend *backend, press_parts *p, kvp_context *ctx) {
    if (backend->press) return backend->press(&p->score, &p->select, &p->gather, ctx);
    KVPI_TRY(backend->score[p->score.scorer](&p->score, ctx));
    KVPI_TRY(backend->select(&p->select, ctx));
    return backend->gather(&p->gather, ctx);
}

static kvp_status run_press(const void *of_call, kvp_context *ctx) {
    const kvp_press_args *args = of_call;
    const kvp_backend *backend;
    KVPI_TRY(kvpi_check_press(args, ctx));
    KVPI_TRY(find_backend(&args->keys, &backend, ctx));
    KVPI_TRY(find_scorer(backend, args->scorer, ctx));
    KVPI_TRY(check_worker_count(ctx->n_worker, ctx));
    press_parts p = split_press(args);
    KVPI_TRY(check_bytes(press_bytes(backend, &p, kvpi_worker_count(ctx)), KVP_PRESS, args, ctx));
    const size_t of_score = kvpi_table_bytes(KVP_SCORE, &p.score), bytes = press_table_bytes(&p);
    kvpi_copy_score_tables(&p.score, ctx->workspace);
    kvpi_copy_select_tables(&p.select, (char *)ctx->workspace + of_score);
    KVPI_TRY(check_score_values(&p.score, ctx));
    KVPI_TRY(kvpi_check_select_values(&p.select, ctx));
    p.score.scores.data = p.select.scores.data = (char *)ctx->workspace + bytes;
    const kept_workspace kept = pass_tables(ctx, bytes + p.score_bytes);
    return give_back(ctx, kept, run_parts(backend, &p, ctx));
}

/* A verb in the floating-point environment that is its own. */
static kvp_status call(kvp_status (*verb)(const void *, kvp_context *), const void *args, kvp_context *ctx) {
    if (!ctx) return KVP_ERR_VALUE;
    if (!args) return kvpi_fail(ctx, KVP_ERR_VALUE, "args is NULL; expected the verb's struct of arguments");
    const fenv_t own = kvpi_enter_default();
    const kvp_status status = verb(args, ctx);
    kvpi_leave_default(own);
    return status;
}

kvp_status kvp_score(const kvp_score_args *args, kvp_context *ctx) { return call(run_score, args, ctx); }
kvp_status kvp_select(const kvp_select_args *args, kvp_context *ctx) { return call(run_select, args, ctx); }
kvp_status kvp_gather(const kvp_gather_args *args, kvp_context *ctx) { return call(run_gather, args, ctx); }
kvp_status kvp_press(const kvp_press_args *args, kvp_context *ctx) { return call(run_press, args, ctx); }
kvp_status kvp_share(const kvp_share_args *args, kvp_context *ctx) { return call(run_share, args, ctx); }
kvp_status kvp_expect(const kvp_expect_args *args, kvp_context *ctx) { return call(run_expect, args, ctx); }

static kvp_status find_workspace(kvp_verb verb, const void *args, int32_t n_worker, size_t *bytes) {
    kvp_context scratch = {0};
    const kvp_backend *backend;
    const kvp_tensor *first;
    int32_t scorer = -1; /* none */
    switch (verb) {
    case KVP_SCORE:
        KVPI_TRY(kvpi_check_score(args, &scratch));
        first = &((const kvp_score_args *)args)->keys;
        scorer = ((const kvp_score_args *)args)->scorer;
        break;
    case KVP_SELECT:
        KVPI_TRY(kvpi_check_select(args, &scratch));
        first = &((const kvp_select_args *)args)->scores;
        break;
    case KVP_SHARE:
        KVPI_TRY(kvpi_check_share(args, &scratch));
        first = &((const kvp_share_args *)args)->scores;
        break;
    case KVP_GATHER:
        KVPI_TRY(kvpi_check_gather(args, &scratch));
        first = &((const kvp_gather_args *)args)->keys;
        break;
    case KVP_PRESS:
        KVPI_TRY(kvpi_check_press(args, &scratch));
        first = &((const kvp_press_args *)args)->keys;
        scorer = ((const kvp_press_args *)args)->scorer;
        break;
    case KVP_EXPECT:
        KVPI_TRY(kvpi_check_expect(args, &scratch));
        first = &((const kvp_expect_args *)args)->keys;
        break;
    default: return KVP_ERR_VALUE;
    }
    KVPI_TRY(find_backend(first, &backend, &scratch));
    if (verb == KVP_EXPECT) KVPI_TRY(find_expect(backend, &scratch));
    if (scorer >= 0) KVPI_TRY(find_scorer(backend, scorer, &scratch));
    KVPI_TRY(check_worker_count(n_worker, &scratch));
    *bytes = workspace_of(backend, verb, args, n_worker > 1 ? n_worker : 1);
    return KVP_OK;
}

kvp_status kvp_workspace(kvp_verb verb, const void *args, int32_t n_worker, size_t *bytes) {
    if (!args || !bytes) return KVP_ERR_VALUE;
    const fenv_t own = kvpi_enter_default();
    const kvp_status status = find_workspace(verb, args, n_worker, bytes);
    kvpi_leave_default(own);
    return status;
}

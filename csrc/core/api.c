/* SPDX-License-Identifier: Apache-2.0
 *
 * The three verbs: check the contract, find the backend, see to the scratch, call.
 */
#include "internal.h"

static kvp_status find_backend(const kvp_tensor *tensor, const kvp_backend **backend, kvp_context *ctx) {
    *backend = kvpi_backend_for(tensor->device);
    if (*backend) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_DEVICE, "the tensors are on %s, for which no backend is loaded",
                     tensor->device == KVP_CUDA ? "a CUDA device" : "an unknown device");
}

/* Far above any machine, and low enough that the size of their scratch cannot overflow. */
static kvp_status check_worker_count(int32_t n_worker, kvp_context *ctx) {
    if (n_worker <= KVP_MAX_WORKER) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_VALUE, "n_worker is %d; expected at most %d", (int)n_worker, KVP_MAX_WORKER);
}

static kvp_status check_workspace(const kvp_backend *backend, kvp_verb verb, const void *args, kvp_context *ctx) {
    KVPI_TRY(check_worker_count(ctx->n_worker, ctx));
    const size_t need = backend->workspace(verb, args, kvpi_worker_count(ctx));
    if (need == 0) return KVP_OK;
    if (!ctx->workspace || ctx->workspace_bytes < need)
        return kvpi_fail(ctx, KVP_ERR_WORKSPACE, "workspace has %zu bytes; expected at least %zu (for %d worker%s)",
                         ctx->workspace ? ctx->workspace_bytes : (size_t)0, need, (int)kvpi_worker_count(ctx),
                         kvpi_worker_count(ctx) == 1 ? "" : "s");
    if ((uintptr_t)ctx->workspace % 64u)
        return kvpi_fail(ctx, KVP_ERR_WORKSPACE, "workspace begins %d bytes behind a multiple of 64; expected it to be aligned to 64 bytes",
                         (int)((uintptr_t)ctx->workspace % 64u));
    return KVP_OK;
}

kvp_status kvp_score(const kvp_score_args *args, kvp_context *ctx) {
    const kvp_backend *backend;
    KVPI_TRY(kvpi_check_score(args, ctx));
    KVPI_TRY(find_backend(&args->keys, &backend, ctx));
    if (!backend->score[args->scorer])
        return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED, "this device has no scorer \"%s\"", kvp_scorer_name(args->scorer));
    KVPI_TRY(check_workspace(backend, KVP_SCORE, args, ctx));
    KVPI_TRY(kvpi_check_valid_values(&args->valid, args->keys.shape[2], ctx));
    if (kvp_scorer_needs(args->scorer) & KVP_NEEDS_VOTES) KVPI_TRY(kvpi_check_vote_values(args, ctx));
    return backend->score[args->scorer](args, ctx);
}

kvp_status kvp_select(const kvp_select_args *args, kvp_context *ctx) {
    const kvp_backend *backend;
    KVPI_TRY(kvpi_check_select(args, ctx));
    KVPI_TRY(find_backend(&args->scores, &backend, ctx));
    KVPI_TRY(check_workspace(backend, KVP_SELECT, args, ctx));
    KVPI_TRY(kvpi_check_select_values(args, ctx));
    return backend->select(args, ctx);
}

kvp_status kvp_gather(const kvp_gather_args *args, kvp_context *ctx) {
    const kvp_backend *backend;
    KVPI_TRY(kvpi_check_gather(args, ctx));
    KVPI_TRY(find_backend(&args->keys, &backend, ctx));
    KVPI_TRY(check_workspace(backend, KVP_GATHER, args, ctx));
    return backend->gather(args, ctx);
}

kvp_status kvp_workspace(kvp_verb verb, const void *args, int32_t n_worker, size_t *bytes) {
    kvp_context scratch = {0};
    const kvp_backend *backend;
    const kvp_tensor *first;
    switch (verb) {
    case KVP_SCORE:
        KVPI_TRY(kvpi_check_score(args, &scratch));
        first = &((const kvp_score_args *)args)->keys;
        break;
    case KVP_SELECT:
        KVPI_TRY(kvpi_check_select(args, &scratch));
        first = &((const kvp_select_args *)args)->scores;
        break;
    case KVP_GATHER:
        KVPI_TRY(kvpi_check_gather(args, &scratch));
        first = &((const kvp_gather_args *)args)->keys;
        break;
    default: return KVP_ERR_VALUE;
    }
    KVPI_TRY(find_backend(first, &backend, &scratch));
    KVPI_TRY(check_worker_count(n_worker, &scratch));
    *bytes = backend->workspace(verb, args, n_worker > 1 ? n_worker : 1);
    return KVP_OK;
}

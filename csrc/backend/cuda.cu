/* SPDX-License-Identifier: Apache-2.0
 *
 * The CUDA backend: one constant table, like cpu.c's. Every call runs on the device of its tensors, whichever is
 * current.
 */
#include "../gpu/rows.cuh"

extern "C" {
#include "../evict/evict.h"
#include "../score/expected/expected.h"
#include "../score/score.h"
#include "../select/select.h"
}

static const kvp_tensor *first_of(const kvp_score_args *args) { return &args->keys; }
static const kvp_tensor *first_of(const kvp_select_args *args) { return &args->scores; }
static const kvp_tensor *first_of(const kvp_gather_args *args) { return &args->keys; }
static const kvp_tensor *first_of(const kvp_share_args *args) { return &args->scores; }
static const kvp_tensor *first_of(const kvp_expect_args *args) { return &args->keys; }

/* What a press is of. */
typedef struct press_args {
    const kvp_score_args *score;
    const kvp_select_args *select;
    const kvp_gather_args *gather;
} press_args;

static const kvp_tensor *first_of(const press_args *args) { return &args->gather->keys; }

template <typename ARGS, kvp_status (*VERB)(const ARGS *, kvp_context *)>
static kvp_status on_its_device(const ARGS *args, kvp_context *ctx) {
    const kvp_tensor *first = first_of(args);
    int before;
    if (first->shape[0] * first->shape[1] > KVPG_MAX_ROWS)
        return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED, "B times H is %lld; on a CUDA device expected at most %d",
                         (long long)(first->shape[0] * first->shape[1]), (int)KVPG_MAX_ROWS);
    KVPG_TRY("tell the current device", cudaGetDevice(&before));
    if (before == first->device_index) return VERB(args, ctx);
    KVPG_TRY("go to the device of the tensors", cudaSetDevice(first->device_index));
    const kvp_status status = VERB(args, ctx);
    const cudaError_t back = cudaSetDevice(before);
    if (status != KVP_OK) return status; /* and its sentence */
    KVPG_TRY("go back to the device before", back);
    return KVP_OK;
}

/* Every KVP_SCORER of scorers.def must name a function here, or the module does not link. */
static kvp_status (*const score_table[KVPI_SCORER_COUNT])(const kvp_score_args *, kvp_context *) = {
#define KVP_PARAM(scorer, name, initial)
#define KVP_SCORER(name, needs, params) on_its_device<kvp_score_args, kvpi_score_##name##_cuda>,
#include "../scorers.def"
#undef KVP_SCORER
};

static size_t (*const score_workspace_table[KVPI_SCORER_COUNT])(const kvp_score_args *) = {
#define KVP_SCORER(name, needs, params) kvpi_score_##name##_cuda_workspace,
#include "../scorers.def"
#undef KVP_SCORER
#undef KVP_PARAM
};

static kvp_status press_there(const press_args *args, kvp_context *ctx) {
    return kvpi_press_cuda(args->score, args->select, args->gather, score_table[args->score->scorer], ctx);
}

static kvp_status press(const kvp_score_args *score, const kvp_select_args *select, const kvp_gather_args *gather,
                        kvp_context *ctx) {
    const press_args args = {score, select, gather};
    return on_its_device<press_args, press_there>(&args, ctx);
}

static size_t workspace_of(kvp_verb verb, const void *args, int32_t n_worker) {
    (void)n_worker;
    if (verb == KVP_SELECT) return kvpi_select_cuda_workspace((const kvp_select_args *)args);
    if (verb == KVP_GATHER) return 0;
    if (verb == KVP_SHARE) return kvpi_share_cuda_workspace((const kvp_share_args *)args);
    if (verb == KVP_EXPECT) return kvpi_expect_cuda_workspace((const kvp_expect_args *)args);
    const kvp_score_args *score = (const kvp_score_args *)args;
    return score_workspace_table[score->scorer](score);
}

extern "C" const kvp_backend *kvp_cuda_backend(void) {
    static const kvp_backend backend = {
        KVP_ABI_VERSION,
        KVP_CUDA,
        score_table,
        on_its_device<kvp_select_args, kvpi_select_cuda>,
        on_its_device<kvp_gather_args, kvpi_gather_cuda>,
        on_its_device<kvp_share_args, kvpi_share_cuda>,
        workspace_of,
        on_its_device<kvp_expect_args, kvpi_expect_cuda>,
        press,
    };
    return &backend;
}

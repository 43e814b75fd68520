/* SPDX-License-Identifier: Apache-2.0
 *
 * The CPU backend: one constant table. Every line of scorers.def must name a function here, or the core does not link.
 */
#include "../evict/evict.h"
#include "../score/expected/expected.h"
#include "../score/score.h"
#include "../select/select.h"

static kvp_status (*const score_table[KVPI_SCORER_COUNT])(const kvp_score_args *, kvp_context *) = {
#define KVP_PARAM(scorer, name, initial)
#define KVP_SCORER(name, needs, params) [KVPI_SCORER_##name] = kvpi_score_##name##_cpu,
#include "../scorers.def"
#undef KVP_SCORER
#undef KVP_PARAM
};

static size_t workspace_of(kvp_verb verb, const void *args, int32_t n_worker) {
    switch (verb) {
    case KVP_SCORE: {
        const kvp_score_args *score = args;
        const kvpi_scorer_traits *traits = kvpi_scorer_at(score->scorer)->traits;
        return traits->workspace ? traits->workspace(score, n_worker) : 0;
    }
    case KVP_SELECT: return kvpi_select_workspace(args) * (size_t)n_worker;
    case KVP_SHARE: return kvpi_share_workspace(args);
    case KVP_EXPECT: return kvpi_expect_workspace(args, n_worker);
    case KVP_GATHER:
    case KVP_PRESS: return 0; /* the core asks for its parts */
    }
    return 0;
}

const kvp_backend kvpi_cpu_backend = {
    .abi = KVP_ABI_VERSION,
    .device = KVP_CPU,
    .score = score_table,
    .select = kvpi_select_cpu,
    .gather = kvpi_gather_cpu,
    .share = kvpi_share_cpu,
    .workspace = workspace_of,
    .expect = kvpi_expect_cpu,
};

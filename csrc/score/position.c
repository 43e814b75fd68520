/* SPDX-License-Identifier: Apache-2.0
 *
 * StreamingLLM: keep the first n_sink tokens, which many heads use as attention sinks, and the newest ones (arXiv
 * 2309.17453). Scores are whole numbers that float32 holds exactly: 2T - k for a sink, k for the others.
 */
#include "score.h"

#include <math.h>

static kvp_status check_params(const double *param, int64_t n_token, kvp_context *ctx) {
    if (n_token > 1 << 23)
        return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED, "T is %lld in keys; the scorer \"position\" tells at most %d apart",
                         (long long)n_token, 1 << 23);
    return kvpi_check_whole(param[KVPI_PARAM_position_n_sink], "n_sink", 0, INT32_MAX, ctx);
}

const kvpi_scorer_traits kvpi_position_traits = {check_params, NULL};

kvp_status kvpi_score_position_cpu(const kvp_score_args *args, kvp_context *ctx) {
    (void)ctx;
    const kvp_tensor *scores = &args->scores;
    const int64_t n_token = scores->shape[2];
    const double n_sink = args->param[KVPI_PARAM_position_n_sink];
    for (int64_t b = 0; b < scores->shape[0]; b++) {
        int64_t begin, end;
        kvpi_valid_range(&args->valid, b, n_token, &begin, &end);
        const int64_t sink_end = n_sink < (double)(end - begin) ? begin + (int64_t)n_sink : end,
                      step = scores->stride[2];
        for (int64_t h = 0; h < scores->shape[1]; h++) {
            float *out = (float *)(void *)kvpi_at(scores, b, h, 0);
            for (int64_t t = 0; t < begin; t++) out[t * step] = -INFINITY;
            for (int64_t t = begin; t < sink_end; t++) out[t * step] = (float)(2 * n_token - t);
            for (int64_t t = sink_end; t < end; t++) out[t * step] = (float)t;
            for (int64_t t = end; t < n_token; t++) out[t * step] = -INFINITY;
        }
    }
    return KVP_OK;
}

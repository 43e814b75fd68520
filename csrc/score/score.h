/* SPDX-License-Identifier: Apache-2.0
 *
 * What each scorer of scorers.def offers the backends: score/NAME.c (or score/NAME/) the first, with its traits,
 * score/NAME.cu the others.
 */
#ifndef KVP_SCORE_H
#define KVP_SCORE_H

#include "../core/internal.h"

#define KVP_PARAM(scorer, name, initial)
#define KVP_SCORER(name, needs, params)                                                \
    kvp_status kvpi_score_##name##_cpu(const kvp_score_args *args, kvp_context *ctx);  \
    kvp_status kvpi_score_##name##_cuda(const kvp_score_args *args, kvp_context *ctx); \
    size_t kvpi_score_##name##_cuda_workspace(const kvp_score_args *args);
#include "../scorers.def"
#undef KVP_SCORER
#undef KVP_PARAM

#endif

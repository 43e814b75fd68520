/* SPDX-License-Identifier: Apache-2.0
 *
 * What the scorers offer the backends.
 */
#ifndef KVP_SCORE_H
#define KVP_SCORE_H

#include "../core/internal.h"

kvp_status kvpi_score_norm_cpu(const kvp_score_args *args, kvp_context *ctx);
kvp_status kvpi_score_position_cpu(const kvp_score_args *args, kvp_context *ctx);
kvp_status kvpi_score_attention_cpu(const kvp_score_args *args, kvp_context *ctx);
size_t kvpi_score_attention_workspace(const kvp_score_args *args, int32_t n_worker);

kvp_status kvpi_score_norm_cuda(const kvp_score_args *args, kvp_context *ctx);
kvp_status kvpi_score_position_cuda(const kvp_score_args *args, kvp_context *ctx);
kvp_status kvpi_score_attention_cuda(const kvp_score_args *args, kvp_context *ctx);
size_t kvpi_score_attention_cuda_workspace(const kvp_score_args *args);

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * What eviction offers the backends.
 */
#ifndef KVP_EVICT_H
#define KVP_EVICT_H

#include "../core/internal.h"

kvp_status kvpi_gather_cpu(const kvp_gather_args *args, kvp_context *ctx);
kvp_status kvpi_gather_cuda(const kvp_gather_args *args, kvp_context *ctx);

/* press.cu: selection and gathering of what is selected, by one kernel where that is faster; scores that it can make as
 * it selects are not written. */
typedef kvp_status kvpi_score_fn(const kvp_score_args *args, kvp_context *ctx);
kvp_status kvpi_press_cuda(const kvp_score_args *score, const kvp_select_args *select, const kvp_gather_args *gather,
                           kvpi_score_fn *write_scores, kvp_context *ctx);

#endif

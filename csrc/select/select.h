/* SPDX-License-Identifier: Apache-2.0
 *
 * What selection offers the backends: which positions a head keeps (topk.c), and how many each (share.c).
 */
#ifndef KVP_SELECT_H
#define KVP_SELECT_H

#include "../core/internal.h"

kvp_status kvpi_select_cpu(const kvp_select_args *args, kvp_context *ctx);
size_t kvpi_select_workspace(const kvp_select_args *args); /* of one worker */

kvp_status kvpi_select_cuda(const kvp_select_args *args, kvp_context *ctx);
size_t kvpi_select_cuda_workspace(const kvp_select_args *args);

kvp_status kvpi_share_cpu(const kvp_share_args *args, kvp_context *ctx);
size_t kvpi_share_workspace(const kvp_share_args *args); /* of all workers */

kvp_status kvpi_share_cuda(const kvp_share_args *args, kvp_context *ctx);
size_t kvpi_share_cuda_workspace(const kvp_share_args *args);

#endif

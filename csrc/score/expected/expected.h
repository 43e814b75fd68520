/* SPDX-License-Identifier: Apache-2.0
 *
 * What the verb expect offers the backends.
 */
#ifndef KVP_EXPECTED_H
#define KVP_EXPECTED_H

#include "../../core/internal.h"

kvp_status kvpi_expect_cpu(const kvp_expect_args *args, kvp_context *ctx);
size_t kvpi_expect_workspace(const kvp_expect_args *args, int32_t n_worker);
kvp_status kvpi_expect_cuda(const kvp_expect_args *args, kvp_context *ctx);
size_t kvpi_expect_cuda_workspace(const kvp_expect_args *args);

#endif

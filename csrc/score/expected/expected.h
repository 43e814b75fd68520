/* SPDX-License-Identifier: Apache-2.0
 *
 * What the verb expect offers the backends. It has no file for the CPU, where torch's own products are as fast.
 */
#ifndef KVP_EXPECTED_H
#define KVP_EXPECTED_H

#include "../../core/internal.h"

kvp_status kvpi_expect_cuda(const kvp_expect_args *args, kvp_context *ctx);
size_t kvpi_expect_cuda_workspace(const kvp_expect_args *args);

#endif

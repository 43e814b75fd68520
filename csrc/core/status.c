/* SPDX-License-Identifier: Apache-2.0
 *
 * Names of the statuses, and the one function that writes an error text.
 */
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>

const char *kvp_status_name(kvp_status status) {
    switch (status) {
    case KVP_OK: return "ok";
    case KVP_ERR_SHAPE: return "shape";
    case KVP_ERR_DTYPE: return "dtype";
    case KVP_ERR_DEVICE: return "device";
    case KVP_ERR_VALUE: return "value";
    case KVP_ERR_UNSUPPORTED: return "unsupported";
    case KVP_ERR_WORKSPACE: return "workspace";
    case KVP_ERR_CUDA: return "cuda";
    case KVP_ERR_INTERNAL: return "internal";
    }
    return "unknown";
}

kvp_status kvpi_fail(kvp_context *ctx, kvp_status status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(ctx->error, sizeof ctx->error, format, list);
    va_end(list);
    return status;
}

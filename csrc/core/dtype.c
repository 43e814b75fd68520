/* SPDX-License-Identifier: Apache-2.0
 *
 * Name and size of each element type.
 */
#include "internal.h"

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [KVP_F32] = {"float32", 4}, [KVP_F16] = {"float16", 2}, [KVP_BF16] = {"bfloat16", 2},
    [KVP_I32] = {"int32", 4},   [KVP_U8] = {"uint8", 1},
};

static bool known(int32_t dtype) { return dtype >= 0 && dtype < (int32_t)(sizeof dtypes / sizeof dtypes[0]); }

const char *kvpi_dtype_name(int32_t dtype) { return known(dtype) ? dtypes[dtype].name : "unknown"; }

size_t kvpi_dtype_size(int32_t dtype) { return known(dtype) ? dtypes[dtype].size : 0; }

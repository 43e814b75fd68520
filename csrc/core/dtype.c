/* SPDX-License-Identifier: Apache-2.0
 *
 * Name and size of each element type.
 */
#include "internal.h"

static const struct {
    const char *name;
    size_t size;
    bool is_float;
} dtypes[] = {
#define KVP_FLOAT(constant, name, kind, bits) [KVP_##constant] = {name, (bits) / 8, true},
#define KVP_DTYPE(constant, name, kind, bits) [KVP_##constant] = {name, (bits) / 8, false},
#include "../dtypes.def"
#undef KVP_FLOAT
#undef KVP_DTYPE
};

static bool known(int32_t dtype) { return dtype >= 0 && dtype < (int32_t)(sizeof dtypes / sizeof dtypes[0]); }

const char *kvpi_dtype_name(int32_t dtype) { return known(dtype) ? dtypes[dtype].name : "unknown"; }

size_t kvpi_dtype_size(int32_t dtype) { return known(dtype) ? dtypes[dtype].size : 0; }

bool kvpi_is_float(int32_t dtype) { return known(dtype) && dtypes[dtype].is_float; }

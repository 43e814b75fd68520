/* SPDX-License-Identifier: Apache-2.0
 *
 * Which table of row primitives is in use.
 */
#include "rows.h"

#include <stdatomic.h>
#include <string.h>

static const kvpi_rows *const tables[] = {&kvpi_rows_scalar};
enum { TABLE_COUNT = sizeof tables / sizeof tables[0] };

static _Atomic(const kvpi_rows *) in_use = &kvpi_rows_scalar;

const kvpi_rows *kvpi_rows_now(void) { return atomic_load_explicit(&in_use, memory_order_relaxed); }

const char *kvp_cpu_isa(void) { return kvpi_rows_now()->name; }

const char *kvp_cpu_isa_name(int32_t index) { return index >= 0 && index < TABLE_COUNT ? tables[index]->name : NULL; }

int32_t kvp_cpu_isa_set(const char *name) {
    for (int i = 0; i < TABLE_COUNT; i++) {
        if (strcmp(tables[i]->name, name) != 0) continue;
        atomic_store(&in_use, tables[i]);
        return 0;
    }
    return -1;
}

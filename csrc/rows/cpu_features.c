/* SPDX-License-Identifier: Apache-2.0
 *
 * Which table of row primitives is in use: the fastest that this CPU can run, until another is set. Compiled with
 * -DKVP_ISA=NAME, say -DKVP_ISA=scalar, there is only that one.
 */
#include "rows.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

/* What it needs of the operating system, AVX and AVX2 need too, and the compiler's check of those sees to it. */
bool kvpi_has_f16c(void) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C;
}
#endif

#ifdef KVP_ISA
#define TABLE(name) kvpi_rows_##name
#define NAMED_TABLE(name) TABLE(name)
static const kvpi_rows *const tables[] = {&NAMED_TABLE(KVP_ISA)};
#else
static const kvpi_rows *const tables[] = {
    &kvpi_rows_scalar, /* then each faster than the one before, where it is_fast */
#if defined(__x86_64__)
    &kvpi_rows_avx2,   &kvpi_rows_avx512, &kvpi_rows_avx512_bf16,
#ifdef KVPI_HAS_AMX
    &kvpi_rows_amx,
#endif
#elif defined(__aarch64__)
    &kvpi_rows_neon,
#endif
};
#endif
enum { TABLE_COUNT = sizeof tables / sizeof tables[0] };

/* On Intel's processors the product of bfloat16 pairs does not pay: H2O of 2048 and 4096 tokens, 32/8/128, takes 1.44
 * times as long by avx512_bf16 as by avx512 (an Intel Xeon with AMX, one core). On AMD's it does since Zen 4. */
static bool is_fast(const kvpi_rows *table) {
#if defined(__x86_64__)
    if (strcmp(table->name, "avx512_bf16") == 0) return !__builtin_cpu_is("intel");
#endif
    (void)table;
    return true;
}

static _Atomic(const kvpi_rows *) in_use; /* NULL until first asked for; two threads that choose at once choose alike */

const kvpi_rows *kvpi_rows_now(void) {
    const kvpi_rows *now = atomic_load_explicit(&in_use, memory_order_relaxed);
    if (now) return now;
    int best = TABLE_COUNT - 1;
    while (best > 0 && !(tables[best]->is_available() && is_fast(tables[best]))) best--;
    atomic_store(&in_use, tables[best]);
    return tables[best];
}

const char *kvp_cpu_isa(void) { return kvpi_rows_now()->name; }

const char *kvp_cpu_isa_name(int32_t index) { return index >= 0 && index < TABLE_COUNT ? tables[index]->name : NULL; }

int32_t kvp_cpu_isa_set(const char *name) {
    for (int i = 0; name && i < TABLE_COUNT; i++) {
        if (strcmp(tables[i]->name, name) != 0) continue;
        if (!tables[i]->is_available()) return -1;
        atomic_store(&in_use, tables[i]);
        return 0;
    }
    return -1;
}

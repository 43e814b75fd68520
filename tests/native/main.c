/* SPDX-License-Identifier: Apache-2.0
 *
 * The core against oracles, without Python. Exit code 1 if any check failed.
 */
#include "harness.h"
#include "tests.h"

#include <stdio.h>
#include <time.h>

static void run(const char *name, void (*test)(void)) {
    struct timespec start, end;
    timespec_get(&start, TIME_UTC);
    name_case("%s", name);
    seed_random(1);
    test();
    timespec_get(&end, TIME_UTC);
    printf("%-24s %7.2f s\n", name, (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec));
    fflush(stdout);
}

static void run_on_rows(void) {
    run("norm", test_norm);
    run("position", test_position);
    run("attention", test_attention);
    run("attention sums", test_attention_sums);
    run("same bits", test_same_bits);
    run("select", test_select);
    run("gather, large", test_gather_large);
    run("gather in place", test_gather_in_place);
}

int main(void) {
    for (int32_t i = 0; kvp_cpu_isa_name(i); i++) {
        const char *name = kvp_cpu_isa_name(i);
        const bool can_run = kvp_cpu_isa_set(name) == 0;
        printf("row primitives: %s%s\n", name, can_run ? "" : " (not on this CPU)");
        if (can_run) run_on_rows();
    }
    run("gather", test_gather);
    run("refusals", test_refusals);
    run("introspection", test_introspection);
    run("register backend", test_register_backend);
    return report_checks();
}

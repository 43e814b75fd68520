/* SPDX-License-Identifier: Apache-2.0
 *
 * The core against oracles, without Python. Exit code 1 if any check failed. Arguments, if any, name the only tests to
 * run; the environment variable KVP_ISA the only row primitives.
 */
#include "harness.h"
#include "tests.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static char **wanted; /* ends with NULL; empty = all */

static bool is_wanted(const char *name) {
    for (char **one = wanted; *one; one++)
        if (strcmp(*one, name) == 0) return true;
    return !*wanted;
}

static void run(const char *name, void (*test)(void)) {
    struct timespec start, end;
    if (!is_wanted(name)) return;
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
    run("random", test_random);
    run("keydiff", test_keydiff);
    run("lagkv", test_lagkv);
    run("expect", test_expect);
    run("attention", test_attention);
    run("attention sums", test_attention_sums);
    run("attention shifts", test_shifts);
    run("attention layouts", test_layouts);
    run("broken keys", test_broken_keys);
    run("the most", test_most);
    run("same bits", test_same_bits);
    run("floating", test_floating);
    run("select", test_select);
    run("share", test_share);
    run("gather, large", test_gather_large);
    run("gather in place", test_gather_in_place);
    run("press", test_press);
}

int main(int argc, char **argv) {
    const char *isa = getenv("KVP_ISA");
    wanted = argv + (argc > 0);
    for (int32_t i = 0; kvp_cpu_isa_name(i); i++) {
        const char *name = kvp_cpu_isa_name(i);
        if (isa && isa[0] && strcmp(isa, name) != 0) continue;
        const bool can_run = kvp_cpu_isa_set(name) == 0;
        printf("row primitives: %s%s\n", name, can_run ? "" : " (not on this CPU)");
        if (can_run) run_on_rows();
    }
    run("band", test_band);
    run("gather", test_gather);
    run("refusals", test_refusals);
    run("expect refusals", test_expect_refusals);
    run("introspection", test_introspection);
    run("corpus", test_corpus);
    run("register backend", test_register_backend);
    run("press of a backend", test_press_of_a_backend);
    if (passed_checks() == 0) printf("no such test, or no such row primitives\n");
    return report_checks() || passed_checks() == 0;
}

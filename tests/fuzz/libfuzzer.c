/* SPDX-License-Identifier: Apache-2.0
 *
 * libFuzzer's two entries. The environment variable KVP_FUZZ names the target. The first failed check ends the process,
 * and leaves its input.
 */
#include "producer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const fuzz_target *target = FUZZ_TARGETS;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const char *name = getenv("KVP_FUZZ");
    (void)argc, (void)argv;
    while (target->name && (!name || strcmp(name, target->name) != 0)) target++;
    if (target->name) return 0;
    fprintf(stderr, "KVP_FUZZ is %s; expected score, select, share, gather or contract\n", name ? name : "not set");
    exit(2);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    target->run(data, size);
    if (failed_checks() == 0) return 0;
    report_checks();
    fflush(stdout);
    abort();
}

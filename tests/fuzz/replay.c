/* SPDX-License-Identifier: Apache-2.0
 *
 * The corpus without libFuzzer: every file of tests/fuzz/corpus/TARGET through its target. Part of the native tests, so
 * that it runs with every compiler, sanitizer and machine that they run on.
 */
#include "../native/tests.h"
#include "producer.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>

enum { LARGEST = 1 << 16 };
static const char FOLDER[] = "tests/fuzz/corpus"; /* from the root of the repository */

static void replay_file(const fuzz_target *target, const char *folder, const char *name) {
    static unsigned char data[LARGEST];
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!CHECK(file, "%s cannot be opened", path)) return;
    const size_t size = fread(data, 1, sizeof data, file);
    CHECK(size < LARGEST, "%s is too long", path);
    fclose(file);
    /* an exact copy, so that the sanitizer sees a read behind its end */
    block exact = new_block(size);
    for (size_t i = 0; i < size; i++) exact.data[i] = data[i];
    const int64_t failed = failed_checks();
    target->run(exact.data, size);
    if (failed_checks() > failed) printf("in %s\n", path);
    free_block(&exact);
}

void test_corpus(void) {
    for (const fuzz_target *target = FUZZ_TARGETS; target->name; target++) {
        char folder[256];
        int n_file = 0;
        snprintf(folder, sizeof folder, "%s/%s", FOLDER, target->name);
        DIR *list = opendir(folder);
        if (!CHECK(list, "%s cannot be read; the tests run in the root of the repository", folder)) continue;
        for (const struct dirent *entry; (entry = readdir(list));) {
            if (entry->d_name[0] == '.') continue;
            replay_file(target, folder, entry->d_name);
            n_file++;
        }
        closedir(list);
        CHECK(n_file > 10, "%s holds %d files", folder, n_file);
    }
}

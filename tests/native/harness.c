/* SPDX-License-Identifier: Apache-2.0
 *
 * Checks, random numbers, guarded memory and calls.
 */
#include "harness.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__has_feature) /* Clang's way to say it */
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

enum { GUARD_BYTES = 64, GUARD_VALUE = 0xa5, PRINTED_FAILURES = 40 };

static long long n_passed, n_failed;
static char case_name[256];
static uint64_t random_state = 1;

bool count_check(bool ok, const char *file, int line, const char *format, ...) {
    if (ok) {
        n_passed++;
        return true;
    }
    if (n_failed++ < PRINTED_FAILURES) {
        va_list list;
        va_start(list, format);
        printf("%s:%d: [%s] ", file, line, case_name);
        vprintf(format, list);
        printf("\n");
        fflush(stdout); /* also if the next call ends the process */
        va_end(list);
    }
    return false;
}

void name_case(const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(case_name, sizeof case_name, format, list);
    va_end(list);
}

int report_checks(void) {
    if (n_failed > PRINTED_FAILURES) printf("... and %lld more\n", n_failed - PRINTED_FAILURES);
    printf("%lld passed, %lld failed\n", n_passed, n_failed);
    return n_failed > 0;
}

int64_t passed_checks(void) { return n_passed; }

int64_t failed_checks(void) { return n_failed; }

void seed_random(uint64_t seed) { random_state = seed; }

/* splitmix64 */
uint64_t random_bits(void) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

int64_t random_below(int64_t n) { return (int64_t)(random_bits() % (uint64_t)n); }

int64_t random_dim(int64_t most) { return random_below(3) ? 1 + random_below(most) : 32 * (1 + random_below(4)); }

/* Twelve uniform numbers have the variance 1. Not Box-Muller: logarithms and cosines differ between machines. Summed as
 * whole numbers, of which an emulator does many more in a second than of floats. */
double random_normal(void) {
    uint64_t sum = 0;
    for (int i = 0; i < 12; i++) sum += random_bits() >> 11;
    return (double)sum * 0x1p-53 - 6;
}

static size_t padded_bytes(size_t bytes) { return (bytes + GUARD_BYTES - 1) / GUARD_BYTES * GUARD_BYTES; }

/* The guard behind the data starts at its very last byte, so that an overrun by one byte is seen. */
static size_t tail_bytes(const block *b) { return padded_bytes(b->bytes) - b->bytes + GUARD_BYTES; }

static void close_guards(const block *b) {
    ASAN_POISON_MEMORY_REGION(b->data - GUARD_BYTES, GUARD_BYTES);
    ASAN_POISON_MEMORY_REGION(b->data + b->bytes, tail_bytes(b));
}

static void open_guards(const block *b) {
    ASAN_UNPOISON_MEMORY_REGION(b->data - GUARD_BYTES, GUARD_BYTES);
    ASAN_UNPOISON_MEMORY_REGION(b->data + b->bytes, tail_bytes(b));
}

block new_block(size_t bytes) {
    unsigned char *base = aligned_alloc(GUARD_BYTES, padded_bytes(bytes) + 2 * GUARD_BYTES);
    if (!base) {
        fprintf(stderr, "out of memory\n");
        exit(2);
    }
    const block b = {base + GUARD_BYTES, bytes};
    memset(base, GUARD_VALUE, padded_bytes(bytes) + 2 * GUARD_BYTES);
    close_guards(&b);
    return b;
}

void check_guards(const block *b) {
    size_t broken = 0;
    open_guards(b);
    for (size_t i = 0; i < GUARD_BYTES; i++) broken += b->data[(ptrdiff_t)i - GUARD_BYTES] != GUARD_VALUE;
    for (size_t i = 0; i < tail_bytes(b); i++) broken += b->data[b->bytes + i] != GUARD_VALUE;
    close_guards(b);
    CHECK(broken == 0, "%zu guard bytes around a block of %zu bytes were written", broken, b->bytes);
}

void free_block(block *b) {
    if (!b->data) return;
    check_guards(b);
    open_guards(b);
    free(b->data - GUARD_BYTES);
    *b = (block){0};
}

/* FNV-1a, of words of eight bytes and of the bytes that are left */
uint64_t hash_block(const block *b) {
    uint64_t hash = 0xcbf29ce484222325u, word;
    size_t i = 0;
    for (; i + sizeof word <= b->bytes; i += sizeof word) {
        memcpy(&word, b->data + i, sizeof word);
        hash = (hash ^ word) * 0x100000001b3u;
    }
    for (; i < b->bytes; i++) hash = (hash ^ b->data[i]) * 0x100000001b3u;
    return hash;
}

kvp_status call_verb(kvp_verb verb, const void *args, calling how) {
    size_t bytes = SIZE_MAX;
    const kvp_status asked = kvp_workspace(verb, args, how.n_worker, &bytes);
    if (!CHECK(asked == KVP_OK, "kvp_workspace: %s", kvp_status_name(asked))) return asked;
    CHECK(bytes % 64 == 0, "the workspace is %zu bytes; expected a multiple of 64", bytes);
    block scratch = new_block(bytes);
    memset(scratch.data, how.scratch_byte, scratch.bytes);
    kvp_context ctx = {.workspace = scratch.bytes ? scratch.data : NULL, .workspace_bytes = scratch.bytes};
    ctx.parallel_for = how.parallel_for;
    ctx.n_worker = how.n_worker;
    kvp_status status = KVP_ERR_VALUE;
    switch (verb) {
    case KVP_SCORE: status = kvp_score(args, &ctx); break;
    case KVP_SELECT: status = kvp_select(args, &ctx); break;
    case KVP_GATHER: status = kvp_gather(args, &ctx); break;
    case KVP_PRESS: status = kvp_press(args, &ctx); break;
    case KVP_SHARE: status = kvp_share(args, &ctx); break;
    case KVP_EXPECT: status = kvp_expect(args, &ctx); break;
    }
    CHECK(status == KVP_OK, "%s: %s", kvp_status_name(status), ctx.error);
    free_block(&scratch);
    return status;
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * Bytes as tensors that claim anything, for the checker alone: it must read none of them, refuse each that has a flaw,
 * and pass each that nothing was done to.
 */
#include "producer.h"

#include "core/internal.h"

#include <string.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

/* Addresses that nobody may read, each argument's in a part of its own. */
enum { PART = 1 << 16 };
static _Alignas(64) unsigned char nothing[MAX_ARGUMENTS * PART];

static kvp_status check(const call *c, kvp_context *ctx) {
    if (c->verb == KVP_SCORE) return kvpi_check_score(c->args, ctx);
    return c->verb == KVP_SELECT ? kvpi_check_select(c->args, ctx) : kvpi_check_gather(c->args, ctx);
}

static void check_tensors(call *c, int64_t *sizes) {
    kvp_context ctx = {0};
    draw_tensors(c, sizes);
    for (int i = 0; i < c->n_argument; i++) c->arguments[i].shift = i * PART;
    spoil_tensors(c, 6);
    for (int i = 0; i < c->n_argument; i++) {
        argument *a = &c->arguments[i];
        a->tensor->data = a->given ? nothing + a->shift : NULL;
    }
    const kvp_status status = check(c, &ctx);
    size_t need = 0;
    const char *flaw = find_flaw(c);
    const kvp_status asked = kvp_workspace(c->verb, c->args, 1 + (int32_t)take(c->in, 1 << 17), &need);
    if (status == KVP_OK && asked == KVP_ERR_DEVICE)
        return; /* all on a device without a backend, which the checker leaves to its caller */
    CHECK(status != KVP_OK || !flaw, "accepted although %s", flaw ? flaw : "");
    CHECK(status == KVP_OK || c->spoilt, "refused: %s", ctx.error);
    CHECK(status == KVP_OK || strlen(ctx.error) > 10, "no error sentence");
    CHECK(status == KVP_OK ? asked == KVP_OK || asked == KVP_ERR_VALUE : asked == status, "kvp_workspace: %s",
          kvp_status_name(asked));
    CHECK(need < (size_t)1 << 62 && need % 64 == 0, "%zu bytes of scratch", need);
}

static void check_score(input *in, int64_t *sizes) {
    kvp_score_args args = {.size = sizeof(kvp_score_args), .scorer = (int32_t)take(in, kvp_scorer_count())};
    for (int32_t p = 0; kvp_scorer_param(args.scorer, p); p++) args.param[p] = kvp_scorer_param_default(args.scorer, p);
    argument arguments[MAX_ARGUMENTS];
    call c = {.verb = KVP_SCORE,
              .args = &args,
              .arguments = arguments,
              .n_argument = list_score_arguments(&args, arguments),
              .in = in};
    check_tensors(&c, sizes);
}

static void check_select(input *in, int64_t *sizes) {
    kvp_select_args args = {.size = sizeof(kvp_select_args)};
    argument arguments[MAX_ARGUMENTS];
    call c = {.verb = KVP_SELECT,
              .args = &args,
              .arguments = arguments,
              .n_argument = list_select_arguments(&args, arguments),
              .in = in};
    check_tensors(&c, sizes);
}

static void check_gather(input *in, int64_t *sizes) {
    kvp_gather_args args = {.size = sizeof(kvp_gather_args)};
    argument arguments[MAX_ARGUMENTS];
    call c = {.verb = KVP_GATHER,
              .args = &args,
              .arguments = arguments,
              .n_argument = list_gather_arguments(&args, arguments),
              .in = in};
    check_tensors(&c, sizes);
}

int fuzz_contract(const uint8_t *data, size_t size) {
    input in = {data, size};
    int64_t sizes[128] = {0};
#ifdef ASAN_POISON_MEMORY_REGION
    ASAN_POISON_MEMORY_REGION(nothing, sizeof nothing);
#endif
    name_case("fuzz contract");
    for (const char *letter = "BHTDCQVSK"; *letter; letter++) sizes[(unsigned char)*letter] = 1 + take(&in, 5);
    sizes['Q'] = 1 + take(&in, sizes['T']);
    sizes['N'] = sizes['H'] * (1 + take(&in, 3));
    sizes['E'] = sizes['S'] + 1;
    sizes['F'] = KVP_VOTE_FIELDS;
    sizes['R'] = 2;
    const int64_t verb = take(&in, 3);
    if (verb == 0)
        check_score(&in, sizes);
    else if (verb == 1)
        check_select(&in, sizes);
    else
        check_gather(&in, sizes);
    return 0;
}

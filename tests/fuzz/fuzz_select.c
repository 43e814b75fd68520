/* SPDX-License-Identifier: Apache-2.0
 *
 * Bytes as calls of kvp_select, against the quadratic oracle: equal exactly.
 */
#include "oracle.h"
#include "producer.h"

#include <stdlib.h>

enum { SCORES, SEGMENTS, QUOTAS, PROTECT, VALID, POSITIONS, COUNTS };

static void verify(const call *c) {
    const kvp_select_args *args = c->args;
    int32_t *expected = malloc((size_t)(args->positions.shape[2] + args->scores.shape[2]) * sizeof *expected);
    if (!expected) abort();
    for (int64_t b = 0; b < args->scores.shape[0]; b++)
        for (int64_t h = 0; h < args->scores.shape[1]; h++) {
            const int64_t count = exact_select(args, b, h, expected);
            CHECK(get(&args->counts, b, h, 0, 0) == (double)count, "row %lld,%lld counts %g; expected %lld",
                  (long long)b, (long long)h, get(&args->counts, b, h, 0, 0), (long long)count);
            for (int64_t i = 0; i < args->positions.shape[2]; i++)
                CHECK(get(&args->positions, b, h, i, 0) == expected[i], "position %lld of row %lld,%lld", (long long)i,
                      (long long)b, (long long)h);
        }
    free(expected);
}

/* Edges that ascend inside the row, or, if wild, any number at all. */
static void fill_segments(call *c, const kvp_tensor *t, int64_t n_token, bool wild) {
    for (int64_t b = 0; b < t->shape[0]; b++) {
        int64_t edge = 0;
        for (int64_t e = 0; e < t->shape[1]; e++) {
            edge += take(c->in, n_token - edge + 1);
            set(t, b, e, 0, 0, (double)(wild && take(c->in, 4) == 0 ? take(c->in, 1 << 16) - 300 : edge));
        }
    }
}

/* Quotas that sum to at most K, or, if wild, any number at all. */
static void fill_quotas(call *c, const kvp_tensor *t, int64_t room, bool wild) {
    static const double odd[] = {-1, INT32_MAX, INT32_MIN, 1 << 20};
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++) {
            int64_t left = room;
            for (int64_t s = 0; s < t->shape[2]; s++) {
                const int64_t quota = take(c->in, left + 1);
                left -= quota;
                set(t, b, h, s, 0, wild && take(c->in, 4) == 0 ? odd[take(c->in, 4)] : (double)quota);
            }
        }
}

static void fill_protect(call *c, const kvp_tensor *t) {
    const int64_t one_in = 1 + take(c->in, 8);
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t k = 0; k < t->shape[1]; k++)
            set(t, b, k, 0, 0, (double)(random_below(one_in) ? 0 : 1 + random_below(255)));
}

static void fill_valid_ranges(call *c, const kvp_tensor *t, int64_t n_token, bool wild) {
    for (int64_t b = 0; b < t->shape[0] && t->shape[1] == 2; b++) {
        const int64_t begin = take(c->in, n_token + 1), end = begin + take(c->in, n_token - begin + 1);
        set(t, b, 0, 0, 0, (double)(begin - (wild && take(c->in, 4) == 0)));
        set(t, b, 1, 0, 0, (double)(end + (wild ? take(c->in, 3) - 1 : 0)));
    }
}

/* A broadcast table has more indices than elements: what was written last counts, and may not be what was meant. */
static bool is_broadcast(const argument *a) {
    for (int d = 0; d < a->tensor->ndim; d++)
        if (a->given && a->tensor->shape[d] > 1 && a->tensor->stride[d] == 0) return true;
    return false;
}

static void fill(call *c, int64_t n_token, int64_t room) {
    argument *a = c->arguments;
    const bool wild = take(c->in, 8) == 0;
    if (wild) c->spoilt = true;
    for (int i = SEGMENTS; i <= VALID; i++)
        if (is_broadcast(&a[i])) c->spoilt = true;
    if (is_usable(&a[SEGMENTS])) fill_segments(c, a[SEGMENTS].tensor, n_token, wild);
    if (is_usable(&a[QUOTAS])) fill_quotas(c, a[QUOTAS].tensor, room, wild);
    if (is_usable(&a[PROTECT])) fill_protect(c, a[PROTECT].tensor);
    if (is_usable(&a[VALID])) fill_valid_ranges(c, a[VALID].tensor, n_token, wild);
    fill_values(c, SCORES, take(c->in, 4) > 0);
}

int fuzz_select(const uint8_t *data, size_t size) {
    input in = {data, size};
    kvp_select_args args = {.size = sizeof(kvp_select_args)};
    argument arguments[MAX_ARGUMENTS];
    call c = {.verb = KVP_SELECT,
              .args = &args,
              .arguments = arguments,
              .n_argument = list_select_arguments(&args, arguments),
              .in = &in};
    int64_t sizes[128] = {0};
    seed_random((uint64_t)take(&in, 1 << 16));
    const bool is_long = take(&in, 64) == 63; /* the oracle is quadratic */
    sizes['B'] = is_long ? 1 : 1 + take(&in, 2);
    sizes['H'] = is_long ? 1 : 1 + take(&in, 3);
    sizes['T'] = 1 + (is_long ? take(&in, 1100) : take(&in, 40));
    sizes['K'] = 1 + take(&in, sizes['T'] + 3);
    sizes['S'] = 1 + take(&in, 5);
    sizes['E'] = sizes['S'] + 1;
    sizes['R'] = 2;
    draw_tensors(&c, sizes);
    if (take(&in, 3) == 0) spoil_tensors(&c, 3);
    place_tensors(&c);
    fill(&c, sizes['T'], sizes['K']);
    name_case("fuzz select B=%lld H=%lld T=%lld K=%lld S=%lld", (long long)sizes['B'], (long long)sizes['H'],
              (long long)sizes['T'], (long long)sizes['K'], (long long)sizes['S']);
    run_call(&c, true, verify);
    free_tensors(&c);
    return 0;
}

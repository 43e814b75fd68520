/* SPDX-License-Identifier: Apache-2.0
 *
 * Bytes as calls of kvp_share, against the oracle that sorts: equal exactly.
 */
#include "oracle.h"
#include "producer.h"

enum { SCORES, SEGMENTS, QUOTAS, FLOORS, COUNTS, MOST_HEADS = 4 };

static void verify(const call *c) {
    const kvp_share_args *args = c->args;
    for (int64_t b = 0; b < args->quotas.shape[0]; b++)
        for (int64_t s = 0; s < args->quotas.shape[2]; s++) {
            int64_t expected[MOST_HEADS + 1];
            if (args->quotas.shape[1] > MOST_HEADS) return; /* spoilt, and accepted */
            exact_share(args, b, s, expected);
            for (int64_t h = 0; h < args->quotas.shape[1]; h++)
                CHECK(get(&args->counts, b, h, s, 0) == (double)expected[h],
                      "head %lld of row %lld has %g; expected %lld", (long long)h, (long long)b,
                      get(&args->counts, b, h, s, 0), (long long)expected[h]);
        }
}

/* Edges that ascend inside the row, or, if wild, any number at all. */
static void fill_edges(call *c, const kvp_tensor *t, int64_t n_token, bool wild) {
    for (int64_t b = 0; b < t->shape[0]; b++) {
        int64_t edge = 0;
        for (int64_t e = 0; e < t->shape[1]; e++) {
            edge += take(c->in, n_token - edge + 1);
            set(t, b, e, 0, 0, (double)(wild && take(c->in, 4) == 0 ? take(c->in, 1 << 16) - 300 : edge));
        }
    }
}

/* Quotas of any size, and floors up to them; or, if wild, any number at all. */
static void fill_numbers(call *c, const kvp_tensor *t, const kvp_tensor *quotas, int64_t n_token, bool wild) {
    static const double odd[] = {-1, INT32_MAX, INT32_MIN, 1 << 20};
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++)
            for (int64_t s = 0; s < t->shape[2]; s++) {
                const int64_t most = quotas ? (int64_t)get(quotas, b, h, s, 0) : n_token + 2;
                set(t, b, h, s, 0,
                    wild && take(c->in, 4) == 0 ? odd[take(c->in, 4)] : (double)take(c->in, most < 0 ? 1 : most + 1));
            }
}

static bool is_broadcast(const argument *a) {
    for (int d = 0; d < a->tensor->ndim && d < 4; d++)
        if (a->given && a->tensor->shape[d] > 1 && a->tensor->stride[d] == 0) return true;
    return false;
}

static void fill(call *c, int64_t n_token) {
    argument *a = c->arguments;
    const bool wild = take(c->in, 8) == 0;
    for (int i = SEGMENTS; i <= FLOORS; i++) /* of a broadcast, what was written last counts */
        if (wild || is_broadcast(&a[i]) || a[i].over != UNSHARED) c->spoilt = true;
    if (is_usable(&a[SEGMENTS])) fill_edges(c, a[SEGMENTS].tensor, n_token, wild);
    if (is_usable(&a[QUOTAS])) fill_numbers(c, a[QUOTAS].tensor, NULL, n_token, wild);
    bool same = is_usable(&a[QUOTAS]) && is_usable(&a[FLOORS]);
    for (int d = 0; d < 3; d++) same = same && a[QUOTAS].tensor->shape[d] == a[FLOORS].tensor->shape[d];
    if (!same)
        c->spoilt = true; /* then what floors may be is not known */
    else
        fill_numbers(c, a[FLOORS].tensor, a[QUOTAS].tensor, n_token, wild);
    fill_values(c, SCORES, take(c->in, 4) > 0);
}

int fuzz_share(const uint8_t *data, size_t size) {
    input in = {data, size};
    kvp_share_args args = {.size = sizeof(kvp_share_args)};
    argument arguments[MAX_ARGUMENTS];
    call c = {.verb = KVP_SHARE,
              .args = &args,
              .arguments = arguments,
              .n_argument = list_share_arguments(&args, arguments),
              .in = &in};
    int64_t sizes[128] = {0};
    seed_random((uint64_t)take(&in, 1 << 16));
    const bool is_long = take(&in, 64) == 63;
    sizes['B'] = is_long ? 1 : 1 + take(&in, 2);
    sizes['H'] = 1 + take(&in, MOST_HEADS);
    sizes['T'] = 1 + (is_long ? take(&in, 1100) : take(&in, 40));
    sizes['S'] = 1 + take(&in, 5);
    sizes['E'] = sizes['S'] + 1;
    draw_tensors(&c, sizes);
    if (take(&in, 3) == 0) spoil_tensors(&c, 3);
    place_tensors(&c);
    fill(&c, sizes['T']);
    name_case("fuzz share B=%lld H=%lld T=%lld S=%lld", (long long)sizes['B'], (long long)sizes['H'],
              (long long)sizes['T'], (long long)sizes['S']);
    run_call(&c, true, verify);
    free_tensors(&c);
    return 0;
}

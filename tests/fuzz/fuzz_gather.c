/* SPDX-License-Identifier: Apache-2.0
 *
 * Bytes as calls of kvp_gather, also in place, against a loop over elements: equal bit for bit.
 */
#include "producer.h"

#include <string.h>

enum { KEYS, VALUES, POSITIONS, OUT_KEYS, OUT_VALUES };

/* What stood in the inputs before the call, which may have been written over. */
static block old_keys, old_values;

static block copy_block(const block *from) {
    const block copy = new_block(from->bytes);
    memcpy(copy.data, from->data, from->bytes);
    return copy;
}

/* The memory that argument i lies in. */
static const block *memory_of(const call *c, int i) {
    const argument *a = &c->arguments[i];
    return a->over == UNSHARED ? &a->memory : &c->arguments[a->over].memory;
}

static void verify_rows(const call *c, int from, const block *old, int output) {
    static const unsigned char zeros[4];
    const kvp_tensor *in = c->arguments[from].tensor, *out = c->arguments[output].tensor,
                     *positions = c->arguments[POSITIONS].tensor;
    kvp_tensor before = *in;
    before.data = old->data + ((unsigned char *)in->data - memory_of(c, from)->data);
    for (int64_t b = 0; b < out->shape[0]; b++)
        for (int64_t h = 0; h < out->shape[1]; h++)
            for (int64_t i = 0; i < out->shape[2]; i++)
                for (int64_t d = 0; d < out->shape[3]; d++) {
                    const int64_t position = (int64_t)get(positions, b, h, i, 0);
                    const void *expected = position < 0 ? zeros : element(&before, b, h, position, d);
                    CHECK(memcmp(element(out, b, h, i, d), expected, dtype_size(out->dtype)) == 0,
                          "%s[%lld,%lld,%lld,%lld]", c->arguments[output].name, (long long)b, (long long)h,
                          (long long)i, (long long)d);
                }
}

static void verify(const call *c) {
    verify_rows(c, KEYS, &old_keys, OUT_KEYS);
    verify_rows(c, VALUES, &old_values, OUT_VALUES);
}

/* Ascending, then -1; or, if wild, anything. */
static void fill_positions(call *c, const kvp_tensor *t, int64_t n_token, bool wild) {
    for (int64_t b = 0; b < t->shape[0]; b++)
        for (int64_t h = 0; h < t->shape[1]; h++) {
            int64_t next = 0;
            for (int64_t i = 0; i < t->shape[2]; i++) {
                const int64_t left = t->shape[2] - i, free_rows = n_token - next - left;
                next += take(c->in, free_rows > 0 ? (free_rows < 8 ? free_rows + 1 : 8) : 1);
                const int64_t position = next < n_token ? next++ : -1;
                set(t, b, h, i, 0, (double)(wild && take(c->in, 8) == 0 ? take(c->in, 1 << 16) - 8 : position));
            }
        }
}

static void fill(call *c, int64_t n_token) {
    argument *a = c->arguments;
    const bool wild = take(c->in, 8) == 0;
    if (wild) c->spoilt = true;
    for (int d = 0; d < 3; d++) /* what was written last counts */
        if (a[POSITIONS].tensor->shape[d] > 1 && a[POSITIONS].tensor->stride[d] == 0) c->spoilt = true;
    fill_values(c, KEYS, true);
    fill_values(c, VALUES, true);
    if (is_usable(&a[POSITIONS])) fill_positions(c, a[POSITIONS].tensor, n_token, wild);
}

/* Outputs that are the start of their inputs, as far as the contract allows. */
static void put_in_place(call *c, int from, int output) {
    argument *a = &c->arguments[output];
    a->over = from;
    memcpy(a->tensor->stride, c->arguments[from].tensor->stride, sizeof a->tensor->stride);
    c->spoilt = true; /* a broadcast input, or more rows than the input has, will not do */
}

int fuzz_gather(const uint8_t *data, size_t size) {
    input in = {data, size};
    kvp_gather_args args = {.size = sizeof(kvp_gather_args)};
    argument arguments[MAX_ARGUMENTS];
    call c = {.verb = KVP_GATHER,
              .args = &args,
              .arguments = arguments,
              .n_argument = list_gather_arguments(&args, arguments),
              .in = &in};
    int64_t sizes[128] = {0};
    seed_random((uint64_t)take(&in, 1 << 16));
    sizes['B'] = 1 + take(&in, 2);
    sizes['H'] = 1 + take(&in, 3);
    sizes['T'] = 1 + take(&in, 40);
    sizes['K'] = 1 + take(&in, sizes['T'] + 3);
    sizes['D'] = 1 + take(&in, 20);
    sizes['C'] = 1 + take(&in, take(&in, 4) ? 6 : 70);
    draw_tensors(&c, sizes);
    if (take(&in, 4) == 0) put_in_place(&c, KEYS, OUT_KEYS);
    if (take(&in, 4) == 0) put_in_place(&c, VALUES, OUT_VALUES);
    if (take(&in, 3) == 0) spoil_tensors(&c, 3);
    place_tensors(&c);
    fill(&c, sizes['T']);
    old_keys = copy_block(memory_of(&c, KEYS));
    old_values = copy_block(memory_of(&c, VALUES));
    name_case("fuzz gather B=%lld H=%lld T=%lld K=%lld D=%lld", (long long)sizes['B'], (long long)sizes['H'],
              (long long)sizes['T'], (long long)sizes['K'], (long long)sizes['D']);
    run_call(&c, true, verify);
    free_block(&old_keys);
    free_block(&old_values);
    free_tensors(&c);
    return 0;
}

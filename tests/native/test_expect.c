/* SPDX-License-Identifier: Apache-2.0
 *
 * The verb expect, whose kernels are for GPUs: what it refuses anywhere, and that a CPU says that it has none.
 */
#include "harness.h"
#include "tests.h"

#include <math.h>
#include <string.h>

enum { B = 2, H = 2, G = 2, T = 5, D = 4, S = 2, N_ARRAY = 11 };

typedef struct call {
    array of[N_ARRAY];
    kvp_expect_args args;
} call;

static void make_call(call *c) {
    kvp_expect_args *a = &c->args;
    const struct {
        kvp_tensor *view;
        int32_t rank;
        int64_t shape[4];
    } arrays[N_ARRAY] = {
        {&a->keys, 4, {B, H, T, D}},    {&a->queries, 4, {B, H * G, T, D}}, {&a->values, 4, {B, H, T, 3}},
        {&a->cosines, 4, {B, 1, T, D}}, {&a->sines, 4, {B, 1, T, D}},       {&a->ahead_cosines, 2, {B, D}},
        {&a->ahead_sines, 2, {B, D}},   {&a->segments, 2, {B, S + 2}},      {&a->sinks, 1, {H * G}},
        {&a->logits, 3, {B, H * G, T}}, {&a->scores, 3, {B, H, T}},
    };
    *a = (kvp_expect_args){.size = sizeof *a, .with_spread = 1, .scaling = 0.5, .epsilon = 0.02};
    for (int i = 0; i < N_ARRAY; i++) {
        const bool is_table = arrays[i].view == &a->segments;
        c->of[i] = new_array(is_table ? KVP_I32 : KVP_F32, CONTIGUOUS, arrays[i].rank, arrays[i].shape);
        *arrays[i].view = c->of[i].view;
    }
}

#define REFUSALS(DO)                                                                                    \
    DO(UNSUPPORTED, "no verb \"expect\"", (void)a) /* the good call */                                  \
    DO(UNSUPPORTED, "no verb \"expect\"", a->values.data = a->sinks.data = NULL)                        \
    DO(VALUE, "sizeof(kvp_expect_args)", a->size = 0)                                                   \
    DO(VALUE, "queries is missing", a->queries.data = NULL)                                             \
    DO(VALUE, "ahead_sines is missing", a->ahead_sines.data = NULL)                                     \
    DO(SHAPE, "keys has 3 dimensions", a->keys.ndim = 3)                                                \
    DO(SHAPE, "queries.shape[2] is 4, but T is 5", a->queries.shape[2] = 4)                             \
    DO(SHAPE, "queries.shape[1] is 3; expected a multiple of the 2 key heads", a->queries.shape[1] = 3; \
       a->logits.shape[1] = a->sinks.shape[0] = 3)                                                      \
    DO(SHAPE, "cosines.shape[1] is 2; expected 1", a->cosines.shape[1] = a->sines.shape[1] = 2;         \
       a->cosines.stride[1] = a->sines.stride[1] = 0)                                                   \
    DO(SHAPE, "sines.shape[3] is 2, but D is 4", a->sines.shape[3] = 2)                                 \
    DO(SHAPE, "ahead_cosines.shape[1] is 3, but D is 4", a->ahead_cosines.shape[1] = 3)                 \
    DO(SHAPE, "logits.shape[1] is 2, but N is 4", a->logits.shape[1] = 2)                               \
    DO(SHAPE, "logits is written to", a->logits.stride[0] = 0)                                          \
    DO(DTYPE, "queries has dtype float16; expected float32, as keys has", a->queries.dtype = KVP_F16)   \
    DO(DTYPE, "cosines has dtype float16; expected float32", a->cosines.dtype = KVP_F16)                \
    DO(DEVICE, "sines is on device 2:0", a->sines.device = KVP_CUDA)                                    \
    DO(SHAPE, "values.shape[2] is 4, but T is 5", a->values.shape[2] = 4)                               \
    DO(SHAPE, "segments.shape[1] is 2; expected at least 3", a->segments.shape[1] = 2)                  \
    DO(DEVICE, "segments is on device 2:0; expected it in host memory", a->segments.device = KVP_CUDA)  \
    DO(SHAPE, "sinks.shape[0] is 2, but N is 4", a->sinks.shape[0] = 2)                                 \
    DO(SHAPE, "scores.shape[1] is 1, but H is 2", a->scores.shape[1] = 1)                               \
    DO(VALUE, "epsilon is -1; expected", a->epsilon = -1)                                               \
    DO(VALUE, "epsilon is nan; expected", a->epsilon = (double)NAN)                                     \
    DO(VALUE, "scores overlaps values", a->scores.data = a->values.data)                                \
    DO(VALUE, "scaling is nan", a->scaling = (double)NAN)                                               \
    DO(VALUE, "scaling is 1e+39", a->scaling = 1e39)                                                    \
    DO(VALUE, "with_spread is 2; expected a whole number from 0 to 1", a->with_spread = 2)              \
    DO(VALUE, "logits overlaps queries", a->logits.data = a->queries.data)

void test_expect(void) {
#define CHECK_ONE(expected, named, ...)                                                                               \
    {                                                                                                                 \
        call c;                                                                                                       \
        make_call(&c);                                                                                                \
        kvp_expect_args *a = &c.args;                                                                                 \
        __VA_ARGS__;                                                                                                  \
        kvp_context ctx = {0};                                                                                        \
        size_t bytes = 12345;                                                                                         \
        const kvp_status status = kvp_expect(a, &ctx);                                                                \
        CHECK(status == KVP_ERR_##expected && strstr(ctx.error, named), "%s: %s, instead of %s", named,               \
              kvp_status_name(status), ctx.error);                                                                    \
        CHECK(kvp_workspace(KVP_EXPECT, a, 1, &bytes) == status && bytes == 12345, "%s: scratch of %zu bytes", named, \
              bytes);                                                                                                 \
        for (int i = 0; i < N_ARRAY; i++) free_array(&c.of[i]);                                                       \
    }
    REFUSALS(CHECK_ONE)
#undef CHECK_ONE
}

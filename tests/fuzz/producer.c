/* SPDX-License-Identifier: Apache-2.0
 *
 * Drawing, spoiling and placing tensors.
 */
#include "producer.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { MAX_BYTES = 1 << 20, LITTLE = 64 };

const fuzz_target FUZZ_TARGETS[] = {
    {"score", fuzz_score},   {"select", fuzz_select},     {"share", fuzz_share},
    {"gather", fuzz_gather}, {"contract", fuzz_contract}, {NULL, NULL},
};

int64_t take(input *in, int64_t n) {
    int64_t value = 0;
    for (int64_t reach = 1; reach < n && in->left > 0; reach *= 256, in->left--) value = value * 256 + *in->at++;
    return value % n;
}

static float wild_value(unsigned char byte) {
    static const float odd[] = {NAN,     INFINITY, -INFINITY, 0.0f,  -0.0f,    0x1p-149f, -0x1p-149f, FLT_MIN,
                                FLT_MAX, -FLT_MAX, 65504,     65520, 0x1p-24f, 0x1p-25f,  1e20f,      -1e-20f};
    if (byte < sizeof odd / sizeof odd[0]) return odd[byte];
    if (byte >= 64) return (float)(byte % 16) - 8.0f; /* ties */
    const uint32_t bits = (uint32_t)random_bits();
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

float take_value(input *in, bool wild) {
    const unsigned char byte = (unsigned char)(in->left ? take(in, 256) : random_below(256));
    return wild ? wild_value(byte) : ((float)byte - 128.0f) / 128.0f;
}

/* ------------------------------------------------------------ tensors */

/* Dimensions in any order from the fastest on, each with a gap or without; one in eight of an input's is a broadcast.
 */
static void draw_strides(input *in, kvp_tensor *t, bool output) {
    int64_t step = 1 + (take(in, 4) == 3);
    int left[4] = {0, 1, 2, 3};
    const bool plain = take(in, 3) > 0;
    for (int n = t->ndim; n > 0; n--) {
        const int at = plain ? n - 1 : (int)take(in, n), d = left[at];
        left[at] = left[n - 1];
        t->stride[d] = !plain && !output && take(in, 8) == 7 ? 0 : step;
        step = step * t->shape[d] + (plain ? 0 : take(in, 3));
    }
}

void draw_tensors(call *c, const int64_t *size) {
    static const int32_t order[] = {KVP_F32, KVP_F16, KVP_BF16, KVP_I32, KVP_U8};
    const int wide = (int)take(c->in, 3);
    for (int i = 0; i < c->n_argument; i++) {
        argument *a = &c->arguments[i];
        kvp_tensor *t = a->tensor;
        a->over = UNSHARED;
        a->given = a->required || take(c->in, 2);
        if (a->allowed == ALLOW_FLOATS) t->dtype = order[wide];
        for (int d = 0; a->allowed != ALLOW_FLOATS && d < 5; d++)
            if (a->allowed == 1 << order[d]) t->dtype = order[d];
        t->device = KVP_CPU;
        t->ndim = (int32_t)strlen(a->letters);
        for (int d = 0; d < t->ndim; d++) t->shape[d] = size[(unsigned char)a->letters[d]];
        draw_strides(c->in, t, a->output);
    }
}

static int64_t odd_size(input *in) {
    static const int64_t odd[] = {0,
                                  1,
                                  2,
                                  3,
                                  5,
                                  -1,
                                  INT32_MAX,
                                  (int64_t)INT32_MAX + 1,
                                  1 << 20,
                                  INT64_C(1) << 40,
                                  INT64_C(1) << 54,
                                  INT64_C(1) << 61,
                                  INT64_MAX / 2,
                                  INT64_MAX - 1,
                                  INT64_MAX,
                                  INT64_MIN};
    return odd[take(in, (int64_t)(sizeof odd / sizeof odd[0]))];
}

static int64_t nudge(input *in, int64_t x) { return (int64_t)((uint64_t)x + (uint64_t)take(in, 5) - 2); }

/* Puts a over another's memory: at the same place with the same strides, or shifted by a few elements. */
static void share_memory(call *c, argument *a) {
    const int with = (int)take(c->in, c->n_argument);
    const argument *other = &c->arguments[with];
    if (other == a || other->over != UNSHARED || !other->given) return;
    for (int i = 0; i < c->n_argument; i++)
        if (&c->arguments[i] == a || c->arguments[i].over == (int)(a - c->arguments)) c->arguments[i].over = UNSHARED;
    a->over = with;
    a->shift = other->shift + take(c->in, 6) * (int64_t)dtype_size(a->tensor->dtype);
    if (take(c->in, 2)) memcpy(a->tensor->stride, other->tensor->stride, sizeof a->tensor->stride);
}

/* One size, in every tensor that has it, and broadcast: what agrees with all else, and needs no memory. */
static void spoil_letter(call *c, int letter) {
    const int64_t size = odd_size(c->in), stride = take(c->in, 4) > 0 ? 0 : odd_size(c->in);
    for (int i = 0; i < c->n_argument; i++)
        for (int d = 0; c->arguments[i].letters[d]; d++) {
            if (c->arguments[i].letters[d] != letter) continue;
            c->arguments[i].tensor->shape[d] = size;
            if (!c->arguments[i].output) c->arguments[i].tensor->stride[d] = stride;
        }
}

static void spoil_tensor(call *c, argument *a) {
    input *in = c->in;
    kvp_tensor *t = a->tensor;
    const int64_t d = take(in, 4);
    switch (take(in, 14)) {
    case 0: t->ndim = (int32_t)take(in, 7) - 1; break;
    case 1: t->shape[d] = odd_size(in); break;
    case 2: t->shape[d] = nudge(in, t->shape[d]); break;
    case 3: t->stride[d] = odd_size(in); break;
    case 4: t->stride[d] = nudge(in, t->stride[d]); break;
    case 5: t->dtype = (int32_t)take(in, 8) - 1; break;
    case 6: t->device = (int32_t)take(in, 5) - 1; break;
    case 7: t->device_index = (int32_t)take(in, 3) - 1; break;
    case 8: a->given = !a->given; break;
    case 9: a->shift += take(in, 4); break;
    case 10:
    case 11: spoil_letter(c, a->letters[(size_t)d % strlen(a->letters)]); break;
    default: share_memory(c, a); break;
    }
}

void spoil_tensors(call *c, int64_t most) {
    for (int64_t left = take(c->in, most + 1); left > 0; left--) {
        c->spoilt = true;
        spoil_tensor(c, &c->arguments[take(c->in, c->n_argument)]);
    }
}

/* Bytes from the first element to the end of the last; 0 if that is more than MAX_BYTES, or nothing one could count. */
static size_t span_of(const kvp_tensor *t) {
    int64_t last = 0;
    if (t->ndim < 1 || t->ndim > 4) return 0;
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] < 1 || t->stride[d] < 0) return 0;
        if (t->shape[d] > 1 && t->stride[d] > MAX_BYTES / (t->shape[d] - 1)) return 0;
        last += (t->shape[d] - 1) * t->stride[d];
    }
    return last < MAX_BYTES / 4 ? (size_t)(last + 1) * dtype_size(t->dtype) : 0;
}

/* Elements, or -1 if there are more than can be visited. */
static int64_t count_of(const kvp_tensor *t) {
    int64_t count = 1;
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] > MAX_BYTES / count) return -1;
        count *= t->shape[d];
    }
    return count <= MAX_BYTES / 4 ? count : -1;
}

void place_tensors(call *c) {
    size_t need[MAX_ARGUMENTS];
    for (int i = 0; i < c->n_argument; i++) {
        const argument *a = &c->arguments[i];
        const size_t span = span_of(a->tensor);
        need[i] = (span ? span : LITTLE) + (size_t)a->shift;
        c->too_long |= a->given && !span;
    }
    for (int i = 0; i < c->n_argument; i++) {
        const int over = c->arguments[i].over;
        if (over != UNSHARED && need[i] > need[over]) need[over] = need[i];
    }
    for (int i = 0; i < c->n_argument; i++) {
        argument *a = &c->arguments[i];
        if (a->over != UNSHARED) continue;
        a->memory = new_block(need[i]);
        for (size_t k = 0; k < need[i]; k++) a->memory.data[k] = (unsigned char)random_bits();
    }
    for (int i = 0; i < c->n_argument; i++) {
        argument *a = &c->arguments[i];
        const block *memory = a->over == UNSHARED ? &a->memory : &c->arguments[a->over].memory;
        a->tensor->data = a->given ? memory->data + a->shift : NULL;
    }
}

void free_tensors(call *c) {
    for (int i = 0; i < c->n_argument; i++) free_block(&c->arguments[i].memory);
}

bool is_usable(const argument *a) {
    const kvp_tensor *t = a->tensor;
    const bool known = t->dtype >= KVP_F32 && t->dtype <= KVP_U8 && (a->allowed >> t->dtype & 1);
    return a->given && known && t->ndim == (int32_t)strlen(a->letters) && span_of(t) && count_of(t) > 0 &&
           (uintptr_t)t->data % dtype_size(t->dtype) == 0;
}

void fill_values(call *c, int index, bool wild) {
    const kvp_tensor *t = c->arguments[index].tensor;
    int64_t size[4] = {1, 1, 1, 1};
    if (!is_usable(&c->arguments[index])) return;
    for (int d = 0; d < t->ndim; d++) size[d] = t->shape[d];
    for (int64_t i = 0; i < size[0]; i++)
        for (int64_t j = 0; j < size[1]; j++)
            for (int64_t k = 0; k < size[2]; k++)
                for (int64_t l = 0; l < size[3]; l++) {
                    const float value = take_value(c->in, wild);
                    if (t->dtype == KVP_F32)
                        memcpy(element(t, i, j, k, l), &value, sizeof value); /* keeps the payload of a NaN */
                    else
                        set(t, i, j, k, l, (double)value);
                }
}

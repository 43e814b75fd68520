/* SPDX-License-Identifier: Apache-2.0
 *
 * Tensors of every element type and layout. The conversions are arithmetic (frexp, ldexp), not bit tricks, so that they
 * share no mistake with the core's.
 */
#include "harness.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { OFFSET_ELEMENTS = 3 };

size_t dtype_size(int32_t dtype) {
    switch (dtype) {
    case KVP_F32:
    case KVP_I32: return 4;
    case KVP_F16:
    case KVP_BF16: return 2;
    default: return 1;
    }
}

const char *dtype_name(int32_t dtype) {
    static const char *const names[] = {"f32", "f16", "bf16", "i32", "u8"};
    return names[dtype];
}

/* Rounds to "bits" significant bits, with no place below 2^lowest. */
static double round_bits(double value, int bits, int lowest) {
    int exponent;
    frexp(value, &exponent);
    const int place = exponent - bits > lowest ? exponent - bits : lowest;
    return ldexp(nearbyint(ldexp(value, -place)), place);
}

double round_to_dtype(int32_t dtype, double value) {
    if (!isfinite(value) || value == 0) return value;
    if (dtype == KVP_F16) return round_bits(value, 11, -24);
    if (dtype == KVP_BF16) return round_bits(value, 8, -133);
    return (double)(float)value;
}

/* Sign, exponent and fraction of a 16-bit float with that many fraction bits; "value" was rounded before. */
static uint16_t encode_16(double value, int fraction_bits, int bias) {
    const unsigned sign = signbit(value) ? 0x8000u : 0u, infinity = (2u * (unsigned)bias + 1u) << fraction_bits;
    int exponent;
    if (isnan(value)) return (uint16_t)(infinity | 1u << (fraction_bits - 1));
    const double part = frexp(fabs(value), &exponent); /* [0.5, 1) */
    if (isinf(value) || exponent - 1 > bias) return (uint16_t)(sign | infinity);
    if (exponent - 1 < 1 - bias) return (uint16_t)(sign | (unsigned)ldexp(fabs(value), bias - 1 + fraction_bits));
    if (value == 0) return (uint16_t)sign;
    const unsigned fraction = (unsigned)ldexp(2 * part - 1, fraction_bits);
    return (uint16_t)(sign | (unsigned)(exponent - 1 + bias) << fraction_bits | fraction);
}

static double decode_16(uint16_t bits, int fraction_bits, int bias) {
    const int field = bits >> fraction_bits & (2 * bias + 1), fraction = bits & ((1 << fraction_bits) - 1);
    double value;
    if (field == 2 * bias + 1)
        value = fraction ? (double)NAN : (double)INFINITY;
    else if (field == 0)
        value = ldexp(fraction, 1 - bias - fraction_bits);
    else
        value = ldexp(fraction + (1 << fraction_bits), field - bias - fraction_bits);
    return bits & 0x8000u ? -value : value;
}

/* Without an array of the indices, which the address sanitizer would guard in every call, a quarter of all its time. */
void *element(const kvp_tensor *t, int64_t i, int64_t j, int64_t k, int64_t l) {
    int64_t offset = t->ndim > 0 ? i * t->stride[0] : 0;
    if (t->ndim > 1) offset += j * t->stride[1];
    if (t->ndim > 2) offset += k * t->stride[2];
    if (t->ndim > 3) offset += l * t->stride[3];
    return (char *)t->data + offset * (int64_t)dtype_size(t->dtype);
}

double get(const kvp_tensor *t, int64_t i, int64_t j, int64_t k, int64_t l) {
    const void *at = element(t, i, j, k, l);
    switch (t->dtype) {
    case KVP_F32: return (double)*(const float *)at;
    case KVP_I32: return *(const int32_t *)at;
    case KVP_F16: return decode_16(*(const uint16_t *)at, 10, 15);
    case KVP_BF16: return decode_16(*(const uint16_t *)at, 7, 127);
    default: return *(const uint8_t *)at;
    }
}

void set(const kvp_tensor *t, int64_t i, int64_t j, int64_t k, int64_t l, double value) {
    void *at = element(t, i, j, k, l);
    switch (t->dtype) {
    case KVP_F32: *(float *)at = (float)value; break;
    case KVP_I32: *(int32_t *)at = (int32_t)value; break;
    case KVP_F16: *(uint16_t *)at = encode_16(round_to_dtype(KVP_F16, value), 10, 15); break;
    case KVP_BF16: *(uint16_t *)at = encode_16(round_to_dtype(KVP_BF16, value), 7, 127); break;
    default: *(uint8_t *)at = (uint8_t)value; break;
    }
}

/* Calls visit(t, i, j, k, l, arg) for every element. */
static void visit_elements(const kvp_tensor *t, void (*visit)(const kvp_tensor *, const int64_t *, void *), void *arg) {
    int64_t size[4] = {1, 1, 1, 1}, index[4];
    for (int d = 0; d < t->ndim; d++) size[d] = t->shape[d];
    for (index[0] = 0; index[0] < size[0]; index[0]++)
        for (index[1] = 0; index[1] < size[1]; index[1]++)
            for (index[2] = 0; index[2] < size[2]; index[2]++)
                for (index[3] = 0; index[3] < size[3]; index[3]++) visit(t, index, arg);
}

static void set_normal(const kvp_tensor *t, const int64_t *x, void *arg) {
    (void)arg;
    set(t, x[0], x[1], x[2], x[3], random_normal());
}

void fill_normal(const kvp_tensor *t) { visit_elements(t, set_normal, NULL); }

/* Strides for the layout; returns how many elements the storage holds. */
static int64_t lay_out(kvp_tensor *t, layout how) {
    int order[4] = {0, 1, 2, 3}; /* from the slowest dimension to the fastest */
    if (how == HEADS_INSIDE && t->ndim > 2) {
        order[1] = 2;
        order[2] = 1;
    } else if (how == HEADS_INSIDE && t->ndim == 2) {
        order[0] = 1;
        order[1] = 0;
    }
    int64_t step = how == EVERY_OTHER ? 2 : 1, last = 0;
    for (int i = t->ndim - 1; i >= 0; i--) {
        const int d = order[i];
        t->stride[d] = how == BROADCAST_BATCH && d == 0 ? 0 : step;
        step *= t->shape[d];
        last += (t->shape[d] - 1) * t->stride[d];
    }
    return last + 1;
}

array new_array(kvp_dtype dtype, layout how, int32_t ndim, const int64_t *shape) {
    array a = {.view = {.dtype = (int32_t)dtype, .device = KVP_CPU, .ndim = ndim}};
    memcpy(a.view.shape, shape, (size_t)ndim * sizeof shape[0]);
    const int64_t count = lay_out(&a.view, how) + (how == OFFSET ? OFFSET_ELEMENTS : 0);
    a.memory = new_block((size_t)count * dtype_size(a.view.dtype));
    a.view.data = a.memory.data + (how == OFFSET ? OFFSET_ELEMENTS * dtype_size(a.view.dtype) : 0);
    memset(a.memory.data, 0, a.memory.bytes);
    return a;
}

void free_array(array *a) {
    free_block(&a->memory);
    *a = (array){0};
}

void poison_array(array *a, unsigned char byte) { memset(a->memory.data, byte, a->memory.bytes); }

static void clear_mark(const kvp_tensor *t, const int64_t *x, void *arg) {
    memset(element(t, x[0], x[1], x[2], x[3]), *(const unsigned char *)arg, dtype_size(t->dtype));
}

void check_untouched(const array *a, unsigned char byte) {
    check_guards(&a->memory);
    block copy = new_block(a->memory.bytes);
    memcpy(copy.data, a->memory.data, copy.bytes);
    kvp_tensor view = a->view;
    view.data = copy.data + ((unsigned char *)a->view.data - a->memory.data);
    visit_elements(&view, clear_mark, &byte);
    size_t touched = 0;
    for (size_t i = 0; i < copy.bytes; i++) touched += copy.data[i] != byte;
    CHECK(touched == 0, "%zu bytes between the elements of an output were written", touched);
    free_block(&copy);
}

layout output_layout(layout how) { return how == BROADCAST_BATCH ? OFFSET : how; }

layout random_layout(void) { return (layout)random_below(LAYOUT_COUNT); }

kvp_tensor batch_row(const kvp_tensor *t, int64_t b) {
    kvp_tensor row = *t;
    if (!t->data) return row;
    row.data = element(t, b, 0, 0, 0);
    row.shape[0] = 1;
    return row;
}

typedef struct comparison {
    const kvp_tensor *other;
    bool same;
} comparison;

static void compare_element(const kvp_tensor *t, const int64_t *x, void *arg) {
    comparison *c = arg;
    if (memcmp(element(t, x[0], x[1], x[2], x[3]), element(c->other, x[0], x[1], x[2], x[3]), dtype_size(t->dtype)) !=
        0)
        c->same = false;
}

bool same_elements(const kvp_tensor *x, const kvp_tensor *y) {
    comparison c = {y, true};
    visit_elements(x, compare_element, &c);
    return c.same;
}

void read_valid(const kvp_tensor *valid, int64_t b, int64_t n_token, int64_t *begin, int64_t *end) {
    *begin = valid->data ? (int64_t)get(valid, b, 0, 0, 0) : 0;
    *end = valid->data ? (int64_t)get(valid, b, 1, 0, 0) : n_token;
}

void fill_valid(const kvp_tensor *valid, int64_t n_token, bool nonempty) {
    for (int64_t b = 0; b < valid->shape[0]; b++) {
        const int64_t kind = random_below(nonempty ? 4 : 5);
        int64_t begin = kind == 0 || kind == 2 ? random_below(n_token) : 0, end = n_token;
        if (kind == 1 || kind == 2) end = begin + 1 + random_below(n_token - begin);
        if (kind == 4) begin = end = random_below(n_token + 1);
        set(valid, b, 0, 0, 0, (double)begin);
        set(valid, b, 1, 0, 0, (double)end);
    }
}

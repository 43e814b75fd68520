/* SPDX-License-Identifier: Apache-2.0
 *
 * Shape, dtype and device contracts. Each verb's contract is a list of (argument, letters); a letter is bound by the
 * first argument that has it and must agree in all later ones, so a message can say what an argument is, what it had to
 * be, and where that came from.
 */
#include "internal.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    F32 = 1 << KVP_F32,
    I32 = 1 << KVP_I32,
    U8 = 1 << KVP_U8,
    FLOATS = 0
#define KVP_FLOAT(constant, name, kind, bits) | 1 << KVP_##constant
#define KVP_DTYPE(constant, name, kind, bits)
#include "../dtypes.def"
#undef KVP_FLOAT
#undef KVP_DTYPE
};

#define MAX_RULE 16 /* arguments of a verb */

/* What an argument is; TABLE: small numbers, which the host reads on every device. */
enum { OPTIONAL = 0, REQUIRED = 1, OUTPUT = 2, TABLE = 4 };

typedef struct rule {
    const char *name;
    const kvp_tensor *tensor;
    const char *letters;
    int dtypes;
    int flags;
} rule;

/* By letter. */
typedef struct binding {
    int64_t size['Z' + 1];
    const char *from['Z' + 1];
    const kvp_tensor *first;
    const char *first_name;
} binding;

static kvp_status check_dtype(const rule *r, kvp_context *ctx) {
    const kvp_tensor *t = r->tensor;
    if (kvpi_dtype_size(t->dtype) && (r->dtypes >> t->dtype & 1)) return KVP_OK;
    const char *expected = r->dtypes == FLOATS ? KVP_FLOAT_NAMES
                           : r->dtypes == F32  ? "float32"
                           : r->dtypes == I32  ? "int32"
                                               : "uint8";
    return kvpi_fail(ctx, KVP_ERR_DTYPE, "%s has dtype %s; expected %s", r->name, kvpi_dtype_name(t->dtype), expected);
}

/* Sizes and strides must be such that no offset, in bytes, can overflow, and neither can a size of scratch: a broadcast
 * claims any number of elements, and has one. */
static kvp_status check_extent(const rule *r, kvp_context *ctx) {
    const kvp_tensor *t = r->tensor;
    const int64_t size = (int64_t)kvpi_dtype_size(t->dtype);
    int64_t span = size, count = span;
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] < 1)
            return kvpi_fail(ctx, KVP_ERR_SHAPE, "%s.shape[%d] is %lld; expected at least 1", r->name, d,
                             (long long)t->shape[d]);
        if (t->shape[d] > INT32_MAX)
            return kvpi_fail(ctx, KVP_ERR_SHAPE, "%s.shape[%d] is %lld; expected at most %d", r->name, d,
                             (long long)t->shape[d], INT32_MAX);
        if (t->stride[d] < 0)
            return kvpi_fail(ctx, KVP_ERR_SHAPE, "%s.stride[%d] is %lld; expected no negative stride", r->name, d,
                             (long long)t->stride[d]);
        if (t->stride[d] > INT64_MAX / 64)
            return kvpi_fail(ctx, KVP_ERR_SHAPE, "%s.stride[%d] is %lld; expected at most %lld", r->name, d,
                             (long long)t->stride[d], (long long)(INT64_MAX / 64));
        int64_t reach;
        if (__builtin_mul_overflow(t->shape[d] - 1, t->stride[d], &reach) || reach > INT64_MAX / 64 ||
            span > INT64_MAX / 64 || __builtin_mul_overflow(count, t->shape[d], &count) || count > INT64_MAX / 64)
            return kvpi_fail(ctx, KVP_ERR_SHAPE, "%s has more elements than can be addressed", r->name);
        span += reach * size;
    }
    if ((uintptr_t)t->data % (size_t)size)
        return kvpi_fail(ctx, KVP_ERR_VALUE, "%s is not aligned to its %zu-byte elements", r->name, (size_t)size);
    return KVP_OK;
}

/* Whether no two elements share memory: in order of stride, each dimension steps over all of the smaller ones. */
static bool is_spread_out(const kvp_tensor *t) {
    int64_t reach = 1;
    for (int done = 0, seen = 0; done < t->ndim; done++) {
        int next = -1;
        for (int d = 0; d < t->ndim; d++)
            if (!(seen >> d & 1) && (next < 0 || t->stride[d] < t->stride[next])) next = d;
        seen |= 1 << next;
        if (t->shape[next] == 1) continue;
        if (t->stride[next] < reach) return false;
        reach += (t->shape[next] - 1) * t->stride[next];
    }
    return true;
}

static kvp_status check_device(const rule *r, binding *bound, kvp_context *ctx) {
    if (r->flags & TABLE) {
        if (r->tensor->device == KVP_CPU) return KVP_OK;
        return kvpi_fail(ctx, KVP_ERR_DEVICE,
                         "%s is on device %d:%d; expected it in host memory, whatever the others' device", r->name,
                         (int)r->tensor->device, (int)r->tensor->device_index);
    }
    if (!bound->first) {
        bound->first = r->tensor;
        bound->first_name = r->name;
    }
    if (r->tensor->device == bound->first->device && r->tensor->device_index == bound->first->device_index)
        return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_DEVICE, "%s is on device %d:%d, but %s is on device %d:%d; expected one device",
                     r->name, (int)r->tensor->device, (int)r->tensor->device_index, bound->first_name,
                     (int)bound->first->device, (int)bound->first->device_index);
}

static kvp_status bind_letters(const rule *r, binding *bound, kvp_context *ctx) {
    for (int d = 0; d < r->tensor->ndim; d++) {
        const int letter = r->letters[d];
        const int64_t size = r->tensor->shape[d];
        if (!bound->from[letter]) {
            bound->from[letter] = r->name;
            bound->size[letter] = size;
        } else if (bound->size[letter] != size) {
            return kvpi_fail(ctx, KVP_ERR_SHAPE, "%s.shape[%d] is %lld, but %c is %lld in %s", r->name, d,
                             (long long)size, letter, (long long)bound->size[letter], bound->from[letter]);
        }
    }
    return KVP_OK;
}

static kvp_status check_rules(const rule *rules, size_t n_rule, binding *bound, kvp_context *ctx) {
    memset(bound, 0, sizeof *bound);
    for (size_t i = 0; i < n_rule; i++) {
        const rule *r = &rules[i];
        if (!r->tensor->data) {
            if (r->flags & REQUIRED)
                return kvpi_fail(ctx, KVP_ERR_VALUE, "%s is missing; expected a tensor (%s)", r->name, r->letters);
            continue;
        }
        if (r->tensor->ndim != (int32_t)strlen(r->letters))
            return kvpi_fail(ctx, KVP_ERR_SHAPE, "%s has %d dimension%s; expected %zu (%s)", r->name,
                             (int)r->tensor->ndim, r->tensor->ndim == 1 ? "" : "s", strlen(r->letters), r->letters);
        KVPI_TRY(check_dtype(r, ctx));
        KVPI_TRY(check_extent(r, ctx));
        if ((r->flags & OUTPUT) && !is_spread_out(r->tensor))
            return kvpi_fail(ctx, KVP_ERR_SHAPE, "%s is written to, but its strides make elements share memory",
                             r->name);
        KVPI_TRY(check_device(r, bound, ctx));
        KVPI_TRY(bind_letters(r, bound, ctx));
    }
    if (bound->from['R'] && bound->size['R'] != 2)
        return kvpi_fail(ctx, KVP_ERR_SHAPE, "valid.shape[1] is %lld; expected 2 (begin, end)",
                         (long long)bound->size['R']);
    return KVP_OK;
}

/* The last byte of a tensor. */
static const char *last_byte(const kvp_tensor *t) {
    int64_t last = 0;
    for (int d = 0; d < t->ndim; d++) last += (t->shape[d] - 1) * t->stride[d];
    return (const char *)t->data + (last + 1) * (int64_t)kvpi_dtype_size(t->dtype) - 1;
}

/* Whether "delta", in elements, is a sum of stride[d] * m over the dimensions [d, n), with each m in [-below[d],
 * above[d]]. Strides descend, and of a spread-out tensor each is longer than all behind it reach, so there are two m at
 * most that can do. */
static bool is_difference(const int64_t *stride, const int64_t *below, const int64_t *above, int d, int n,
                          int64_t delta) {
    if (d == n) return delta == 0;
    int64_t low = 0, high = 0; /* what the dimensions behind d can add */
    for (int i = d + 1; i < n; i++) {
        low -= stride[i] * below[i];
        high += stride[i] * above[i];
    }
    const int64_t middle = delta / stride[d], reach = (high > -low ? high : -low) / stride[d] + 1;
    if (reach > 2) return true; /* not spread out: no search */
    for (int64_t m = middle - reach; m <= middle + reach; m++)
        if (m >= -below[d] && m <= above[d] && is_difference(stride, below, above, d + 1, n, delta - m * stride[d]))
            return true;
    return false;
}

/* Whether tensors share elements whose first and last bytes enclose some of the other's. Two views of one block of
 * memory, say of the keys and the values of a fused cache, may lie between each other's rows without sharing any
 * element. That is seen where both have the same strides. (Dimensions of one element have none that counts.) */
static bool elements_overlap(const kvp_tensor *x, const kvp_tensor *y) {
    const int64_t size = (int64_t)kvpi_dtype_size(x->dtype), delta = (const char *)y->data - (const char *)x->data;
    int64_t stride[4], below[4], above[4];
    int n = 0;
    if (x->ndim != y->ndim || size != (int64_t)kvpi_dtype_size(y->dtype) || delta % size) return true;
    for (int d = 0; d < x->ndim; d++) {
        if (x->shape[d] == 1 && y->shape[d] == 1) continue;
        if (x->shape[d] > 1 && y->shape[d] > 1 && x->stride[d] != y->stride[d]) return true;
        const int64_t own = x->shape[d] > 1 ? x->stride[d] : y->stride[d];
        int at = n++;
        for (; at > 0 && stride[at - 1] < own; at--) {
            stride[at] = stride[at - 1];
            below[at] = below[at - 1];
            above[at] = above[at - 1];
        }
        stride[at] = own;
        below[at] = y->shape[d] - 1; /* m: the index in x minus that in y */
        above[at] = x->shape[d] - 1;
    }
    return (n > 0 && stride[n - 1] == 0) || is_difference(stride, below, above, 0, n, delta / size);
}

static bool has_strides_of(const kvp_tensor *out, const kvp_tensor *in) {
    for (int d = 0; d < out->ndim; d++)
        if (out->shape[d] > 1 && out->stride[d] != in->stride[d]) return false;
    return true;
}

/* Being the start of its own input is the one overlap that copying upwards survives, unless a row of the input is also
 * one of another head, which would be read before or after it is written, as the threads come. */
static bool is_start_of(const kvp_tensor *out, const kvp_tensor *in) {
    return out->data == in->data && has_strides_of(out, in) && out->device == KVP_CPU && is_spread_out(in);
}

static kvp_status refuse_overlap(const rule *output, const rule *other, const rule *in_place_of, kvp_context *ctx) {
    if (!in_place_of)
        return kvpi_fail(ctx, KVP_ERR_VALUE, "%s overlaps %s; expected memory of its own", output->name, other->name);
    return kvpi_fail(ctx, KVP_ERR_VALUE,
                     "%s overlaps %s; expected memory of its own, or (on the CPU) the start of %s, none of whose "
                     "elements share memory",
                     output->name, other->name, in_place_of->name);
}

/* The output of a rule shares memory with no other, but that it may be the start of the input in_place_of, if not NULL.
 */
static kvp_status check_overlap(const rule *output, const rule *rules, size_t n_rule, const char *const *last,
                                const rule *in_place_of, kvp_context *ctx) {
    const char *const first = output->tensor->data, *const end = last[output - rules];
    for (size_t i = 0; i < n_rule; i++) {
        const rule *other = &rules[i];
        if (other == output || !other->tensor->data) continue;
        if (first > last[i] || (const char *)other->tensor->data > end) continue;
        if (!elements_overlap(output->tensor, other->tensor)) continue;
        if (other == in_place_of && is_start_of(output->tensor, other->tensor)) continue;
        return refuse_overlap(output, other, in_place_of, ctx);
    }
    return KVP_OK;
}

static kvp_status check_overlaps(const rule *rules, size_t n_rule, const rule *const *in_place_of, kvp_context *ctx) {
    const char *last[MAX_RULE];
    for (size_t i = 0; i < n_rule; i++) last[i] = rules[i].tensor->data ? last_byte(rules[i].tensor) : NULL;
    for (size_t o = 0; o < n_rule; o++)
        if (rules[o].flags & OUTPUT && rules[o].tensor->data)
            KVPI_TRY(check_overlap(&rules[o], rules, n_rule, last, in_place_of ? in_place_of[o] : NULL, ctx));
    return KVP_OK;
}

kvp_status kvpi_check_whole(double value, const char *name, double low, double high, kvp_context *ctx) {
    if (value >= low && value <= high && value == floor(value)) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_VALUE, "%s is %g; expected a whole number from %.0f to %.0f", name, value, low, high);
}

/* A caller that was compiled with another kvp.h, or has forgotten the field. */
static kvp_status check_size(uint32_t size, size_t expected, const char *what, kvp_context *ctx) {
    if (size == expected) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_VALUE, "size is %u; expected %zu, sizeof(%s)", (unsigned)size, expected, what);
}

static int asked(const kvpi_scorer *scorer, int need) { return scorer->needs & need ? REQUIRED : OPTIONAL; }

/* Each key head has as many query heads. */
static kvp_status check_groups(const binding *bound, kvp_context *ctx) {
    if (bound->size['N'] % bound->size['H'] == 0) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_SHAPE, "queries.shape[1] is %lld; expected a multiple of the %lld key heads",
                     (long long)bound->size['N'], (long long)bound->size['H']);
}

/* What a scorer asks of the queries, the votes and its parameters; both may be missing where it needs none. */
static kvp_status check_scorer(const kvpi_scorer *scorer, const kvp_tensor *keys, const kvp_tensor *queries,
                               const kvp_tensor *votes, const double *param, const binding *bound, kvp_context *ctx) {
    const int64_t n_token = bound->size['T'];
    if (queries->data && queries->dtype != keys->dtype)
        return kvpi_fail(ctx, KVP_ERR_DTYPE, "queries has dtype %s; expected %s, as keys has",
                         kvpi_dtype_name(queries->dtype), kvpi_dtype_name(keys->dtype));
    if (queries->data) KVPI_TRY(check_groups(bound, ctx));
    if (queries->data && bound->size['Q'] > n_token)
        return kvpi_fail(ctx, KVP_ERR_SHAPE, "queries.shape[2] is %lld; expected at most the %lld tokens in keys",
                         (long long)bound->size['Q'], (long long)n_token);
    if (votes->data && bound->size['F'] != KVP_VOTE_FIELDS)
        return kvpi_fail(ctx, KVP_ERR_SHAPE, "votes.shape[2] is %lld; expected %d", (long long)bound->size['F'],
                         (int)KVP_VOTE_FIELDS);
    return scorer->traits->check ? scorer->traits->check(param, n_token, ctx) : KVP_OK;
}

static kvp_status check_edges(const binding *bound, kvp_context *ctx) {
    if (bound->size['E'] == bound->size['S'] + 1) return KVP_OK;
    return kvpi_fail(ctx, KVP_ERR_SHAPE,
                     "segments.shape[1] is %lld; expected %lld, one more than the %lld segments in quotas",
                     (long long)bound->size['E'], (long long)bound->size['S'] + 1, (long long)bound->size['S']);
}

/* Rules first to last are about caches, whose elements are all of one type, that of keys. */
static kvp_status check_one_dtype(const rule *rules, size_t first, size_t last, const kvp_tensor *keys,
                                  kvp_context *ctx) {
    for (size_t i = first; i <= last; i++)
        if (rules[i].tensor->dtype != keys->dtype)
            return kvpi_fail(ctx, KVP_ERR_DTYPE, "%s has dtype %s; expected %s, as keys has", rules[i].name,
                             kvpi_dtype_name(rules[i].tensor->dtype), kvpi_dtype_name(keys->dtype));
    return KVP_OK;
}

kvp_status kvpi_check_score(const kvp_score_args *args, kvp_context *ctx) {
    KVPI_TRY(check_size(args->size, sizeof *args, "kvp_score_args", ctx));
    const kvpi_scorer *scorer = kvpi_scorer_at(args->scorer);
    if (!scorer)
        return kvpi_fail(ctx, KVP_ERR_VALUE, "scorer is %d; expected 0 to %d", (int)args->scorer,
                         KVPI_SCORER_COUNT - 1);
    const rule rules[] = {
        {"keys", &args->keys, "BHTD", FLOATS, REQUIRED},
        {"values", &args->values, "BHTC", FLOATS, asked(scorer, KVP_NEEDS_VALUES)},
        {"queries", &args->queries, "BNQD", FLOATS, asked(scorer, KVP_NEEDS_QUERIES)},
        {"votes", &args->votes, "BVF", I32, asked(scorer, KVP_NEEDS_VOTES) | TABLE},
        {"valid", &args->valid, "BR", I32, TABLE},
        {"lse", &args->lse, "BNQ", F32, OPTIONAL},
        {"scores", &args->scores, "BHT", F32, REQUIRED | OUTPUT},
    };
    binding bound;
    KVPI_TRY(check_rules(rules, sizeof rules / sizeof rules[0], &bound, ctx));
    if (args->values.data) KVPI_TRY(check_one_dtype(rules, 1, 1, &args->keys, ctx));
    KVPI_TRY(check_scorer(scorer, &args->keys, &args->queries, &args->votes, args->param, &bound, ctx));
    return check_overlaps(rules, sizeof rules / sizeof rules[0], NULL, ctx);
}

kvp_status kvpi_check_select(const kvp_select_args *args, kvp_context *ctx) {
    KVPI_TRY(check_size(args->size, sizeof *args, "kvp_select_args", ctx));
    const rule rules[] = {
        {"scores", &args->scores, "BHT", F32, REQUIRED},
        {"segments", &args->segments, "BE", I32, REQUIRED | TABLE},
        {"quotas", &args->quotas, "BHS", I32, REQUIRED | TABLE},
        {"protect", &args->protect, "BT", U8, OPTIONAL},
        {"valid", &args->valid, "BR", I32, TABLE},
        {"positions", &args->positions, "BHK", I32, REQUIRED | OUTPUT},
        {"counts", &args->counts, "BH", I32, REQUIRED | OUTPUT},
    };
    binding bound;
    KVPI_TRY(check_rules(rules, sizeof rules / sizeof rules[0], &bound, ctx));
    KVPI_TRY(check_overlaps(rules, sizeof rules / sizeof rules[0], NULL, ctx));
    return check_edges(&bound, ctx);
}

kvp_status kvpi_check_share(const kvp_share_args *args, kvp_context *ctx) {
    KVPI_TRY(check_size(args->size, sizeof *args, "kvp_share_args", ctx));
    const rule rules[] = {
        {"scores", &args->scores, "BHT", F32, REQUIRED},
        {"segments", &args->segments, "BE", I32, REQUIRED | TABLE},
        {"quotas", &args->quotas, "BHS", I32, REQUIRED | TABLE},
        {"floors", &args->floors, "BHS", I32, REQUIRED | TABLE},
        {"counts", &args->counts, "BHS", I32, REQUIRED | OUTPUT},
    };
    binding bound;
    KVPI_TRY(check_rules(rules, sizeof rules / sizeof rules[0], &bound, ctx));
    KVPI_TRY(check_overlaps(rules, sizeof rules / sizeof rules[0], NULL, ctx));
    if (bound.size['H'] * bound.size['T'] > INT32_MAX)
        return kvpi_fail(ctx, KVP_ERR_UNSUPPORTED,
                         "H times T is %lld in scores; heads share among %d positions at most",
                         (long long)(bound.size['H'] * bound.size['T']), INT32_MAX);
    return check_edges(&bound, ctx);
}

kvp_status kvpi_check_gather(const kvp_gather_args *args, kvp_context *ctx) {
    KVPI_TRY(check_size(args->size, sizeof *args, "kvp_gather_args", ctx));
    const rule rules[] = {
        {"keys", &args->keys, "BHTD", FLOATS, REQUIRED},
        {"values", &args->values, "BHTC", FLOATS, REQUIRED},
        {"positions", &args->positions, "BHK", I32, REQUIRED},
        {"out_keys", &args->out_keys, "BHKD", FLOATS, REQUIRED | OUTPUT},
        {"out_values", &args->out_values, "BHKC", FLOATS, REQUIRED | OUTPUT},
    };
    binding bound;
    KVPI_TRY(check_rules(rules, sizeof rules / sizeof rules[0], &bound, ctx));
    KVPI_TRY(check_one_dtype(rules, 1, 1, &args->keys, ctx));
    KVPI_TRY(check_one_dtype(rules, 3, 4, &args->keys, ctx));
    const rule *const in_place_of[] = {NULL, NULL, NULL, &rules[0], &rules[1]};
    return check_overlaps(rules, sizeof rules / sizeof rules[0], in_place_of, ctx);
}

kvp_status kvpi_check_press(const kvp_press_args *args, kvp_context *ctx) {
    KVPI_TRY(check_size(args->size, sizeof *args, "kvp_press_args", ctx));
    const kvpi_scorer *scorer = kvpi_scorer_at(args->scorer);
    if (!scorer)
        return kvpi_fail(ctx, KVP_ERR_VALUE, "scorer is %d; expected 0 to %d", (int)args->scorer,
                         KVPI_SCORER_COUNT - 1);
    const rule rules[] = {
        {"keys", &args->keys, "BHTD", FLOATS, REQUIRED},
        {"values", &args->values, "BHTC", FLOATS, REQUIRED},
        {"out_keys", &args->out_keys, "BHKD", FLOATS, REQUIRED | OUTPUT},
        {"out_values", &args->out_values, "BHKC", FLOATS, REQUIRED | OUTPUT},
        {"queries", &args->queries, "BNQD", FLOATS, asked(scorer, KVP_NEEDS_QUERIES)},
        {"votes", &args->votes, "BVF", I32, asked(scorer, KVP_NEEDS_VOTES) | TABLE},
        {"valid", &args->valid, "BR", I32, TABLE},
        {"lse", &args->lse, "BNQ", F32, OPTIONAL},
        {"segments", &args->segments, "BE", I32, REQUIRED | TABLE},
        {"quotas", &args->quotas, "BHS", I32, REQUIRED | TABLE},
        {"protect", &args->protect, "BT", U8, OPTIONAL},
        {"positions", &args->positions, "BHK", I32, REQUIRED | OUTPUT},
        {"counts", &args->counts, "BH", I32, OPTIONAL | OUTPUT},
    };
    enum { N_RULE = sizeof rules / sizeof rules[0] };
    _Static_assert(N_RULE <= MAX_RULE, "the verb with the most arguments");
    const rule *const in_place_of[N_RULE] = {NULL, NULL, &rules[0], &rules[1]};
    binding bound;
    KVPI_TRY(check_rules(rules, N_RULE, &bound, ctx));
    KVPI_TRY(check_one_dtype(rules, 1, 3, &args->keys, ctx));
    KVPI_TRY(check_scorer(scorer, &args->keys, &args->queries, &args->votes, args->param, &bound, ctx));
    KVPI_TRY(check_edges(&bound, ctx));
    return check_overlaps(rules, N_RULE, in_place_of, ctx);
}

kvp_status kvpi_check_expect(const kvp_expect_args *args, kvp_context *ctx) {
    KVPI_TRY(check_size(args->size, sizeof *args, "kvp_expect_args", ctx));
    const rule rules[] = {
        {"keys", &args->keys, "BHTD", FLOATS, REQUIRED},
        {"queries", &args->queries, "BNTD", FLOATS, REQUIRED},
        {"values", &args->values, "BHTC", FLOATS, OPTIONAL},
        {"cosines", &args->cosines, "BOTD", F32, REQUIRED},
        {"sines", &args->sines, "BOTD", F32, REQUIRED},
        {"ahead_cosines", &args->ahead_cosines, "BD", F32, REQUIRED},
        {"ahead_sines", &args->ahead_sines, "BD", F32, REQUIRED},
        {"segments", &args->segments, "BE", I32, REQUIRED | TABLE},
        {"sinks", &args->sinks, "N", F32, OPTIONAL},
        {"logits", &args->logits, "BNT", F32, REQUIRED | OUTPUT},
        {"scores", &args->scores, "BHT", F32, REQUIRED | OUTPUT},
    };
    binding bound;
    KVPI_TRY(check_rules(rules, sizeof rules / sizeof rules[0], &bound, ctx));
    KVPI_TRY(check_one_dtype(rules, 1, 1, &args->keys, ctx));
    KVPI_TRY(check_groups(&bound, ctx));
    if (bound.size['D'] % 2 || bound.size['D'] > KVPI_MAX_SQUARE)
        return kvpi_fail(ctx, KVP_ERR_SHAPE,
                         "keys.shape[3] is %lld; expected an even number, of pairs that turn, %d at most",
                         (long long)bound.size['D'], KVPI_MAX_SQUARE);
    if (bound.size['N'] > INT32_MAX / bound.size['B'])
        return kvpi_fail(ctx, KVP_ERR_SHAPE, "B times N is %lld times %lld; expected at most %d together",
                         (long long)bound.size['B'], (long long)bound.size['N'], INT32_MAX);
    if (bound.size['O'] != 1)
        return kvpi_fail(ctx, KVP_ERR_SHAPE, "cosines.shape[1] is %lld; expected 1, for all heads",
                         (long long)bound.size['O']);
    if (bound.size['E'] < 3)
        return kvpi_fail(ctx, KVP_ERR_SHAPE,
                         "segments.shape[1] is %lld; expected at least 3, the edges of what is kept unjudged and of a "
                         "segment that is judged",
                         (long long)bound.size['E']);
    if (!(fabs(args->scaling) <= (double)FLT_MAX))
        return kvpi_fail(ctx, KVP_ERR_VALUE, "scaling is %g; expected a number that is finite in float32, %g at most",
                         args->scaling, (double)FLT_MAX);
    if (!(args->epsilon >= 0 && args->epsilon <= (double)FLT_MAX))
        return kvpi_fail(ctx, KVP_ERR_VALUE, "epsilon is %g; expected a number from 0 to %g", args->epsilon,
                         (double)FLT_MAX);
    KVPI_TRY(kvpi_check_whole(args->with_spread, "with_spread", 0, 1, ctx));
    return check_overlaps(rules, sizeof rules / sizeof rules[0], NULL, ctx);
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * The contract of the tensors as a plain list of flaws, and what must hold for every call.
 */
#include "producer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_SCRATCH = 4 << 20, MOST_ELEMENTS = 1 << 15, MOST_LISTED = 1 << 12 };

/* ----------------------------------------------------------- the contract */

static const char *find_own_flaw(const argument *a) {
    const kvp_tensor *t = a->tensor;
    double bytes = t->dtype == KVP_U8 ? 1 : t->dtype == KVP_F16 || t->dtype == KVP_BF16 ? 2 : 4, reach = 1;
    if (!a->given) return a->required ? "a tensor is missing" : NULL;
    if (t->ndim != (int32_t)strlen(a->letters)) return "a rank is wrong";
    if (t->dtype < KVP_F32 || t->dtype > KVP_U8 || !(a->allowed >> t->dtype & 1)) return "an element type is wrong";
    if (t->device != KVP_CPU) return "a device is not the CPU";
    if ((uintptr_t)t->data % (size_t)bytes) return "data is misaligned";
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] < 1 || t->shape[d] > INT32_MAX) return "a size is below 1 or above 2^31 - 1";
        if (t->stride[d] < 0) return "a stride is negative";
        if (t->stride[d] > INT64_MAX / 16) return "a stride overflows in bytes";
        bytes *= (double)t->shape[d];
        reach += (double)(t->shape[d] - 1) * (double)t->stride[d];
    }
    if (bytes > 0x1p60 || reach > 0x1p60) return "an offset overflows";
    return NULL;
}

static const char *find_unequal_sizes(const call *c) {
    for (int i = 0; i < c->n_argument; i++)
        for (int k = 0; k < i; k++) {
            const argument *x = &c->arguments[i], *y = &c->arguments[k];
            if (!x->given || !y->given) continue;
            for (int d = 0; x->letters[d]; d++)
                for (int e = 0; y->letters[e]; e++)
                    if (x->letters[d] == y->letters[e] && x->tensor->shape[d] != y->tensor->shape[e])
                        return "sizes differ";
            if (x->allowed == ALLOW_FLOATS && y->allowed == ALLOW_FLOATS && x->tensor->dtype != y->tensor->dtype)
                return "element types differ";
            if (!x->table && !y->table && x->tensor->device_index != y->tensor->device_index) return "devices differ";
        }
    return NULL;
}

/* The addresses of all elements, in order of index. Returns how many, or 0 if there are too many to list. */
static int64_t list_addresses(const kvp_tensor *t, uintptr_t *list) {
    int64_t size[4] = {1, 1, 1, 1}, n = 0;
    double count = 1;
    for (int d = 0; d < t->ndim; d++) count *= (double)(size[d] = t->shape[d]);
    if (count > MOST_LISTED) return 0;
    for (int64_t i = 0; i < size[0]; i++)
        for (int64_t j = 0; j < size[1]; j++)
            for (int64_t k = 0; k < size[2]; k++)
                for (int64_t l = 0; l < size[3]; l++) list[n++] = (uintptr_t)element(t, i, j, k, l);
    return n;
}

static int compare_addresses(const void *x, const void *y) {
    const uintptr_t a = *(const uintptr_t *)x, b = *(const uintptr_t *)y;
    return a < b ? -1 : a > b;
}

/* Sorted lists of elements of a and b bytes: does any pair share a byte? */
static bool lists_meet(const uintptr_t *x, int64_t n_x, size_t a, const uintptr_t *y, int64_t n_y, size_t b) {
    for (int64_t i = 0, k = 0; i < n_x && k < n_y;) {
        if (x[i] + a <= y[k])
            i++;
        else if (y[k] + b <= x[i])
            k++;
        else
            return true;
    }
    return false;
}

static const char *find_shared_memory(const call *c, const argument *out) {
    static uintptr_t own[MOST_LISTED], others[MOST_LISTED];
    const int64_t n = list_addresses(out->tensor, own);
    qsort(own, (size_t)n, sizeof own[0], compare_addresses);
    for (int64_t i = 1; i < n; i++)
        if (own[i] == own[i - 1]) return "an output writes an address twice";
    for (int i = 0; i < c->n_argument; i++) {
        const argument *a = &c->arguments[i];
        if (a == out || !a->given) continue;
        const kvp_tensor *t = a->tensor;
        const int64_t n_other = list_addresses(t, others);
        qsort(others, (size_t)n_other, sizeof others[0], compare_addresses);
        if (!lists_meet(own, n, dtype_size(out->tensor->dtype), others, n_other, dtype_size(t->dtype))) continue;
        bool is_start = t->data == out->tensor->data;
        for (int d = 0; d < out->tensor->ndim; d++)
            is_start = is_start && (out->tensor->shape[d] == 1 || t->stride[d] == out->tensor->stride[d]);
        if (i != out->in_place_of || !is_start) return "an output shares memory";
        for (int64_t k = 1; k < n_other; k++)
            if (others[k] == others[k - 1]) return "an output is its input, which holds an address twice";
    }
    return NULL;
}

const char *find_flaw(const call *c) {
    const char *flaw;
    for (int i = 0; i < c->n_argument; i++)
        if ((flaw = find_own_flaw(&c->arguments[i]))) return flaw;
    if ((flaw = find_unequal_sizes(c))) return flaw;
    for (int i = 0; i < c->n_argument; i++)
        if (c->arguments[i].output && (flaw = find_shared_memory(c, &c->arguments[i]))) return flaw;
    return NULL;
}

/* ------------------------------------------------------------------ calls */

typedef struct memories {
    block copy[MAX_ARGUMENTS];
} memories;

static memories copy_memories(const call *c) {
    memories m = {0};
    for (int i = 0; i < c->n_argument; i++) {
        const block *from = &c->arguments[i].memory;
        if (!from->data) continue;
        m.copy[i] = new_block(from->bytes);
        memcpy(m.copy[i].data, from->data, from->bytes);
    }
    return m;
}

static void free_memories(const call *c, memories *m) {
    for (int i = 0; i < c->n_argument; i++) free_block(&m->copy[i]);
}

static void restore_memories(const call *c, const memories *m) {
    for (int i = 0; i < c->n_argument; i++)
        if (m->copy[i].data) memcpy(c->arguments[i].memory.data, m->copy[i].data, m->copy[i].bytes);
}

/* "but_outputs": memories in which an output lies are left out. */
static void check_memories(const call *c, const memories *m, bool but_outputs, const char *what) {
    for (int i = 0; i < c->n_argument; i++) {
        bool has_output = false;
        for (int k = 0; k < c->n_argument; k++)
            has_output |= c->arguments[k].output && c->arguments[k].given && (k == i || c->arguments[k].over == i);
        if (!m->copy[i].data || (but_outputs && has_output)) continue;
        check_guards(&c->arguments[i].memory);
        CHECK(memcmp(c->arguments[i].memory.data, m->copy[i].data, m->copy[i].bytes) == 0, "the memory of %s %s",
              c->arguments[i].name, what);
    }
}

/* The worst order of tasks that threads could come to. */
static void run_backwards(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg) {
    for (int64_t task = n_task - 1; task >= 0; task--) fn(arg, task, (int32_t)(task % n_worker));
}

typedef enum scratch_kind {
    SCRATCH_EXACT,
    SCRATCH_SHORT,
    SCRATCH_NONE,
    SCRATCH_MISALIGNED,
    SCRATCH_KINDS
} scratch_kind;

/* Calls with scratch of "need" bytes, or with none that will do. */
static kvp_status call_with(const call *c, size_t need, scratch_kind kind, bool threads, char *error) {
    block scratch = new_block(need + (kind == SCRATCH_MISALIGNED));
    kvp_context ctx = {.n_worker = threads ? 3 : 1, .parallel_for = threads ? run_backwards : NULL};
    kvp_status status;
    memset(scratch.data, threads ? 0x5a : 0xff, scratch.bytes);
    memset(ctx.error, 0x7f, sizeof ctx.error);
    ctx.workspace = kind == SCRATCH_NONE ? NULL : scratch.data + (kind == SCRATCH_MISALIGNED);
    ctx.workspace_bytes = need - (kind == SCRATCH_SHORT && need > 0);
    if (c->verb == KVP_SCORE)
        status = kvp_score(c->args, &ctx);
    else if (c->verb == KVP_SELECT)
        status = kvp_select(c->args, &ctx);
    else if (c->verb == KVP_SHARE)
        status = kvp_share(c->args, &ctx);
    else
        status = kvp_gather(c->args, &ctx);
    memcpy(error, ctx.error, sizeof ctx.error);
    free_block(&scratch);
    return status;
}

static void check_refusal(const call *c, const memories *before, const char *error) {
    CHECK(memchr(error, 0, KVP_ERROR_BYTES) && strlen(error) > 10, "no error sentence");
    check_memories(c, before, false, "was written by a call that was refused");
}

/* Between the elements of an output nothing may be written. */
static void check_gaps(const call *c, const memories *before) {
    for (int i = 0; i < c->n_argument; i++) {
        const argument *a = &c->arguments[i];
        if (!a->output || !a->given) continue;
        const int at = a->over == UNSHARED ? i : a->over;
        const block *now = &c->arguments[at].memory;
        block marks = new_block(now->bytes);
        memset(marks.data, 0, marks.bytes);
        for (int k = 0; k < c->n_argument; k++) {
            const argument *other = &c->arguments[k];
            if (!other->output || !other->given || (k != at && other->over != at)) continue;
            kvp_tensor view = *other->tensor;
            view.data = marks.data + ((unsigned char *)view.data - now->data);
            int64_t size[4] = {1, 1, 1, 1};
            for (int d = 0; d < view.ndim; d++) size[d] = view.shape[d];
            for (int64_t n = 0; n < size[0] * size[1] * size[2] * size[3]; n++)
                memset(element(&view, n / (size[1] * size[2] * size[3]), n / (size[2] * size[3]) % size[1],
                               n / size[3] % size[2], n % size[3]),
                       1, dtype_size(view.dtype));
        }
        size_t touched = 0;
        for (size_t k = 0; k < now->bytes; k++) touched += !marks.data[k] && now->data[k] != before->copy[at].data[k];
        CHECK(touched == 0, "%zu bytes between the elements of %s were written", touched, a->name);
        free_block(&marks);
    }
}

/* More work than a fuzzer has time for, or more scratch than it has memory. */
static bool is_heavy(const call *c, size_t scratch) {
    double count = 0;
    for (int i = 0; i < c->n_argument; i++) {
        double own = 1;
        for (int d = 0; c->arguments[i].given && d < c->arguments[i].tensor->ndim && d < 4; d++)
            own *= (double)c->arguments[i].tensor->shape[d];
        count += own;
    }
    return c->too_long || scratch > MOST_SCRATCH || count > MOST_ELEMENTS;
}

static void call_again(const call *c, const memories *before, size_t need, bool threads, const memories *first,
                       const char *what) {
    char error[KVP_ERROR_BYTES];
    restore_memories(c, before);
    const kvp_status status = call_with(c, need, SCRATCH_EXACT, threads, error);
    CHECK(status == KVP_OK, "%s: %s", what, status == KVP_OK ? "" : error);
    check_memories(c, first, false, what);
}

static void use_isa(int64_t index) {
    for (int32_t n = 0; kvp_cpu_isa_name(n); n++)
        if (n == index) kvp_cpu_isa_set(kvp_cpu_isa_name(n)); /* stays as it is where this CPU lacks it */
}

static void run_accepted(call *c, const memories *before, size_t need, bool same_on_every_isa,
                         void (*verify)(const call *)) {
    const char *flaw = find_flaw(c);
    if (!CHECK(!flaw, "a call was accepted although %s", flaw ? flaw : "")) return;
    memories first = copy_memories(c);
    size_t need_of_3 = 0;
    check_memories(c, before, true, "was written, which is an input's");
    check_gaps(c, before);
    verify(c);
    CHECK(kvp_workspace(c->verb, c->args, 3, &need_of_3) == KVP_OK && need_of_3 >= need,
          "%zu bytes for 3 workers, %zu for one", need_of_3, need);
    call_again(c, before, need_of_3, true, &first, "differs with three workers");
    if (same_on_every_isa) {
        use_isa(0);
        call_again(c, before, need, false, &first, "differs on another instruction set");
    }
    free_memories(c, &first);
}

void run_call(call *c, bool same_on_every_isa, void (*verify)(const call *)) {
    char error[KVP_ERROR_BYTES], isa[32];
    size_t need = 0, need_of_3 = 0;
    const scratch_kind kind = take(c->in, 8) ? SCRATCH_EXACT : (scratch_kind)take(c->in, SCRATCH_KINDS);
    snprintf(isa, sizeof isa, "%s", kvp_cpu_isa());
    use_isa(take(c->in, 4));
    const kvp_status asked = kvp_workspace(c->verb, c->args, 1, &need);
    if (asked == KVP_OK && kvp_workspace(c->verb, c->args, 3, &need_of_3) == KVP_OK && is_heavy(c, need_of_3)) {
        if (need > 0)
            CHECK(call_with(c, 0, SCRATCH_EXACT, false, error) == KVP_ERR_WORKSPACE,
                  "%zu bytes of scratch are not missed", need);
    } else {
        memories before = copy_memories(c);
        const kvp_status status = call_with(c, need, kind, false, error);
        if (status != KVP_OK) check_refusal(c, &before, error);
        CHECK(asked == KVP_OK || status == asked, "kvp_workspace refuses with %s, the verb with %s",
              kvp_status_name(asked), kvp_status_name(status));
        if (asked == KVP_OK && kind != SCRATCH_EXACT && need > 0)
            CHECK(status == KVP_ERR_WORKSPACE, "bad scratch of kind %d: %s", (int)kind, kvp_status_name(status));
        else
            CHECK(status == KVP_OK || c->spoilt, "a good call was refused: %s", error);
        if (status == KVP_OK) run_accepted(c, &before, need, same_on_every_isa, verify);
        free_memories(c, &before);
    }
    kvp_cpu_isa_set(isa);
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * The verbs as Python functions. What a verb takes is a list of slots, so that reading, running and cleaning up
 * are written once.
 */
#include "verbs.h"

#include <string.h>

static const kvpb_spec score_spec = {
    "score",
    KVP_SCORE,
    7,
    {{"keys", KVP_FLOAT_NAMES, offsetof(kvp_score_args, keys), KVPB_INPUT},
     {"values", KVP_FLOAT_NAMES, offsetof(kvp_score_args, values), KVPB_OPTIONAL},
     {"queries", KVP_FLOAT_NAMES, offsetof(kvp_score_args, queries), KVPB_OPTIONAL},
     {"votes", "int32", offsetof(kvp_score_args, votes), KVPB_OPTIONAL},
     {"valid", "int32", offsetof(kvp_score_args, valid), KVPB_OPTIONAL},
     {"lse", "float32", offsetof(kvp_score_args, lse), KVPB_OPTIONAL},
     {"scores", "float32", offsetof(kvp_score_args, scores), KVPB_OUTPUT}},
};

static const kvpb_spec select_spec = {
    "select",
    KVP_SELECT,
    7,
    {{"scores", "float32", offsetof(kvp_select_args, scores), KVPB_INPUT},
     {"segments", "int32", offsetof(kvp_select_args, segments), KVPB_INPUT},
     {"quotas", "int32", offsetof(kvp_select_args, quotas), KVPB_INPUT},
     {"protect", "uint8 or bool", offsetof(kvp_select_args, protect), KVPB_OPTIONAL},
     {"valid", "int32", offsetof(kvp_select_args, valid), KVPB_OPTIONAL},
     {"positions", "int32", offsetof(kvp_select_args, positions), KVPB_OUTPUT},
     {"counts", "int32", offsetof(kvp_select_args, counts), KVPB_OUTPUT}},
};

static const kvpb_spec share_spec = {
    "share",
    KVP_SHARE,
    5,
    {{"scores", "float32", offsetof(kvp_share_args, scores), KVPB_INPUT},
     {"segments", "int32", offsetof(kvp_share_args, segments), KVPB_INPUT},
     {"quotas", "int32", offsetof(kvp_share_args, quotas), KVPB_INPUT},
     {"floors", "int32", offsetof(kvp_share_args, floors), KVPB_INPUT},
     {"counts", "int32", offsetof(kvp_share_args, counts), KVPB_OUTPUT}},
};

static const kvpb_spec gather_spec = {
    "gather",
    KVP_GATHER,
    5,
    {{"keys", KVP_FLOAT_NAMES, offsetof(kvp_gather_args, keys), KVPB_INPUT},
     {"values", KVP_FLOAT_NAMES, offsetof(kvp_gather_args, values), KVPB_INPUT},
     {"positions", "int32", offsetof(kvp_gather_args, positions), KVPB_INPUT},
     {"out_keys", KVP_FLOAT_NAMES, offsetof(kvp_gather_args, out_keys), KVPB_OUTPUT},
     {"out_values", KVP_FLOAT_NAMES, offsetof(kvp_gather_args, out_values), KVPB_OUTPUT}},
};

static const kvpb_spec expect_spec = {
    "expect",
    KVP_EXPECT,
    11,
    {{"keys", KVP_FLOAT_NAMES, offsetof(kvp_expect_args, keys), KVPB_INPUT},
     {"queries", KVP_FLOAT_NAMES, offsetof(kvp_expect_args, queries), KVPB_INPUT},
     {"values", KVP_FLOAT_NAMES, offsetof(kvp_expect_args, values), KVPB_OPTIONAL},
     {"cosines", "float32", offsetof(kvp_expect_args, cosines), KVPB_INPUT},
     {"sines", "float32", offsetof(kvp_expect_args, sines), KVPB_INPUT},
     {"ahead_cosines", "float32", offsetof(kvp_expect_args, ahead_cosines), KVPB_INPUT},
     {"ahead_sines", "float32", offsetof(kvp_expect_args, ahead_sines), KVPB_INPUT},
     {"segments", "int32", offsetof(kvp_expect_args, segments), KVPB_INPUT},
     {"sinks", "float32", offsetof(kvp_expect_args, sinks), KVPB_OPTIONAL},
     {"logits", "float32", offsetof(kvp_expect_args, logits), KVPB_OUTPUT},
     {"scores", "float32", offsetof(kvp_expect_args, scores), KVPB_OUTPUT}},
};

/* Whatever returns an int returns 0, or -1 with an exception set. */

int kvpb_check_count(const char *name, Py_ssize_t n_arg, Py_ssize_t expected) {
    if (n_arg == expected) return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd positional arguments; %zd were given", name, expected, n_arg);
    return -1;
}

const char *kvpb_read_text(PyObject *object, const char *name) {
    Py_ssize_t size;
    if (!PyUnicode_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s is %R; expected a str", name, object);
        return NULL;
    }
    const char *text = PyUnicode_AsUTF8AndSize(object, &size);
    if (text && strlen(text) != (size_t)size) {
        PyErr_Format(PyExc_ValueError, "%s is %R; expected no null character", name, object);
        return NULL;
    }
    return text;
}

int kvpb_read_scorer(PyObject *object, int32_t *scorer) {
    const char *name = kvpb_read_text(object, "scorer");
    if (!name) return -1;
    *scorer = kvp_scorer_find(name);
    if (*scorer >= 0) return 0;
    kvpb_refuse_name("scorer", name, kvp_scorer_name);
    return -1;
}

int kvpb_read_params(PyObject *object, int32_t scorer, double *param) {
    Py_ssize_t n_known = 0;
    for (; kvp_scorer_param(scorer, (int32_t)n_known); n_known++)
        param[n_known] = kvp_scorer_param_default(scorer, (int32_t)n_known);
    if (object == Py_None) return 0;
    const Py_ssize_t n = PySequence_Size(object);
    if (n < 0) return -1;
    if (n > n_known) {
        PyErr_Format(PyExc_ValueError, "params has %zd values; expected at most %zd for the scorer \"%s\"", n, n_known,
                     kvp_scorer_name(scorer));
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(object, i);
        if (!item) return -1;
        param[i] = PyFloat_AsDouble(item);
        Py_DECREF(item);
        if (PyErr_Occurred()) return -1;
    }
    return 0;
}

int kvpb_read_n_worker(PyObject *object, int32_t *n_worker) {
    const long n = PyLong_AsLong(object);
    if (n == -1 && PyErr_Occurred()) return -1;
    if (n < 0 || n > KVPB_MAX_WORKER) {
        PyErr_Format(PyExc_ValueError, "n_worker is %ld; expected 0 to %d", n, KVPB_MAX_WORKER);
        return -1;
    }
    *n_worker = (int32_t)n;
    return 0;
}

int kvpb_read_tensors(const kvpb_state *state, const kvpb_spec *spec, PyObject *const *objects, void *args,
                      kvpb_loans *loans) {
    for (Py_ssize_t i = 0; i < spec->n_tensor; i++) {
        kvp_tensor *tensor = (kvp_tensor *)((char *)args + spec->tensor[i].offset);
        if (kvpb_view(state, &spec->tensor[i], objects[i], tensor, loans) < 0) return -1;
    }
    return 0;
}

/* The caller's buffer. The core checks size and alignment, but cannot know where a bare pointer points. */
static int lend_workspace(const kvpb_state *state, PyObject *object, const kvp_tensor *first, kvp_context *ctx,
                          kvpb_loans *loans) {
    static const kvpb_slot slot = {"workspace", "uint8", 0, KVPB_OUTPUT};
    kvp_tensor buffer;
    if (kvpb_view(state, &slot, object, &buffer, loans) < 0) return -1;
    if (buffer.dtype != KVP_U8) {
        PyErr_SetString(PyExc_TypeError, "workspace does not hold bytes; expected dtype uint8");
        return -1;
    }
    if (buffer.ndim != 1 || (buffer.shape[0] > 1 && buffer.stride[0] != 1)) {
        PyErr_SetString(PyExc_ValueError,
                        "workspace is not a row of bytes; expected a contiguous array of one dimension");
        return -1;
    }
    if (buffer.device != first->device || buffer.device_index != first->device_index) {
        PyErr_SetString(state->device_error, "workspace is on another device than the tensors; expected one device");
        return -1;
    }
    ctx->workspace = buffer.data;
    ctx->workspace_bytes = (size_t)buffer.shape[0];
    return 0;
}

int kvpb_make_workspace(size_t bytes, kvp_context *ctx, void **owned) {
    if (bytes == 0) return 0;
    *owned = PyMem_Malloc(bytes + 63);
    if (!*owned) {
        PyErr_NoMemory();
        return -1;
    }
    ctx->workspace = (char *)*owned + (64 - (uintptr_t)*owned % 64) % 64;
    ctx->workspace_bytes = bytes;
    return 0;
}

static size_t count_elements(const kvp_tensor *t) {
    size_t count = 1;
    for (int d = 0; d < t->ndim; d++) count *= (size_t)t->shape[d];
    return count;
}

static void copy_table(kvp_tensor *t, int32_t *to) {
    const size_t count = count_elements(t);
    for (size_t i = 0; i < count; i++) {
        const volatile int32_t *from = t->data;
        size_t left = i;
        for (int d = t->ndim - 1; d >= 0; left /= (size_t)t->shape[d--])
            from += (int64_t)(left % (size_t)t->shape[d]) * t->stride[d];
        to[i] = *from;
    }
    t->data = to;
    for (int64_t d = t->ndim - 1, step = 1; d >= 0; step *= t->shape[d--]) t->stride[d] = step;
}

int kvpb_own_tables(const kvpb_spec *spec, kvpb_args *args, void **owned) {
    kvp_tensor *table[KVPB_MAX_TENSOR];
    Py_ssize_t n = 0;
    size_t bytes = 0;
    for (Py_ssize_t i = 0; i < spec->n_tensor; i++) {
        kvp_tensor *t = (kvp_tensor *)((char *)args + spec->tensor[i].offset);
        if (!t->data || t->device != KVP_CPU) continue;
        bytes += count_elements(t) * sizeof(int32_t);
        table[n++] = t;
    }
    if (n == 0) return 0;
    int32_t *to = *owned = PyMem_Malloc(bytes);
    if (!to) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; to += count_elements(table[i++])) copy_table(table[i], to);
    return 0;
}

kvp_status kvpb_run(kvp_verb verb, const void *args, kvp_context *ctx) {
    switch (verb) {
    case KVP_SCORE: return kvp_score(args, ctx);
    case KVP_SELECT: return kvp_select(args, ctx);
    case KVP_GATHER: return kvp_gather(args, ctx);
    case KVP_PRESS: return kvp_press(args, ctx);
    case KVP_SHARE: return kvp_share(args, ctx);
    case KVP_EXPECT: return kvp_expect(args, ctx);
    }
    return KVP_ERR_INTERNAL;
}

/* Borrow, run without the GIL, give back: the last on every path. */
static PyObject *call_verb(PyObject *module, const kvpb_spec *spec, kvpb_args *args, PyObject *const *objects,
                           PyObject *workspace, PyObject *n_worker) {
    const kvpb_state *state = PyModule_GetState(module);
    const kvp_tensor *first = (const kvp_tensor *)((const char *)args + spec->tensor[0].offset);
    kvpb_loans loans = {.n_held = 0};
    kvp_context ctx = {.parallel_for = kvpb_parallel_for};
    void *owned = NULL; /* host memory: scratch of a CPU, or tables of a GPU's call */
    PyObject *result = NULL;
    size_t bytes;
    int failed =
        kvpb_read_n_worker(n_worker, &ctx.n_worker) < 0 || kvpb_read_tensors(state, spec, objects, args, &loans) < 0;
    const bool on_cpu = first->device == KVP_CPU, wants = !on_cpu || workspace == Py_None;
    /* what the core refuses gets nothing: the verb then says why */
    if (!failed && wants && kvp_workspace(spec->verb, args, ctx.n_worker, &bytes) == KVP_OK)
        failed = (on_cpu ? kvpb_make_workspace(bytes, &ctx, &owned) : kvpb_own_tables(spec, args, &owned)) < 0;
    if (!failed && workspace != Py_None) failed = lend_workspace(state, workspace, first, &ctx, &loans) < 0;
    if (!failed) {
        kvp_status status;
        ctx.stream = loans.stream;
        Py_BEGIN_ALLOW_THREADS status = kvpb_run(spec->verb, args, &ctx);
        Py_END_ALLOW_THREADS result = status == KVP_OK ? Py_NewRef(Py_None) : kvpb_raise(state, status, &ctx);
    }
    PyMem_Free(owned);
    kvpb_return_loans(&loans);
    return result;
}

/* kvp_workspace refuses without a sentence; the verb, refusing for the same reason, has one. */
static PyObject *size_workspace(PyObject *module, const kvpb_spec *spec, kvpb_args *args, PyObject *const *objects,
                                PyObject *n_worker) {
    const kvpb_state *state = PyModule_GetState(module);
    kvpb_loans loans = {.n_held = 0};
    PyObject *result = NULL;
    kvp_context ctx = {.n_worker = 1};
    if (kvpb_read_n_worker(n_worker, &ctx.n_worker) == 0 &&
        kvpb_read_tensors(state, spec, objects, args, &loans) == 0) {
        size_t bytes;
        kvp_status status = kvp_workspace(spec->verb, args, ctx.n_worker, &bytes);
        if (status == KVP_OK) {
            result = PyLong_FromSize_t(bytes);
        } else {
            kvpb_run(spec->verb, args, &ctx);
            kvpb_raise(state, status, &ctx);
        }
    }
    kvpb_return_loans(&loans);
    return result;
}

PyObject *kvpb_score(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    kvpb_args args = {.score = {.size = sizeof(kvp_score_args), .scorer = -1}};
    if (kvpb_check_count("score", n_object, 11) < 0 || kvpb_read_scorer(objects[0], &args.score.scorer) < 0 ||
        kvpb_read_params(objects[8], args.score.scorer, args.score.param) < 0)
        return NULL;
    return call_verb(module, &score_spec, &args, objects + 1, objects[9], objects[10]);
}

PyObject *kvpb_select(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    kvpb_args args = {.select = {.size = sizeof(kvp_select_args)}};
    if (kvpb_check_count("select", n_object, 9) < 0) return NULL;
    return call_verb(module, &select_spec, &args, objects, objects[7], objects[8]);
}

PyObject *kvpb_share(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    kvpb_args args = {.share = {.size = sizeof(kvp_share_args)}};
    if (kvpb_check_count("share", n_object, 7) < 0) return NULL;
    return call_verb(module, &share_spec, &args, objects, objects[5], objects[6]);
}

PyObject *kvpb_gather(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    kvpb_args args = {.gather = {.size = sizeof(kvp_gather_args)}};
    if (kvpb_check_count("gather", n_object, 6) < 0) return NULL;
    return call_verb(module, &gather_spec, &args, objects, Py_None, objects[5]);
}

PyObject *kvpb_score_workspace(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    kvpb_args args = {.score = {.size = sizeof(kvp_score_args), .scorer = -1}};
    if (kvpb_check_count("score_workspace", n_object, 10) < 0 || kvpb_read_scorer(objects[0], &args.score.scorer) < 0 ||
        kvpb_read_params(objects[8], args.score.scorer, args.score.param) < 0)
        return NULL;
    return size_workspace(module, &score_spec, &args, objects + 1, objects[9]);
}

PyObject *kvpb_select_workspace(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    kvpb_args args = {.select = {.size = sizeof(kvp_select_args)}};
    if (kvpb_check_count("select_workspace", n_object, 8) < 0) return NULL;
    return size_workspace(module, &select_spec, &args, objects, objects[7]);
}

PyObject *kvpb_share_workspace(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    kvpb_args args = {.share = {.size = sizeof(kvp_share_args)}};
    if (kvpb_check_count("share_workspace", n_object, 6) < 0) return NULL;
    return size_workspace(module, &share_spec, &args, objects, objects[5]);
}

/* (tensors, scaling, epsilon, with_spread): -1 with an exception set. */
static int read_expect(PyObject *const *objects, kvp_expect_args *args) {
    PyObject *const *numbers = objects + expect_spec.n_tensor;
    *args = (kvp_expect_args){.size = sizeof *args};
    args->scaling = PyFloat_AsDouble(numbers[0]);
    if (args->scaling == -1 && PyErr_Occurred()) return -1;
    args->epsilon = PyFloat_AsDouble(numbers[1]);
    if (args->epsilon == -1 && PyErr_Occurred()) return -1;
    args->with_spread = PyObject_IsTrue(numbers[2]);
    return args->with_spread < 0 ? -1 : 0;
}

PyObject *kvpb_expect(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    kvpb_args args;
    if (kvpb_check_count("expect", n_object, 16) < 0 || read_expect(objects, &args.expect) < 0) return NULL;
    return call_verb(module, &expect_spec, &args, objects, objects[14], objects[15]);
}

PyObject *kvpb_expect_workspace(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    kvpb_args args;
    if (kvpb_check_count("expect_workspace", n_object, 15) < 0 || read_expect(objects, &args.expect) < 0) return NULL;
    return size_workspace(module, &expect_spec, &args, objects, objects[14]);
}

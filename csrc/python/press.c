/* SPDX-License-Identifier: Apache-2.0
 *
 * Presses as Python functions: verbs one after the other in one call, whose outputs are made here, and so are no
 * arguments.
 */
#include "verbs.h"

static const kvpb_spec press_spec = {
    "press",
    KVP_PRESS,
    9,
    {{"keys", KVP_FLOAT_NAMES, offsetof(kvp_press_args, keys), KVPB_INPUT},
     {"values", KVP_FLOAT_NAMES, offsetof(kvp_press_args, values), KVPB_INPUT},
     {"queries", KVP_FLOAT_NAMES, offsetof(kvp_press_args, queries), KVPB_OPTIONAL},
     {"votes", "int32", offsetof(kvp_press_args, votes), KVPB_OPTIONAL},
     {"valid", "int32", offsetof(kvp_press_args, valid), KVPB_OPTIONAL},
     {"lse", "float32", offsetof(kvp_press_args, lse), KVPB_OPTIONAL},
     {"segments", "int32", offsetof(kvp_press_args, segments), KVPB_INPUT},
     {"quotas", "int32", offsetof(kvp_press_args, quotas), KVPB_INPUT},
     {"protect", "uint8 or bool", offsetof(kvp_press_args, protect), KVPB_OPTIONAL}},
};

enum { N_OUTPUT = 3 };

/* New arrays of n_kept places a head: positions, and the kept rows of keys and values. The counts follow from the
 * quotas. Where the shapes to come from are wrong, nothing is made: the core then says so. */
static int make_outputs(const kvpb_state *state, PyObject *like, int64_t n_kept, const kvp_tensor *keys,
                        const kvp_tensor *values, kvp_tensor *const *tensors, kvpb_made *made) {
    if (keys->ndim != 4 || values->ndim != 4) return 0;
    const int64_t *shape = keys->shape;
    const kvpb_new wanted[N_OUTPUT] = {
        {"positions", KVP_I32, 3, {shape[0], shape[1], n_kept}},
        {"out_keys", (kvp_dtype)keys->dtype, 4, {shape[0], shape[1], n_kept, shape[3]}},
        {"out_values", (kvp_dtype)keys->dtype, 4, {shape[0], shape[1], n_kept, values->shape[3]}},
    };
    for (int i = 0; i < N_OUTPUT; i++)
        if (kvpb_make(state, &wanted[i], like, keys, tensors[i], &made[i]) < 0) return -1;
    return 0;
}

static PyObject *take_outputs(kvpb_made *made) {
    PyObject *result = PyTuple_New(N_OUTPUT);
    for (Py_ssize_t i = 0; result && i < N_OUTPUT; i++) {
        PyObject *array = kvpb_take(&made[i]);
        if (!array || PyTuple_SetItem(result, i, array) < 0) Py_CLEAR(result);
    }
    return result;
}

static int make_scratch(const kvpb_state *state, PyObject *like, const kvp_tensor *keys, size_t bytes, kvp_context *ctx,
                        struct kvpb_dl_versioned **scratch) {
    kvp_tensor buffer;
    if (bytes == 0) return 0;
    if (!(*scratch = kvpb_make_scratch(state, bytes, like, keys, &buffer))) return -1;
    ctx->workspace = buffer.data;
    ctx->workspace_bytes = bytes;
    return 0;
}

static int read_n_kept(PyObject *object, int64_t *n_kept) {
    *n_kept = PyLong_AsLongLong(object);
    if (*n_kept == -1 && PyErr_Occurred()) return -1;
    if (*n_kept >= 1 && *n_kept <= INT32_MAX) return 0;
    PyErr_Format(PyExc_ValueError, "n_kept is %lld; expected 1 to %d", (long long)*n_kept, INT32_MAX);
    return -1;
}

/* What a press needs beside its arguments, as call_verb sees to it; the scratch of a GPU is made here. */
static int prepare_press(const kvpb_state *state, PyObject *like, kvpb_args *args, kvp_context *ctx, void **owned,
                         struct kvpb_dl_versioned **scratch) {
    size_t bytes;
    if (kvp_workspace(KVP_PRESS, args, ctx->n_worker, &bytes) != KVP_OK) return 0;
    if (args->press.keys.device == KVP_CPU) return kvpb_make_workspace(bytes, ctx, owned);
    if (kvpb_own_tables(&press_spec, args, owned) < 0) return -1;
    return make_scratch(state, like, &args->press.keys, bytes, ctx, scratch);
}

PyObject *kvpb_press(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    const kvpb_state *state = PyModule_GetState(module);
    kvpb_args args = {.press = {.size = sizeof(kvp_press_args)}};
    kvpb_loans loans = {.n_held = 0};
    kvp_context ctx = {.parallel_for = kvpb_parallel_for};
    kvp_tensor *const outputs[] = {&args.press.positions, &args.press.out_keys, &args.press.out_values};
    kvpb_made made[N_OUTPUT] = {{.array = NULL}};
    PyObject *result = NULL;
    struct kvpb_dl_versioned *scratch = NULL;
    void *owned = NULL;
    int64_t n_kept;
    if (kvpb_check_count("press", n_object, 13) < 0 || kvpb_read_scorer(objects[0], &args.press.scorer) < 0 ||
        kvpb_read_params(objects[10], args.press.scorer, args.press.param) < 0 ||
        read_n_kept(objects[11], &n_kept) < 0 || kvpb_read_n_worker(objects[12], &ctx.n_worker) < 0)
        return NULL;
    if (kvpb_read_tensors(state, &press_spec, objects + 1, &args, &loans) == 0 &&
        make_outputs(state, objects[1], n_kept, &args.press.keys, &args.press.values, outputs, made) == 0 &&
        prepare_press(state, objects[1], &args, &ctx, &owned, &scratch) == 0) {
        kvp_status status;
        ctx.stream = loans.stream;
        Py_BEGIN_ALLOW_THREADS status = kvp_press(&args.press, &ctx);
        Py_END_ALLOW_THREADS result = status == KVP_OK ? take_outputs(made) : kvpb_raise(state, status, &ctx);
    }
    for (int i = 0; i < N_OUTPUT; i++) kvpb_drop(&made[i]);
    kvpb_free_scratch(scratch);
    PyMem_Free(owned);
    kvpb_return_loans(&loans);
    return result;
}

/* What follows from scores, by one call: what heads keep that share their quotas, positions and rows. No verb of the
 * core, whose outputs are given: it is known after share how much room they need. */
typedef struct part_args {
    kvp_score_args score;
    kvp_share_args share;
    kvp_select_args select;
    kvp_gather_args gather;
} part_args;

static const kvpb_spec shared_spec = {
    "press_shared",
    KVP_SCORE, /* the first of them */
    10,
    {{"keys", KVP_FLOAT_NAMES, offsetof(part_args, score.keys), KVPB_INPUT},
     {"values", KVP_FLOAT_NAMES, offsetof(part_args, score.values), KVPB_INPUT},
     {"queries", KVP_FLOAT_NAMES, offsetof(part_args, score.queries), KVPB_OPTIONAL},
     {"votes", "int32", offsetof(part_args, score.votes), KVPB_OPTIONAL},
     {"valid", "int32", offsetof(part_args, score.valid), KVPB_OPTIONAL},
     {"lse", "float32", offsetof(part_args, score.lse), KVPB_OPTIONAL},
     {"segments", "int32", offsetof(part_args, share.segments), KVPB_INPUT},
     {"quotas", "int32", offsetof(part_args, share.quotas), KVPB_INPUT},
     {"floors", "int32", offsetof(part_args, share.floors), KVPB_INPUT},
     {"shares", "int32", offsetof(part_args, share.counts), KVPB_OUTPUT}},
};

static const kvpb_spec evict_spec = {
    "evict",
    KVP_SELECT,
    9,
    {{"scores", "float32", offsetof(part_args, score.scores), KVPB_INPUT},
     {"keys", KVP_FLOAT_NAMES, offsetof(part_args, score.keys), KVPB_INPUT},
     {"values", KVP_FLOAT_NAMES, offsetof(part_args, score.values), KVPB_INPUT},
     {"valid", "int32", offsetof(part_args, score.valid), KVPB_OPTIONAL},
     {"segments", "int32", offsetof(part_args, share.segments), KVPB_INPUT},
     {"quotas", "int32", offsetof(part_args, share.quotas), KVPB_INPUT},
     {"protect", "uint8 or bool", offsetof(part_args, select.protect), KVPB_OPTIONAL},
     {"floors", "int32", offsetof(part_args, share.floors), KVPB_OPTIONAL},
     {"shares", "int32", offsetof(part_args, share.counts), KVPB_OPTIONAL}},
};

/* One verb of several on the CPU, with scratch of its own. */
static int run_part(const kvpb_state *state, kvp_verb verb, const void *args, kvp_context *ctx) {
    void *owned = NULL;
    size_t bytes;
    kvp_status status;
    ctx->workspace = NULL;
    ctx->workspace_bytes = 0;
    if (kvp_workspace(verb, args, ctx->n_worker, &bytes) == KVP_OK && kvpb_make_workspace(bytes, ctx, &owned) < 0)
        return -1;
    Py_BEGIN_ALLOW_THREADS status = kvpb_run(verb, args, ctx);
    Py_END_ALLOW_THREADS PyMem_Free(owned);
    if (status != KVP_OK) kvpb_raise(state, status, ctx);
    return status == KVP_OK ? 0 : -1;
}

/* The places that the head needs that has most; the core has checked the shape, and checks what is read here again. */
static int64_t most_of(const kvp_tensor *shares) {
    const int64_t *shape = shares->shape, *stride = shares->stride;
    int64_t most = 1;
    for (int64_t i = 0; i < shape[0] * shape[1]; i++) {
        const volatile int32_t *of_head =
            (const int32_t *)shares->data + i / shape[1] * stride[0] + i % shape[1] * stride[1];
        int64_t sum = 0;
        for (int64_t s = 0; s < shape[2]; s++) sum += of_head[s * stride[2]];
        most = sum > most && sum <= INT32_MAX ? sum : most;
    }
    return most;
}

enum { SCORES, COUNTS, N_BETWEEN };

/* What was made in such a call: what is returned, and what no caller sees. */
typedef struct made_parts {
    kvpb_made out[N_OUTPUT], between[N_BETWEEN];
} made_parts;

static PyObject *end_parts(made_parts *made, kvpb_loans *loans, bool is_done) {
    PyObject *result = is_done ? take_outputs(made->out) : NULL;
    for (int i = 0; i < N_OUTPUT; i++) kvpb_drop(&made->out[i]);
    for (int i = 0; i < N_BETWEEN; i++) kvpb_drop(&made->between[i]);
    kvpb_return_loans(loans);
    return result;
}

static int check_caches(const kvpb_state *state, const part_args *a) {
    const kvp_tensor *keys = &a->score.keys, *values = &a->score.values;
    if (keys->device != KVP_CPU)
        PyErr_SetString(state->device_error, "keys is on a GPU; expected the CPU");
    else if (keys->ndim != 4 || values->ndim != 4)
        PyErr_Format(PyExc_ValueError, "keys has %d dimensions, and values has %d; expected 4", (int)keys->ndim,
                     (int)values->ndim);
    else
        return 0;
    return -1;
}

static int score(const kvpb_state *state, PyObject *like, part_args *a, kvp_context *ctx, made_parts *made) {
    const kvp_tensor *keys = &a->score.keys;
    const kvpb_new wanted = {"scores", KVP_F32, 3, {keys->shape[0], keys->shape[1], keys->shape[2]}};
    if (kvpb_make(state, &wanted, like, keys, &a->score.scores, &made->between[SCORES]) < 0) return -1;
    return run_part(state, KVP_SCORE, &a->score, ctx);
}

/* Heads share where there are floors; else n_kept are the places that they need. */
static int evict(const kvpb_state *state, PyObject *like, part_args *a, int64_t n_kept, kvp_context *ctx,
                 made_parts *made) {
    const kvp_tensor *keys = &a->score.keys, *values = &a->score.values, *quotas = &a->share.quotas;
    const kvpb_new wanted = {"counts", KVP_I32, 2, {keys->shape[0], keys->shape[1]}};
    kvp_tensor *const outputs[] = {&a->select.positions, &a->gather.out_keys, &a->gather.out_values};
    a->share.scores = a->select.scores = a->score.scores;
    if (a->share.floors.data) {
        if (run_part(state, KVP_SHARE, &a->share, ctx) < 0) return -1;
        quotas = &a->share.counts;
        n_kept = most_of(quotas);
    }
    if (make_outputs(state, like, n_kept, keys, values, outputs, made->out) < 0 ||
        kvpb_make(state, &wanted, like, keys, &a->select.counts, &made->between[COUNTS]) < 0)
        return -1;
    a->select.segments = a->share.segments;
    a->select.quotas = *quotas;
    a->select.valid = a->score.valid;
    a->gather.keys = *keys;
    a->gather.values = *values;
    a->gather.positions = a->select.positions;
    return run_part(state, KVP_SELECT, &a->select, ctx) < 0 ? -1 : run_part(state, KVP_GATHER, &a->gather, ctx);
}

static part_args no_parts(void) {
    return (part_args){.score = {.size = sizeof(kvp_score_args), .scorer = -1},
                       .share = {.size = sizeof(kvp_share_args)},
                       .select = {.size = sizeof(kvp_select_args)},
                       .gather = {.size = sizeof(kvp_gather_args)}};
}

PyObject *kvpb_press_shared(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    const kvpb_state *state = PyModule_GetState(module);
    part_args a = no_parts();
    kvpb_loans loans = {.n_held = 0};
    kvp_context ctx = {.parallel_for = kvpb_parallel_for};
    made_parts made = {.out = {{.array = NULL}}};
    if (kvpb_check_count("press_shared", n_object, 13) < 0 || kvpb_read_scorer(objects[0], &a.score.scorer) < 0 ||
        kvpb_read_params(objects[11], a.score.scorer, a.score.param) < 0 ||
        kvpb_read_n_worker(objects[12], &ctx.n_worker) < 0)
        return NULL;
    const bool is_done = kvpb_read_tensors(state, &shared_spec, objects + 1, &a, &loans) == 0 &&
                         check_caches(state, &a) == 0 && score(state, objects[1], &a, &ctx, &made) == 0 &&
                         evict(state, objects[1], &a, 1, &ctx, &made) == 0;
    return end_parts(&made, &loans, is_done);
}

PyObject *kvpb_evict(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    const kvpb_state *state = PyModule_GetState(module);
    part_args a = no_parts();
    kvpb_loans loans = {.n_held = 0};
    kvp_context ctx = {.parallel_for = kvpb_parallel_for};
    int64_t n_kept;
    made_parts made = {.out = {{.array = NULL}}};
    if (kvpb_check_count("evict", n_object, 11) < 0 || read_n_kept(objects[9], &n_kept) < 0 ||
        kvpb_read_n_worker(objects[10], &ctx.n_worker) < 0)
        return NULL;
    const bool is_done = kvpb_read_tensors(state, &evict_spec, objects, &a, &loans) == 0 &&
                         check_caches(state, &a) == 0 && evict(state, objects[1], &a, n_kept, &ctx, &made) == 0;
    return end_parts(&made, &loans, is_done);
}

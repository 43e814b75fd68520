/* SPDX-License-Identifier: Apache-2.0
 *
 * The extension module kvpitfalls._core: what the core says about itself, and the module's life. The verbs are in
 * verbs.c.
 */
#include "binding.h"

#include <stdlib.h>
#include <string.h>

static PyObject *list_params(int32_t scorer) {
    PyObject *list = PyList_New(0), *tuple = NULL;
    for (int32_t i = 0; list && kvp_scorer_param(scorer, i); i++) {
        PyObject *pair = Py_BuildValue("(sd)", kvp_scorer_param(scorer, i), kvp_scorer_param_default(scorer, i));
        if (!pair || PyList_Append(list, pair) < 0) Py_CLEAR(list);
        Py_XDECREF(pair);
    }
    if (list) tuple = PyList_AsTuple(list);
    Py_XDECREF(list);
    return tuple;
}

static PyObject *list_scorers(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *result = PyTuple_New(kvp_scorer_count());
    for (int32_t i = 0; result && i < kvp_scorer_count(); i++) {
        PyObject *params = list_params(i);
        PyObject *entry = params ? Py_BuildValue("(siN)", kvp_scorer_name(i), (int)kvp_scorer_needs(i), params) : NULL;
        if (!entry || PyTuple_SetItem(result, i, entry) < 0) Py_CLEAR(result);
    }
    return result;
}

/* An unknown name is not an error: what nobody has heard of is not supported. */
static PyObject *tell_support(PyObject *module, PyObject *const *objects, Py_ssize_t n_object) {
    static const char *const devices[] = {[KVP_CPU] = "cpu", [KVP_CUDA] = "cuda"};
    static const char *const dtypes[] = {
#define KVP_FLOAT(constant, text, kind, bits) [KVP_##constant] = text,
#define KVP_DTYPE KVP_FLOAT
#include "../dtypes.def"
#undef KVP_FLOAT
#undef KVP_DTYPE
    };
    enum { N_DTYPE = sizeof dtypes / sizeof dtypes[0] };
    const char *scorer, *device, *dtype;
    (void)module;
    if (kvpb_check_count("supports", n_object, 3) < 0) return NULL;
    if (!(scorer = kvpb_read_text(objects[0], "scorer")) || !(device = kvpb_read_text(objects[1], "device")) ||
        !(dtype = kvpb_read_text(objects[2], "dtype")))
        return NULL;
    for (int32_t d = KVP_CPU; d <= KVP_CUDA; d++)
        for (int32_t t = 0; t < N_DTYPE; t++)
            if (strcmp(device, devices[d]) == 0 && strcmp(dtype, dtypes[t]) == 0)
                return PyBool_FromLong(kvp_supports(kvp_scorer_find(scorer), d, t));
    return Py_NewRef(Py_False);
}

static PyObject *tell_isa(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyUnicode_FromString(kvp_cpu_isa());
}

/* what: where the name comes from, for the message. 0, or -1 with an exception set. */
static int choose_isa(const char *what, const char *name) {
    if (kvp_cpu_isa_set(name) == 0) return 0;
    for (int32_t i = 0; kvp_cpu_isa_name(i); i++) {
        if (strcmp(name, kvp_cpu_isa_name(i)) != 0) continue;
        PyErr_Format(PyExc_ValueError, "%s is \"%s\", which this CPU lacks", what, name);
        return -1;
    }
    kvpb_refuse_name(what, name, kvp_cpu_isa_name);
    return -1;
}

static PyObject *set_isa(PyObject *module, PyObject *object) {
    (void)module;
    const char *name = kvpb_read_text(object, "isa");
    return name && choose_isa("isa", name) == 0 ? Py_NewRef(Py_None) : NULL;
}

static PyObject *list_isas(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *list = PyList_New(0), *tuple = NULL;
    for (int32_t i = 0; list && kvp_cpu_isa_name(i); i++) {
        PyObject *name = PyUnicode_FromString(kvp_cpu_isa_name(i));
        if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    if (list) tuple = PyList_AsTuple(list);
    Py_XDECREF(list);
    return tuple;
}

static PyObject *tell_build(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
#if defined(__clang__)
    const char *compiler = __VERSION__; /* begins with its name */
#else
    const char *compiler = "gcc " __VERSION__;
#endif
    PyObject *openmp = PyBool_FromLong(kvpb_has_openmp());
    return Py_BuildValue("{s:s,s:N,s:i}", "compiler", compiler, "openmp", openmp, "abi_version", KVP_ABI_VERSION);
}

/* By way of a plain function pointer, which C allows to hold any other. */
#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

PyDoc_STRVAR(
    score_doc,
    "score($module, scorer, keys, values, queries, votes, valid, lse, scores, params, workspace, n_worker, /)\n--\n\n"
    "Write how much each cached token matters into scores. The contract is in csrc/kvp.h.");
PyDoc_STRVAR(
    select_doc,
    "select($module, scores, segments, quotas, protect, valid, positions, counts, workspace, n_worker, /)\n--\n\n"
    "Write the positions to keep into positions and their number into counts.");
PyDoc_STRVAR(share_doc, "share($module, scores, segments, quotas, floors, counts, workspace, n_worker, /)\n--\n\n"
                        "Write how many positions each head keeps of each segment into counts, where heads share.");
PyDoc_STRVAR(gather_doc, "gather($module, keys, values, positions, out_keys, out_values, n_worker, /)\n--\n\n"
                         "Copy the kept rows of keys and values.");
PyDoc_STRVAR(press_doc, "press($module, scorer, keys, values, queries, votes, valid, lse, segments, quotas, protect, "
                        "params, n_kept, n_worker, /)\n--\n\n"
                        "Score, select and gather: positions of n_kept places a head, and the keys and values that "
                        "are kept, in new arrays.");
PyDoc_STRVAR(press_shared_doc,
             "press_shared($module, scorer, keys, values, queries, votes, valid, lse, segments, quotas, floors, "
             "shares, params, n_worker, /)\n--\n\n"
             "Score, share, select and gather on the CPU, where heads share: what each head keeps of each segment is "
             "written into shares; positions, and the keys and values that are kept, are new arrays.");
PyDoc_STRVAR(evict_doc, "evict($module, scores, keys, values, valid, segments, quotas, protect, floors, shares, "
                        "n_kept, n_worker, /)\n--\n\n"
                        "Select and gather on the CPU, where scores are there, and share before, where floors are "
                        "given: as press and press_shared.");
PyDoc_STRVAR(expect_doc, "expect($module, keys, queries, values, cosines, sines, ahead_cosines, ahead_sines, segments, "
                         "sinks, logits, scores, scaling, epsilon, with_spread, workspace, n_worker, /)\n--\n\n"
                         "Write the logits that queries to come are expected to give to keys into logits, and the "
                         "scores that follow from them into scores.");
PyDoc_STRVAR(expect_workspace_doc,
             "expect_workspace($module, keys, queries, values, cosines, sines, ahead_cosines, ahead_sines, segments, "
             "sinks, logits, scores, scaling, epsilon, with_spread, n_worker, /)\n--\n\n"
             "Bytes of scratch that expect needs.");
PyDoc_STRVAR(
    score_workspace_doc,
    "score_workspace($module, scorer, keys, values, queries, votes, valid, lse, scores, params, n_worker, /)\n--\n\n"
    "Bytes of scratch that score needs for so many workers.");
PyDoc_STRVAR(
    select_workspace_doc,
    "select_workspace($module, scores, segments, quotas, protect, valid, positions, counts, n_worker, /)\n--\n\n"
    "Bytes of scratch that select needs for so many workers.");
PyDoc_STRVAR(share_workspace_doc,
             "share_workspace($module, scores, segments, quotas, floors, counts, n_worker, /)\n--\n\n"
             "Bytes of scratch that share needs for so many workers.");
PyDoc_STRVAR(
    scorers_doc,
    "scorers($module, /)\n--\n\nEach scorer: its name, the KVP_NEEDS_* bits, and its parameters with their defaults.");
PyDoc_STRVAR(
    supports_doc,
    "supports($module, scorer, device, dtype, /)\n--\n\nWhether a device has kernels for this scorer and dtype.");
PyDoc_STRVAR(isa_doc, "isa($module, /)\n--\n\nThe instruction set in use on the CPU.");
PyDoc_STRVAR(
    isa_set_doc,
    "isa_set($module, name, /)\n--\n\nUse another of isas(), for the whole process; ValueError if this CPU lacks it.");
PyDoc_STRVAR(isas_doc, "isas($module, /)\n--\n\nThe instruction sets that this build holds.");
PyDoc_STRVAR(build_info_doc, "build_info($module, /)\n--\n\nThe compiler, whether OpenMP is built in, and the version "
                             "of the core's C interface.");

static PyMethodDef methods[] = {
    {"score", FAST(kvpb_score), score_doc},
    {"select", FAST(kvpb_select), select_doc},
    {"gather", FAST(kvpb_gather), gather_doc},
    {"press", FAST(kvpb_press), press_doc},
    {"press_shared", FAST(kvpb_press_shared), press_shared_doc},
    {"evict", FAST(kvpb_evict), evict_doc},
    {"share", FAST(kvpb_share), share_doc},
    {"expect", FAST(kvpb_expect), expect_doc},
    {"score_workspace", FAST(kvpb_score_workspace), score_workspace_doc},
    {"select_workspace", FAST(kvpb_select_workspace), select_workspace_doc},
    {"share_workspace", FAST(kvpb_share_workspace), share_workspace_doc},
    {"expect_workspace", FAST(kvpb_expect_workspace), expect_workspace_doc},
    {"scorers", list_scorers, METH_NOARGS, scorers_doc},
    {"supports", FAST(tell_support), supports_doc},
    {"isa", tell_isa, METH_NOARGS, isa_doc},
    {"isa_set", set_isa, METH_O, isa_set_doc},
    {"isas", list_isas, METH_NOARGS, isas_doc},
    {"build_info", tell_build, METH_NOARGS, build_info_doc},
    {NULL, NULL, 0, NULL},
};

static int add_registry(PyObject *module) {
    static kvpb_registry registry = {KVP_ABI_VERSION, KVPB_SIZES, kvp_register_backend};
    PyObject *capsule = PyCapsule_New(&registry, KVPB_REGISTRY_NAME, NULL);
    const int failed = !capsule || PyModule_AddObjectRef(module, KVPB_REGISTRY_ATTRIBUTE, capsule) < 0;
    Py_XDECREF(capsule);
    return failed ? -1 : 0;
}

static const char *const names[KVPB_NAMES] = {
    [KVPB_EXCHANGE_API] = "__dlpack_c_exchange_api__",
    [KVPB_DLPACK] = "__dlpack__",
    [KVPB_DLPACK_DEVICE] = "__dlpack_device__",
    [KVPB_IS_NEG] = "is_neg",
    [KVPB_RESOLVE_NEG] = "resolve_neg",
    [KVPB_REQUIRES_GRAD] = "requires_grad",
    [KVPB_DETACH] = "detach",
    [KVPB_UNTYPED_STORAGE] = "untyped_storage",
    [KVPB_NBYTES] = "nbytes",
    [KVPB_STORAGE_OFFSET] = "storage_offset",
};

/* On failure the interpreter drops the module, and free_module what the state already holds. */
static int fill_module(PyObject *module) {
    kvpb_state *state = PyModule_GetState(module);
    const char *isa = getenv("KVP_ISA");
    if (PyInterpreterState_GetID(PyInterpreterState_Get()) !=
        0) { /* the slot below says so too, but no build for the stable ABI has it */
        PyErr_SetString(PyExc_ImportError,
                        "kvpitfalls._core is imported in a subinterpreter; expected the main one, as NumPy does");
        return -1;
    }
    if (kvpb_import_numpy() < 0) return -1;
    if (isa && isa[0] && choose_isa("the environment variable KVP_ISA", isa) < 0) return -1;
    if (kvpb_watch_forks() < 0) {
        PyErr_NoMemory();
        return -1;
    }
    for (int i = 0; i < KVPB_NAMES; i++)
        if (!(state->names[i] = PyUnicode_InternFromString(names[i]))) return -1;
    if (add_registry(module) < 0) return -1;
    PyObject *errors = PyImport_ImportModule("kvpitfalls.errors");
    if (!errors) return -1;
    state->device_error = PyObject_GetAttrString(errors, "DeviceError");
    state->cuda_error = state->device_error ? PyObject_GetAttrString(errors, "CudaError") : NULL;
    Py_DECREF(errors);
    return state->cuda_error ? 0 : -1;
}

static int visit_state(PyObject *module, visitproc visit, void *arg) {
    kvpb_state *state = PyModule_GetState(module);
    Py_VISIT(state->device_error);
    Py_VISIT(state->cuda_error);
    for (int i = 0; i < KVPB_NAMES; i++) Py_VISIT(state->names[i]);
    return 0;
}

static int clear_state(PyObject *module) {
    kvpb_state *state = PyModule_GetState(module);
    Py_CLEAR(state->device_error);
    Py_CLEAR(state->cuda_error);
    for (int i = 0; i < KVPB_NAMES; i++) Py_CLEAR(state->names[i]);
    return 0;
}

static void free_module(void *module) { clear_state(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec,
     (void *)(uintptr_t)fill_module}, /* by way of an integer: C has no cast from a function to an object pointer */
#ifdef Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED
    {Py_mod_multiple_interpreters,
     Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* because NumPy does not support them */
#endif
#ifdef Py_MOD_GIL_NOT_USED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* all globals are constant or atomic, but NumPy's table, written while the
                                          import lock is held */
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "kvpitfalls._core",
    .m_doc = "The C core: score, select and gather on arrays that the caller provides. kvpitfalls.eviction.ops is the "
             "friendly way in.",
    .m_size = sizeof(kvpb_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = visit_state,
    .m_clear = clear_state,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__core(void); /* for -Wmissing-prototypes */

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }

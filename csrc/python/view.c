/* SPDX-License-Identifier: Apache-2.0
 *
 * A Python array as a kvp_tensor, without a copy. Three ways in, tried in this order: NumPy arrays by NumPy's C API;
 * types with a DLPack C exchange table (torch >= 2.10), which also knows the current CUDA stream; anything with
 * __dlpack__. What the core checks, shapes above all, is not checked here; here is refused only what a kvp_tensor
 * cannot say.
 */
#include "binding.h"
#include "dlpack_abi.h"

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL kvpb_numpy
#include <numpy/arrayobject.h>

#include <stdalign.h>
#include <string.h>

/* Arrays without elements may have no address, but data == NULL would tell the core that the argument is not given.
 * Never accessed. */
static alignas(64) char no_elements[64];

int kvpb_import_numpy(void) {
    import_array1(-1);
    return 0;
}

/* First what the three ways have in common. Whatever returns an int returns 0, or -1 with an exception set. */

static int check_rank(const kvpb_slot *slot, int ndim) {
    if (ndim >= 1 && ndim <= 4) return 0;
    PyErr_Format(PyExc_ValueError, "%s has %d dimensions; expected 1 to 4", slot->name, ndim);
    return -1;
}

static void refuse_type(const kvpb_slot *slot, PyObject *object) {
    PyObject *name = PyType_GetName(Py_TYPE(object));
    if (name)
        PyErr_Format(PyExc_TypeError, "%s is of type %U; expected a NumPy array or a tensor with __dlpack__",
                     slot->name, name);
    Py_XDECREF(name);
}

static PyObject *take_exception(void) {
    PyObject *class, *exception, *trace;
    PyErr_Fetch(&class, &exception, &trace);
    PyErr_NormalizeException(&class, &exception, &trace);
    if (trace) PyException_SetTraceback(exception, trace);
    Py_XDECREF(class);
    Py_XDECREF(trace);
    return exception;
}

/*
 * The library of a sparse or meta tensor, say, refused in its own words and with an exception of its choice, which
 * varies: it becomes the cause of one that names the argument. Interrupts and the lack of memory are not about the
 * argument.
 */
static void refuse_borrow(const kvpb_slot *slot) {
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) return;
    PyObject *cause = take_exception();
    PyErr_Format(PyExc_TypeError, "%s is a tensor whose library does not lend out its memory; the cause says why",
                 slot->name);
    PyObject *exception = take_exception();
    PyException_SetCause(exception, cause);
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_DECREF(exception);
}

static int check_writable(const kvpb_slot *slot, bool writable) {
    if (writable || slot->kind != KVPB_OUTPUT) return 0;
    PyErr_Format(PyExc_ValueError, "%s is read-only; expected an array that can be written to", slot->name);
    return -1;
}

static int set_data(const kvpb_slot *slot, kvp_tensor *tensor, void *data, uint64_t offset) {
    tensor->data = data ? (char *)data + offset : NULL;
    for (int32_t d = 0; d < tensor->ndim; d++)
        if (tensor->shape[d] == 0) tensor->data = no_elements;
    if (tensor->data) return 0;
    PyErr_Format(PyExc_ValueError, "%s has no memory behind it; expected a tensor with data", slot->name);
    return -1;
}

const kvpb_dl_type kvpb_dl_types[] = {
#define KVP_FLOAT(constant, name, kind, bits) [KVP_##constant] = {kind, bits},
#define KVP_DTYPE KVP_FLOAT
#include "../dtypes.def"
#undef KVP_FLOAT
#undef KVP_DTYPE
};

/* The dtype of a kind of DLPack's; -1 if there is none. */
static int find_dtype(int code, int64_t bits) {
    if (code == KVPB_DL_BOOL) code = KVPB_DL_UINT;
    for (int i = 0; i < (int)(sizeof kvpb_dl_types / sizeof kvpb_dl_types[0]); i++)
        if (code == kvpb_dl_types[i].code && bits == kvpb_dl_types[i].bits) return i;
    return -1;
}

static int numpy_dtype(PyArrayObject *array) {
    static const char kinds[] = {
        [KVPB_DL_INT] = 'i', [KVPB_DL_UINT] = 'u', [KVPB_DL_FLOAT] = 'f', [KVPB_DL_BOOL] = 'b'};
    for (int code = 0; code < (int)sizeof kinds; code++)
        if (kinds[code] == PyArray_DESCR(array)->kind) return find_dtype(code, 8 * (int64_t)PyArray_ITEMSIZE(array));
    return -1;
}

static int view_numpy(const kvpb_slot *slot, PyArrayObject *array, kvp_tensor *tensor) {
    const npy_intp size = PyArray_ITEMSIZE(array);
    if (check_rank(slot, PyArray_NDIM(array)) < 0 || check_writable(slot, PyArray_ISWRITEABLE(array)) < 0) return -1;
    *tensor = (kvp_tensor){.dtype = numpy_dtype(array), .device = KVP_CPU, .ndim = PyArray_NDIM(array)};
    if (tensor->dtype < 0) {
        PyErr_Format(PyExc_TypeError, "%s has dtype %S; expected %s", slot->name, PyArray_DESCR(array), slot->dtypes);
        return -1;
    }
    if (!PyArray_ISNOTSWAPPED(array)) {
        PyErr_Format(PyExc_TypeError, "%s has dtype %S; expected the byte order of this machine", slot->name,
                     PyArray_DESCR(array));
        return -1;
    }
    for (int d = 0; d < tensor->ndim; d++) {
        const npy_intp stride = PyArray_STRIDE(array, d);
        tensor->shape[d] = PyArray_DIM(array, d);
        tensor->stride[d] = stride / size;
        if (stride % size && tensor->shape[d] > 1) {
            PyErr_Format(PyExc_ValueError, "%s has a stride of %zd bytes; expected a multiple of its %zd-byte elements",
                         slot->name, (Py_ssize_t)stride, (Py_ssize_t)size);
            return -1;
        }
    }
    return set_data(slot, tensor, PyArray_DATA(array), 0);
}

static int refuse_dlpack_dtype(const kvpb_slot *slot, const kvpb_dl_tensor *dl) {
    static const char *const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    if (dl->type_code < sizeof kinds / sizeof kinds[0] && dl->type_lanes == 1) {
        PyErr_Format(PyExc_TypeError, "%s has dtype %s%d; expected %s", slot->name, kinds[dl->type_code],
                     (int)dl->type_bits, slot->dtypes);
    } else {
        PyErr_Format(PyExc_TypeError, "%s has a %d-bit dtype with DLPack code %d and %d lanes; expected %s", slot->name,
                     (int)dl->type_bits, (int)dl->type_code, (int)dl->type_lanes, slot->dtypes);
    }
    return -1;
}

int kvpb_view_dlpack(const kvpb_slot *slot, const kvpb_dl_tensor *dl, kvp_tensor *tensor) {
    if (check_rank(slot, dl->ndim) < 0) return -1;
    *tensor = (kvp_tensor){.device = dl->device_type, .ndim = dl->ndim};
    tensor->dtype = dl->type_lanes == 1 ? find_dtype(dl->type_code, dl->type_bits) : -1;
    if (tensor->dtype < 0) return refuse_dlpack_dtype(slot, dl);
    if (dl->device_type != KVP_CPU) tensor->device_index = dl->device_index; /* some producers number CPUs */
    int64_t compact = 1;
    for (int32_t d = dl->ndim - 1; d >= 0; d--) {
        tensor->shape[d] = dl->shape[d];
        tensor->stride[d] = dl->strides ? dl->strides[d] : compact;
        if (!dl->strides) compact *= dl->shape[d];
    }
    return set_data(slot, tensor, dl->data, dl->byte_offset);
}

/* 0 with *api NULL: the type has none that can be used. */
int kvpb_find_exchange_api(const kvpb_state *state, PyObject *object, const kvpb_dl_api **api) {
    *api = NULL;
    PyObject *capsule = PyObject_GetAttr((PyObject *)Py_TYPE(object), state->names[KVPB_EXCHANGE_API]);
    if (!capsule) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear();
        return 0;
    }
    const kvpb_dl_api_header *header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule); /* the table itself lives as long as the process */
    if (!header) return -1;
    while (header && header->version.major != KVPB_DL_MAJOR) header = header->previous;
    if (header && ((const kvpb_dl_api *)header)->borrow) *api = (const kvpb_dl_api *)header;
    return 0;
}

static int hold(kvpb_loans *loans, PyObject *object) {
    if (loans->n_held < KVPB_MAX_HELD) {
        loans->held[loans->n_held++] = object;
        return 0;
    }
    Py_DECREF(object);
    PyErr_SetString(PyExc_SystemError, "a verb has more tensors than kvpb_loans has room for");
    return -1;
}

/*
 * What torch's tensors have beside memory and shape, and DLPack does not tell, is asked by torch's names for it. A
 * library that does not know the names has nothing of the kind: 0 then, and -1 with an exception set for all else.
 */
static int ask(const kvpb_state *state, PyObject *object, kvpb_name name, PyObject **answer) {
    *answer = PyObject_CallMethodObjArgs(object, state->names[name], NULL);
    if (*answer) return 1;
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return 0;
}

static int ask_number(const kvpb_state *state, PyObject *object, kvpb_name name, int64_t *number) {
    PyObject *answer;
    const int told = ask(state, object, name, &answer);
    if (told < 1) return told;
    *number = PyLong_AsLongLong(answer);
    Py_DECREF(answer);
    return *number == -1 && PyErr_Occurred() ? -1 : 1;
}

/* A tensor that autograd follows becomes one that it does not: __dlpack__ refuses the former. *object: borrowed. */
static int leave_autograd(const kvpb_state *state, PyObject **object, kvpb_loans *loans) {
    PyObject *answer = PyObject_GetAttr(*object, state->names[KVPB_REQUIRES_GRAD]);
    if (!answer) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear();
        return 0;
    }
    const int is_followed = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (is_followed < 1) return is_followed;
    const int told = ask(state, *object, KVPB_DETACH, &answer);
    if (told < 1) return told;
    *object = answer;
    return hold(loans, answer);
}

/* A tensor whose numbers are still to be turned from plus to minus becomes one where they are. *object: borrowed. */
static int turn_signs(const kvpb_state *state, PyObject **object, kvpb_loans *loans) {
    PyObject *answer;
    int told = ask(state, *object, KVPB_IS_NEG, &answer);
    if (told < 1) return told;
    const int is_negative = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (is_negative < 1) return is_negative;
    if ((told = ask(state, *object, KVPB_RESOLVE_NEG, &answer)) < 1) return told;
    *object = answer;
    return hold(loans, answer);
}

/* Memory that was freed, or shrunk, behind a tensor whose shape stayed, as sharding does. */
static int check_storage(const kvpb_state *state, const kvpb_slot *slot, PyObject *object, const kvpb_dl_tensor *dl) {
    int64_t last = 0, n_byte = 0, offset = 0;
    PyObject *storage;
    for (int64_t d = dl->ndim - 1, compact = 1; d >= 0; compact *= dl->shape[d--]) {
        if (dl->shape[d] == 0) return 0;
        last += (dl->shape[d] - 1) * (dl->strides ? dl->strides[d] : compact);
    }
    int told = ask(state, object, KVPB_UNTYPED_STORAGE, &storage);
    if (told < 1) return told;
    told = ask_number(state, storage, KVPB_NBYTES, &n_byte);
    Py_DECREF(storage);
    if (told < 1 || (told = ask_number(state, object, KVPB_STORAGE_OFFSET, &offset)) < 1) return told;
    const int64_t needed = (offset + last + 1) * dl->type_bits / 8;
    if (n_byte >= needed) return 0;
    PyErr_Format(PyExc_ValueError, "%s has storage of %lld bytes; expected at least %lld: its memory was freed",
                 slot->name, (long long)n_byte, (long long)needed);
    return -1;
}

static int view_exchange(const kvpb_state *state, const kvpb_slot *slot, const kvpb_dl_api *api, PyObject *object,
                         kvp_tensor *tensor, kvpb_loans *loans) {
    kvpb_dl_tensor dl;
    if (slot->kind != KVPB_OUTPUT && turn_signs(state, &object, loans) < 0) return -1;
    if (api->borrow(object, &dl) != 0) {
        refuse_borrow(slot);
        return -1;
    }
    if (check_storage(state, slot, object, &dl) < 0 || kvpb_view_dlpack(slot, &dl, tensor) < 0) return -1;
    if (tensor->device != KVP_CUDA) return 0;
    if (api->current_stream(dl.device_type, dl.device_index, &loans->stream) != 0) return -1;
    loans->has_stream = true;
    if (!loans->stream || !loans->assumed_default) return 0;
    PyErr_Format(
        PyExc_BufferError,
        "%s is on a stream of its own, but a tensor before it was made ready on the default stream; expected arrays "
        "of one library",
        slot->name);
    return -1;
}

/*
 * A CUDA producer is asked to make the data ready on the stream where the core then works: the one that an array with
 * an exchange API told, or the legacy default stream (1 in the protocol), because this way in does not tell the current
 * stream.
 */
static int choose_stream(const kvpb_state *state, PyObject *object, PyObject *keywords, kvpb_loans *loans) {
    PyObject *pair = PyObject_CallMethodObjArgs(object, state->names[KVPB_DLPACK_DEVICE], NULL);
    PyObject *device = pair ? PySequence_GetItem(pair, 0) : NULL;
    const long number = device ? PyLong_AsLong(device) : -1;
    PyObject *stream = number != KVP_CUDA ? NULL
                       : loans->stream    ? PyLong_FromVoidPtr(loans->stream)
                                          : PyLong_FromLong(1);
    if (number == KVP_CUDA && !loans->has_stream) loans->assumed_default = true;
    if (stream) PyDict_SetItemString(keywords, "stream", stream);
    Py_XDECREF(stream);
    Py_XDECREF(device);
    Py_XDECREF(pair);
    return PyErr_Occurred() ? -1 : 0;
}

/* A new capsule, or NULL with an exception set. */
static PyObject *export_capsule(const kvpb_state *state, const kvpb_slot *slot, PyObject *object, kvpb_loans *loans) {
    PyObject *method = PyObject_GetAttr(object, state->names[KVPB_DLPACK]);
    if (!method) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError)) refuse_type(slot, object);
        return NULL;
    }
    PyObject *none = PyTuple_New(0), *capsule = NULL;
    PyObject *keywords = Py_BuildValue("{s:(ii)}", "max_version", KVPB_DL_MAJOR, 0);
    if (none && keywords && choose_stream(state, object, keywords, loans) == 0) {
        capsule = PyObject_Call(method, none, keywords);
        if (!capsule &&
            PyErr_ExceptionMatches(PyExc_TypeError)) { /* a producer from before DLPack 1.0 knows no max_version */
            PyErr_Clear();
            if (PyDict_DelItemString(keywords, "max_version") == 0) capsule = PyObject_Call(method, none, keywords);
        }
    }
    if (!capsule) refuse_borrow(slot);
    Py_XDECREF(keywords);
    Py_XDECREF(none);
    Py_DECREF(method);
    return capsule;
}

/* What a capsule holds; NULL with an exception set. */
static const kvpb_dl_tensor *open_capsule(const kvpb_slot *slot, PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor_versioned")) return PyCapsule_GetPointer(capsule, "dltensor");
    const kvpb_dl_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    if (managed->version.major != KVPB_DL_MAJOR) {
        PyErr_Format(PyExc_BufferError, "%s comes as DLPack %u; expected version %d", slot->name,
                     (unsigned)managed->version.major, KVPB_DL_MAJOR);
        return NULL;
    }
    if (check_writable(slot, !(managed->flags & (KVPB_DL_READ_ONLY | KVPB_DL_IS_COPIED))) < 0)
        return NULL; /* a write to a copy is lost */
    return &managed->tensor;
}

/*
 * The capsule is kept for the length of the call and never renamed to "used_...": so its own destructor frees the view,
 * on every path.
 */
static int view_protocol(const kvpb_state *state, const kvpb_slot *slot, PyObject *object, kvp_tensor *tensor,
                         kvpb_loans *loans) {
    if (slot->kind != KVPB_OUTPUT &&
        (turn_signs(state, &object, loans) < 0 || leave_autograd(state, &object, loans) < 0))
        return -1;
    PyObject *capsule = export_capsule(state, slot, object, loans);
    if (!capsule || hold(loans, capsule) < 0) return -1;
    const kvpb_dl_tensor *dl = open_capsule(slot, capsule);
    return dl && check_storage(state, slot, object, dl) == 0 ? kvpb_view_dlpack(slot, dl, tensor) : -1;
}

int kvpb_view(const kvpb_state *state, const kvpb_slot *slot, PyObject *object, kvp_tensor *tensor, kvpb_loans *loans) {
    const kvpb_dl_api *api;
    memset(tensor, 0, sizeof *tensor);
    if (object == Py_None && slot->kind == KVPB_OPTIONAL) return 0;
    if (PyArray_Check(object)) return view_numpy(slot, (PyArrayObject *)object, tensor);
    if (kvpb_find_exchange_api(state, object, &api) < 0) return -1;
    if (api) return view_exchange(state, slot, api, object, tensor, loans);
    return view_protocol(state, slot, object, tensor, loans);
}

void kvpb_return_loans(kvpb_loans *loans) {
    while (loans->n_held > 0) Py_DECREF(loans->held[--loans->n_held]);
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * New arrays, of the library and on the device of one that was given: NumPy's by its C API, others by the allocator of
 * their exchange table (torch's begin at a multiple of 64 bytes).
 */
#include "binding.h"
#include "dlpack_abi.h"

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define NO_IMPORT_ARRAY
#define PY_ARRAY_UNIQUE_SYMBOL kvpb_numpy
#include <numpy/arrayobject.h>

#include <string.h>

/* NumPy's own arrays begin at a multiple of 16; these at one of 64, so that rows are written past the caches a line at
 * a time. */
enum { LINE = 64 };

static PyObject *new_aligned(PyArray_Descr *descr, int ndim, npy_intp *shape, npy_intp n_byte) {
    npy_intp room = n_byte + LINE - 1;
    PyObject *memory = PyArray_SimpleNew(1, &room, NPY_UINT8);
    if (!memory) {
        Py_DECREF((PyObject *)descr);
        return NULL;
    }
    char *data = PyArray_BYTES((PyArrayObject *)memory);
    data += (LINE - (uintptr_t)data % LINE) % LINE;
    PyObject *array = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, shape, NULL, data, NPY_ARRAY_CARRAY, NULL);
    if (array && PyArray_SetBaseObject((PyArrayObject *)array, memory) == 0)
        return array; /* which took the memory over */
    if (!array) Py_DECREF(memory);
    Py_XDECREF(array);
    return NULL;
}

static PyObject *new_numpy(const kvpb_new *wanted, PyArrayObject *like) {
    npy_intp shape[4], n_byte;
    const bool is_own = wanted->dtype == KVP_I32 || wanted->dtype == KVP_F32;
    PyArray_Descr *descr =
        is_own ? PyArray_DescrFromType(wanted->dtype == KVP_I32 ? NPY_INT32 : NPY_FLOAT32) : PyArray_DESCR(like);
    if (!is_own) Py_INCREF((PyObject *)descr);
    n_byte = PyDataType_ELSIZE(descr);
    for (int d = 0; d < wanted->ndim; d++) n_byte *= shape[d] = (npy_intp)wanted->shape[d];
    return new_aligned(descr, wanted->ndim, shape, n_byte);
}

/* What the library's allocator calls when it cannot. */
static void set_error(void *context, const char *kind, const char *message) {
    (void)context;
    if (!PyErr_Occurred())
        PyErr_SetString(kind && strcmp(kind, "MemoryError") == 0 ? PyExc_MemoryError : PyExc_RuntimeError, message);
}

/* Memory of the library's own, and its view; NULL with an exception set. */
static kvpb_dl_versioned *allocate(const kvpb_new *wanted, const kvpb_dl_api *api, const kvp_tensor *like,
                                   kvp_tensor *tensor) {
    int64_t shape[4];
    memcpy(shape, wanted->shape, sizeof shape);
    const kvpb_dl_tensor prototype = {.device_type = like->device,
                                      .device_index = like->device_index,
                                      .ndim = wanted->ndim,
                                      .type_code = kvpb_dl_types[wanted->dtype].code,
                                      .type_bits = kvpb_dl_types[wanted->dtype].bits,
                                      .type_lanes = 1,
                                      .shape = shape};
    kvpb_dl_versioned *managed = NULL;
    if (api->allocate(&prototype, &managed, NULL, set_error) != 0 || !managed) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        return NULL;
    }
    const kvpb_slot slot = {.name = wanted->name, .dtypes = "one of the core's"};
    if (kvpb_view_dlpack(&slot, &managed->tensor, tensor) == 0) return managed;
    kvpb_free_scratch(managed);
    return NULL;
}

static int find_allocator(const kvpb_state *state, const kvpb_new *wanted, PyObject *like, const kvpb_dl_api **api) {
    if (kvpb_find_exchange_api(state, like, api) < 0) return -1;
    if (*api && (*api)->allocate && (*api)->import_managed) return 0;
    PyErr_Format(PyExc_TypeError,
                 "%s cannot be made by the library of the given arrays; expected NumPy's, or torch's from 2.10",
                 wanted->name);
    return -1;
}

kvpb_dl_versioned *kvpb_make_scratch(const kvpb_state *state, size_t bytes, PyObject *like, const kvp_tensor *view,
                                     kvp_tensor *tensor) {
    const kvpb_new wanted = {"the scratch", KVP_U8, 1, {(int64_t)bytes}};
    const kvpb_dl_api *api;
    return find_allocator(state, &wanted, like, &api) < 0 ? NULL : allocate(&wanted, api, view, tensor);
}

void kvpb_free_scratch(kvpb_dl_versioned *managed) {
    if (managed && managed->deleter) managed->deleter(managed);
}

int kvpb_make(const kvpb_state *state, const kvpb_new *wanted, PyObject *like, const kvp_tensor *view,
              kvp_tensor *tensor, kvpb_made *made) {
    *made = (kvpb_made){.array = NULL};
    if (!PyArray_Check(like)) {
        if (find_allocator(state, wanted, like, &made->api) < 0) return -1;
        made->memory = allocate(wanted, made->api, view, tensor);
        return made->memory ? 0 : -1;
    }
    if (!(made->array = new_numpy(wanted, (PyArrayObject *)like))) return -1;
    kvpb_loans none = {.n_held = 0};
    const kvpb_slot slot = {wanted->name, "one of the core's", 0, KVPB_OUTPUT};
    return kvpb_view(state, &slot, made->array, tensor, &none);
}

PyObject *kvpb_take(kvpb_made *made) {
    void *array = made->array;
    struct kvpb_dl_versioned *memory = made->memory;
    made->array = NULL;
    made->memory = NULL; /* whose it is now, whether it can make an array of it or not */
    return !memory || made->api->import_managed(memory, &array) == 0 ? array : NULL;
}

void kvpb_drop(kvpb_made *made) {
    Py_CLEAR(made->array);
    kvpb_free_scratch(made->memory);
    made->memory = NULL;
}

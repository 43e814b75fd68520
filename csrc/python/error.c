/* SPDX-License-Identifier: Apache-2.0
 *
 * Exceptions: the one place where a status of the core becomes one, and the refusal of an unknown name.
 */
#include "binding.h"

static PyObject *pick_class(const kvpb_state *state, kvp_status status) {
    switch (status) {
    case KVP_ERR_SHAPE:
    case KVP_ERR_VALUE:
    case KVP_ERR_WORKSPACE: return PyExc_ValueError;
    case KVP_ERR_DTYPE: return PyExc_TypeError;
    case KVP_ERR_DEVICE: return state->device_error;
    case KVP_ERR_UNSUPPORTED: return PyExc_NotImplementedError;
    case KVP_ERR_CUDA: return state->cuda_error;
    case KVP_OK:
    case KVP_ERR_INTERNAL: break;
    }
    return PyExc_SystemError;
}

PyObject *kvpb_raise(const kvpb_state *state, kvp_status status, const kvp_context *ctx) {
    PyObject *class = pick_class(state, status);
    if (ctx->error[0]) {
        PyErr_SetString(class, ctx->error);
    } else {
        PyErr_Format(class, "the core reported \"%s\" without a sentence", kvp_status_name(status));
    }
    return NULL;
}

void kvpb_refuse_name(const char *what, const char *given, const char *(*nth)(int32_t)) {
    PyObject *known = PyUnicode_FromString("");
    for (int32_t i = 0; known && nth(i); i++) {
        PyObject *longer = PyUnicode_FromFormat("%U%s%s", known, i ? ", " : "", nth(i));
        Py_DECREF(known);
        known = longer;
    }
    if (known) PyErr_Format(PyExc_ValueError, "%s is \"%s\"; expected one of %U", what, given, known);
    Py_XDECREF(known);
}

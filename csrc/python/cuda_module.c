/* SPDX-License-Identifier: Apache-2.0
 *
 * The extension module kvpitfalls._cuda. Importing it gives the core its CUDA backend, and needs no GPU; the verbs stay
 * those of _core.
 */
#include "binding.h"

#include <string.h>

static PyObject *tell_build(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return Py_BuildValue("{s:s,s:s}", "compiler", "nvcc " KVPB_NVCC, "architectures", KVPB_ARCHITECTURES);
}

PyDoc_STRVAR(build_info_doc,
             "build_info($module, /)\n--\n\nThe compiler, and the GPU architectures that there is machine code for.");

static PyMethodDef methods[] = {
    {"build_info", tell_build, METH_NOARGS, build_info_doc},
    {NULL, NULL, 0, NULL},
};

static int fill_module(PyObject *module) {
    (void)module;
    PyObject *core = PyImport_ImportModule("kvpitfalls._core");
    PyObject *capsule = core ? PyObject_GetAttrString(core, KVPB_REGISTRY_ATTRIBUTE) : NULL;
    const kvpb_registry *registry = capsule ? PyCapsule_GetPointer(capsule, KVPB_REGISTRY_NAME) : NULL;
    Py_XDECREF(capsule); /* the table lives as long as _core's code, which is never unloaded */
    Py_XDECREF(core);
    if (!registry) return -1;
    static const uint32_t sizes[KVPB_REGISTRY_SIZES] = KVPB_SIZES;
    if (registry->abi == KVP_ABI_VERSION && memcmp(registry->sizes, sizes, sizeof sizes) == 0 &&
        registry->register_backend(kvp_cuda_backend()) == KVP_OK)
        return 0;
    PyErr_Format(PyExc_ImportError,
                 "kvpitfalls._cuda is built for version %d of the core's interface, and kvpitfalls._core has %d; "
                 "expected the same, of one build",
                 KVP_ABI_VERSION, (int)registry->abi);
    return -1;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec,
     (void *)(uintptr_t)fill_module}, /* by way of an integer: C has no cast from a function to an object pointer */
#ifdef Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED}, /* as _core */
#endif
#ifdef Py_MOD_GIL_NOT_USED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "kvpitfalls._cuda",
    .m_doc = "CUDA kernels for the verbs of kvpitfalls._core, which has them once this module is imported.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__cuda(void); /* for -Wmissing-prototypes */

PyMODINIT_FUNC PyInit__cuda(void) { return PyModuleDef_Init(&definition); }

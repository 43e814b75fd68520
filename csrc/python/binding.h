/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files of the extension module kvpitfalls._core share. The only folder that knows Python; of the core it sees
 * kvp.h alone.
 */
#ifndef KVPB_BINDING_H
#define KVPB_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../kvp.h"

#include <stdbool.h>

/* What is asked of tensors, as strings that are made once. */
typedef enum kvpb_name {
    KVPB_EXCHANGE_API,
    KVPB_DLPACK,
    KVPB_DLPACK_DEVICE,
    KVPB_IS_NEG,
    KVPB_RESOLVE_NEG,
    KVPB_REQUIRES_GRAD,
    KVPB_DETACH,
    KVPB_UNTYPED_STORAGE,
    KVPB_NBYTES,
    KVPB_STORAGE_OFFSET,
    KVPB_NAMES
} kvpb_name;

typedef struct kvpb_state {
    PyObject *device_error, *cuda_error; /* classes of kvpitfalls.errors */
    PyObject *names[KVPB_NAMES];         /* by kvpb_name */
} kvpb_state;

/* What _cuda finds in _core, as a capsule under this attribute. */
#define KVPB_REGISTRY_ATTRIBUTE "_registry"
#define KVPB_REGISTRY_NAME "kvpitfalls._core._registry"
enum { KVPB_REGISTRY_SIZES = 8 };
/* Of what passes between the two, so that a change without a new version is noticed, too. */
#define KVPB_SIZES                                                                                     \
    {sizeof(kvp_score_args), sizeof(kvp_select_args), sizeof(kvp_gather_args), sizeof(kvp_press_args), \
     sizeof(kvp_share_args), sizeof(kvp_expect_args), sizeof(kvp_context),     sizeof(kvp_backend)}
typedef struct kvpb_registry {
    int32_t abi; /* KVP_ABI_VERSION; what follows may change with it */
    uint32_t sizes[KVPB_REGISTRY_SIZES];
    kvp_status (*register_backend)(const kvp_backend *backend);
} kvpb_registry;

/* An optional one may be None, which leaves data == NULL; an output must be writable. */
typedef enum kvpb_kind { KVPB_INPUT, KVPB_OPTIONAL, KVPB_OUTPUT } kvpb_kind;

/* One tensor argument: what it is called, what it may be, and where its view goes. */
typedef struct kvpb_slot {
    const char *name;
    const char *dtypes; /* in words, for messages; the core decides */
    size_t offset;      /* of its kvp_tensor in the verb's struct */
    kvpb_kind kind;
} kvpb_slot;

/*
 * What the views of one call rest on. NumPy arrays and exchange-API views borrow from the caller's argument, which
 * outlives the call. To be given back is what was made for the call: the capsule of __dlpack__, whose destructor frees
 * the view, and torch's tensors without what DLPack does not tell (view.c).
 */
enum { KVPB_MAX_HELD = 48 }; /* three for each tensor of a verb */
typedef struct kvpb_loans {
    PyObject *held[KVPB_MAX_HELD];
    int32_t n_held;
    void *stream; /* the producer's current CUDA stream; NULL on the CPU, and the default stream for __dlpack__ capsules
                   */
    bool has_stream,
        assumed_default; /* an exchange API told it; a __dlpack__ producer was told the default stream before that */
} kvpb_loans;

/* view.c: 0, or -1 with an exception set. */
int kvpb_import_numpy(void);
int kvpb_view(const kvpb_state *state, const kvpb_slot *slot, PyObject *object, kvp_tensor *tensor, kvpb_loans *loans);
void kvpb_return_loans(kvpb_loans *loans);
typedef struct kvpb_dl_type {
    uint8_t code, bits;
} kvpb_dl_type;
extern const kvpb_dl_type kvpb_dl_types[]; /* by dtype */
struct kvpb_dl_api;
struct kvpb_dl_tensor;
struct kvpb_dl_versioned;
int kvpb_view_dlpack(const kvpb_slot *slot, const struct kvpb_dl_tensor *dl, kvp_tensor *tensor);
int kvpb_find_exchange_api(const kvpb_state *state, PyObject *object,
                           const struct kvpb_dl_api **api); /* *api NULL: there is none of use */

/* outputs.c: new arrays like an old one. First the memory and its view; the array of it is made when it is taken, since
 * torch takes its time for that, which a GPU may work meanwhile. 0 and not NULL, or -1 and NULL with an exception set.
 */
typedef struct kvpb_new {
    const char *name;
    kvp_dtype dtype; /* KVP_I32, KVP_F32, KVP_U8 or that of the old array */
    int32_t ndim;
    int64_t shape[4];
} kvpb_new;
typedef struct kvpb_made {
    PyObject *array;                  /* NumPy's */
    struct kvpb_dl_versioned *memory; /* any other library's */
    const struct kvpb_dl_api *api;
} kvpb_made;
int kvpb_make(const kvpb_state *state, const kvpb_new *wanted, PyObject *like, const kvp_tensor *view,
              kvp_tensor *tensor, kvpb_made *made);
PyObject *kvpb_take(kvpb_made *made); /* a new reference; once */
void kvpb_drop(kvpb_made *made);      /* what was not taken, if anything was made */
/* Bytes beside an array that is not NumPy's, for the length of a call: no array is made of them. */
struct kvpb_dl_versioned *kvpb_make_scratch(const kvpb_state *state, size_t bytes, PyObject *like,
                                            const kvp_tensor *view, kvp_tensor *tensor);
void kvpb_free_scratch(struct kvpb_dl_versioned *scratch); /* may be NULL */

/* error.c: each sets an exception. kvpb_raise, for a status that is not KVP_OK, returns NULL so that callers can return
 * it. */
PyObject *kvpb_raise(const kvpb_state *state, kvp_status status, const kvp_context *ctx);
void kvpb_refuse_name(const char *what, const char *given,
                      const char *(*nth)(int32_t)); /* nth: the known names, NULL past the last */

/* verbs.c, press.c: METH_FASTCALL functions, and two readers of arguments that set an exception on failure (-1, NULL).
 */
PyObject *kvpb_score(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_select(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_gather(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_press(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_press_shared(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_evict(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_share(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_expect(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_score_workspace(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_select_workspace(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_share_workspace(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
PyObject *kvpb_expect_workspace(PyObject *module, PyObject *const *objects, Py_ssize_t n_object);
int kvpb_check_count(const char *name, Py_ssize_t n_object, Py_ssize_t expected);
const char *kvpb_read_text(PyObject *object, const char *name); /* lives as long as object */

/* parallel.c */
bool kvpb_has_openmp(void);
int kvpb_watch_forks(void); /* 0, or -1 without an exception */
void kvpb_parallel_for(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg);

#endif

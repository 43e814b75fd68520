/* SPDX-License-Identifier: Apache-2.0
 *
 * What the files that make Python functions of the verbs share: how arguments are read, and what a call needs beside
 * them.
 */
#ifndef KVPB_VERBS_H
#define KVPB_VERBS_H

#include "binding.h"

/* More threads than any machine has would make OpenMP end the process. */
enum { KVPB_MAX_WORKER = 1024, KVPB_MAX_TENSOR = KVPB_MAX_HELD / 3 - 1 };

#define KVP_FLOAT(constant, name, kind, bits)
#define KVP_DTYPE KVP_FLOAT
#include "../dtypes.def" /* for KVP_FLOAT_NAMES */
#undef KVP_FLOAT
#undef KVP_DTYPE

typedef union kvpb_args {
    kvp_score_args score;
    kvp_select_args select;
    kvp_gather_args gather;
    kvp_press_args press;
    kvp_share_args share;
    kvp_expect_args expect;
} kvpb_args;

typedef struct kvpb_spec {
    const char *name;
    kvp_verb verb;
    Py_ssize_t n_tensor;
    kvpb_slot tensor[KVPB_MAX_TENSOR];
} kvpb_spec;

/* Whatever returns an int returns 0, or -1 with an exception set. args: what the offsets of the spec's slots count in.
 */
int kvpb_read_scorer(PyObject *object, int32_t *scorer);
int kvpb_read_params(PyObject *object, int32_t scorer, double *param);
int kvpb_read_n_worker(PyObject *object, int32_t *n_worker);
int kvpb_read_tensors(const kvpb_state *state, const kvpb_spec *spec, PyObject *const *objects, void *args,
                      kvpb_loans *loans);

/* Host memory for a call without a workspace, to be freed with PyMem_Free. */
int kvpb_make_workspace(size_t bytes, kvp_context *ctx, void **owned);

/*
 * Of a call on a GPU the tables are what is in host memory. There the core has nowhere to copy them to, and reads them
 * where they are, once to check them and again to send them: so they are copied here, and a thread that rewrites them
 * changes nothing. To be freed with PyMem_Free.
 */
int kvpb_own_tables(const kvpb_spec *spec, kvpb_args *args, void **owned);

kvp_status kvpb_run(kvp_verb verb, const void *args, kvp_context *ctx); /* args: the verb's struct */

#endif

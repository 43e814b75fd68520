/* SPDX-License-Identifier: Apache-2.0
 *
 * The part of the DLPack 1.x binary interface that view.c reads, declared anew so that nothing is vendored. Only the
 * layout is a contract with other libraries; the names are ours. Specification: https://dmlc.github.io/dlpack/latest/
 */
#ifndef KVPB_DLPACK_ABI_H
#define KVPB_DLPACK_ABI_H

#include <stddef.h>
#include <stdint.h>

/* A change of the major number changes the layout below; a minor one only adds type and device codes. */
#define KVPB_DL_MAJOR 1

enum { KVPB_DL_INT = 0, KVPB_DL_UINT = 1, KVPB_DL_FLOAT = 2, KVPB_DL_BOOL = 6 };
enum { KVPB_DL_READ_ONLY = 1, KVPB_DL_IS_COPIED = 2 };

typedef struct kvpb_dl_version {
    uint32_t major, minor;
} kvpb_dl_version;

typedef struct kvpb_dl_tensor {
    void *data;
    int32_t device_type, device_index;
    int32_t ndim;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL = row-major without gaps (before DLPack 1.2) */
    uint64_t byte_offset;
} kvpb_dl_tensor;

/* In a capsule "dltensor" a kvpb_dl_tensor comes first; the fields behind it belong to the capsule's destructor. */

/* In a capsule "dltensor_versioned". The two pointers belong to the capsule's destructor too. */
typedef struct kvpb_dl_versioned {
    kvpb_dl_version version;
    void *manager;
    void (*deleter)(struct kvpb_dl_versioned *self); /* may be NULL */
    uint64_t flags;
    kvpb_dl_tensor tensor;
} kvpb_dl_versioned;

typedef struct kvpb_dl_api_header {
    kvpb_dl_version version;
    const struct kvpb_dl_api_header *previous; /* an older major version of the same table, or NULL */
} kvpb_dl_api_header;

/* In a capsule "dlpack_exchange_api", an attribute of the array type. The second function is not used here. */
typedef struct kvpb_dl_api {
    kvpb_dl_api_header header;
    /* Of the prototype's shape, type and device; its data is not looked at. */
    int (*allocate)(const kvpb_dl_tensor *prototype, kvpb_dl_versioned **out, void *context,
                    void (*set_error)(void *context, const char *kind, const char *message));
    void (*export_managed)(void);
    int (*import_managed)(kvpb_dl_versioned *managed, void **object); /* takes it over; -1 = Python exception set */
    int (*borrow)(void *object, kvpb_dl_tensor *out);                 /* may be NULL; -1 = Python exception set */
    int (*current_stream)(int32_t device_type, int32_t device_index, void **out); /* -1 = Python exception set */
} kvpb_dl_api;

#if UINTPTR_MAX == UINT64_MAX
_Static_assert(sizeof(kvpb_dl_tensor) == 48 && offsetof(kvpb_dl_versioned, tensor) == 32 &&
                   offsetof(kvpb_dl_api, borrow) == 40,
               "the layout of DLPack 1.x on 64-bit machines");
#endif
#endif

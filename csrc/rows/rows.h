/* SPDX-License-Identifier: Apache-2.0
 *
 * Row primitives: the only place that knows element types and instruction sets. A row is D elements of one head, "stride" elements apart.
 * Arithmetic is float32; sums run in 8 interleaved partial sums that are added in a fixed order, so results depend on nothing but the row.
 */
#ifndef KVP_ROWS_H
#define KVP_ROWS_H

#include "../kvp.h"

enum { KVPI_FLOAT_DTYPES = 3 }; /* KVP_F32, KVP_F16, KVP_BF16 */

typedef struct kvpi_rows {
    const char *name;
    void (*widen[KVPI_FLOAT_DTYPES])(const void *row, int64_t stride, int64_t n, float *out);
    float (*dot[KVPI_FLOAT_DTYPES])(const float *query, const void *row, int64_t stride, int64_t n);
    float (*sum_of_squares[KVPI_FLOAT_DTYPES])(const void *row, int64_t stride, int64_t n);
} kvpi_rows;

extern const kvpi_rows kvpi_rows_scalar;

const kvpi_rows *kvpi_rows_now(void); /* the table in use */

#endif

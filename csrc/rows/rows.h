/* SPDX-License-Identifier: Apache-2.0
 *
 * Row primitives: the only place that knows element types and instruction sets. One table per instruction set, each
 * made from the same source (rows_template.h) over a few vector operations; a table's results depend on nothing but its
 * arguments.
 *
 * Attention works on a strip of KVPI_STRIP query rows against blocks of KVPI_BLOCK keys:
 *
 *     pack_queries, pack_keys   into panels, so that the product reads memory in order
 *     multiply                  logits of a strip and a block (or a part of it)
 *     soften                    exp(logit - shift), with the row's highest logit as the shift unless one is given
 *     add_columns               column += weight * row, for all rows of the strip
 *     raise_columns             column = the most of itself and weight * row, likewise
 *
 * Where the processor multiplies bfloat16 itself, packed bfloat16 stays bfloat16, in pairs; all else is packed as
 * float32.
 */
#ifndef KVP_ROWS_H
#define KVP_ROWS_H

#include "../kvp.h"

#include <stdbool.h>

enum {
    KVPI_DTYPES = 0 /* functions by dtype are there for floats only */
#define KVP_FLOAT(constant, name, kind, bits) +1
#define KVP_DTYPE KVP_FLOAT
#include "../dtypes.def"
#undef KVP_FLOAT
#undef KVP_DTYPE
};

enum {
    KVPI_STRIP = 16,  /* query rows whose logits are kept at a time: 16 x 8192 of them are half of a 1 MiB cache */
    KVPI_FEW = 8,     /* query rows at most that multiply_few takes */
    KVPI_BLOCK = 256, /* keys; a multiple of every table's panel width */
    KVPI_SLACK = 16,  /* elements that may be touched behind a row of scratch */
    KVPI_WIDTH = 32,  /* channels; a multiple of every table's panel width and of its rows */
};

/* Rows of one head: row r, dimension d stands at first + (r * row_stride + d * dim_stride) elements. */
typedef struct kvpi_head {
    const void *first;
    int64_t row_stride, dim_stride;
} kvpi_head;

typedef struct kvpi_rows {
    const char *name;
    bool (*is_available)(void);
    int32_t panel; /* keys per packed panel */

    /* out[r * out_stride] = the Euclidean norm of row r. */
    void (*norms[KVPI_DTYPES])(kvpi_head head, int64_t n_row, int64_t n_dim, float *out, int64_t out_stride);

    /* out[r] = row r times the vector. "vector" has zeros behind its n_dim elements, KVPI_SLACK of them. */
    void (*products[KVPI_DTYPES])(kvpi_head head, int64_t n_row, int64_t n_dim, const float *vector, float *out);
    /* out[d] += sum over r of weight[r] * row r, one row after the other: the same bits by one call as by many. Of the
     * KVPI_SLACK elements behind the n_dim, zeros stay zeros if weights are finite. */
    void (*add_rows[KVPI_DTYPES])(kvpi_head head, int64_t n_row, int64_t n_dim, const float *weight, float *out);

    /* The least and the most of each dimension over the rows; NaN is none of them. low, high: as vector, and zero
     * behind the n_dim. */
    void (*bounds[KVPI_DTYPES])(kvpi_head head, int64_t n_row, int64_t n_dim, float *low, float *high);
    /* out[r] = the standard deviation, with divisor n_dim - 1, of (row r + offset) * factor, in two passes. offset,
     * factor: as vector; line: room for one. */
    void (*spreads[KVPI_DTYPES])(kvpi_head head, int64_t n_row, int64_t n_dim, const float *offset, const float *factor,
                                 float *line, float *out);

    /* out[d] = own[d] * row[d] + other[d] * row[e] - shift[d], e being n_dim / 2 from d, and KVPI_SLACK zeros behind.
     * own, other, shift: as vector, whatever stands behind. */
    void (*turn[KVPI_DTYPES])(const void *row, int64_t dim_stride, int64_t n_dim, const float *own, const float *other,
                              const float *shift, float *out);
    /* out[i * width + j] += sum over r of line r's i * its j, one line after the other, where j is in the panel of i or
     * behind it. width: a multiple of KVPI_WIDTH, and from line to line. */
    void (*add_squares)(const float *lines, int64_t n_line, int64_t width, float *out);

    /* out: kvpi_packed_bytes(n_key rounded up to whole panels); missing keys are zero. */
    void (*pack_keys[KVPI_DTYPES])(kvpi_head head, int64_t n_key, int64_t n_dim, void *out);
    void (*pack_floats[KVPI_DTYPES])(kvpi_head head, int64_t n_key, int64_t n_dim, void *out); /* as float32, always */
    /* n_row <= KVPI_STRIP addresses of rows; missing rows are zero. The result of multiply times the returned scale is
     * scale * q.k. */
    float (*pack_queries[KVPI_DTYPES])(const void *const *rows, int64_t dim_stride, int64_t n_row, int64_t n_dim,
                                       float scale, void *out);
    /* logits[r * stride + k] = q.k for n_row and n_key rounded up to whole panels. */
    void (*multiply[KVPI_DTYPES])(const void *queries, const void *keys, int64_t n_row, int64_t n_key, int64_t n_dim,
                                  float *logits, int64_t stride);
    /* The same of up to KVPI_FEW query rows and keys as they stand: transposing keys takes longer than so few products.
     * line_up makes such queries, and multiply_few some keys in "line", room for KVPI_SLACK, of rows: times the scale,
     * one after the other, each of whole vectors with zeros at its end. */
    void (*line_up[KVPI_DTYPES])(const void *const *rows, int64_t dim_stride, int64_t n_row, int64_t n_dim, float scale,
                                 float *out);
    void (*multiply_few[KVPI_DTYPES])(const float *queries, kvpi_head head, int64_t n_row, int64_t n_key, int64_t n_dim,
                                      float *line, float *logits, int64_t stride);
    /* row[k] = height * tanh(factor * row[k]), to about 4e-7 of it, for k < n rounded up to whole panels. */
    void (*cap)(float *row, int64_t n, float factor, float height);
    /* row[k] = 2^(scale * row[k] - shift) for k < n_visible, 0 for the others up to n, a multiple of the panel width.
     * shift is the highest scale * row[k] where *shift is NaN, and then written there (0 if none is above minus
     * infinity). Returns the sum of the row. */
    float (*soften)(float *row, int64_t n_visible, int64_t n, float scale, float *shift);
    /* column[k] += sum over r of weight[r] * rows[r * stride + k], k < n. */
    void (*add_columns)(float *column, int64_t n, const float *rows, int64_t stride, const float *weight,
                        int64_t n_row);
    /* column[k] = the most of itself and of all weight[r] * rows[r * stride + k], k < n. NaN stays in the column, and
     * counts for nothing in a row. */
    void (*raise_columns)(float *column, int64_t n, const float *rows, int64_t stride, const float *weight,
                          int64_t n_row);

    /* column[k] += sum over r of (rows[r * stride + k] + offset[r]) * others[r * stride + k], k < n, a multiple of the
     * panel width. */
    void (*dot_columns)(float *column, int64_t n, const float *rows, const float *others, int64_t stride,
                        const float *offset, int64_t n_row);

    /* Selection works on ranks. list: the positions first + i where ranks[i] >= lowest, in order, at most n_out of
     * them, to out; returns how many. filter: the ranks with (rank & mask) == prefix, in order; out has room for
     * KVPI_SLACK more than there are. */
    int64_t (*list)(const uint32_t *ranks, int64_t n, uint32_t lowest, int32_t first, int32_t *out, int64_t n_out);
    int64_t (*filter)(const uint32_t *ranks, int64_t n, uint32_t mask, uint32_t prefix, uint32_t *out);

    /* Row i of n bytes at target + i * target_step = row positions[i] at source, or row 0 if positions[i] is not below
     * n_token by now; in place where the target is the start of the source. */
    void (*copy_rows)(char *target, int64_t target_step, const char *source, int64_t source_step,
                      const int32_t *positions, int64_t n_token, int64_t n_row, size_t n);
    /* Copies n bytes past the caches where it can, since they would only be read to be overwritten. After the last one:
     * end_stream. */
    void (*stream)(void *target, const void *source, size_t n);
    void (*end_stream)(void);
} kvpi_rows;

extern const kvpi_rows kvpi_rows_scalar;
#if defined(__x86_64__)
extern const kvpi_rows kvpi_rows_avx2, kvpi_rows_avx512, kvpi_rows_avx512_bf16;
#if defined(__linux__) && __has_include(<amxbf16intrin.h>) /* a process asks Linux for its tiles */
#define KVPI_HAS_AMX
extern const kvpi_rows kvpi_rows_amx;
#endif
bool kvpi_has_f16c(void); /* cpu_features.c: not a feature that every compiler's __builtin_cpu_supports knows */
#elif defined(__aarch64__)
extern const kvpi_rows kvpi_rows_neon;
#endif

const kvpi_rows *kvpi_rows_now(void); /* the table in use */

/* A position for use. It was checked, but another thread may have written to it since: so it is read once, and compared
 * again. */
static inline int64_t kvpi_position(const int32_t *position, int64_t n_token) {
    const uint32_t now = (uint32_t)__atomic_load_n(position, __ATOMIC_RELAXED);
    return now < (uint64_t)n_token ? now : 0;
}

/* Bytes that packed rows take at most, whatever the table. */
static inline size_t kvpi_packed_bytes(int64_t n_row, int64_t n_dim) {
    return (size_t)n_row * (size_t)(n_dim + n_dim % 2) * sizeof(float);
}

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * Small tables of whole numbers that the host knows (valid ranges, votes, segments, quotas), on their way to a kernel.
 * They travel with the launch, so that nothing is copied or waited for and a captured graph holds its own; what does
 * not fit goes to the workspace, piece by piece, by launches of its own.
 */
#ifndef KVP_TABLES_CUH
#define KVP_TABLES_CUH

#include "rows.cuh"

/* Numbers that travel with a launch, whose parameters should be few, and with a launch that does nothing else: 4096
 * bytes fit on every GPU. */
enum { KVPG_IN_PARAMETERS = 128, KVPG_PIECE = 960 };

/* Rows of `stride` numbers, one for each batch row. A kernel must take it as __grid_constant__. */
typedef struct kvpg_table {
    const int32_t *in_memory; /* NULL: the numbers are in the parameters of the kernel */
    int32_t stride;           /* 0: there is no table */
    int32_t in_parameters[KVPG_IN_PARAMETERS];
} kvpg_table;

/* Numbers of a table from some place on. Not a pointer, because numbers in the parameters are read as what they are,
 * constants: a pointer to them would be followed through memory each time. */
typedef struct kvpg_numbers {
    const kvpg_table *table;
    int at;
    __device__ __forceinline__ int operator[](int i) const {
        return table->in_memory ? table->in_memory[at + i] : table->in_parameters[at + i];
    }
    __device__ __forceinline__ kvpg_numbers operator+(int i) const { return {table, at + i}; }
} kvpg_numbers;

__device__ __forceinline__ kvpg_numbers kvpg_table_row(const kvpg_table &table, int b) {
    return {&table, b * table.stride};
}

/* Bytes of workspace that a table needs. */
static inline size_t kvpg_table_bytes(int64_t n_row, int64_t stride) {
    return n_row * stride <= KVPG_IN_PARAMETERS ? 0 : kvpi_round_up_64((size_t)(n_row * stride) * sizeof(int32_t));
}

typedef struct kvpg_piece {
    int32_t number[KVPG_PIECE];
} kvpg_piece;

static __global__ void kvpg_put_piece(const __grid_constant__ kvpg_piece piece, int32_t *to, int n) {
    kvpg_follow();
    for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = piece.number[i];
}

/* Writes a table number by number: kvpg_start_table, kvpg_put, kvpg_end_table, which says whether all went well. */
typedef struct kvpg_writer {
    kvpg_table *table;
    kvp_context *ctx;
    kvp_status status;
    int32_t *to; /* in the workspace; NULL: in the parameters */
    int n;       /* in the piece at hand */
    kvpg_piece piece;
} kvpg_writer;

/* workspace: kvpg_table_bytes of it. */
static inline void kvpg_start_table(kvpg_writer *w, kvpg_table *table, int64_t n_row, int64_t stride, void *workspace,
                                    kvp_context *ctx) {
    w->table = table;
    w->ctx = ctx;
    w->status = KVP_OK;
    w->to = kvpg_table_bytes(n_row, stride) ? (int32_t *)workspace : NULL;
    w->n = 0;
    table->in_memory = w->to;
    table->stride = (int32_t)stride;
}

static inline void kvpg_flush(kvpg_writer *w) {
    if (!w->to || w->n == 0) return;
    if (w->status == KVP_OK)
        w->status = kvpg_launch("put_piece", w->ctx, kvpg_put_piece, {1, 1}, 256, 1, 0, w->piece, w->to, w->n);
    w->to += w->n;
    w->n = 0;
}

static inline kvp_status kvpg_end_table(kvpg_writer *w) {
    kvpg_flush(w);
    return w->status;
}

static inline void kvpg_put(kvpg_writer *w, int64_t number) {
    if (w->to && w->n == KVPG_PIECE) kvpg_flush(w);
    (w->to ? w->piece.number : w->table->in_parameters)[w->n++] = (int32_t)number;
}

/* The table of valid ranges: none where all tokens are. */
enum { KVPG_VALID_STRIDE = 2 };

static inline size_t kvpg_valid_bytes(const kvp_tensor *valid) {
    return valid->data ? kvpg_table_bytes(valid->shape[0], KVPG_VALID_STRIDE) : 0;
}

static inline kvp_status kvpg_table_of_valid(const kvp_tensor *valid, kvp_context *ctx, kvpg_table *table) {
    kvpg_writer w;
    table->stride = 0;
    if (!valid->data) return KVP_OK;
    kvpg_start_table(&w, table, valid->shape[0], KVPG_VALID_STRIDE, ctx->workspace, ctx);
    for (int64_t b = 0; b < valid->shape[0]; b++)
        for (int64_t i = 0; i < KVPG_VALID_STRIDE; i++) kvpg_put(&w, kvpi_i32(valid, b, i, 0));
    return kvpg_end_table(&w);
}

__device__ __forceinline__ bool kvpg_is_valid(const kvpg_table &valid, int b, int t) {
    if (!valid.stride) return true;
    const kvpg_numbers row = kvpg_table_row(valid, b);
    return t >= row[0] && t < row[1];
}

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * The row primitives over vectors of LANES floats, included by each rows_*.c, which defines before
 *
 *     LANES, vec                      how many floats a vector holds (at most 16), and its type
 *     TARGET                          attributes of every function (the instruction set)
 *     PANEL_ROWS, PANEL_VECTORS       shape of the product's block of registers: query rows, and vectors of keys
 *     v_load v_store v_fill v_add v_mul v_div v_fma v_max v_sum v_sums v_highest v_exp2 v_transpose, and
 *                                     v_from_NAME for each element type behind float32
 *
 *     HAS_MASKS                       where it can load less than a vector: then also v_part_NAME for each element type
 *                                     (n elements, and zeros behind them) and move_part (n bytes, fewer than a
 * vector's)
 *
 * and after it the table. v_fma(a, b, c) is a*b + c, in one rounding where the processor has that; v_max gives its
 * second argument where either is NaN; v_exp2 is exact to about 1e-7, 0 for minus infinity and NaN for NaN; v_sum
 * and v_highest add and compare the lanes of one vector in a fixed order; v_sums adds those of each of LANES vectors;
 * v_transpose makes columns of LANES rows, in place; v_from_* widen LANES elements.
 */
#include "rows.h"

#include <math.h>
#include <string.h>

enum { PANEL_KEYS = LANES * PANEL_VECTORS, SUMS = LANES < 8 ? 8 : LANES };
_Static_assert(KVPI_BLOCK % PANEL_KEYS == 0 && KVPI_STRIP % PANEL_ROWS == 0 && LANES <= KVPI_SLACK,
               "panels divide blocks and strips");
_Static_assert(KVPI_WIDTH % PANEL_KEYS == 0 && KVPI_WIDTH % PANEL_ROWS == 0, "and what squares are made of");

/* Highest and sum of a row of n logits; hidden ones were set to minus infinity. */
TARGET static float highest_of(const float *row, int64_t n) {
    vec high[2] = {v_fill(-INFINITY), v_fill(-INFINITY)};
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES) {
        high[0] = v_max(v_load(row + k), high[0]);
        high[1] = v_max(v_load(row + k + LANES), high[1]);
    }
    for (; k < n; k += LANES) high[0] = v_max(v_load(row + k), high[0]);
    return v_highest(v_max(high[0], high[1]));
}

/* tanh of a number that is at most 7.9 in size, as a quotient of polynomials; behind that it is 1 but for less than a
 * rounding. NaN stays. */
TARGET static inline vec v_tanh(vec x) {
    const vec most = v_fill(7.90531110763549805f), minus = v_fill(-1);
    x = v_max(v_mul(minus, most), x);
    x = v_mul(minus, v_max(v_mul(minus, most), v_mul(minus, x)));
    const vec square = v_mul(x, x);
    vec p = v_fill(-2.76076847742355e-16f), q = v_fill(1.19825839466702e-06f);
    p = v_fma(p, square, v_fill(2.00018790482477e-13f));
    p = v_fma(p, square, v_fill(-8.60467152213735e-11f));
    p = v_fma(p, square, v_fill(5.12229709037114e-08f));
    p = v_fma(p, square, v_fill(1.48572235717979e-05f));
    p = v_fma(p, square, v_fill(6.37261928875436e-04f));
    p = v_fma(p, square, v_fill(4.89352455891786e-03f));
    q = v_fma(q, square, v_fill(1.18534705686654e-04f));
    q = v_fma(q, square, v_fill(2.26843463243900e-03f));
    q = v_fma(q, square, v_fill(4.89352518554385e-03f));
    return v_div(v_mul(x, p), q);
}

TARGET static void cap(float *row, int64_t n, float factor, float height) {
    const vec f = v_fill(factor), h = v_fill(height);
    for (int64_t k = 0; k < n; k += LANES) v_store(row + k, v_mul(h, v_tanh(v_mul(f, v_load(row + k)))));
}

TARGET static float soften(float *row, int64_t n_visible, int64_t n, float scale, float *shift) {
    for (int64_t k = n_visible < 0 ? 0 : n_visible; k < n; k++) row[k] = -INFINITY;
    if (isnan(*shift)) {
        *shift = highest_of(row, n) * scale;
        if (*shift == -INFINITY) *shift = 0;
    }
    const vec factor = v_fill(scale), minus_shift = v_fill(-*shift);
    vec sum[2] = {v_fill(0), v_fill(0)};
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES) {
        for (int i = 0; i < 2; i++) {
            const vec p = v_exp2(v_fma(v_load(row + k + i * LANES), factor, minus_shift));
            v_store(row + k + i * LANES, p);
            sum[i] = v_add(sum[i], p);
        }
    }
    for (; k < n; k += LANES) {
        const vec p = v_exp2(v_fma(v_load(row + k), factor, minus_shift));
        v_store(row + k, p);
        sum[0] = v_add(sum[0], p);
    }
    return v_sum(v_add(sum[0], sum[1]));
}

/* The first n columns, or LANES of them: those behind belong to others. */
TARGET static inline void store_first(float *column, vec a, int64_t n) {
    if (n >= LANES) {
        v_store(column, a);
        return;
    }
    float last[LANES];
    v_store(last, a);
    memcpy(column, last, (size_t)n * sizeof(float));
}

TARGET static void add_columns(float *column, int64_t n, const float *rows, int64_t stride, const float *weight,
                               int64_t n_row) {
    vec w[KVPI_STRIP];
    for (int64_t r = 0; r < n_row; r++) w[r] = v_fill(weight[r]);
    for (int64_t k = 0; k < n; k += LANES) {
        vec sum = v_load(column + k);
        for (int64_t r = 0; r < n_row; r++) sum = v_fma(w[r], v_load(rows + r * stride + k), sum);
        store_first(column + k, sum, n - k);
    }
}

TARGET static void raise_columns(float *column, int64_t n, const float *rows, int64_t stride, const float *weight,
                                 int64_t n_row) {
    vec w[KVPI_STRIP];
    for (int64_t r = 0; r < n_row; r++) w[r] = v_fill(weight[r]);
    for (int64_t k = 0; k < n; k += LANES) {
        vec most = v_load(column + k);
        for (int64_t r = 0; r < n_row; r++) most = v_max(v_mul(w[r], v_load(rows + r * stride + k)), most);
        store_first(column + k, most, n - k);
    }
}

TARGET static void dot_columns(float *column, int64_t n, const float *rows, const float *others, int64_t stride,
                               const float *offset, int64_t n_row) {
    for (int64_t k = 0; k < n; k += LANES) {
        vec sum = v_load(column + k);
        for (int64_t r = 0; r < n_row; r++)
            sum = v_fma(v_add(v_load(rows + r * stride + k), v_fill(offset[r])), v_load(others + r * stride + k), sum);
        v_store(column + k, sum);
    }
}

TARGET static void add_squares(const float *lines, int64_t n_line, int64_t width, float *out) {
    for (int64_t row = 0; row < width; row += PANEL_ROWS) {
        for (int64_t first = row / PANEL_KEYS * PANEL_KEYS; first < width; first += PANEL_KEYS) {
            const float *k = lines + first, *q = lines + row;
            float *to = out + row * width + first;
            vec sum[PANEL_ROWS][PANEL_VECTORS];
            for (int r = 0; r < PANEL_ROWS; r++)
                for (int v = 0; v < PANEL_VECTORS; v++) sum[r][v] = v_load(to + r * width + v * LANES);
            for (int64_t i = 0; i < n_line; i++, k += width, q += width) {
                vec part[PANEL_VECTORS];
                for (int v = 0; v < PANEL_VECTORS; v++) part[v] = v_load(k + v * LANES);
                for (int r = 0; r < PANEL_ROWS; r++) {
                    const vec by = v_fill(q[r]);
                    for (int v = 0; v < PANEL_VECTORS; v++) sum[r][v] = v_fma(by, part[v], sum[r][v]);
                }
            }
            for (int r = 0; r < PANEL_ROWS; r++)
                for (int v = 0; v < PANEL_VECTORS; v++) v_store(to + r * width + v * LANES, sum[r][v]);
        }
    }
}

#ifndef HAS_MASKS
static inline void move_part(char *target, const char *source, size_t n) { memmove(target, source, n); }
#endif

/* Bytes move as floats, which keep their bits in a register. In place a row may be its own source, and is copied onto
 * itself. */
TARGET static void copy_rows(char *target, int64_t target_step, const char *source, int64_t source_step,
                             const int32_t *positions, int64_t n_token, int64_t n_row, size_t n) {
    const size_t whole = n - n % (LANES * sizeof(float));
    for (int64_t i = 0; i < n_row; i++, target += target_step) {
        const char *row = source + kvpi_position(positions + i, n_token) * source_step;
        for (size_t at = 0; at < whole; at += LANES * sizeof(float))
            v_store((float *)(void *)(target + at), v_load((const float *)(const void *)(row + at)));
        if (whole < n) move_part(target + whole, row + whole, n - whole);
    }
}

/* Packed keys: per panel, for each dimension, the panel's keys side by side. Packed queries: for each dimension, the
 * strip's rows. */
TARGET static void multiply_floats(const void *queries, const void *keys, int64_t n_row, int64_t n_key, int64_t n_dim,
                                   float *logits, int64_t stride) {
    for (int64_t key = 0; key < n_key; key += PANEL_KEYS) {
        for (int64_t row = 0; row < n_row; row += PANEL_ROWS) {
            const float *k = (const float *)keys + key * n_dim, *q = (const float *)queries + row;
            vec sum[PANEL_ROWS][PANEL_VECTORS];
            for (int r = 0; r < PANEL_ROWS; r++)
                for (int v = 0; v < PANEL_VECTORS; v++) sum[r][v] = v_fill(0);
            /* Counting is a fifth of the instructions, which counts where a processor shares its core. */
#pragma GCC unroll 4
            for (int64_t d = 0; d < n_dim; d++) {
                vec of_keys[PANEL_VECTORS];
                for (int v = 0; v < PANEL_VECTORS; v++) of_keys[v] = v_load(k + v * LANES);
                for (int r = 0; r < PANEL_ROWS; r++) {
                    const vec of_query = v_fill(q[r]);
                    for (int v = 0; v < PANEL_VECTORS; v++) sum[r][v] = v_fma(of_query, of_keys[v], sum[r][v]);
                }
                k += PANEL_KEYS;
                q += KVPI_STRIP;
            }
            for (int r = 0; r < PANEL_ROWS; r++)
                for (int v = 0; v < PANEL_VECTORS; v++)
                    v_store(logits + (row + r) * stride + key + v * LANES, sum[r][v]);
        }
    }
}

/* Vectors of keys in the last panel that pack_keys had no key for. */
TARGET static inline void clear_missing_keys(void *packed, int64_t n_key, int64_t n_element) {
    for (int64_t key = (n_key + LANES - 1) / LANES * LANES; key % PANEL_KEYS; key += LANES)
        for (int64_t d = 0; d < n_element; d++)
            v_store((float *)packed + key / PANEL_KEYS * PANEL_KEYS * n_element + d * PANEL_KEYS + key % PANEL_KEYS,
                    v_fill(0));
}

/* LANES rows of up to LANES 32-bit elements become columns at out, "step" apart. */
TARGET static inline void store_columns(vec *rows, int64_t n_column, float *out, int64_t step) {
    v_transpose(rows);
    for (int64_t i = 0; i < n_column; i++) v_store(out + i * step, rows[i]);
}

/* How many keys' products with 1 to KVPI_FEW query rows fit SUMS registers. */
static inline __attribute__((always_inline)) int keys_of_few(int64_t n_row) {
    return n_row == 1 ? SUMS : n_row == 2 ? SUMS / 2 : n_row <= 4 ? SUMS / 4 : SUMS / KVPI_FEW;
}
_Static_assert(SUMS % LANES == 0 && SUMS <= PANEL_KEYS, "multiply_few writes no more than whole panels");

/* In the tables: a function of each element type; one function for all of them. */
#define OF_EACH_DTYPE(x) {[KVP_F32] = x##_f32, [KVP_F16] = x##_f16, [KVP_BF16] = x##_bf16}
#define FOR_ALL_DTYPES(x) {[KVP_F32] = x, [KVP_F16] = x, [KVP_BF16] = x}

/* Of a table: what no instruction set has otherwise, and what those that multiply floats have. */
#define SHARED_FUNCTIONS                                                                                       \
    .panel = PANEL_KEYS, .norms = OF_EACH_DTYPE(norms), .products = OF_EACH_DTYPE(products),                   \
    .add_rows = OF_EACH_DTYPE(add_rows), .turn = OF_EACH_DTYPE(turn), .pack_floats = OF_EACH_DTYPE(pack_keys), \
    .add_squares = add_squares, .dot_columns = dot_columns, .bounds = OF_EACH_DTYPE(bounds),                   \
    .spreads = OF_EACH_DTYPE(spreads), .cap = cap, .soften = soften, .add_columns = add_columns,               \
    .raise_columns = raise_columns, .list = list, .filter = filter, .copy_rows = copy_rows, .stream = stream,  \
    .end_stream = end_stream, .line_up = OF_EACH_DTYPE(line_up), .multiply_few = OF_EACH_DTYPE(multiply_few)
#define FLOAT_FUNCTIONS                                                                 \
    .pack_keys = OF_EACH_DTYPE(pack_keys), .pack_queries = OF_EACH_DTYPE(pack_queries), \
    .multiply = FOR_ALL_DTYPES(multiply_floats)

#define v_from_f32 v_load
#define ROW_NAME(x) x##_f32
#define ROW_TYPE float
#include "rows_by_dtype.h"

#define ROW_NAME(x) x##_f16
#define ROW_TYPE uint16_t
#include "rows_by_dtype.h"

#define ROW_NAME(x) x##_bf16
#define ROW_TYPE uint16_t
#include "rows_by_dtype.h"

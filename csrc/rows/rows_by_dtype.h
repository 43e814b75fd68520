/* SPDX-License-Identifier: Apache-2.0
 *
 * What rows_template.h needs once per element type, with ROW_NAME(x) and ROW_TYPE defined. Elements that are not side
 * by side are gathered first, so that a row gives the same bits whatever its stride.
 */

#ifndef HAS_MASKS
/* n elements, fewer than LANES, and zeros behind them. */
TARGET __attribute__((noinline)) static vec ROW_NAME(v_part)(const ROW_TYPE *x, int64_t n) {
    ROW_TYPE part[LANES] = {0};
    memcpy(part, x, (size_t)n * sizeof part[0]);
    return ROW_NAME(v_from)(part);
}
#endif

/* Apart from load_part, so that the usual case stays in registers. */
TARGET __attribute__((noinline)) static vec ROW_NAME(gather_part)(const ROW_TYPE *row, int64_t stride, int64_t d,
                                                                  int64_t n_dim) {
    ROW_TYPE part[LANES] = {0};
    for (int64_t i = 0; i < LANES && d + i < n_dim; i++) part[i] = row[(d + i) * stride];
    return ROW_NAME(v_from)(part);
}

/* LANES elements of a row from dimension d on, which is one of the row's; zero behind the last. */
TARGET static inline vec ROW_NAME(load_part)(const ROW_TYPE *row, int64_t stride, int64_t d, int64_t n_dim) {
    if (stride != 1) return ROW_NAME(gather_part)(row, stride, d, n_dim);
    return d + LANES <= n_dim ? ROW_NAME(v_from)(row + d) : ROW_NAME(v_part)(row + d, n_dim - d);
}

/* The product of what a row has from dimension d on with a vector, or with itself where that is NULL, added to the sums
 * of what stands before. Apart from product, which would keep its sums in memory for the calls in here: twice the time.
 */
TARGET __attribute__((noinline)) static float ROW_NAME(finish_product)(const ROW_TYPE *row, int64_t stride, int64_t d,
                                                                       int64_t n_dim, const float *vector, vec *sum) {
    for (int i = 0; d < n_dim; d += LANES, i = (i + 1) % 4) {
        const vec part = ROW_NAME(load_part)(row, stride, d, n_dim);
        sum[i] = v_fma(part, vector ? v_load(vector + d) : part, sum[i]);
    }
    return v_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3])));
}

/* The product of a row with a vector, or with itself where that is NULL. */
TARGET static inline float ROW_NAME(product)(const ROW_TYPE *row, int64_t stride, int64_t n_dim, const float *vector) {
    vec sum[4] = {v_fill(0), v_fill(0), v_fill(0), v_fill(0)};
    int64_t d = 0;
    for (const int64_t whole = stride == 1 ? n_dim - n_dim % (4 * LANES) : 0; d < whole; d += 4 * LANES) {
#pragma GCC unroll 8
        for (int i = 0; i < 4; i++) {
            const vec part = ROW_NAME(v_from)(row + d + i * LANES);
            sum[i] = v_fma(part, vector ? v_load(vector + d + i * LANES) : part, sum[i]);
        }
    }
    if (d < n_dim) {
        vec before[4] = {sum[0], sum[1], sum[2], sum[3]};
        return ROW_NAME(finish_product)(row, stride, d, n_dim, vector, before);
    }
    return v_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3])));
}

TARGET static void ROW_NAME(norms)(kvpi_head head, int64_t n_row, int64_t n_dim, float *out, int64_t out_stride) {
    const ROW_TYPE *row = head.first;
    for (int64_t r = 0; r < n_row; r++, row += head.row_stride)
        out[r * out_stride] = sqrtf(ROW_NAME(product)(row, head.dim_stride, n_dim, NULL));
}

TARGET static void ROW_NAME(products)(kvpi_head head, int64_t n_row, int64_t n_dim, const float *vector, float *out) {
    const ROW_TYPE *row = head.first;
    for (int64_t r = 0; r < n_row; r++, row += head.row_stride)
        out[r] = ROW_NAME(product)(row, head.dim_stride, n_dim, vector);
}

TARGET static void ROW_NAME(add_rows)(kvpi_head head, int64_t n_row, int64_t n_dim, const float *weight, float *out) {
    for (int64_t d = 0; d < n_dim; d += 4 * LANES) {
        const ROW_TYPE *row = head.first;
        vec sum[4] = {v_fill(0), v_fill(0), v_fill(0), v_fill(0)};
#pragma GCC unroll 8
        for (int i = 0; i < 4; i++)
            if (d + i * LANES < n_dim) sum[i] = v_load(out + d + i * LANES);
        for (int64_t r = 0; r < n_row; r++, row += head.row_stride) {
            const vec w = v_fill(weight[r]);
#pragma GCC unroll 8
            for (int i = 0; i < 4; i++)
                if (d + i * LANES < n_dim)
                    sum[i] = v_fma(w, ROW_NAME(load_part)(row, head.dim_stride, d + i * LANES, n_dim), sum[i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 4; i++)
            if (d + i * LANES < n_dim) v_store(out + d + i * LANES, sum[i]);
    }
}

TARGET static void ROW_NAME(turn)(const void *row, int64_t dim_stride, int64_t n_dim, const float *own,
                                  const float *other, const float *shift, float *out) {
    const int64_t half = n_dim / 2;
    const vec minus = v_fill(-1);
    for (int64_t first = 0; first < n_dim; first += half) {
        const ROW_TYPE *x = (const ROW_TYPE *)row + first * dim_stride;
        const ROW_TYPE *y = (const ROW_TYPE *)row + (half - first) * dim_stride;
        for (int64_t d = 0; d < half; d += LANES) {
            vec sum = v_mul(v_load(shift + first + d), minus);
            sum = v_fma(v_load(own + first + d), ROW_NAME(load_part)(x, dim_stride, d, half), sum);
            sum = v_fma(v_load(other + first + d), ROW_NAME(load_part)(y, dim_stride, d, half), sum);
            v_store(out + first + d, sum);
        }
    }
    memset(out + n_dim, 0, KVPI_SLACK * sizeof(float));
}

TARGET static void ROW_NAME(bounds)(kvpi_head head, int64_t n_row, int64_t n_dim, float *low, float *high) {
    const vec minus = v_fill(-1);
    for (int64_t d = 0; d < n_dim; d += 4 * LANES) {
        const ROW_TYPE *row = head.first;
        vec least[4], most[4]; /* of minus the rows, and of the rows */
        for (int i = 0; i < 4; i++) least[i] = most[i] = v_fill(-INFINITY);
        for (int64_t r = 0; r < n_row; r++, row += head.row_stride) {
#pragma GCC unroll 8
            for (int i = 0; i < 4; i++) {
                if (d + i * LANES >= n_dim) continue;
                const vec part = ROW_NAME(load_part)(row, head.dim_stride, d + i * LANES, n_dim);
                least[i] = v_max(v_mul(minus, part), least[i]);
                most[i] = v_max(part, most[i]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 4; i++) {
            if (d + i * LANES >= n_dim) continue;
            v_store(low + d + i * LANES, v_mul(minus, least[i]));
            v_store(high + d + i * LANES, most[i]);
        }
    }
}

TARGET static void ROW_NAME(spreads)(kvpi_head head, int64_t n_row, int64_t n_dim, const float *offset,
                                     const float *factor, float *line, float *out) {
    const ROW_TYPE *row = head.first;
    for (int64_t r = 0; r < n_row; r++, row += head.row_stride) {
        vec sum[2] = {v_fill(0), v_fill(0)}, square[2] = {v_fill(0), v_fill(0)};
        for (int64_t d = 0; d < n_dim; d += LANES) {
            const vec part = v_add(ROW_NAME(load_part)(row, head.dim_stride, d, n_dim), v_load(offset + d));
            const vec scaled = v_mul(part, v_load(factor + d));
            v_store(line + d, scaled);
            sum[d / LANES % 2] = v_add(sum[d / LANES % 2], scaled);
        }
        const float mean = v_sum(v_add(sum[0], sum[1])) / (float)n_dim;
        for (int64_t d = n_dim; d % LANES; d++) line[d] = mean; /* which adds nothing */
        const vec minus_mean = v_fill(-mean);
        for (int64_t d = 0; d < n_dim; d += LANES) {
            const vec rest = v_add(v_load(line + d), minus_mean);
            square[d / LANES % 2] = v_fma(rest, rest, square[d / LANES % 2]);
        }
        out[r] = sqrtf(v_sum(v_add(square[0], square[1])) / (float)(n_dim > 1 ? n_dim - 1 : 1));
    }
}

TARGET static void ROW_NAME(pack_keys)(kvpi_head head, int64_t n_key, int64_t n_dim, void *out) {
    const ROW_TYPE *first = head.first;
    for (int64_t key = 0; key < n_key; key += LANES) {
        float *panel = (float *)out + key / PANEL_KEYS * PANEL_KEYS * n_dim + key % PANEL_KEYS;
        for (int64_t d = 0; d < n_dim; d += LANES) {
            vec part[LANES];
            for (int64_t i = 0; i < LANES; i++)
                part[i] = key + i < n_key
                              ? ROW_NAME(load_part)(first + (key + i) * head.row_stride, head.dim_stride, d, n_dim)
                              : v_fill(0);
            store_columns(part, n_dim - d < LANES ? n_dim - d : LANES, panel + d * PANEL_KEYS, PANEL_KEYS);
        }
    }
    clear_missing_keys(out, n_key, n_dim);
}

TARGET static float ROW_NAME(pack_queries)(const void *const *rows, int64_t dim_stride, int64_t n_row, int64_t n_dim,
                                           float scale, void *out) {
    const vec factor = v_fill(scale);
    for (int64_t first = 0; first < KVPI_STRIP; first += LANES) {
        for (int64_t d = 0; d < n_dim; d += LANES) {
            vec part[LANES];
            for (int64_t i = 0; i < LANES; i++)
                part[i] = first + i < n_row ? v_mul(factor, ROW_NAME(load_part)(rows[first + i], dim_stride, d, n_dim))
                                            : v_fill(0);
            store_columns(part, n_dim - d < LANES ? n_dim - d : LANES, (float *)out + d * KVPI_STRIP + first,
                          KVPI_STRIP);
        }
    }
    return 1;
}

TARGET static void ROW_NAME(line_up)(const void *const *rows, int64_t dim_stride, int64_t n_row, int64_t n_dim,
                                     float scale, float *out) {
    const vec factor = v_fill(scale);
    for (int64_t r = 0; r < n_row; r++)
        for (int64_t d = 0; d < n_dim; d += LANES, out += LANES)
            v_store(out, v_mul(factor, ROW_NAME(load_part)(rows[r], dim_stride, d, n_dim)));
}

/* The products of keys_of_few(n_row) keys, "step" apart, with n_row queries, a number that the compiler knows, so that
 * sums stay in registers. */
TARGET static inline __attribute__((always_inline)) void ROW_NAME(dot_rows)(const float *queries, const ROW_TYPE *keys,
                                                                            int64_t step, int64_t width, int n_row,
                                                                            float *logits, int64_t stride) {
    const int n_key = keys_of_few(n_row);
    vec sum[SUMS];
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) sum[i] = v_fill(0);
    for (int64_t d = 0; d < width; d += LANES) {
        vec query[KVPI_FEW];
#pragma GCC unroll 8
        for (int r = 0; r < n_row; r++) query[r] = v_load(queries + r * width + d);
#pragma GCC unroll 16
        for (int k = 0; k < n_key; k++) {
            const vec key = ROW_NAME(v_from)(keys + k * step + d);
#pragma GCC unroll 8
            for (int r = 0; r < n_row; r++) sum[r * n_key + k] = v_fma(query[r], key, sum[r * n_key + k]);
        }
    }
    float out[SUMS];
#pragma GCC unroll 2
    for (int i = 0; i < SUMS; i += LANES) v_store(out + i, v_sums(sum + i));
#pragma GCC unroll 8
    for (int r = 0; r < n_row; r++) memcpy(logits + r * stride, out + r * n_key, (size_t)n_key * sizeof(float));
}

TARGET static void ROW_NAME(dot_few)(const float *queries, const ROW_TYPE *keys, int64_t step, int64_t width,
                                     int64_t n_row, float *logits, int64_t stride) {
    switch (n_row) {
    case 1: ROW_NAME(dot_rows)(queries, keys, step, width, 1, logits, stride); break;
    case 2: ROW_NAME(dot_rows)(queries, keys, step, width, 2, logits, stride); break;
    case 3: ROW_NAME(dot_rows)(queries, keys, step, width, 3, logits, stride); break;
    case 4: ROW_NAME(dot_rows)(queries, keys, step, width, 4, logits, stride); break;
    case 5: ROW_NAME(dot_rows)(queries, keys, step, width, 5, logits, stride); break;
    case 6: ROW_NAME(dot_rows)(queries, keys, step, width, 6, logits, stride); break;
    case 7: ROW_NAME(dot_rows)(queries, keys, step, width, 7, logits, stride); break;
    default: ROW_NAME(dot_rows)(queries, keys, step, width, KVPI_FEW, logits, stride); break;
    }
}

/* Keys that are not side by side, or no whole vectors, or the last and fewer than the others, are lined up first. */
TARGET static void ROW_NAME(multiply_few)(const float *queries, kvpi_head head, int64_t n_row, int64_t n_key,
                                          int64_t n_dim, float *line, float *logits, int64_t stride) {
    const ROW_TYPE *keys = head.first;
    const int64_t width = (n_dim + LANES - 1) / LANES * LANES, n_each = keys_of_few(n_row);
    const bool is_whole = head.dim_stride == 1 && width == n_dim;
    for (int64_t key = 0; key < n_key; key += n_each, keys += n_each * head.row_stride) {
        if (is_whole && key + n_each <= n_key) {
            ROW_NAME(dot_few)(queries, keys, head.row_stride, width, n_row, logits + key, stride);
            continue;
        }
        const void *rows[SUMS];
        for (int64_t k = 0; k < n_each; k++) rows[k] = keys + (key + k < n_key ? k : n_key - 1 - key) * head.row_stride;
        ROW_NAME(line_up)(rows, head.dim_stride, n_each, n_dim, 1, line);
        dot_few_f32(queries, line, width, width, n_row, logits + key, stride);
    }
}

#undef ROW_NAME
#undef ROW_TYPE

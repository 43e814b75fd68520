/* SPDX-License-Identifier: Apache-2.0
 *
 * What rows_template.h needs once per element type, with ROW_NAME(x), ROW_TYPE, ROW_WIDEN(element) and ROW_LOAD(address) defined.
 * Elements that are not side by side are gathered first, so that a row gives the same bits whatever its stride.
 */

TARGET static float ROW_NAME(sum_of_squares)(const void *row, int64_t stride, int64_t n) {
    enum { STEP = 4 * LANES };
    vec sum[4] = {v_fill(0), v_fill(0), v_fill(0), v_fill(0)};
    for (int64_t i = 0; i < n; i += STEP) {
        const ROW_TYPE *x = (const ROW_TYPE *)row + i * stride;
        ROW_TYPE gathered[STEP];
        if (stride != 1 || n - i < STEP) {
            for (int64_t j = 0; j < STEP; j++) gathered[j] = i + j < n ? x[j * stride] : (ROW_TYPE)0;
            x = gathered;
        }
        for (int j = 0; j < 4; j++) {
            const vec part = ROW_LOAD(x + j * LANES);
            sum[j] = v_fma(part, part, sum[j]);
        }
    }
    return v_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3])));
}

TARGET static void ROW_NAME(pack_keys)(kvpi_head head, int64_t n_key, int64_t n_dim, void *out) {
    float *panel = out;
    for (int64_t first = 0; first < n_key; first += PANEL_KEYS, panel += PANEL_KEYS * n_dim) {
        for (int64_t i = 0; i < PANEL_KEYS; i++) {
            const ROW_TYPE *row = (const ROW_TYPE *)head.first + (first + i) * head.row_stride;
            if (first + i >= n_key)
                for (int64_t d = 0; d < n_dim; d++) panel[d * PANEL_KEYS + i] = 0;
            else
                for (int64_t d = 0; d < n_dim; d++) panel[d * PANEL_KEYS + i] = ROW_WIDEN(row[d * head.dim_stride]);
        }
    }
}

TARGET static float ROW_NAME(pack_queries)(const void *const *rows, int64_t dim_stride, int64_t n_row, int64_t n_dim, float scale, void *out) {
    float *panel = out;
    for (int64_t first = 0; first < n_row; first += PANEL_ROWS, panel += PANEL_ROWS * n_dim) {
        for (int64_t r = 0; r < PANEL_ROWS; r++) {
            const ROW_TYPE *row = first + r < n_row ? rows[first + r] : NULL;
            for (int64_t d = 0; d < n_dim; d++) panel[d * PANEL_ROWS + r] = row ? scale * ROW_WIDEN(row[d * dim_stride]) : 0;
        }
    }
    return 1;
}

#undef ROW_NAME
#undef ROW_TYPE
#undef ROW_WIDEN
#undef ROW_LOAD

/* SPDX-License-Identifier: Apache-2.0
 *
 * The row loops, included once per element type with ROW_NAME(x), ROW_TYPE and ROW_LOAD(element) defined. The contiguous case has a loop
 * of its own so that the compiler can vectorise it; both add in the same order and give the same bits.
 */

static void ROW_NAME(widen)(const void *row, int64_t stride, int64_t n, float *out) {
    const ROW_TYPE *x = row;
    for (int64_t i = 0; i < n; i++) out[i] = ROW_LOAD(x[i * stride]);
}

static float ROW_NAME(dot)(const float *query, const void *row, int64_t stride, int64_t n) {
    const ROW_TYPE *x = row;
    float sum[8] = {0};
    int64_t i = 0;
    if (stride == 1) {
        for (; i + 8 <= n; i += 8)
            for (int lane = 0; lane < 8; lane++) sum[lane] += query[i + lane] * ROW_LOAD(x[i + lane]);
    }
    for (; i < n; i++) sum[i % 8] += query[i] * ROW_LOAD(x[i * stride]);
    return add_lanes(sum);
}

static float ROW_NAME(sum_of_squares)(const void *row, int64_t stride, int64_t n) {
    const ROW_TYPE *x = row;
    float sum[8] = {0};
    int64_t i = 0;
    if (stride == 1) {
        for (; i + 8 <= n; i += 8) {
            for (int lane = 0; lane < 8; lane++) {
                const float value = ROW_LOAD(x[i + lane]);
                sum[lane] += value * value;
            }
        }
    }
    for (; i < n; i++) {
        const float value = ROW_LOAD(x[i * stride]);
        sum[i % 8] += value * value;
    }
    return add_lanes(sum);
}

#undef ROW_NAME
#undef ROW_TYPE
#undef ROW_LOAD

/* SPDX-License-Identifier: Apache-2.0
 *
 * Copies the kept rows of keys and values on the GPU, both in one launch. Rows on 16-byte boundaries go 16 bytes a
 * lane, four rows in flight, past the caches; others element by element. Positions are not read by the host, so one
 * outside [0, T) is taken for -1.
 */
#include "gather.cuh"

enum { THREADS = 256, IN_FLIGHT = 4 };

typedef struct gather_job {
    copy copies[2];
    kvpg_rows positions;
    int n_row, n_head, n_token, n_kept; /* n_row: batch rows times heads */
} gather_job;

__device__ __forceinline__ int read_position(const gather_job &j, int b, int h, int i) {
    const int position = (int)kvpg_load(kvpg_row(j.positions, b, h, i));
    return position < j.n_token ? position : -1;
}

/* LANES lanes to a row. Keys come first, the oldest before the newest, and all heads of a stretch of tokens together:
 * so the oldest are met in the second-level cache, where a scorer that reads them last has left them. */
template <int LANES> __global__ void __launch_bounds__(THREADS) gather_wide(const __grid_constant__ gather_job j) {
    kvpg_follow();
    const copy &c = j.copies[blockIdx.y];
    const int row = blockIdx.x % j.n_row, b = row / j.n_head, h = row % j.n_head, n_group = THREADS / LANES;
    const int first = blockIdx.x / j.n_row * n_group * IN_FLIGHT + threadIdx.x / LANES;
    kvpg_copy_rows<LANES, IN_FLIGHT>(c, b, h, first, n_group, j.n_kept,
                                     [&](int i) { return read_position(j, b, h, i); });
}

/* A warp to a row. T: any type of the elements' size. */
template <typename T> __global__ void __launch_bounds__(THREADS) gather_narrow(const __grid_constant__ gather_job j) {
    kvpg_follow();
    const copy &c = j.copies[blockIdx.y];
    const int row = blockIdx.x % j.n_row, b = row / j.n_head, h = row % j.n_head,
              i = blockIdx.x / j.n_row * (THREADS / 32) + threadIdx.x / 32;
    if (i >= j.n_kept) return;
    const int position = read_position(j, b, h, i);
    for (int d = threadIdx.x % 32; d < c.n_unit; d += 32)
        *(T *)(kvpg_row(c.out, b, h, i) + d * c.out.d) =
            position >= 0 ? *(const T *)(kvpg_row(c.in, b, h, position) + d * c.in.d) : T(0);
}

extern "C" kvp_status kvpi_gather_cuda(const kvp_gather_args *args, kvp_context *ctx) {
    const int64_t *kept = args->positions.shape;
    const bool wide = kvpg_is_wide(args);
    const int64_t size = (int64_t)kvpi_dtype_size(args->keys.dtype), unit_bytes = wide ? 16 : size;
    gather_job j;
    j.copies[0] = kvpg_make_copy(&args->keys, &args->out_keys, unit_bytes);
    j.copies[1] = kvpg_make_copy(&args->values, &args->out_values, unit_bytes);
    j.positions = kvpg_rows_of(&args->positions);
    j.n_row = (int)(kept[0] * kept[1]);
    j.n_head = (int)kept[1];
    j.n_token = (int)args->keys.shape[2];
    j.n_kept = (int)kept[2];
    const int longest = j.copies[0].n_unit > j.copies[1].n_unit ? j.copies[0].n_unit : j.copies[1].n_unit;
    const int lanes = !wide           ? 32
                      : longest <= 8  ? 8
                      : longest <= 16 ? 16
                                      : 32,
              rows = THREADS / lanes * (wide ? IN_FLIGHT : 1);
    const kvpg_grid grid = {kvpg_ceil_div(j.n_kept, rows) * j.n_row, 2};
    void (*kernel)(gather_job) = gather_wide<32>;
    if (!wide)
        kernel = size == 4 ? gather_narrow<uint32_t> : gather_narrow<uint16_t>;
    else if (lanes < 32)
        kernel = lanes == 8 ? gather_wide<8> : gather_wide<16>;
    return kvpg_launch("gather", ctx, kernel, grid, THREADS, 1, 0, j);
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * Gathering against a loop over elements, bit for bit; also into the start of its own input.
 */
#include "harness.h"
#include "tests.h"

#include <string.h>

static void fill_bits(const array *a) {
    for (size_t i = 0; i < a->memory.bytes; i++) a->memory.data[i] = (unsigned char)random_bits();
}

/* A random subset in ascending order, then -1; subsets of every size up to K. */
static void draw_positions(const kvp_tensor *positions, int64_t n_token) {
    for (int64_t b = 0; b < positions->shape[0]; b++)
        for (int64_t h = 0; h < positions->shape[1]; h++) {
            const int64_t room = positions->shape[2] < n_token ? positions->shape[2] : n_token;
            int64_t left = random_below(3) ? room : random_below(room + 1), i = 0;
            for (int64_t t = 0; t < n_token && left > 0; t++) {
                if (random_below(n_token - t) >= left) continue;
                set(positions, b, h, i++, 0, (double)t);
                left--;
            }
            for (; i < positions->shape[2]; i++) set(positions, b, h, i, 0, -1);
        }
}

static int64_t count_wrong(const kvp_tensor *in, const kvp_tensor *positions, const kvp_tensor *out) {
    static const unsigned char zeros[4] = {0};
    int64_t n_wrong = 0;
    for (int64_t b = 0; b < out->shape[0]; b++)
        for (int64_t h = 0; h < out->shape[1]; h++)
            for (int64_t i = 0; i < out->shape[2]; i++)
                for (int64_t d = 0; d < out->shape[3]; d++) {
                    const int64_t position = (int64_t)get(positions, b, h, i, 0);
                    const void *expected = position < 0 ? zeros : element(in, b, h, position, d);
                    n_wrong += memcmp(element(out, b, h, i, d), expected, dtype_size(out->dtype)) != 0;
                }
    return n_wrong;
}

static void gather_case(kvp_dtype dtype, int64_t n_token, int64_t n_kept, int64_t n_dim, int64_t n_value_dim) {
    const int64_t b = 2, h = 3;
    array keys = new_array(dtype, random_layout(), 4, (int64_t[4]){b, h, n_token, n_dim});
    array values = new_array(dtype, random_layout(), 4, (int64_t[4]){b, h, n_token, n_value_dim});
    array positions = new_array(KVP_I32, random_layout(), 3, (int64_t[3]){b, h, n_kept});
    array out_keys = new_array(dtype, output_layout(random_layout()), 4, (int64_t[4]){b, h, n_kept, n_dim});
    array out_values = new_array(dtype, output_layout(random_layout()), 4, (int64_t[4]){b, h, n_kept, n_value_dim});
    fill_bits(&keys);
    fill_bits(&values);
    draw_positions(&positions.view, n_token);
    const kvp_gather_args args = {sizeof(kvp_gather_args), keys.view,     values.view,
                                  positions.view,          out_keys.view, out_values.view};
    name_case("gather %s T=%lld K=%lld D=%lld Dv=%lld", dtype_name((int32_t)dtype), (long long)n_token,
              (long long)n_kept, (long long)n_dim, (long long)n_value_dim);
    const uint64_t before = hash_block(&keys.memory) ^ hash_block(&values.memory) ^ hash_block(&positions.memory);
    poison_array(&out_keys, 0xff);
    poison_array(&out_values, 0xff);
    call_verb(KVP_GATHER, &args, (calling){.scratch_byte = 0xff});
    check_untouched(&out_keys, 0xff);
    check_untouched(&out_values, 0xff);
    CHECK(count_wrong(&keys.view, &positions.view, &out_keys.view) == 0, "keys differ");
    CHECK(count_wrong(&values.view, &positions.view, &out_values.view) == 0, "values differ");
    CHECK((hash_block(&keys.memory) ^ hash_block(&values.memory) ^ hash_block(&positions.memory)) == before,
          "an input was written");
    array *const all[] = {&keys, &values, &positions, &out_keys, &out_values};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free_array(all[i]);
}

/* Large enough outputs to be written past the caches, with rows that can be and rows that cannot. */
void test_gather_large(void) {
    static const int64_t dims[] = {128, 100, 33};
    for (int i = 0; i < 6; i++)
        gather_case(i % 2 ? KVP_F32 : KVP_BF16, 5000, i < 3 ? 2500 : 900, dims[i % 3] * 2,
                    dims[i % 3] * (i < 3 ? 2 : 5));
}

void test_gather(void) {
    static const int64_t dims[] = {1, 8, 16, 64, 80};
    for (int dtype = KVP_F32; dtype <= KVP_BF16; dtype++)
        for (int64_t t = 1; t <= 257; t += t < 17 ? 1 : t < 65 ? 16 : 64)
            for (int i = 0; i < 6; i++)
                gather_case((kvp_dtype)dtype, t, 1 + random_below(i ? t : t + 4), dims[random_below(5)],
                            dims[random_below(5)]);
}

/* Same data, same strides, fewer rows. What lies behind the kept rows must stay. */
static void gather_in_place(kvp_dtype dtype, layout how, int64_t n_token, int64_t n_kept, int64_t n_dim) {
    const int64_t shape[4] = {2, 3, n_token, n_dim}, kept[3] = {2, 3, n_kept};
    array keys = new_array(dtype, how, 4, shape), values = new_array(dtype, how, 4, shape),
          old = new_array(dtype, how, 4, shape);
    array positions = new_array(KVP_I32, CONTIGUOUS, 3, kept);
    name_case("gather in place %s layout %d T=%lld K=%lld", dtype_name((int32_t)dtype), (int)how, (long long)n_token,
              (long long)n_kept);
    fill_bits(&keys);
    memcpy(old.memory.data, keys.memory.data, keys.memory.bytes);
    memcpy(values.memory.data, keys.memory.data, keys.memory.bytes);
    draw_positions(&positions.view, n_token);
    kvp_gather_args args = {sizeof(kvp_gather_args), keys.view, values.view, positions.view, keys.view, values.view};
    args.out_keys.shape[2] = args.out_values.shape[2] = n_kept;
    call_verb(KVP_GATHER, &args, (calling){.scratch_byte = 0xff});
    CHECK(count_wrong(&old.view, &positions.view, &args.out_keys) == 0, "keys differ");
    CHECK(count_wrong(&old.view, &positions.view, &args.out_values) == 0, "values differ");
    /* put the old rows back: then nothing at all may differ */
    for (int64_t i = 0; i < 6 * n_kept * n_dim; i++) {
        const int64_t d = i % n_dim, k = i / n_dim % n_kept, h = i / n_dim / n_kept % 3, b = i / n_dim / n_kept / 3;
        memcpy(element(&keys.view, b, h, k, d), element(&old.view, b, h, k, d), dtype_size((int32_t)dtype));
    }
    CHECK(hash_block(&keys.memory) == hash_block(&old.memory), "bytes beyond the kept rows were written");
    array *const all[] = {&keys, &values, &old, &positions};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free_array(all[i]);
}

/* Keys and values are halves of one cache (B,2,H,T,D) or (B,H,T,2,D): their elements lie between each other's, and none
 * is shared. */
static void gather_fused(bool heads_apart, bool in_place) {
    enum { B = 3, H = 2, T = 20, K = 9, D = 8 };
    const int64_t shape[4] = {B, 2 * H, T, D}, kept[3] = {B, H, K};
    array cache = new_array(KVP_F16, CONTIGUOUS, 4, shape), old = new_array(KVP_F16, CONTIGUOUS, 4, shape),
          out = new_array(KVP_F16, CONTIGUOUS, 4, shape);
    array positions = new_array(KVP_I32, CONTIGUOUS, 3, kept);
    name_case("gather from a fused cache%s%s", heads_apart ? ", halves apart" : ", rows by turns",
              in_place ? ", in place" : "");
    fill_bits(&cache);
    memcpy(old.memory.data, cache.memory.data, cache.memory.bytes);
    draw_positions(&positions.view, T);
    kvp_tensor half[3][2]; /* of cache, out and old */
    for (int i = 0; i < 3; i++) {
        half[i][0] = (i == 0 ? &cache : i == 1 ? &out : &old)->view;
        half[i][0].shape[1] = H;
        half[i][0].stride[0] = 2 * H * T * D;
        half[i][0].stride[1] = (heads_apart ? 1 : 2) * T * D;
        half[i][0].stride[2] = (heads_apart ? 1 : 2) * D;
        half[i][1] = half[i][0];
        half[i][1].data = (char *)half[i][0].data + (heads_apart ? H * T * D : D) * 2;
    }
    const int to = !in_place;
    kvp_gather_args args = {sizeof(kvp_gather_args), half[0][0], half[0][1], positions.view, half[to][0], half[to][1]};
    args.out_keys.shape[2] = args.out_values.shape[2] = K;
    CHECK(call_verb(KVP_GATHER, &args, (calling){0}) == KVP_OK, "refused");
    CHECK(count_wrong(&half[2][0], &positions.view, &args.out_keys) == 0, "keys differ");
    CHECK(count_wrong(&half[2][1], &positions.view, &args.out_values) == 0, "values differ");
    array *const all[] = {&cache, &old, &out, &positions};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free_array(all[i]);
}

void test_gather_in_place(void) {
    for (int i = 0; i < 4; i++) gather_fused(i % 2, i / 2);
    for (int dtype = KVP_F32; dtype <= KVP_BF16; dtype++)
        for (int how = CONTIGUOUS; how < BROADCAST_BATCH; how++)
            for (int64_t t = 1; t <= 70; t += 1 + t / 6)
                gather_in_place((kvp_dtype)dtype, (layout)how, t, 1 + random_below(t), 8);
    for (int how = CONTIGUOUS; how < BROADCAST_BATCH; how++)
        gather_in_place(KVP_F32, (layout)how, 1500, 1000, 128); /* past the caches */
}

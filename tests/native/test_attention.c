/* SPDX-License-Identifier: Apache-2.0
 *
 * The scorer "attention" against whole attention matrices in double, and against facts that need no oracle.
 */
#include "attention_case.h"
#include "oracle.h"
#include "tests.h"

#include <math.h>

static const int64_t LENGTHS[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33, 64, 65, 257};
static const int64_t DIMS[] = {1, 8, 16, 64, 80, 96, 128}, GROUPS[] = {1, 3, 7};
enum { MAX_SUM_TOKENS = 90 };
#define COUNT(list) (sizeof(list) / sizeof(list)[0])

/* Two calls, with different bytes in the outputs and the scratch before; then the oracle. */
static void score_case(attention_case *c) {
    const block *const inputs[] = {&c->keys.memory, &c->queries.memory, &c->votes.memory};
    uint64_t before[COUNT(inputs)];
    for (size_t i = 0; i < COUNT(inputs); i++) before[i] = hash_block(inputs[i]);
    array again = new_array(KVP_F32, CONTIGUOUS, 3, c->scores.view.shape);
    poison_array(&again, 0x5a);
    kvp_score_args args = c->args;
    args.scores = again.view;
    call_verb(KVP_SCORE, &args, (calling){.scratch_byte = 0x5a});
    poison_array(&c->scores, 0xff);
    call_verb(KVP_SCORE, &c->args, (calling){.scratch_byte = 0xff});
    check_untouched(&again, 0x5a);
    check_untouched(&c->scores, 0xff);
    CHECK(same_elements(&again.view, &c->scores.view),
          "what stood in memory before, or the output's layout, changes the scores");
    for (size_t i = 0; i < COUNT(inputs); i++) CHECK(hash_block(inputs[i]) == before[i], "input %zu was written", i);
    check_scores(&c->args, exact_attention, naive_attention);
    free_array(&again);
}

static void score_shape(int64_t n_token, int64_t n_dim, int64_t group, int64_t repeat) {
    const attention_shape shape = {
        .n_batch = n_token > 100 ? 2 : 3,
        .n_head = n_token > 100 && group > 1 ? 1 : 2,
        .group = group,
        .n_token = n_token,
        .n_dim = n_dim,
        .dtype = (kvp_dtype)random_below(3),
        .kind = (voting)(repeat % VOTING_COUNT),
    };
    attention_case c = new_attention_case(&shape);
    name_case("attention T=%lld Q=%lld D=%lld G=%lld %s voting %d pooling %g softcap %g%s%s%s", (long long)n_token,
              (long long)c.args.queries.shape[2], (long long)n_dim, (long long)group, dtype_name(c.args.keys.dtype),
              (int)shape.kind, c.args.param[2], c.args.param[1], c.args.param[3] > 0 ? " shared" : "",
              c.args.valid.data ? " padded" : "", c.args.lse.data ? " lse" : "");
    score_case(&c);
    free_attention_case(&c);
}

/* More keys than fit into packed memory at once, so that the heads come in waves. */
static void score_in_waves(voting kind) {
    const attention_shape shape = {.n_batch = 5,
                                   .n_head = 8,
                                   .group = 1,
                                   .n_token = 40,
                                   .n_dim = 210,
                                   .dtype = (kvp_dtype)(kind % 3),
                                   .kind = kind};
    attention_case c = new_attention_case(&shape);
    name_case("attention in waves, voting %d", (int)kind);
    score_case(&c);
    free_attention_case(&c);
}

/* Nothing to tell keys apart by: all visible ones get the same. */
static void score_without_scaling(kvp_dtype dtype) {
    const attention_shape shape = {
        .n_batch = 2, .n_head = 2, .group = 2, .n_token = 37, .n_dim = 9, .dtype = dtype, .kind = VOTING_RANDOM};
    attention_case c = new_attention_case(&shape);
    name_case("attention, scaling 0, %s", dtype_name((int32_t)dtype));
    c.args.param[0] = c.args.param[1] = 0;
    score_case(&c);
    free_attention_case(&c);
}

/* Up to four query rows over many keys, which some tables multiply as they stand: all numbers of rows, odd and even
 * numbers of keys, whole vectors and parts of one. */
static void score_few_rows(void) {
    static const int64_t lengths[] = {2, 31, 299, 600}, dims[] = {1, 7, 16, 64, 77};
    for (size_t t = 0; t < COUNT(lengths); t++)
        for (size_t d = 0; d < COUNT(dims); d++)
            for (int64_t group = 1; group <= 5; group++) score_shape(lengths[t], dims[d], group, VOTING_TOVA);
}

void test_attention(void) {
    int64_t n = 0;
    score_few_rows();
    for (int dtype = KVP_F32; dtype <= KVP_BF16; dtype++) score_without_scaling((kvp_dtype)dtype);
    for (int kind = 0; kind < VOTING_COUNT; kind++) {
        score_shape(1100, 6, 1, kind); /* several blocks of keys, and several strips to a task */
        score_in_waves((voting)kind);
    }
    for (size_t t = 0; t < COUNT(LENGTHS); t++)
        for (size_t d = 0; d < COUNT(DIMS); d++)
            for (size_t g = 0; g < COUNT(GROUPS); g++)
                for (int repeat = 0; repeat < (LENGTHS[t] > 100 || DIMS[d] > 80 ? 2 : 4); repeat++)
                    score_shape(LENGTHS[t], DIMS[d], GROUPS[g], n++);
}

/* Everybody judges, weighted by age or not; rows of a softmax sum to 1, so the unweighted scores of a row sum to the
 * number of queries. */
static void check_sums(const attention_shape *shape, int32_t weight, bool share_heads) {
    attention_case c = new_attention_case(shape);
    c.args.lse = (kvp_tensor){0};
    c.args.param[2] = 1;
    c.args.param[3] = share_heads;
    for (int64_t b = 0; b < shape->n_batch; b++) set(&c.votes.view, b, 0, KVP_VOTE_WEIGHT, 0, weight);
    call_verb(KVP_SCORE, &c.args, (calling){0});
    for (int64_t b = 0; b < shape->n_batch; b++) {
        int64_t begin, end;
        read_valid(&c.args.valid, b, shape->n_token, &begin, &end);
        for (int64_t h = 0; h < shape->n_head; h++) {
            double sum = 0;
            for (int64_t k = begin; k < end; k++) {
                const double n_query = weight == KVP_WEIGHT_AGE    ? fmax(1, (double)(shape->n_token - k))
                                       : weight == KVP_WEIGHT_MEAN ? (double)(end - begin)
                                                                   : 1;
                sum += get(&c.args.scores, b, h, k, 0) * n_query;
                if (share_heads)
                    CHECK(get(&c.args.scores, b, h, k, 0) == get(&c.args.scores, b, 0, k, 0),
                          "the rows of shared heads differ");
            }
            const double expected = (double)(end - begin);
            CHECK(fabs(sum - expected) <= 1e-5 * expected, "the attention of %g queries sums to %.9g", expected, sum);
        }
    }
    free_attention_case(&c);
}

/* A given lse that is true changes nothing but rounding. */
static void check_true_lse(const attention_shape *shape) {
    attention_case c = new_attention_case(shape);
    array lse = new_array(KVP_F32, random_layout() % BROADCAST_BATCH, 3, c.args.queries.shape);
    c.args.lse = (kvp_tensor){0};
    for (int64_t b = 0; b < shape->n_batch; b++)
        for (int64_t n = 0; n < lse.view.shape[1]; n++) {
            double of_row[MAX_SUM_TOKENS];
            exact_lse(&c.args, b, n, of_row);
            for (int64_t i = 0; i < lse.view.shape[2]; i++) set(&lse.view, b, n, i, 0, of_row[i]);
        }
    array computed = new_array(KVP_F32, CONTIGUOUS, 3, c.args.scores.shape);
    kvp_score_args args = c.args;
    args.scores = computed.view;
    call_verb(KVP_SCORE, &args, (calling){0});
    c.args.lse = lse.view;
    call_verb(KVP_SCORE, &c.args, (calling){0});
    for (int64_t i = 0; i < shape->n_batch * shape->n_head * shape->n_token; i++) {
        const int64_t k = i % shape->n_token, h = i / shape->n_token % shape->n_head,
                      b = i / shape->n_token / shape->n_head;
        const double x = get(&computed.view, b, h, k, 0), y = get(&c.args.scores, b, h, k, 0);
        CHECK((isinf(x) && x == y) || fabs(x - y) <= 1e-5 * fabs(x), "key %lld scores %g alone and %g with lse",
              (long long)k, x, y);
    }
    free_array(&computed);
    free_array(&lse);
    free_attention_case(&c);
}

void test_attention_sums(void) {
    for (int i = 0; i < 60; i++) {
        attention_shape shape = {.n_batch = 2,
                                 .n_head = 2,
                                 .group = GROUPS[i % 3],
                                 .n_token = 1 + random_below(MAX_SUM_TOKENS),
                                 .n_dim = DIMS[(size_t)i % COUNT(DIMS)]};
        shape.dtype = (kvp_dtype)(i % 3);
        shape.kind = VOTING_H2O;
        name_case("attention sums T=%lld D=%lld G=%lld weight %d", (long long)shape.n_token, (long long)shape.n_dim,
                  (long long)shape.group, i % 3);
        check_sums(&shape, i % 3, i % 4 == 0);
        check_true_lse(&shape);
    }
}

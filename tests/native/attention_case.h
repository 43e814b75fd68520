/* SPDX-License-Identifier: Apache-2.0
 *
 * Random but reproducible calls of the scorer "attention".
 */
#ifndef KVP_TEST_ATTENTION_CASE_H
#define KVP_TEST_ATTENTION_CASE_H

#include "harness.h"

typedef enum voting {
    VOTING_SNAPKV,  /* the last tokens judge the others; mean; pooled */
    VOTING_TOVA,    /* the last token judges all, for all heads */
    VOTING_H2O,     /* everybody judges, by age */
    VOTING_SPANS,   /* two spans, the first with two ranges of queries */
    VOTING_EMPTY,   /* empty ranges, and keys under no vote */
    VOTING_OVERLAP, /* two ranges of queries that share some */
    VOTING_KVZIP,   /* the last half judges all before it by what is most, and a span by the span's own */
    VOTING_RANDOM,  /* four votes of random ranges, weights and ages, different for each batch row */
    VOTING_COUNT
} voting;

typedef struct attention_shape {
    int64_t n_batch, n_head, group, n_token, n_dim;
    kvp_dtype dtype;
    voting kind;
} attention_shape;

typedef struct attention_case {
    array keys, queries, votes, valid, lse, scores;
    kvp_score_args args;
} attention_case;

/* Everything that the shape leaves open is drawn: layouts, valid ranges, Q, scaling, softcap, pooling and given lse. */
attention_case new_attention_case(const attention_shape *shape);
void free_attention_case(attention_case *c);

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * What attention.c (votes, tasks, results) and strip.c (the arithmetic of a few query rows) share.
 *
 * A unit is one key head of one batch row. Its voters are pairs of a query position and a query head of the group, in
 * order of position; KVPI_STRIP of them at a time make a strip. The strips of a unit are dealt out to at most
 * KVPI_CHUNK tasks, each with column sums of its own, which are added in order: so results do not depend on who runs
 * what. Positions here count from the row's first valid one.
 */
#ifndef KVP_ATTENTION_H
#define KVP_ATTENTION_H

#include "../../rows/rows.h"
#include "../score.h"

enum { KVPI_CHUNK = 8 };

typedef struct kvpi_attention {
    const kvp_score_args *args;
    const kvp_context *ctx;
    const kvpi_rows *rows;
    int64_t n_batch, n_head, n_token, n_query, n_dim, n_vote, group; /* group: query heads per key head */
    int64_t n_wave;  /* units worked on at a time, as many as memory is there for */
    int64_t stride;  /* of a row of logits, and of a column vector: n_token and slack */
    int64_t n_chunk; /* tasks of a unit */
    bool share_heads;
    /* shared scratch */
    int32_t *voters;   /* (B,Q) positions of the queries that vote */
    int64_t *n_voters; /* (B) */
    char *packed;      /* (n_wave) units' keys */
    float *columns;    /* (n_wave, KVPI_CHUNK, stride) */
    double *shared;    /* (B, T) sums over all heads, if they are shared */
    /* scratch of the first worker; the others' follows */
    char *worker;
    size_t worker_bytes, packed_bytes;
} kvpi_attention;

/* One vote, with its ranges cut by the valid range. */
typedef struct kvpi_vote {
    int64_t key[2], a[2], b[2], window[2], age_end;
    int32_t weight;
} kvpi_vote;

kvpi_vote kvpi_read_vote(const kvpi_attention *j, int64_t b, int64_t v);

static inline bool kvpi_votes_here(const kvpi_vote *v, int64_t q) {
    return (q >= v->a[0] && q < v->a[1]) || (q >= v->b[0] && q < v->b[1]);
}

static inline int64_t kvpi_strip_count(const kvpi_attention *j, int64_t b) {
    return (j->n_voters[b] * j->group + KVPI_STRIP - 1) / KVPI_STRIP;
}

/* The keys of unit (b, h) from its first valid position on. */
kvpi_head kvpi_keys_of(const kvpi_attention *j, int64_t b, int64_t h);

/* strip.c: packs a block of n_key keys, from the unit's key "first" on. */
void kvpi_pack_block(const kvpi_attention *j, kvpi_head head, int64_t first, int64_t n_key, char *out);

/* strip.c: scratch of one worker, and the strips chunk, chunk + KVPI_CHUNK, ... of unit (b, h), added up into column.
 * packed: the unit's keys, or NULL to pack them block by block. */
size_t kvpi_strip_bytes(int64_t n_token, int64_t n_dim);
void kvpi_add_strips(const kvpi_attention *j, int64_t b, int64_t h, int64_t chunk, const char *packed, char *scratch,
                     float *column);

#endif

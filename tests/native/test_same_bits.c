/* SPDX-License-Identifier: Apache-2.0
 *
 * Results have the same bits for any number of workers, any order of tasks, any place of a row in its batch, and while
 * other calls run.
 */
#include "attention_case.h"
#include "tests.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum { MAX_WORKERS = 3 };

typedef struct pool {
    int64_t n_task;
    kvp_task_fn fn;
    void *arg;
    _Atomic int64_t next;
} pool;

typedef struct worker {
    pool *tasks;
    int32_t index;
} worker;

static _Atomic int64_t n_pool; /* how often the core asked for threads */

static void *work(void *arg) {
    const worker *w = arg;
    for (int64_t task; (task = atomic_fetch_add(&w->tasks->next, 1)) < w->tasks->n_task;) {
        w->tasks->fn(w->tasks->arg, task, w->index);
        sched_yield();
    }
    return NULL;
}

static void run_on_threads(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg) {
    pool tasks = {n_task, fn, arg, 0};
    worker workers[MAX_WORKERS];
    pthread_t threads[MAX_WORKERS];
    atomic_fetch_add(&n_pool, 1);
    if (!CHECK(n_worker > 1 && n_worker <= MAX_WORKERS, "parallel_for was given %d workers", (int)n_worker)) return;
    for (int32_t i = 0; i < n_worker; i++) {
        workers[i] = (worker){&tasks, i};
        pthread_create(&threads[i], NULL, work, &workers[i]);
    }
    for (int32_t i = 0; i < n_worker; i++) pthread_join(threads[i], NULL);
}

/* The worst order a pool could choose, on one thread: last task first, scratch changing all the time. */
static void run_backwards(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg) {
    for (int64_t task = n_task - 1; task >= 0; task--) fn(arg, task, (int32_t)((task * 7 + 1) % n_worker));
}

static const calling WAYS[] = {
    {run_on_threads, 2, 0xff}, {run_on_threads, 3, 0x5a}, {run_backwards, 2, 0x11},
    {run_backwards, 3, 0xff},  {run_on_threads, 1, 0x77}, {NULL, 3, 0xee},
};
enum { N_WAY = sizeof WAYS / sizeof WAYS[0] };

const calling *way_of_running(int i) { return i < N_WAY ? &WAYS[i] : NULL; }

static void score_every_way(kvp_score_args args, const char *what) {
    const kvp_tensor first = args.scores;
    array again = new_array(KVP_F32, CONTIGUOUS, 3, first.shape);
    args.scores = again.view;
    for (int i = 0; i < N_WAY; i++) {
        poison_array(&again, 0xff);
        call_verb(KVP_SCORE, &args, WAYS[i]);
        CHECK(same_elements(&again.view, &first), "%s differs with way %d", what, i);
    }
    free_array(&again);
    for (int64_t b = 0; b < first.shape[0]; b++) {
        kvp_score_args alone = args;
        const kvp_tensor expected = batch_row(&first, b);
        array row = new_array(KVP_F32, CONTIGUOUS, 3, expected.shape);
        alone.keys = batch_row(&args.keys, b);
        alone.values = batch_row(&args.values, b);
        alone.queries = batch_row(&args.queries, b);
        alone.votes = batch_row(&args.votes, b);
        alone.valid = batch_row(&args.valid, b);
        alone.lse = batch_row(&args.lse, b);
        alone.scores = row.view;
        call_verb(KVP_SCORE, &alone, (calling){0});
        CHECK(same_elements(&row.view, &expected), "%s of batch row %lld differs when it is alone", what, (long long)b);
        free_array(&row);
    }
}

static void score_attention(voting kind, int64_t n_dim) {
    const attention_shape shape = {.n_batch = 3,
                                   .n_head = 2,
                                   .group = 3,
                                   .n_token = 150,
                                   .n_dim = n_dim,
                                   .dtype = (kvp_dtype)random_below(3),
                                   .kind = kind};
    attention_case c = new_attention_case(&shape);
    name_case("same bits: attention, D=%lld voting %d", (long long)n_dim, (int)kind);
    call_verb(KVP_SCORE, &c.args, (calling){0});
    score_every_way(c.args, "attention");
    free_attention_case(&c);
}

/* Of these keys alone, by blocks of tokens. */
static void score_keys(const char *scorer) {
    const int64_t shape[4] = {2, 3, 9500, 24};
    array keys = new_array(KVP_F32, HEADS_INSIDE, 4, shape), scores = new_array(KVP_F32, CONTIGUOUS, 3, shape);
    fill_normal(&keys.view);
    const kvp_score_args args = {
        .size = sizeof(kvp_score_args), .scorer = kvp_scorer_find(scorer), .keys = keys.view, .scores = scores.view};
    name_case("same bits: %s", scorer);
    call_verb(KVP_SCORE, &args, (calling){0});
    score_every_way(args, scorer);
    free_array(&keys);
    free_array(&scores);
}

/* Ranges of several pieces, and more units than are worked on at a time. */
static void score_keydiff(void) {
    const int64_t shape[4] = {3, 2, 9000, 67};
    array keys = new_array(KVP_F32, HEADS_INSIDE, 4, shape), scores = new_array(KVP_F32, CONTIGUOUS, 3, shape),
          votes = new_array(KVP_I32, CONTIGUOUS, 3, (int64_t[3]){3, 2, KVP_VOTE_FIELDS});
    fill_normal(&keys.view);
    for (int64_t b = 0; b < 3; b++) {
        const double edges[3] = {0, 6000 - 500 * (double)b, 9000};
        for (int64_t v = 0; v < 2; v++)
            for (int f = 0; f < KVP_VOTE_FIELDS; f++)
                set(&votes.view, b, v, f, 0, f > KVP_VOTE_KEY_END ? 0 : edges[v + f]);
    }
    const kvp_score_args args = {.size = sizeof(kvp_score_args),
                                 .scorer = kvp_scorer_find("keydiff"),
                                 .keys = keys.view,
                                 .votes = votes.view,
                                 .scores = scores.view};
    name_case("same bits: keydiff");
    call_verb(KVP_SCORE, &args, (calling){0});
    score_every_way(args, "keydiff");
    free_array(&keys);
    free_array(&scores);
    free_array(&votes);
}

/* Long enough rows that the core asks for threads. */
static void select_and_gather(void) {
    enum { T = 3000, K = 700 };
    const int64_t shape[4] = {2, 3, T, 8}, kept[4] = {2, 3, K, 8};
    array keys = new_array(KVP_F16, HEADS_INSIDE, 4, shape), scores = new_array(KVP_F32, CONTIGUOUS, 3, shape);
    array segments = new_array(KVP_I32, CONTIGUOUS, 2, (int64_t[2]){2, 3}),
          quotas = new_array(KVP_I32, CONTIGUOUS, 3, (int64_t[3]){2, 3, 2});
    array positions[2], counts[2], out[4];
    fill_normal(&keys.view);
    fill_normal(&scores.view);
    for (int64_t b = 0; b < 2; b++) {
        for (int64_t e = 0; e < 3; e++) set(&segments.view, b, e, 0, 0, (double)(e * T / 2));
        for (int64_t h = 0; h < 3; h++)
            for (int64_t s = 0; s < 2; s++) set(&quotas.view, b, h, s, 0, (double)(K / 2 - h));
    }
    for (int i = 0; i < 2; i++) {
        positions[i] = new_array(KVP_I32, CONTIGUOUS, 3, kept);
        counts[i] = new_array(KVP_I32, CONTIGUOUS, 2, kept);
        out[2 * i] = new_array(KVP_F16, CONTIGUOUS, 4, kept);
        out[2 * i + 1] = new_array(KVP_F16, HEADS_INSIDE, 4, kept);
    }
    for (int i = 0; i <= N_WAY; i++) {
        const calling how = i ? WAYS[i - 1] : (calling){0};
        const int slot = i > 0;
        const kvp_select_args select = {
            sizeof(kvp_select_args),    scores.view, segments.view, quotas.view, .positions = positions[slot].view,
            .counts = counts[slot].view};
        const kvp_gather_args gather = {sizeof(kvp_gather_args), keys.view,          keys.view,
                                        positions[slot].view,    out[2 * slot].view, out[2 * slot + 1].view};
        name_case("same bits: select and gather, way %d", i - 1);
        call_verb(KVP_SELECT, &select, how);
        call_verb(KVP_GATHER, &gather, how);
        CHECK(same_elements(&positions[slot].view, &positions[0].view), "positions differ");
        CHECK(same_elements(&counts[slot].view, &counts[0].view), "counts differ");
        CHECK(same_elements(&out[2 * slot].view, &out[0].view) && same_elements(&out[2 * slot + 1].view, &out[1].view),
              "gathered rows differ");
    }
    array *const all[] = {&keys,      &scores,    &segments, &quotas, &positions[0], &positions[1],
                          &counts[0], &counts[1], &out[0],   &out[1], &out[2],       &out[3]};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free_array(all[i]);
}

static void share(void) {
    enum { T = 9000, H = 3, S = 2 };
    const int64_t shape[3] = {2, H, S};
    array scores = new_array(KVP_F32, HEADS_INSIDE, 3, (int64_t[3]){2, H, T}), counts[2],
          segments = new_array(KVP_I32, CONTIGUOUS, 2, (int64_t[2]){2, S + 1}),
          quotas = new_array(KVP_I32, CONTIGUOUS, 3, shape), floors = new_array(KVP_I32, CONTIGUOUS, 3, shape);
    fill_normal(&scores.view);
    for (int64_t b = 0; b < 2; b++) {
        for (int64_t e = 0; e <= S; e++) set(&segments.view, b, e, 0, 0, (double)(e * T / S));
        for (int64_t i = 0; i < H * S; i++) set(&quotas.view, b, i / S, i % S, 0, T / 4.0);
        for (int64_t i = 0; i < H * S; i++) set(&floors.view, b, i / S, i % S, 0, T / 9.0);
    }
    for (int i = 0; i < 2; i++) counts[i] = new_array(KVP_I32, CONTIGUOUS, 3, shape);
    for (int i = 0; i <= N_WAY; i++) {
        const kvp_share_args args = {sizeof args, scores.view, segments.view,
                                     quotas.view, floors.view, counts[i > 0].view};
        name_case("same bits: share, way %d", i - 1);
        call_verb(KVP_SHARE, &args, i ? WAYS[i - 1] : (calling){0});
        CHECK(same_elements(&counts[i > 0].view, &counts[0].view), "counts differ");
    }
    array *const all[] = {&scores, &segments, &quotas, &floors, &counts[0], &counts[1]};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free_array(all[i]);
}

typedef struct caller {
    attention_case *c;
    array own;
    kvp_context ctx;
    kvp_status status;
} caller;

static void *call_repeatedly(void *arg) {
    caller *me = arg;
    kvp_score_args args = me->c->args;
    args.scores = me->own.view;
    for (int i = 0; i < 10 && me->status == KVP_OK; i++) me->status = kvp_score(&args, &me->ctx);
    return NULL;
}

/* Three threads with a context each, at the same time. */
static void score_concurrently(void) {
    const attention_shape shape = {
        .n_batch = 1, .n_head = 2, .group = 2, .n_token = 40, .n_dim = 16, .dtype = KVP_BF16, .kind = VOTING_H2O};
    attention_case c = new_attention_case(&shape);
    caller callers[MAX_WORKERS];
    block scratch[MAX_WORKERS];
    pthread_t threads[MAX_WORKERS];
    size_t bytes = 0;
    name_case("same bits: calls at the same time");
    call_verb(KVP_SCORE, &c.args, (calling){0});
    CHECK(kvp_workspace(KVP_SCORE, &c.args, 1, &bytes) == KVP_OK, "no workspace");
    for (int i = 0; i < MAX_WORKERS; i++) {
        scratch[i] = new_block(bytes);
        callers[i] = (caller){.c = &c, .own = new_array(KVP_F32, CONTIGUOUS, 3, c.args.scores.shape)};
        callers[i].ctx = (kvp_context){.workspace = scratch[i].data, .workspace_bytes = bytes};
        pthread_create(&threads[i], NULL, call_repeatedly, &callers[i]);
    }
    for (int i = 0; i < MAX_WORKERS; i++) {
        pthread_join(threads[i], NULL);
        CHECK(callers[i].status == KVP_OK && same_elements(&callers[i].own.view, &c.args.scores),
              "caller %d got other scores", i);
        free_array(&callers[i].own);
        free_block(&scratch[i]);
    }
    free_attention_case(&c);
}

static int64_t n_region, n_task_most; /* of one call; on one thread */

static void count_regions(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg) {
    n_region++;
    n_task_most = n_task > n_task_most ? n_task : n_task_most;
    for (int64_t task = 0; task < n_task; task++) fn(arg, task, (int32_t)(task % n_worker));
}

/* One query judges a long cache: the heads are worked on side by side, however long it is, and nothing is packed first.
 */
static void score_long(void) {
    enum { H = 8, T = 16384, D = 128 };
    const int32_t fields[KVP_VOTE_FIELDS] = {0, T, T - 1, T, 0, 0, KVP_WEIGHT_SUM, 0, 0, 0};
    array keys = new_array(KVP_BF16, CONTIGUOUS, 4, (int64_t[4]){1, H, T, D}),
          queries = new_array(KVP_BF16, CONTIGUOUS, 4, (int64_t[4]){1, H, 1, D});
    array votes = new_array(KVP_I32, CONTIGUOUS, 3, (int64_t[3]){1, 1, KVP_VOTE_FIELDS}), scores[2];
    for (int64_t i = 0; i < H * T * D; i++)
        ((uint16_t *)(void *)keys.memory.data)[i] = (uint16_t)(0x3d00 + (random_bits() & 0x80ff));
    fill_normal(&queries.view);
    for (int f = 0; f < KVP_VOTE_FIELDS; f++) set(&votes.view, 0, 0, f, 0, fields[f]);
    for (int i = 0; i < 2; i++) {
        scores[i] = new_array(KVP_F32, CONTIGUOUS, 3, keys.view.shape);
        const kvp_score_args args = {.size = sizeof(kvp_score_args),
                                     .scorer = kvp_scorer_find("attention"),
                                     .keys = keys.view,
                                     .queries = queries.view,
                                     .votes = votes.view,
                                     .scores = scores[i].view,
                                     .param = {0.1, 0, 1, 0}};
        name_case("same bits: one query, %d tokens", T);
        n_region = n_task_most = 0;
        call_verb(KVP_SCORE, &args, i ? (calling){count_regions, 8, 0xff} : (calling){0});
    }
    CHECK(n_region <= 2 && n_task_most == H, "%lld regions of up to %lld tasks; expected 2 of %d", (long long)n_region,
          (long long)n_task_most, H);
    CHECK(same_elements(&scores[0].view, &scores[1].view), "scores differ with 8 workers");
    array *const all[] = {&keys, &queries, &votes, &scores[0], &scores[1]};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free_array(all[i]);
}

/* Several tasks a unit, and what is left of a row. */
static void score_lagkv(void) {
    const int64_t shape[4] = {3, 2, 1900, 33};
    array keys = new_array(KVP_BF16, HEADS_INSIDE, 4, shape), values = new_array(KVP_BF16, CONTIGUOUS, 4, shape),
          scores = new_array(KVP_F32, CONTIGUOUS, 3, shape);
    fill_normal(&keys.view);
    fill_normal(&values.view);
    const kvp_score_args args = {.size = sizeof(kvp_score_args),
                                 .scorer = kvp_scorer_find("lagkv"),
                                 .keys = keys.view,
                                 .values = values.view,
                                 .scores = scores.view,
                                 .param = {4, 50}};
    name_case("same bits: lagkv");
    call_verb(KVP_SCORE, &args, (calling){0});
    score_every_way(args, "lagkv");
    free_array(&keys);
    free_array(&values);
    free_array(&scores);
}

void test_same_bits(void) {
    score_long();
    atomic_store(&n_pool, 0);
    for (int kind = 0; kind < VOTING_COUNT; kind++) {
        score_attention((voting)kind, 40);
        score_attention((voting)kind, 128);
    }
    score_keys("norm");
    score_keys("random");
    score_keydiff();
    score_lagkv();
    select_and_gather();
    share();
    score_concurrently();
    CHECK(atomic_load(&n_pool) > 0, "the core never asked for threads, so these tests say nothing");
}

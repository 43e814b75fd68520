/* SPDX-License-Identifier: Apache-2.0
 *
 * kvpitfalls core: evict entries of a transformer's key/value cache.
 *
 * Three verbs, in the order they are used (and two more, share and press, below):
 *
 *     score   keys (and queries)                 -> how much each token matters       float32 (B,H,T), higher = keep
 *     select  scores, quotas per segment, ...    -> the positions to keep             int32   (B,H,K), ascending
 *     gather  keys, values, positions            -> a smaller cache                   (B,H,K,D)
 *
 * Shape letters: B batch rows, H key/value heads, G query heads per key/value head, T cached tokens, Q query rows (the
 * last Q of the T positions), D head dimension, S segments, V votes, K kept tokens.
 *
 * The contract. The core owns nothing: it allocates no memory, starts no thread, prints nothing and never exits.
 * Tensors are borrowed strided views. The structs of arguments begin with their size, by which a library that knows
 * more fields will tell older callers. Scratch, threads and the place for an error text come in through a kvp_context,
 * one per call, on the caller's stack; calls with distinct contexts may run at the same time. Outputs and scratch share
 * memory with no other argument (but see gather). A call that returns anything but KVP_OK has written no output.
 * Results have the same bits for any number of workers, any place of a row in its batch, every repeat, and any
 * floating-point environment of the caller's threads (rounding mode, flushing of subnormal numbers, traps), which are
 * left as they were. Of its stack a thread needs 32 KiB.
 *
 * An example, K-norm on one layer (error handling left out):
 *
 *     kvp_context ctx = {0};
 *     kvp_score_args s = {.size = sizeof s, .scorer = kvp_scorer_find("norm"), .keys = keys, .scores = scores};
 *     kvp_score(&s, &ctx);
 *     kvp_select_args p = {.size = sizeof p, .scores = scores, .segments = segments, .quotas = quotas,
 *                          .positions = positions, .counts = counts};
 *     kvp_workspace(KVP_SELECT, &p, 1, &ctx.workspace_bytes);                   scratch for one worker
 *     ctx.workspace = aligned_alloc(64, ctx.workspace_bytes);
 *     kvp_select(&p, &ctx);
 *     kvp_gather_args g = {.size = sizeof g, .keys = keys, .values = values, .positions = positions,
 *                          .out_keys = k2, .out_values = v2};
 *     kvp_gather(&g, &ctx);
 */
#ifndef KVP_H
#define KVP_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Before the declarations of what a shared library exports. */
#ifndef KVP_API
#if defined(KVP_SHARED) && defined(__GNUC__)
#define KVP_API __attribute__((visibility("default")))
#else
#define KVP_API
#endif
#endif

#define KVP_ABI_VERSION 8
#define KVP_MAX_PARAMS 8
#define KVP_ERROR_BYTES 256
#define KVP_MAX_WORKER 65536

typedef enum kvp_status {
    KVP_OK = 0,
    KVP_ERR_SHAPE = 1,       /* a rank or a size does not fit the others */
    KVP_ERR_DTYPE = 2,       /* an element type the argument may not have */
    KVP_ERR_DEVICE = 3,      /* tensors on different devices, or on one without a backend */
    KVP_ERR_VALUE = 4,       /* a number out of its range */
    KVP_ERR_UNSUPPORTED = 5, /* well formed, but this backend cannot do it */
    KVP_ERR_WORKSPACE = 6,   /* scratch missing, too small or misaligned */
    KVP_ERR_CUDA = 7,        /* the CUDA runtime refused */
    KVP_ERR_INTERNAL = 8     /* a bug in the core */
} kvp_status;

typedef enum kvp_dtype { KVP_F32 = 0, KVP_F16 = 1, KVP_BF16 = 2, KVP_I32 = 3, KVP_U8 = 4 } kvp_dtype;

/* The numbers are DLPack's. */
typedef enum kvp_device { KVP_CPU = 1, KVP_CUDA = 2 } kvp_device;

/* A borrowed view. Strides are in elements and may be zero on inputs (broadcast). data == NULL means: not given.
 * All tensors of a call are on one device, but for its tables (votes, valid, segments, quotas, floors): those are in
 * host memory, and read before the call returns; those of a call on a CUDA device must not change until then. */
typedef struct kvp_tensor {
    void *data;
    int32_t dtype;        /* kvp_dtype */
    int32_t device;       /* kvp_device */
    int32_t device_index; /* which GPU; 0 on the CPU */
    int32_t ndim;         /* 1 to 4 */
    int64_t shape[4];     /* each 1 to 2^31 - 1 */
    int64_t stride[4];
} kvp_tensor;

/* One piece of work: task in [0, n_task), worker in [0, n_worker). Two tasks never run on one worker at the same time.
 */
typedef void (*kvp_task_fn)(void *arg, int64_t task, int32_t worker);
typedef void (*kvp_parallel_for_fn)(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg);

typedef struct kvp_context {
    void *stream;                     /* CUDA stream; ignored on the CPU */
    void *workspace;                  /* scratch, aligned to 64 bytes; contents undefined before and after */
    size_t workspace_bytes;           /* at least what kvp_workspace says for n_worker */
    kvp_parallel_for_fn parallel_for; /* NULL = run serially */
    int32_t n_worker;                 /* workers parallel_for may use, 0 to KVP_MAX_WORKER; 0 counts as 1 */
    char error[KVP_ERROR_BYTES];      /* one sentence, written when the status is not KVP_OK */
} kvp_context;

/* ------------------------------------------------------------------ score */

/*
 * Which optional tensors a scorer needs.
 */
enum { KVP_NEEDS_QUERIES = 1, KVP_NEEDS_VOTES = 2, KVP_NEEDS_VALUES = 4 };

/*
 * A vote says which queries judge which keys. Votes are an int32 tensor (B,V,KVP_VOTE_FIELDS); positions are those of
 * the cache, [0,T), ranges are half open, and every range is cut by the row's valid range. For a key k in [key_begin,
 * key_end):
 *
 *     score[k] = weight(k) * sum of A[h,q,k] over queries q >= k in [a_begin, a_end) or [b_begin, b_end)
 *
 * A[h,q,:] is the softmax over *all* visible keys (valid, and not after q), not only those in the range. Weight:
 * KVP_WEIGHT_MEAN is 1 / (queries in both ranges); KVP_WEIGHT_AGE is 1 / max(1, age_end - k); KVP_WEIGHT_SUM is 1. Then
 * a mean over kernel_size neighbours inside the key range (missing neighbours count as zero, the divisor stays
 * kernel_size), and a mean over the G heads of the group (or over all H*G heads if share_heads is 1; the H rows are
 * then equal). With KVP_WEIGHT_MAX (on a CUDA device in all of a call's votes or in none) the most of A[h,q,k] over
 * these queries and heads takes the place of the sum and of the mean over heads, and then comes the mean over
 * neighbours. A key in [window_begin, window_end) scores 2 + (k - window_begin): above any attention, newest first. No
 * key may be in two key ranges or windows. A key under no vote scores 0, one outside the row's valid range minus
 * infinity. A query whose logits have no softmax (one is NaN or plus infinity, or all are minus infinity) makes the
 * keys that it sees and votes on NaN, and only those. With a given lse each A stands alone, so that only a key whose
 * own logit is NaN becomes NaN. Source: arXiv 2510.00231; SnapKV arXiv 2404.14469, TOVA arXiv 2401.06104, H2O arXiv
 * 2306.14048, KVzip arXiv 2505.23416 are special cases.
 */
enum kvp_vote_field {
    KVP_VOTE_KEY_BEGIN,
    KVP_VOTE_KEY_END,
    KVP_VOTE_A_BEGIN,
    KVP_VOTE_A_END,
    KVP_VOTE_B_BEGIN,
    KVP_VOTE_B_END,
    KVP_VOTE_WEIGHT,
    KVP_VOTE_AGE_END,
    KVP_VOTE_WINDOW_BEGIN,
    KVP_VOTE_WINDOW_END,
    KVP_VOTE_FIELDS
};
enum { KVP_WEIGHT_SUM = 0, KVP_WEIGHT_MEAN = 1, KVP_WEIGHT_AGE = 2, KVP_WEIGHT_MAX = 3 };

/*
 * A scorer that needs votes and no queries reads the key ranges alone: keys are judged by those of their range. All
 * other fields must be 0.
 *
 * Scorers (csrc/scorers.def lists names and parameters):
 *
 *   norm       minus the Euclidean norm of the key, in float32 (K-norm: a small key is an important one, arXiv
 *              2406.11430).
 *   position   the first n_sink valid tokens score 2T - k, the others k: sinks first, then the newest (StreamingLLM,
 *              arXiv 2309.17453). T must be at most 2^23, so that float32 tells all positions apart.
 *   attention  votes, see above. scaling multiplies q.k; softcap c > 0 maps a logit x to c tanh(x/c).
 *   keydiff    minus the cosine of the key and the mean of the unit vectors of its range (KeyDiff, arXiv 2504.15364). A
 *              key of length zero scores 0 and takes no part in the mean. All score 0 where a range has two keys or
 *              fewer, of which each is as like their mean as the other, or where unit vectors cancel each other out,
 *              their mean being shorter than 2^-18. Lengths are no matter, to the ends of float32's exponents. A key
 *              that is NaN or infinite makes its range NaN.
 *   lagkv      behind the first n_sink valid tokens come chunks of lag_size. Of a tensor x and a token k of a chunk,
 *              let spread be the standard deviation (divisor D - 1) over d of (x[k,d] - low[d]) / (high[d] - low[d]),
 *              with the least and the most of the next chunk (0 for a d where these are equal), and weight the softmax
 *              of spread over k's chunk. Tokens score minus their rank by the sum of their weights of keys and of
 *              values within their chunk, from 0 for the best and by position where equal. What has no whole chunk
 *              behind it scores 1 and up, the newest most, and the first n_sink tokens T + 1 (LagKV, arXiv
 *              2504.04704). A chunk with a number that is no number or infinite is NaN, and one before an infinite one
 *              may be. T must be at most 2^23.
 *   random     a draw from [0, 1) for each valid token, the same on every device: a control. It depends on the head, on
 *              the number of valid tokens, on the token's place among them, on the keys of eight of them, and on the
 *              seed, seed + 2^32 seed_high: whole numbers below 2^32 and 2^30. score/draws.h has the arithmetic.
 */
typedef struct kvp_score_args {
    uint32_t size; /* sizeof(kvp_score_args) */
    int32_t scorer;
    kvp_tensor keys;    /* (B,H,T,D) F32, F16 or BF16 */
    kvp_tensor values;  /* (B,H,T,Dv), dtype of keys */
    kvp_tensor queries; /* (B,H*G,Q,D), dtype of keys; query i stands at position T - Q + i */
    kvp_tensor votes;   /* (B,V,KVP_VOTE_FIELDS) I32 */
    kvp_tensor valid;   /* (B,2) I32: first and one past the last valid position; not given = all T */
    kvp_tensor lse;    /* (B,H*G,Q) F32: natural log of the softmax denominator of each query row; not given = computed.
                          A row that is not finite casts no vote. */
    kvp_tensor scores; /* out (B,H,T) F32 */
    double param[KVP_MAX_PARAMS];
} kvp_score_args;

/* ----------------------------------------------------------------- select */

/*
 * Segments partition a row: segment s is [segments[b,s], segments[b,s+1]). In each (b, h, s) keep the quota's best
 * positions, in this total order: protected before unprotected; among unprotected, higher score first, NaN last; ties
 * by the lower position. A position outside the valid range or outside all segments is never kept. A quota above the
 * number of such positions keeps them all. Every backend must agree exactly.
 */
typedef struct kvp_select_args {
    uint32_t size;        /* sizeof(kvp_select_args) */
    kvp_tensor scores;    /* (B,H,T) F32 */
    kvp_tensor segments;  /* (B,S+1) I32, not descending, in [0,T] */
    kvp_tensor quotas;    /* (B,H,S) I32, not negative, summing to at most K */
    kvp_tensor protect;   /* (B,T) U8, nonzero = protected; not given = none */
    kvp_tensor valid;     /* (B,2) I32; not given = all T */
    kvp_tensor positions; /* out (B,H,K) I32, ascending, then -1 */
    kvp_tensor counts;    /* out (B,H) I32: how many are kept */
} kvp_select_args;

/* ------------------------------------------------------------------ share */

/*
 * How many positions each head keeps of each segment where the heads of a batch row share their quotas: together, in
 * (b, s), as many as the sum of their quotas, or all there are. First each head keeps its floor's best, and of its
 * infinite scores as many as its quota, which count towards the floor; then the best of what is left, whichever head
 * has it. Order as in select; of equal scores the lower head's come first. (Ada-KV, arXiv 2407.11550.)
 */
typedef struct kvp_share_args {
    uint32_t size;       /* sizeof(kvp_share_args) */
    kvp_tensor scores;   /* (B,H,T) F32; H times T is at most 2^31 - 1 */
    kvp_tensor segments; /* (B,S+1) I32, as for select */
    kvp_tensor quotas;   /* (B,H,S) I32, not negative */
    kvp_tensor floors;   /* (B,H,S) I32, from 0 to the quota */
    kvp_tensor counts;   /* out (B,H,S) I32 */
} kvp_share_args;

/* ----------------------------------------------------------------- gather */

/*
 * Copy rows bit for bit: out[b,h,i,:] = in[b,h,positions[b,h,i],:]; where the position is -1 the row becomes zeros.
 * Keys and values may have different D. On the CPU an output may be the start of its own input (same data and strides):
 * positions ascend, so nothing is overwritten before it is read, unless elements of the input share memory. That, and
 * any other overlap, is refused. On the CPU positions are checked; on a CUDA device, where the host cannot read them,
 * one outside [-1,T) gives a row of zeros.
 */
typedef struct kvp_gather_args {
    uint32_t size;         /* sizeof(kvp_gather_args) */
    kvp_tensor keys;       /* (B,H,T,D) F32, F16 or BF16 */
    kvp_tensor values;     /* (B,H,T,Dv), dtype of keys */
    kvp_tensor positions;  /* (B,H,K) I32 in [-1,T), strictly ascending, any -1 last */
    kvp_tensor out_keys;   /* out (B,H,K,D) */
    kvp_tensor out_values; /* out (B,H,K,Dv) */
} kvp_gather_args;

/* ------------------------------------------------------------------ press */

/*
 * Score, select and gather by one call, for those who do not want the scores, which stay in the scratch: the same bits
 * as by the three. The fields are theirs, but that counts need not be given. All is checked before anything is written.
 */
typedef struct kvp_press_args {
    uint32_t size; /* sizeof(kvp_press_args) */
    int32_t scorer;
    kvp_tensor keys, values, queries, votes, valid, lse; /* values: (B,H,T,Dv) */
    kvp_tensor segments, quotas, protect;
    kvp_tensor positions, counts, out_keys,
        out_values; /* out; on the CPU the last two may be the start of keys and values */
    double param[KVP_MAX_PARAMS];
} kvp_press_args;

/* ----------------------------------------------------------------- expect */

/*
 * Scores of keys by the attention that queries to come are expected to pay to them (Expected Attention, arXiv
 * 2510.00636). Tokens of a batch row's first segment are kept unjudged, those of its other segments are judged. Rotary
 * embedding turns channel d and channel d + D/2 together, by a cosine and a sine of each:
 *
 *     turned[d] = x[d] cos[d] - x[d + D/2] sin[d]        turned[d + D/2] = x[d + D/2] cos[d + D/2] + x[d] sin[d + D/2]
 *
 * Queries are turned back by those of their tokens, both divided by cos^2 + sin^2, which need not be 1. With their mean
 * m and covariance C (divided by their number) over all judged tokens, R the turn by ahead_cosines and ahead_sines, and
 * a the scaling,
 *
 *     logits[h,k] = a k.Rm + a^2/2 k.RCR'k              the second term only if with_spread is 1
 *     scores[k] = (mean over the group of softmax(logits[h] of k's segment, sinks[h])[k] + epsilon) ||values[k]||
 *
 * for each query head h and each judged key k of its key head. Tokens of the first segment score 1 more than the best
 * of the batch row (where NaN counts as 0), those outside of all segments 0; neither have logits, and what stands in
 * the places of those is left as it was. D is even and at most 4096; on a CUDA
 * device it is 64, 96, 128 or 256.
 */
typedef struct kvp_expect_args {
    uint32_t size;            /* sizeof(kvp_expect_args) */
    int32_t with_spread;      /* 1 or 0 */
    kvp_tensor keys;          /* (B,H,T,D) F32, F16 or BF16 */
    kvp_tensor queries;       /* (B,H*G,T,D), dtype of keys */
    kvp_tensor values;        /* (B,H,T,Dv) F32, F16 or BF16, or NULL: their lengths count as 1 */
    kvp_tensor cosines;       /* (B,1,T,D) F32 */
    kvp_tensor sines;         /* (B,1,T,D) F32 */
    kvp_tensor ahead_cosines; /* (B,D) F32 */
    kvp_tensor ahead_sines;   /* (B,D) F32 */
    kvp_tensor segments;      /* (B,S+2) I32, ascending edges; host */
    kvp_tensor sinks;         /* (H*G) F32, a logit that joins each softmax of a query head, or NULL: none does */
    kvp_tensor logits;        /* out (B,H*G,T) F32 */
    kvp_tensor scores;        /* out (B,H,T) F32 */
    double scaling, epsilon;  /* epsilon: 0 or more */
} kvp_expect_args;

typedef enum kvp_verb {
    KVP_SCORE = 0,
    KVP_SELECT = 1,
    KVP_GATHER = 2,
    KVP_PRESS = 3,
    KVP_SHARE = 4,
    KVP_EXPECT = 5
} kvp_verb;

KVP_API kvp_status kvp_score(const kvp_score_args *args, kvp_context *ctx);
KVP_API kvp_status kvp_select(const kvp_select_args *args, kvp_context *ctx);
KVP_API kvp_status kvp_gather(const kvp_gather_args *args, kvp_context *ctx);
KVP_API kvp_status kvp_press(const kvp_press_args *args, kvp_context *ctx);
KVP_API kvp_status kvp_share(const kvp_share_args *args, kvp_context *ctx);
KVP_API kvp_status kvp_expect(const kvp_expect_args *args, kvp_context *ctx);

/* Scratch for this call with n_worker workers (0 counts as 1), in bytes, a multiple of 64. args: the verb's struct,
 * whose tensors are checked as the verb does, but for what stands in tables. A refusal leaves bytes as it was; the verb
 * itself would refuse alike, with a sentence. */
KVP_API kvp_status kvp_workspace(kvp_verb verb, const void *args, int32_t n_worker, size_t *bytes);

/* ---------------------------------------------------------- introspection */

KVP_API int32_t kvp_scorer_count(void);
KVP_API const char *kvp_scorer_name(int32_t scorer);                 /* NULL when there is no such scorer */
KVP_API int32_t kvp_scorer_find(const char *name);                   /* -1 when there is no such name */
KVP_API int32_t kvp_scorer_needs(int32_t scorer);                    /* KVP_NEEDS_*, or -1 */
KVP_API const char *kvp_scorer_param(int32_t scorer, int32_t index); /* NULL past the last parameter */
KVP_API double kvp_scorer_param_default(int32_t scorer, int32_t index);
KVP_API int32_t kvp_supports(int32_t scorer, int32_t device, int32_t dtype); /* 1 or 0 */
KVP_API const char *kvp_status_name(kvp_status status);

/* Row primitives of the CPU: the name in use; set one by name (0, or -1 if this CPU lacks it); the names this build
 * holds. Set for the whole process, for calls that begin later: one at work in another thread may score by both. */
KVP_API const char *kvp_cpu_isa(void);
KVP_API int32_t kvp_cpu_isa_set(const char *name);
KVP_API const char *kvp_cpu_isa_name(int32_t index); /* NULL past the last */

/* --------------------------------------------------------------- backends */

/* Arguments were checked against the contract above before any of these is called. */
typedef struct kvp_backend {
    int32_t abi; /* KVP_ABI_VERSION */
    int32_t device;
    kvp_status (*const *score)(const kvp_score_args *, kvp_context *); /* indexed by scorer; NULL = not supported */
    kvp_status (*select)(const kvp_select_args *, kvp_context *);
    kvp_status (*gather)(const kvp_gather_args *, kvp_context *);
    kvp_status (*share)(const kvp_share_args *, kvp_context *);
    size_t (*workspace)(kvp_verb verb, const void *args, int32_t n_worker);
    kvp_status (*expect)(const kvp_expect_args *, kvp_context *); /* NULL = not supported */
    kvp_status (*press)(const kvp_score_args *, const kvp_select_args *, const kvp_gather_args *,
                        kvp_context *); /* the three of them together, whose scores nobody reads; NULL = one by one */
} kvp_backend;

/* The backend must outlive every later call. Registering a device twice replaces it. */
KVP_API kvp_status kvp_register_backend(const kvp_backend *backend);

/* The CUDA backend, in libraries that are built with it. Calls go to ctx->stream and do not wait; they allocate nothing
 * and can be captured in a graph. */
KVP_API const kvp_backend *kvp_cuda_backend(void);

#ifdef __cplusplus
}
#endif
#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * What the native tests share: counted checks, random numbers, memory with guards, tensors in awkward layouts, and
 * calling a verb with exactly the scratch it asked for.
 */
#ifndef KVP_TEST_HARNESS_H
#define KVP_TEST_HARNESS_H

#include "kvp.h"

#include <stdbool.h>

/* A failed check is printed and counted, and the tests go on. */
#define CHECK(condition, ...) count_check((condition), __FILE__, __LINE__, __VA_ARGS__)

#if defined(__GNUC__)
#define PRINTF_LIKE(text, first) __attribute__((format(printf, text, first)))
#else
#define PRINTF_LIKE(text, first)
#endif

bool count_check(bool ok, const char *file, int line, const char *format, ...) PRINTF_LIKE(4, 5);
void name_case(const char *format, ...) PRINTF_LIKE(1, 2); /* what failed checks say they were testing */
int report_checks(void);                                   /* prints "N passed, N failed"; the exit code */
int64_t passed_checks(void);                               /* so far */
int64_t failed_checks(void);

/* Random numbers: the same on every machine, restarted by each test so that tests do not depend on each other. */
void seed_random(uint64_t seed);
uint64_t random_bits(void);
int64_t random_below(int64_t n);  /* [0, n) */
int64_t random_dim(int64_t most); /* [1, most], or, every third, what fills vectors and tiles: 32, 64, 96, 128 */
double random_normal(void);       /* mean 0, deviation 1, within 6 */

/* Memory of exactly "bytes" bytes, aligned to 64, between two guards that the address sanitizer also knows of. */
typedef struct block {
    unsigned char *data;
    size_t bytes;
} block;

block new_block(size_t bytes);
void free_block(block *b); /* checks the guards first */
void check_guards(const block *b);
uint64_t hash_block(const block *b);

typedef enum layout {
    CONTIGUOUS,      /* (B,H,T,D) as it is written */
    HEADS_INSIDE,    /* dimensions 1 and 2 swapped in memory: (B,T,H,D) */
    OFFSET,          /* starts 3 elements into its storage */
    EVERY_OTHER,     /* every stride doubled, so the last one is 2 */
    BROADCAST_BATCH, /* batch stride 0; inputs only */
    LAYOUT_COUNT
} layout;

/* A tensor and the memory it owns. Elements between the ones it covers belong to nobody and must stay as they are. */
typedef struct array {
    kvp_tensor view;
    block memory;
} array;

array new_array(kvp_dtype dtype, layout how, int32_t ndim, const int64_t *shape);
void free_array(array *a);
void poison_array(array *a, unsigned char byte);
void check_untouched(const array *a, unsigned char byte); /* guards and gaps; after a call on a poisoned output */
layout output_layout(layout how);                         /* the same, or OFFSET for a broadcast */
layout random_layout(void);

size_t dtype_size(int32_t dtype);
const char *dtype_name(int32_t dtype);
void *element(const kvp_tensor *t, int64_t i, int64_t j, int64_t k, int64_t l); /* indices past ndim: 0 */
double get(const kvp_tensor *t, int64_t i, int64_t j, int64_t k, int64_t l);
void set(const kvp_tensor *t, int64_t i, int64_t j, int64_t k, int64_t l, double value); /* rounded to the nearest */
void fill_normal(const kvp_tensor *t);
double round_to_dtype(int32_t dtype, double value);

/* One batch row of a tensor, or the tensor itself where it was not given. */
kvp_tensor batch_row(const kvp_tensor *t, int64_t b);
bool same_elements(const kvp_tensor *x, const kvp_tensor *y); /* bit for bit */

/* The valid range of batch row b. */
void read_valid(const kvp_tensor *valid, int64_t b, int64_t n_token, int64_t *begin, int64_t *end);
/* Ranges of every kind: a padded start, a padded end, both, everything and (unless "nonempty") nothing. */
void fill_valid(const kvp_tensor *valid, int64_t n_token, bool nonempty);

/* How to call a verb. */
typedef struct calling {
    kvp_parallel_for_fn parallel_for;
    int32_t n_worker;
    unsigned char scratch_byte; /* what the scratch holds before the call */
} calling;

/* Calls with exactly the scratch that kvp_workspace asks for; checks its guards. */
kvp_status call_verb(kvp_verb verb, const void *args, calling how);

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * Splits bytes into calls of a verb: shapes, strides, element types, values, scratch, and faults of every kind. A fuzz
 * target names its arguments, fills in what they hold, and says how a result is verified; what holds for every verb is
 * checked here.
 */
#ifndef KVP_TEST_PRODUCER_H
#define KVP_TEST_PRODUCER_H

#include "harness.h"

/* What is left of the input; once it is used up, every number is 0. */
typedef struct input {
    const uint8_t *at;
    size_t left;
} input;

int64_t take(input *in, int64_t n); /* [0, n) */
/* An element: from the input while that lasts, then at random. Tame ones are multiples of 1/128 in [-1, 1), wild ones
 * anything at all. */
float take_value(input *in, bool wild);

enum {
    ALLOW_FLOATS = 1 << KVP_F32 | 1 << KVP_F16 | 1 << KVP_BF16,
    ALLOW_F32 = 1 << KVP_F32,
    ALLOW_I32 = 1 << KVP_I32,
    ALLOW_U8 = 1 << KVP_U8
};
enum { MAX_ARGUMENTS = 7, UNSHARED = -1 };

/* One tensor of a call. letters name its dimensions as in kvp.h: the same letter is the same size in every argument. */
typedef struct argument {
    const char *name, *letters;
    kvp_tensor *tensor;
    int allowed; /* element types, ALLOW_* */
    bool required, output, table;
    int in_place_of; /* the input an output may be the start of, or UNSHARED */
    /* drawn */
    bool given;
    int over;      /* whose memory it lies in, or UNSHARED */
    int64_t shift; /* bytes from the start of that memory */
    block memory;
} argument;

typedef struct call {
    kvp_verb verb;
    void *args;
    argument *arguments;
    int n_argument;
    bool spoilt;   /* whatever was drawn may be refused */
    bool too_long; /* a tensor claims more memory than it was given, and so must not be touched */
    input *in;
} call;

/* arguments.c: the tensors of a verb, in the order of kvp.h, into room for MAX_ARGUMENTS; how many they are. */
int list_score_arguments(kvp_score_args *args, argument *out);
int list_select_arguments(kvp_select_args *args, argument *out);
int list_share_arguments(kvp_share_args *args, argument *out);
int list_gather_arguments(kvp_gather_args *args, argument *out);
int32_t needs_of(int32_t scorer); /* kvp_scorer_needs, and 0 for one that is none */

/* Shapes from the sizes of letters (by character), strides of any order with gaps and (inputs) zeros. */
void draw_tensors(call *c, const int64_t *size);
/* Changes up to "most" things about the tensors, each into something odd. */
void spoil_tensors(call *c, int64_t most);
/* Memory of exactly what the tensors claim; of one that claims more than can be had, a little. */
void place_tensors(call *c);
void free_tensors(call *c);

/* Whether its elements can be visited: enough memory, well aligned, of the intended kind. */
bool is_usable(const argument *a);
void fill_values(call *c, int index, bool wild);

/* The contract of the tensors, as plainly as can be: what is wrong with them, or NULL. Not complete in one respect:
 * outputs that share memory in ways that only enumeration finds are found only if they are small. */
const char *find_flaw(const call *c);

/* Calls the verb in different ways and checks what holds for all: a refusal writes nothing and says why, an accepted
 * call has no flaw, writes its outputs only, and gives the same bits for any number of workers. "same_on_every_isa":
 * also on another instruction set. verify is called after the first accepted call. */
void run_call(call *c, bool same_on_every_isa, void (*verify)(const call *));

/* The targets. Each aborts if a check fails. */
int fuzz_score(const uint8_t *data, size_t size);
int fuzz_select(const uint8_t *data, size_t size);
int fuzz_share(const uint8_t *data, size_t size);
int fuzz_gather(const uint8_t *data, size_t size);
int fuzz_contract(const uint8_t *data, size_t size);

typedef struct fuzz_target {
    const char *name;
    int (*run)(const uint8_t *data, size_t size);
} fuzz_target;

extern const fuzz_target FUZZ_TARGETS[]; /* ends with a NULL name */

#endif

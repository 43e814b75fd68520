/* SPDX-License-Identifier: Apache-2.0
 *
 * Results have the same bits whatever floating-point environment a thread comes with, and leave it as it was.
 */
#include "attention_case.h"
#include "tests.h"

#include <fenv.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
enum { FLUSH = 0x8040, MASKS = 0x0e80 }; /* of MXCSR: results and operands; invalid, by zero, overflow */
#endif

static const int ROUNDINGS[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
enum { N_ROUNDING = sizeof ROUNDINGS / sizeof ROUNDINGS[0], N_ENVIRONMENT = N_ROUNDING + 2 };

/* The last two: subnormal numbers are zeros, or what makes NaN, infinity or a quotient by zero is a signal. */
static void enter(int i) {
    fesetenv(FE_DFL_ENV);
    if (i < N_ROUNDING) fesetround(ROUNDINGS[i]);
#if defined(__x86_64__)
    if (i == N_ROUNDING) _mm_setcsr(_mm_getcsr() | FLUSH);
    if (i == N_ROUNDING + 1) _mm_setcsr(_mm_getcsr() & ~(unsigned)MASKS);
#endif
}

static bool is_in(int i) {
#if defined(__x86_64__)
    const unsigned now = _mm_getcsr();
    enter(i);
    return now == _mm_getcsr();
#else
    return fegetround() == (i < N_ROUNDING ? ROUNDINGS[i] : FE_TONEAREST) && fetestexcept(FE_ALL_EXCEPT) == 0;
#endif
}

static int64_t n_region, n_changed;

/* As threads of many kinds would: each task comes upon another environment. */
static void run_in_turns(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg) {
    fenv_t own;
    fegetenv(&own);
    n_region++;
    for (int64_t task = 0; task < n_task; task++) {
        enter((int)(task % N_ENVIRONMENT));
        fn(arg, task, (int32_t)(task % n_worker));
        n_changed += !is_in((int)(task % N_ENVIRONMENT));
    }
    fesetenv(&own);
}

static void score_in_all(kvp_score_args args, const char *what) {
    const kvp_tensor first = args.scores;
    array again = new_array(KVP_F32, CONTIGUOUS, 3, first.shape);
    call_verb(KVP_SCORE, &args, (calling){0});
    args.scores = again.view;
    for (int i = 0; i < N_ENVIRONMENT; i++) {
        poison_array(&again, 0xff);
        enter(i);
        call_verb(KVP_SCORE, &args, (calling){0});
        const bool is_same = is_in(i);
        fesetenv(FE_DFL_ENV);
        CHECK(is_same, "%s changed environment %d", what, i);
        CHECK(same_elements(&again.view, &first), "%s differs in environment %d", what, i);
    }
    poison_array(&again, 0xff);
    n_changed = 0;
    call_verb(KVP_SCORE, &args, (calling){run_in_turns, 2, 0xff});
    CHECK(same_elements(&again.view, &first), "%s differs where threads differ", what);
    CHECK(n_changed == 0, "tasks of %s changed the environment of %lld threads", what, (long long)n_changed);
    free_array(&again);
}

/* Squares of these keys are subnormal numbers, as some of the keys are of themselves. */
static void score_keys(const char *scorer, const double *param) {
    const int64_t shape[4] = {2, 3, 2000, 24};
    array keys = new_array(KVP_F32, CONTIGUOUS, 4, shape), scores = new_array(KVP_F32, CONTIGUOUS, 3, shape);
    fill_normal(&keys.view);
    for (int64_t i = 0; i < (int64_t)(keys.memory.bytes / sizeof(float)); i++)
        ((float *)(void *)keys.memory.data)[i] *= i % 5 ? 1e-20f : 1e-39f;
    kvp_score_args args = {.size = sizeof args,
                           .scorer = kvp_scorer_find(scorer),
                           .keys = keys.view,
                           .values = keys.view,
                           .scores = scores.view,
                           .param = {param[0], param[1]}};
    name_case("floating: %s", scorer);
    score_in_all(args, scorer);
    free_array(&keys);
    free_array(&scores);
}

void test_floating(void) {
    n_region = 0;
    for (int kind = 0; kind < VOTING_COUNT; kind++) {
        const attention_shape shape = {.n_batch = 2,
                                       .n_head = 2,
                                       .group = 2,
                                       .n_token = 150,
                                       .n_dim = 40,
                                       .dtype = (kvp_dtype)(kind % 3),
                                       .kind = (voting)kind};
        attention_case c = new_attention_case(&shape);
        name_case("floating: attention, voting %d", kind);
        score_in_all(c.args, "attention");
        free_attention_case(&c);
    }
    score_keys("norm", (const double[]){0, 0});
    score_keys("random", (const double[]){7, 0});
    score_keys("lagkv", (const double[]){4, 50});
    CHECK(n_region > 0, "the core never asked for threads, so this says nothing of them");
}

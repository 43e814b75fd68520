/* SPDX-License-Identifier: Apache-2.0
 *
 * Threads for the core, by OpenMP. Serial without it, and in a forked child: fork copies OpenMP's pool but not its
 * threads, so that a parallel region there would wait for ever.
 */
#include "binding.h"

#include <stdatomic.h>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>

static atomic_bool is_forked_child;
static atomic_flag is_watching = ATOMIC_FLAG_INIT;

static void note_fork(void) { atomic_store(&is_forked_child, true); }

/* Process-wide and once, however many times the module is loaded: pthread_atfork has no undo. */
int kvpb_watch_forks(void) {
    if (atomic_flag_test_and_set(&is_watching)) return 0;
    return pthread_atfork(NULL, NULL, note_fork) == 0 ? 0 : -1;
}

bool kvpb_has_openmp(void) { return true; }

static void run_threads(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg) {
#pragma omp parallel for schedule(dynamic) num_threads(n_worker)
    for (int64_t task = 0; task < n_task; task++) fn(arg, task, (int32_t)omp_get_thread_num());
}

static bool may_use_threads(void) { return !atomic_load(&is_forked_child); }
#else
int kvpb_watch_forks(void) { return 0; }

bool kvpb_has_openmp(void) { return false; }

static void run_threads(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg) {
    (void)n_worker;
    for (int64_t task = 0; task < n_task; task++) fn(arg, task, 0);
}

static bool may_use_threads(void) { return false; }
#endif

void kvpb_parallel_for(int64_t n_task, int32_t n_worker, kvp_task_fn fn, void *arg) {
    if (n_worker > n_task) n_worker = (int32_t)n_task; /* a thread without a task would only cost its start */
    if (n_worker > 1 && may_use_threads()) {
        run_threads(n_task, n_worker, fn, arg);
    } else {
        for (int64_t task = 0; task < n_task; task++) fn(arg, task, 0);
    }
}

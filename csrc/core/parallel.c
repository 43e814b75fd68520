/* SPDX-License-Identifier: Apache-2.0
 *
 * Handing tasks to the caller's threads. Which worker runs a task never changes its result.
 */
#include "floating.h"
#include "internal.h"

/* Waking a thread pool costs 2 to 40 microseconds, so less work than this (in nanoseconds, roughly) stays on the
 * calling thread. */
#define SERIAL_WORK 20000.0

int32_t kvpi_worker_count(const kvp_context *ctx) { return ctx->parallel_for && ctx->n_worker > 1 ? ctx->n_worker : 1; }

typedef struct job {
    kvp_task_fn fn;
    void *arg;
} job;

/* On a thread of the caller's. */
static void run_task(void *arg, int64_t task, int32_t worker) {
    const job *j = arg;
    const fenv_t own = kvpi_enter_default();
    j->fn(j->arg, task, worker);
    kvpi_leave_default(own);
}

void kvpi_run(const kvp_context *ctx, int64_t n_task, double work, kvp_task_fn fn, void *arg) {
    const int32_t n_worker = kvpi_worker_count(ctx);
    if (n_worker > 1 && n_task > 1 && work >= SERIAL_WORK) {
        job j = {fn, arg};
        ctx->parallel_for(n_task, n_worker, run_task, &j);
        return;
    }
    for (int64_t task = 0; task < n_task; task++) fn(arg, task, 0);
}

void *kvpi_scratch(const kvp_context *ctx, int32_t worker, size_t bytes_per_worker) {
    return (char *)ctx->workspace + (size_t)worker * bytes_per_worker;
}

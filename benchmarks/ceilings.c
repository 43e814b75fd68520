/* SPDX-License-Identifier: Apache-2.0
 *
 * What this machine can do at most, for bench_cpu.py to divide by. Each function does its work on n_thread threads and returns seconds.
 * Plain loops; the compiler is asked for the machine's own instruction set (-march=native).
 */
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One vector register: of longer ones the sums would not stay in registers, and the peak would be that of the stack. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float lanes __attribute__((vector_size(4 * LANES)));
enum { CHAINS = 12 }; /* enough independent sums to hide the latency of a multiply-add */

volatile float sink;

static float add_lanes(const lanes *x) {
    float sum = 0;
    for (int i = 0; i < CHAINS; i++)
        for (int j = 0; j < LANES; j++) sum += x[i][j];
    return sum;
}

/* Floating-point operations of a step of time_fma. */
int operations_fma(void) { return 2 * LANES * CHAINS; }

/* float32 multiply-adds, n steps a thread. */
double time_fma(int64_t n, int n_thread) {
    double start = now();
#pragma omp parallel num_threads(n_thread)
    {
        lanes sum[CHAINS], x = {0}, y = {0};
        for (int j = 0; j < LANES; j++) x[j] = 1.0f - 1e-7f * (float)j, y[j] = 1e-6f;
        for (int i = 0; i < CHAINS; i++) sum[i] = x + (float)i;
        for (int64_t r = 0; r < n; r++) {
#pragma GCC unroll 12
            for (int i = 0; i < CHAINS; i++) sum[i] = sum[i] * x + y;
        }
        sink = add_lanes(sum);
    }
    return now() - start;
}

int has_bf16(void) {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

/* bfloat16 dot products, n a thread: 4 * 16 * 12 * n floating-point operations. */
double time_bf16(int64_t n, int n_thread) {
#if defined(__AVX512BF16__)
    double start = now();
#pragma omp parallel num_threads(n_thread)
    {
        __m512 sum[CHAINS];
        const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);
        for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_set1_ps((float)i);
        for (int64_t r = 0; r < n; r++) {
#pragma GCC unroll 12
            for (int i = 0; i < CHAINS; i++) sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
        }
        float total = 0;
        for (int i = 0; i < CHAINS; i++) total += _mm512_reduce_add_ps(sum[i]);
        sink = total;
    }
    return now() - start;
#else
    (void)n, (void)n_thread;
    return -1;
#endif
}

/* Reads n bytes, a multiple of 1024 * n_thread. */
double time_read(const char *from, int64_t n, int n_thread) {
    double start = now();
#pragma omp parallel num_threads(n_thread)
    {
        const int64_t share = n / omp_get_num_threads();
        const lanes *x = (const lanes *)(from + share * omp_get_thread_num());
        lanes sum[4] = {{0}};
        for (int64_t i = 0; i < share / (int64_t)sizeof(lanes); i += 4)
            for (int j = 0; j < 4; j++) sum[j] += x[i + j];
        const lanes all = sum[0] + sum[1] + sum[2] + sum[3];
        sink = all[0];
    }
    return now() - start;
}

/* Copies n bytes by memcpy, a piece a thread. */
double time_copy(char *to, const char *from, int64_t n, int n_thread) {
    double start = now();
#pragma omp parallel num_threads(n_thread)
    {
        const int64_t share = n / omp_get_num_threads(), at = share * omp_get_thread_num();
        memcpy(to + at, from + at, (size_t)share);
    }
    return now() - start;
}

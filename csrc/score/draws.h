/* SPDX-License-Identifier: Apache-2.0
 *
 * The numbers of the scorer "random", the same on the CPU and on the GPU: those of random.c and of random.cu.
 */
#ifndef KVP_DRAWS_H
#define KVP_DRAWS_H

#include "../core/internal.h"

#include <math.h>

#if defined(__CUDACC__)
#define KVPI_BOTH __host__ __device__ __forceinline__
#else
#define KVPI_BOTH inline
#endif

#define KVPI_STEP 0x1e3779b97f4a7c15u /* odd, and of no pattern */

/* Tokens of a row whose keys its draws begin with. One is not enough: prompts of one length have their first token in
 * common, and with it that token's key in every layer. */
enum { KVPI_TOLD_BY = 8 };

/* The finalizer of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014): all
 * bits depend on all bits. */
static KVPI_BOTH uint64_t kvpi_mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

/* The i-th of them: spread over the valid tokens [begin, end), and the last one first. */
static KVPI_BOTH int64_t kvpi_told_by(int64_t i, int64_t begin, int64_t end) {
    return end - 1 - i * (end - begin) / KVPI_TOLD_BY;
}

/* Of number d of their keys' channels, one key after the other: coarsely, since low bits may depend on the batch. */
static KVPI_BOTH uint64_t kvpi_salt(float x, int64_t d) {
    const float most = 0x1p30f, wide = 4 * x, clamped = wide > most ? most : wide < -most ? -most : wide;
    return kvpi_mix((uint64_t)(int64_t)(isnan(x) ? 0.0f : rintf(clamped)) + (uint64_t)d * KVPI_STEP);
}

static inline uint64_t kvpi_seed(const double *param) {
    return (uint64_t)param[KVPI_PARAM_random_seed] | (uint64_t)param[KVPI_PARAM_random_seed_high] << 32;
}

/* Of head h of a row of so many tokens, whose salts have this sum. */
static KVPI_BOTH uint64_t kvpi_draw_head(uint64_t salts, int64_t h, uint64_t seed, int64_t n_token) {
    const uint64_t of_row = (seed + (uint64_t)n_token * KVPI_STEP) & (UINT64_MAX >> 2); /* whose lowest 62 bits count */
    return kvpi_mix(kvpi_mix(salts + (uint64_t)h) + of_row);
}

/* The score of the t-th token of a row, in [0, 1): 24 bits, which float32 holds. */
static KVPI_BOTH float kvpi_draw(uint64_t head, int64_t t) {
    return (float)(int32_t)(kvpi_mix(head + (uint64_t)t * KVPI_STEP) & 0xffffff) * 0x1p-24f;
}

#endif

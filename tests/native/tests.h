/* SPDX-License-Identifier: Apache-2.0
 *
 * The tests that main.c runs.
 */
#ifndef KVP_TEST_TESTS_H
#define KVP_TEST_TESTS_H

#include "harness.h"

/* Other ways to run a call's tasks, for the same bits; NULL past the last (test_same_bits.c). */
const calling *way_of_running(int i);

/* Once for each set of row primitives that this CPU can run. */
void test_norm(void);
void test_position(void);
void test_random(void);
void test_keydiff(void);
void test_lagkv(void);
void test_expect(void);
void test_attention(void);
void test_attention_sums(void);
void test_shifts(void);
void test_layouts(void);
void test_broken_keys(void);
void test_most(void);
void test_same_bits(void);
void test_floating(void);
void test_gather_large(void);
void test_gather_in_place(void);
void test_press(void);
void test_select(void);
void test_share(void);

/* Once. */
void test_band(void);
void test_gather(void);
void test_refusals(void);
void test_expect_refusals(void);
void test_introspection(void);
void test_corpus(void);           /* tests/fuzz/replay.c */
void test_register_backend(void); /* the last two: a backend cannot be taken away again */
void test_press_of_a_backend(void);

#endif

/* SPDX-License-Identifier: Apache-2.0
 *
 * The tensors of each verb, for the targets.
 */
#include "producer.h"

#include <string.h>

static argument input_of(const char *name, const char *letters, kvp_tensor *tensor, int allowed, bool required) {
    return (argument){.name = name,
                      .letters = letters,
                      .tensor = tensor,
                      .allowed = allowed,
                      .required = required,
                      .in_place_of = UNSHARED};
}

static argument table_of(const char *name, const char *letters, kvp_tensor *tensor, bool required) {
    argument a = input_of(name, letters, tensor, ALLOW_I32, required);
    a.table = true;
    return a;
}

static argument output_of(const char *name, const char *letters, kvp_tensor *tensor, int allowed, int in_place_of) {
    argument a = input_of(name, letters, tensor, allowed, true);
    a.output = true;
    a.in_place_of = in_place_of;
    return a;
}

/* Of a scorer that is none: nothing. */
int32_t needs_of(int32_t scorer) { return kvp_scorer_needs(scorer) < 0 ? 0 : kvp_scorer_needs(scorer); }

int list_score_arguments(kvp_score_args *args, argument *out) {
    const bool queries = needs_of(args->scorer) & KVP_NEEDS_QUERIES, votes = needs_of(args->scorer) & KVP_NEEDS_VOTES;
    const argument list[] = {
        input_of("keys", "BHTD", &args->keys, ALLOW_FLOATS, true),
        input_of("values", "BHTC", &args->values, ALLOW_FLOATS, (needs_of(args->scorer) & KVP_NEEDS_VALUES) != 0),
        input_of("queries", "BNQD", &args->queries, ALLOW_FLOATS, queries),
        table_of("votes", "BVF", &args->votes, votes),
        table_of("valid", "BR", &args->valid, false),
        input_of("lse", "BNQ", &args->lse, ALLOW_F32, false),
        output_of("scores", "BHT", &args->scores, ALLOW_F32, UNSHARED),
    };
    memcpy(out, list, sizeof list);
    return sizeof list / sizeof list[0];
}

int list_select_arguments(kvp_select_args *args, argument *out) {
    const argument list[] = {
        input_of("scores", "BHT", &args->scores, ALLOW_F32, true),
        table_of("segments", "BE", &args->segments, true),
        table_of("quotas", "BHS", &args->quotas, true),
        input_of("protect", "BT", &args->protect, ALLOW_U8, false),
        table_of("valid", "BR", &args->valid, false),
        output_of("positions", "BHK", &args->positions, ALLOW_I32, UNSHARED),
        output_of("counts", "BH", &args->counts, ALLOW_I32, UNSHARED),
    };
    memcpy(out, list, sizeof list);
    return sizeof list / sizeof list[0];
}

int list_share_arguments(kvp_share_args *args, argument *out) {
    const argument list[] = {
        input_of("scores", "BHT", &args->scores, ALLOW_F32, true),
        table_of("segments", "BE", &args->segments, true),
        table_of("quotas", "BHS", &args->quotas, true),
        table_of("floors", "BHS", &args->floors, true),
        output_of("counts", "BHS", &args->counts, ALLOW_I32, UNSHARED),
    };
    memcpy(out, list, sizeof list);
    return sizeof list / sizeof list[0];
}

int list_gather_arguments(kvp_gather_args *args, argument *out) {
    const argument list[] = {
        input_of("keys", "BHTD", &args->keys, ALLOW_FLOATS, true),
        input_of("values", "BHTC", &args->values, ALLOW_FLOATS, true),
        input_of("positions", "BHK", &args->positions, ALLOW_I32, true),
        output_of("out_keys", "BHKD", &args->out_keys, ALLOW_FLOATS, 0),
        output_of("out_values", "BHKC", &args->out_values, ALLOW_FLOATS, 1),
    };
    memcpy(out, list, sizeof list);
    return sizeof list / sizeof list[0];
}

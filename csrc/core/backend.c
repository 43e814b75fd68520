/* SPDX-License-Identifier: Apache-2.0
 *
 * The list of scorers and the table of devices.
 */
#include "internal.h"

#include <stdatomic.h>
#include <string.h>

static const kvpi_scorer scorers[KVPI_SCORER_COUNT + 1] = {
#define KVP_PARAM(scorer, name, initial) {#name, initial},
#define KVP_SCORER(name, needs, params) {#name, needs, &kvpi_##name##_traits, {params{NULL, 0}}},
#include "../scorers.def"
#undef KVP_SCORER
#undef KVP_PARAM
    {NULL, 0, NULL, {{NULL, 0}}},
};

/* Slot by DLPack device number. The CPU is there from the start; others register when their module loads. */
static _Atomic(const kvp_backend *) backends[3] = {NULL, &kvpi_cpu_backend, NULL};

const kvpi_scorer *kvpi_scorer_at(int32_t scorer) {
    return scorer >= 0 && scorer < KVPI_SCORER_COUNT ? &scorers[scorer] : NULL;
}

int32_t kvp_scorer_count(void) { return KVPI_SCORER_COUNT; }

const char *kvp_scorer_name(int32_t scorer) {
    const kvpi_scorer *s = kvpi_scorer_at(scorer);
    return s ? s->name : NULL;
}

int32_t kvp_scorer_find(const char *name) {
    for (int32_t i = 0; name && i < KVPI_SCORER_COUNT; i++)
        if (strcmp(scorers[i].name, name) == 0) return i;
    return -1;
}

int32_t kvp_scorer_needs(int32_t scorer) {
    const kvpi_scorer *s = kvpi_scorer_at(scorer);
    return s ? s->needs : -1;
}

const char *kvp_scorer_param(int32_t scorer, int32_t index) {
    const kvpi_scorer *s = kvpi_scorer_at(scorer);
    return s && index >= 0 && index < KVP_MAX_PARAMS ? s->param[index].name : NULL;
}

double kvp_scorer_param_default(int32_t scorer, int32_t index) {
    return kvp_scorer_param(scorer, index) ? scorers[scorer].param[index].initial : 0.0;
}

const kvp_backend *kvpi_backend_for(int32_t device) {
    return device > 0 && device < 3 ? atomic_load(&backends[device]) : NULL;
}

kvp_status kvp_register_backend(const kvp_backend *backend) {
    if (!backend) return KVP_ERR_VALUE;
    if (backend->abi != KVP_ABI_VERSION || backend->device <= 0 || backend->device >= 3) return KVP_ERR_UNSUPPORTED;
    atomic_store(&backends[backend->device], backend);
    return KVP_OK;
}

int32_t kvp_supports(int32_t scorer, int32_t device, int32_t dtype) {
    const kvp_backend *backend = kvpi_backend_for(device);
    return backend && kvpi_is_float(dtype) && kvpi_scorer_at(scorer) && backend->score[scorer] != NULL;
}

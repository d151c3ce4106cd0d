/* SPDX-License-Identifier: MIT */
#include "placement.h"

#include "json_matrix.h"
#include "text_file.h"

#include "entrepot/plan.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool fail(char *message, const char *format, ...) __attribute__((format(printf, 2, 3)));

static bool fail(char *message, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(message, PLACEMENT_MESSAGE_MAX, format, args);
    va_end(args);
    return false;
}

static bool make_tables(const int32_t *slots, int64_t ranks, placement *p, char *message)
{
    ep_plan_config config = EP_PLAN_CONFIG_INIT;
    config.layers = 1;
    config.experts = (int32_t)p->experts;
    config.replicas = (int32_t)p->slots;
    config.gpus = (int32_t)ranks;
    if (ep_plan_max_count(&config, slots, &p->max_count) != EP_OK)
        return fail(message, "%s", ep_last_error());
    p->log2phy = malloc((size_t)p->experts * (size_t)p->max_count * sizeof *p->log2phy);
    p->logcnt = malloc((size_t)p->experts * sizeof *p->logcnt);
    if (!p->log2phy || !p->logcnt)
        return fail(message, "out of memory");
    if (ep_plan_tables(&config, slots, NULL, p->max_count, p->log2phy, p->logcnt) != EP_OK)
        return fail(message, "%s", ep_last_error());
    return true;
}

static bool use_layer(const json_matrix *m, int64_t layer, int64_t ranks, placement *p,
                      char *message)
{
    if (layer >= (int64_t)m->rows)
        return fail(message, "\"phy2log\" has %zu layers; there is no layer %" PRId64, m->rows,
                    layer);
    p->slots = (int64_t)m->columns;
    if (p->slots % ranks || p->slots < p->experts || p->slots > 1 << 20)
        return fail(message,
                    "layer %" PRId64 " has %" PRId64 " slots; it can have %" PRId64
                    "..1048576, a multiple of the %" PRId64 " ranks",
                    layer, p->slots, p->experts, ranks);
    int32_t *slots = malloc(m->columns * sizeof *slots);
    if (!slots)
        return fail(message, "out of memory");
    for (size_t i = 0; i < m->columns; i++)
        slots[i] = (int32_t)m->values[(size_t)layer * m->columns + i];
    bool good = make_tables(slots, ranks, p, message);
    free(slots);
    return good;
}

bool placement_parse(const char *text, int64_t layer, int64_t experts, int64_t ranks, placement *p,
                     char message[PLACEMENT_MESSAGE_MAX])
{
    const json_matrix_spec spec = {"phy2log", 0, (double)(experts - 1), true};
    json_matrix m;
    *p = (placement){.experts = experts};
    if (!json_matrix_parse(text, strlen(text), &spec, &m, message))
        return false;
    bool good = use_layer(&m, layer, ranks, p, message);
    json_matrix_free(&m);
    if (!good)
        placement_free(p);
    return good;
}

bool placement_load(const char *path, int64_t layer, int64_t experts, int64_t ranks, placement *p,
                    char message[PLACEMENT_MESSAGE_MAX])
{
    size_t size;
    *p = (placement){.experts = experts};
    char *text = text_file_read(path, &size);
    if (!text)
        return fail(message, "%s", strerror(errno));
    bool good = placement_parse(text, layer, experts, ranks, p, message);
    free(text);
    return good;
}

void placement_free(placement *p)
{
    free(p->log2phy);
    free(p->logcnt);
    *p = (placement){.experts = p->experts};
}

bool placement_route(const placement *p, int64_t ranks, int64_t tokens, int topk, int32_t *ids)
{
    ep_plan_router router = EP_PLAN_ROUTER_INIT;
    router.experts = (int32_t)p->experts;
    router.replicas = (int32_t)p->slots;
    router.gpus = (int32_t)ranks;
    router.max_count = p->max_count;
    router.log2phy = p->log2phy;
    router.logcnt = p->logcnt;
    router.choice = EP_PLAN_LEAST_LOADED;
    int64_t *loads = calloc((size_t)ranks, sizeof *loads);
    bool good =
        loads && ep_plan_route(&router, ids, sizeof *ids, tokens, topk, ids, loads) == EP_OK;
    free(loads);
    return good;
}

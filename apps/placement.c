/* SPDX-License-Identifier: MIT */
#include "placement.h"

#include "text_file.h"

#include "entrepot/plan.h"

#include <ctype.h>
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

static const char *blanks(const char *p)
{
    return p + strspn(p, " \t\r\n");
}

/* One layer, "[3, 0, ...]", at *text; moves past it. `slots` NULL: only counts them. */
static bool read_layer(const char **text, int64_t layer, int64_t experts, int32_t *slots,
                       int64_t *count, char *message)
{
    const char *p = blanks(*text);
    *count = 0;
    if (*p != '[')
        return fail(message, "layer %" PRId64 " of \"phy2log\" is no array", layer);
    do {
        char *end;
        p = blanks(p + 1);
        long id = isdigit((unsigned char)*p) ? strtol(p, &end, 10) : -1;
        if (id < 0 || id >= experts)
            return fail(message,
                        "layer %" PRId64 ", slot %" PRId64 ": '%.*s' is not an expert id in "
                        "0..%" PRId64,
                        layer, *count, (int)strcspn(p, " \t\r\n,[]{}:\"") % 20, p, experts - 1);
        if (slots)
            slots[*count] = (int32_t)id;
        ++*count;
        p = blanks(end);
    } while (*p == ',');
    if (*p != ']')
        return fail(message, "layer %" PRId64 ", slot %" PRId64 ": ',' or ']' must follow", layer,
                    *count - 1);
    *text = p + 1;
    return true;
}

/* Where layer number `layer` starts; NULL after a message. */
static const char *find_layer(const char *text, int64_t layer, int64_t experts, char *message)
{
    static const char key[] = "\"phy2log\"";
    const char *p = strstr(text, key);
    p = p ? blanks(p + sizeof key - 1) : "";
    p = *p == ':' ? blanks(p + 1) : "";
    if (*p != '[') {
        fail(message, "there is no array \"phy2log\"");
        return NULL;
    }
    p++;
    for (int64_t i = 0; i < layer; i++) {
        int64_t count;
        if (!read_layer(&p, i, experts, NULL, &count, message))
            return NULL;
        p = blanks(p);
        if (*p != ',') {
            fail(message, "\"phy2log\" has %" PRId64 " layers; there is no layer %" PRId64, i + 1,
                 layer);
            return NULL;
        }
        p++;
    }
    return p;
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

bool placement_parse(const char *text, int64_t layer, int64_t experts, int64_t ranks, placement *p,
                     char message[PLACEMENT_MESSAGE_MAX])
{
    *p = (placement){.experts = experts};
    message[0] = 0;
    const char *start = find_layer(text, layer, experts, message), *again = start;
    if (!start || !read_layer(&start, layer, experts, NULL, &p->slots, message))
        return false;
    if (p->slots % ranks || p->slots < experts || p->slots > 1 << 20)
        return fail(message,
                    "layer %" PRId64 " has %" PRId64 " slots; it can have %" PRId64
                    "..1048576, a multiple of the %" PRId64 " ranks",
                    layer, p->slots, experts, ranks);
    int32_t *slots = malloc((size_t)p->slots * sizeof *slots);
    bool good = slots ? read_layer(&again, layer, experts, slots, &p->slots, message)
                      : fail(message, "out of memory");
    good = good && make_tables(slots, ranks, p, message);
    free(slots);
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

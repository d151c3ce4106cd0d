/* SPDX-License-Identifier: MIT */
/* Which of an expert's replicas a token goes to. */
#include "base/error.h"
#include "plan/eplb.h"

#include <stdlib.h>
#include <string.h>

static const char call[] = "ep_plan_route";

/* Fields checked, and what the choice works with. */
typedef struct route {
    ep_plan_router router;
    int gpu_slots, node_slots;
    const void *in;
    void *out;
    int wide; /* ids of 8 bytes, else of 4 */
    int topk;
    int64_t *gpu_tokens; /* NULL where nobody asks for them */
} route;

static int64_t read_id(const void *ids, int wide, size_t at)
{
    return wide ? ((const int64_t *)ids)[at] : ((const int32_t *)ids)[at];
}

static void write_id(void *ids, int wide, size_t at, int64_t id)
{
    if (wide)
        ((int64_t *)ids)[at] = id;
    else
        ((int32_t *)ids)[at] = (int32_t)id;
}

static ep_status check_field(const char *name, int64_t value, int64_t least, int64_t most)
{
    if (value >= least && value <= most)
        return EP_OK;
    return epi_fail(EP_ERR_ARGUMENT, "%s: %s is %lld, allowed: %lld..%lld", call, name,
                    (long long)value, (long long)least, (long long)most);
}

static ep_status check_router(const ep_plan_router *r)
{
    enum { MOST = 1 << 20 };
    EPI_TRY(check_field("router.experts", r->experts, 1, MOST));
    EPI_TRY(check_field("router.replicas", r->replicas, r->experts, MOST));
    EPI_TRY(check_field("router.gpus", r->gpus, 1, MOST));
    EPI_TRY(check_field("router.nodes", r->nodes, 1, r->gpus));
    EPI_TRY(check_field("router.max_count", r->max_count, 1, r->replicas));
    EPI_TRY(check_field("router.choice", r->choice, EP_PLAN_HASH, EP_PLAN_LEAST_LOADED));
    EPI_TRY(check_field("router.node", r->node, -1, r->nodes - 1));
    if (r->replicas % r->gpus || r->gpus % r->nodes)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: router.replicas, gpus and nodes are %d, %d and %d, allowed: each "
                        "divides the one before",
                        call, r->replicas, r->gpus, r->nodes);
    if (!r->log2phy || !r->logcnt)
        return epi_fail(EP_ERR_ARGUMENT, "%s: router.%s is NULL", call,
                        r->log2phy ? "logcnt" : "log2phy");
    return EP_OK;
}

static ep_status check_tables(const ep_plan_router *r)
{
    for (int e = 0; e < r->experts; e++) {
        const int32_t *slots = r->log2phy + (size_t)e * (size_t)r->max_count;
        if (r->logcnt[e] < 1 || r->logcnt[e] > r->max_count)
            return epi_fail(EP_ERR_ARGUMENT, "%s: logcnt[%d] is %d, allowed: 1..%d", call, e,
                            (int)r->logcnt[e], r->max_count);
        for (int k = 0; k < r->logcnt[e]; k++)
            if (slots[k] < 0 || slots[k] >= r->replicas)
                return epi_fail(EP_ERR_ARGUMENT, "%s: log2phy[%d][%d] is %d, allowed: 0..%d", call,
                                e, k, (int)slots[k], r->replicas - 1);
    }
    return EP_OK;
}

static ep_status check_ids(const route *r, int64_t tokens)
{
    size_t n = (size_t)tokens * (size_t)r->topk;
    for (size_t i = 0; i < n; i++) {
        int64_t id = read_id(r->in, r->wide, i);
        if (id < -1 || id >= r->router.experts)
            return epi_fail(EP_ERR_ARGUMENT, "%s: topk_idx[%zu][%zu] is %lld, allowed: -1..%d",
                            call, i / (size_t)r->topk, i % (size_t)r->topk, (long long)id,
                            r->router.experts - 1);
    }
    return EP_OK;
}

/* The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
 */
static uint64_t mix(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Uniform below n, without the division's cost and bias. */
static int hash_below(const ep_plan_router *r, uint64_t token, int64_t expert, int n)
{
    uint64_t h = mix(mix(r->seed + 0x9e3779b97f4a7c15u * (token + 1)) + (uint64_t)expert);
    return (int)((h >> 32) * (uint64_t)n >> 32);
}

static int is_near(const route *r, int slot)
{
    return r->router.node < 0 || slot / r->node_slots == r->router.node;
}

/* An expert's replicas that are up for choice: those on the preferred node if there are any. */
typedef struct options {
    const int32_t *slots;
    int all, count; /* replicas; those up for choice */
    int near_only;
} options;

static options options_of(const route *r, int64_t expert)
{
    options o = {0};
    if (expert < 0)
        return o;
    o.slots = r->router.log2phy + (size_t)expert * (size_t)r->router.max_count;
    o.all = r->router.logcnt[expert];
    for (int k = 0; k < o.all; k++)
        o.count += is_near(r, o.slots[k]);
    o.near_only = o.count > 0;
    if (!o.near_only)
        o.count = o.all;
    return o;
}

static int is_option(const route *r, const options *o, int k)
{
    return !o->near_only || is_near(r, o->slots[k]);
}

static int choose_by_hash(const route *r, const options *o, uint64_t token, int64_t expert)
{
    int pick = hash_below(&r->router, token, expert, o->count);
    for (int k = 0;; k++)
        if (is_option(r, o, k) && pick-- == 0)
            return o->slots[k];
}

static int64_t *tokens_at(const route *r, int slot)
{
    return &r->gpu_tokens[slot / r->gpu_slots];
}

static int choose_least_loaded(const route *r, const options *o)
{
    int best = -1;
    for (int k = 0; k < o->all; k++)
        if (is_option(r, o, k) && (best < 0 || *tokens_at(r, o->slots[k]) < *tokens_at(r, best)))
            best = o->slots[k];
    return best;
}

static void route_least_loaded(const route *r, int64_t tokens)
{
    size_t n = (size_t)tokens * (size_t)r->topk;
    for (size_t i = 0; i < n; i++) {
        options o = options_of(r, read_id(r->in, r->wide, i));
        int slot = choose_least_loaded(r, &o);
        if (slot >= 0)
            ++*tokens_at(r, slot);
        write_id(r->out, r->wide, i, slot);
    }
}

static void route_by_hash(const route *r, int64_t tokens)
{
    size_t topk = (size_t)r->topk, n = (size_t)tokens * topk;
    for (size_t i = 0; i < n; i++) {
        int64_t expert = read_id(r->in, r->wide, i);
        options o = options_of(r, expert);
        int slot = -1;
        if (o.count > 0)
            slot = choose_by_hash(r, &o, r->router.first_token + i / topk, expert);
        if (slot >= 0 && r->gpu_tokens)
            ++*tokens_at(r, slot);
        write_id(r->out, r->wide, i, slot);
    }
}

static ep_status check_arguments(const route *r, int32_t topk_bytes, int64_t tokens)
{
    EPI_TRY(check_router(&r->router));
    if (topk_bytes != 4 && topk_bytes != 8)
        return epi_fail(EP_ERR_ARGUMENT, "%s: topk_bytes is %d, allowed: 4 or 8", call, topk_bytes);
    EPI_TRY(check_field("topk", r->topk, 1, 1 << 20));
    EPI_TRY(check_field("tokens", tokens, 0, INT64_MAX >> 24));
    if (tokens > 0 && (!r->in || !r->out))
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is NULL", call, r->in ? "physical" : "topk_idx");
    EPI_TRY(check_tables(&r->router));
    return check_ids(r, tokens);
}

ep_status ep_plan_route(const ep_plan_router *router, const void *topk_idx, int32_t topk_bytes,
                        int64_t tokens, int32_t topk, void *physical, int64_t *gpu_tokens)
{
    route r = {.router = EP_PLAN_ROUTER_INIT,
               .in = topk_idx,
               .out = physical,
               .wide = topk_bytes == 8,
               .topk = topk,
               .gpu_tokens = gpu_tokens};
    int64_t *own = NULL;
    if (!router)
        return epi_fail(EP_ERR_ARGUMENT, "%s: router is NULL", call);
    EPI_TRY(check_field("router.size", (int64_t)router->size, sizeof router->size, sizeof *router));
    memcpy(&r.router, router, router->size);
    EPI_TRY(check_arguments(&r, topk_bytes, tokens));
    r.gpu_slots = r.router.replicas / r.router.gpus;
    r.node_slots = r.router.replicas / r.router.nodes;
    if (r.router.choice == EP_PLAN_HASH) {
        route_by_hash(&r, tokens);
        return EP_OK;
    }
    if (!gpu_tokens) {
        own = calloc((size_t)r.router.gpus, sizeof *own);
        if (!own)
            return epi_fail(EP_ERR_MEMORY, "%s: no memory for %d GPUs", call, r.router.gpus);
        r.gpu_tokens = own;
    }
    route_least_loaded(&r, tokens);
    free(own);
    return EP_OK;
}

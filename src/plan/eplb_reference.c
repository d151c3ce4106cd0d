/* SPDX-License-Identifier: MIT */
/*
 * The reference policy: groups to nodes, replicas inside each node, replicas to
 * GPUs. Results equal those of the public EPLB with a stable sort, so every
 * sum and quotient is float32 and taken in the same order.
 */
#include "base/error.h"
#include "plan/eplb.h"
#include "plan/eplb_tree.h"

#include <stdlib.h>
#include <string.h>

void epi_plan_replicate(const float *weight, int n, int slots, uint64_t *tree, float *share,
                        int *expert, int *rank, int *count)
{
    int leaves = epi_tree_leaves(n);
    for (int i = 0; i < n; i++) {
        expert[i] = i;
        rank[i] = 0;
        count[i] = 1;
        share[i] = weight[i];
        tree[leaves + i] = epi_tree_heaviest(weight[i], i);
    }
    epi_tree_build(tree, n, leaves);
    for (int slot = n; slot < slots; slot++) {
        int heaviest = epi_tree_first(tree);
        expert[slot] = heaviest;
        rank[slot] = count[heaviest]++;
        share[heaviest] = weight[heaviest] / (float)count[heaviest];
        epi_tree_set(tree, leaves, heaviest, epi_tree_heaviest(share[heaviest], heaviest));
    }
}

/* One layer's scratch; all parts live in one block. */
typedef struct scratch {
    epi_packer packer;
    float *group_load;            /* [groups] */
    int *group_node, *group_rank; /* [groups] */
    int *order;                   /* [experts] experts node by node */
    float *weight, *share;        /* [experts] in that order */
    int *count;                   /* [experts] */
    int *expert, *rank;           /* [replicas] of one node */
    float *slot_load;             /* [replicas] of one node */
    int *gpu, *gpu_rank;          /* [replicas] of one node */
    int32_t *block;
} scratch;

static int *take(int32_t **next, int n)
{
    int *part = *next;
    *next += n;
    return part;
}

static ep_status scratch_open(scratch *s, const epi_plan *plan)
{
    int e = plan->experts, p = plan->replicas, g = plan->groups;
    memset(s, 0, sizeof *s);
    EPI_TRY(epi_packer_open(&s->packer, p));
    s->block = malloc((3 * (size_t)g + 4 * (size_t)e + 5 * (size_t)p) * sizeof *s->block);
    if (!s->block) {
        epi_packer_close(&s->packer);
        return epi_fail(EP_ERR_MEMORY, "ep_plan_eplb: no memory for %d experts, %d replicas", e, p);
    }
    int32_t *next = s->block;
    s->group_load = (float *)take(&next, g);
    s->group_node = take(&next, g);
    s->group_rank = take(&next, g);
    s->order = take(&next, e);
    s->weight = (float *)take(&next, e);
    s->share = (float *)take(&next, e);
    s->count = take(&next, e);
    s->expert = take(&next, p);
    s->rank = take(&next, p);
    s->slot_load = (float *)take(&next, p);
    s->gpu = take(&next, p);
    s->gpu_rank = take(&next, p);
    return EP_OK;
}

static void scratch_close(scratch *s)
{
    epi_packer_close(&s->packer);
    free(s->block);
}

/* Lists the experts node by node, group by group as the packing ranked them. */
static void order_by_node(scratch *s, const epi_plan *plan, const float *load)
{
    int size = plan->experts / plan->groups, per_node = plan->groups / plan->nodes;
    for (int g = 0; g < plan->groups; g++) {
        s->group_load[g] = 0;
        for (int i = 0; i < size; i++)
            s->group_load[g] += load[g * size + i];
    }
    epi_plan_pack(&s->packer, s->group_load, plan->groups, plan->nodes, s->group_node,
                  s->group_rank);
    for (int g = 0; g < plan->groups; g++) {
        int *at = s->order + (s->group_node[g] * per_node + s->group_rank[g]) * size;
        for (int i = 0; i < size; i++)
            at[i] = g * size + i;
    }
}

/* Fills one node's slots from its n experts. */
static void plan_node(scratch *s, const epi_plan *plan, const float *load, const int *experts,
                      int32_t *phy2log, int32_t *phyrank)
{
    int n = plan->experts / plan->nodes, slots = plan->replicas / plan->nodes;
    for (int i = 0; i < n; i++)
        s->weight[i] = load[experts[i]];
    epi_plan_replicate(s->weight, n, slots, s->packer.tree, s->share, s->expert, s->rank, s->count);
    for (int i = 0; i < slots; i++)
        s->slot_load[i] = s->share[s->expert[i]];
    epi_plan_pack(&s->packer, s->slot_load, slots, plan->gpus / plan->nodes, s->gpu, s->gpu_rank);
    for (int i = 0; i < slots; i++) {
        int slot = s->gpu[i] * plan->gpu_slots + s->gpu_rank[i];
        phy2log[slot] = experts[s->expert[i]];
        if (phyrank)
            phyrank[slot] = s->rank[i];
    }
}

ep_status epi_plan_reference(const epi_plan *plan, const float *load, int32_t *phy2log,
                             int32_t *phyrank)
{
    scratch s;
    EPI_TRY(scratch_open(&s, plan));
    int n = plan->experts / plan->nodes, slots = plan->replicas / plan->nodes;
    for (int layer = 0; layer < plan->layers; layer++) {
        const float *row = load + (size_t)layer * (size_t)plan->experts;
        size_t at = (size_t)layer * (size_t)plan->replicas;
        order_by_node(&s, plan, row);
        for (int node = 0; node < plan->nodes; node++, at += (size_t)slots)
            plan_node(&s, plan, row, s.order + node * n, phy2log + at,
                      phyrank ? phyrank + at : NULL);
    }
    scratch_close(&s);
    return EP_OK;
}

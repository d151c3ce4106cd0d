/* SPDX-License-Identifier: MIT */
/* Balanced packing: equally many items in each pack, the heaviest item first. */
#include "base/error.h"
#include "plan/eplb.h"
#include "plan/eplb_tree.h"

#include <stdlib.h>
#include <string.h>

/* One stable pass of a radix sort on the byte at `shift`. */
static void radix_pass(const uint64_t *from, uint64_t *to, int n, int shift)
{
    int start[256] = {0};
    for (int i = 0; i < n; i++)
        start[from[i] >> shift & 255]++;
    for (int digit = 0, sum = 0; digit < 256; digit++) {
        int here = start[digit];
        start[digit] = sum;
        sum += here;
    }
    for (int i = 0; i < n; i++)
        to[start[from[i] >> shift & 255]++] = from[i];
}

void epi_plan_order(const float *weight, int n, uint64_t *keys, int *order)
{
    uint64_t *from = keys, *to = keys + n;
    for (int i = 0; i < n; i++)
        from[i] = epi_tree_heaviest(weight[i], i);
    for (int shift = 32; shift < 64; shift += 8) {
        radix_pass(from, to, n, shift);
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    for (int i = 0; i < n; i++)
        order[i] = (int)(uint32_t)from[i];
}

ep_status epi_packer_open(epi_packer *packer, int capacity)
{
    size_t n = (size_t)capacity;
    packer->keys = malloc(2 * n * sizeof *packer->keys);
    packer->order = malloc(n * sizeof *packer->order);
    packer->held = malloc(n * sizeof *packer->held);
    packer->sum = malloc(n * sizeof *packer->sum);
    packer->tree = malloc(4 * n * sizeof *packer->tree);
    if (packer->keys && packer->order && packer->held && packer->sum && packer->tree)
        return EP_OK;
    epi_packer_close(packer);
    return epi_fail(EP_ERR_MEMORY, "ep_plan_eplb: no memory for %d items", capacity);
}

void epi_packer_close(epi_packer *packer)
{
    free(packer->keys);
    free(packer->order);
    free(packer->held);
    free(packer->sum);
    free(packer->tree);
    memset(packer, 0, sizeof *packer);
}

void epi_plan_pack(epi_packer *packer, const float *weight, int n, int m, int *pack, int *rank)
{
    int most = n / m;
    if (most == 1) {
        for (int i = 0; i < n; i++) {
            pack[i] = i;
            rank[i] = 0;
        }
        return;
    }
    int leaves = epi_tree_leaves(m);
    uint64_t *tree = packer->tree;
    memset(packer->held, 0, (size_t)m * sizeof *packer->held);
    memset(packer->sum, 0, (size_t)m * sizeof *packer->sum);
    for (int p = 0; p < m; p++)
        tree[leaves + p] = epi_tree_lightest(0, p);
    epi_tree_build(tree, m, leaves);
    epi_plan_order(weight, n, packer->keys, packer->order);
    for (int i = 0; i < n; i++) {
        int item = packer->order[i], p = epi_tree_first(tree);
        pack[item] = p;
        rank[item] = packer->held[p]++;
        packer->sum[p] += weight[item];
        epi_tree_set(tree, leaves, p,
                     packer->held[p] == most ? EPI_TREE_LAST
                                             : epi_tree_lightest(packer->sum[p], p));
    }
}

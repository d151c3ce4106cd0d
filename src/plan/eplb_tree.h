/* SPDX-License-Identifier: MIT */
/*
 * A tournament of 64-bit keys; the least key is at the root. A key holds a
 * float's bits above an index, so ties go to the lowest index. Changing one key
 * costs one path to the root, where a scan would read every key.
 */
#ifndef EPI_PLAN_EPLB_TREE_H
#define EPI_PLAN_EPLB_TREE_H

#include <stdint.h>
#include <string.h>

#define EPI_TREE_LAST UINT64_MAX /* the key that loses to every other */

/* Bits of a float >= 0; they grow with its value. Adding 0 turns -0 into 0. */
static inline uint32_t epi_tree_bits(float value)
{
    uint32_t bits;
    value += 0.0f;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline uint64_t epi_tree_lightest(float value, int index)
{
    return (uint64_t)epi_tree_bits(value) << 32 | (uint32_t)index;
}

static inline uint64_t epi_tree_heaviest(float value, int index)
{
    return (uint64_t)~epi_tree_bits(value) << 32 | (uint32_t)index;
}

static inline int epi_tree_leaves(int n)
{
    int leaves = 1;
    while (leaves < n)
        leaves *= 2;
    return leaves;
}

/* tree: [2 * leaves]; the first n leaves, tree[leaves ..], are set by the caller. */
static inline void epi_tree_build(uint64_t *tree, int n, int leaves)
{
    for (int i = n; i < leaves; i++)
        tree[leaves + i] = EPI_TREE_LAST;
    for (int i = leaves - 1; i >= 1; i--)
        tree[i] = tree[2 * i] < tree[2 * i + 1] ? tree[2 * i] : tree[2 * i + 1];
}

static inline void epi_tree_set(uint64_t *tree, int leaves, int i, uint64_t key)
{
    int node = leaves + i;
    tree[node] = key;
    for (; node > 1; node /= 2) {
        uint64_t sibling = tree[node ^ 1];
        key = key < sibling ? key : sibling;
        tree[node / 2] = key;
    }
}

/* Index of the least key. */
static inline int epi_tree_first(const uint64_t *tree)
{
    return (int)(uint32_t)tree[1];
}

#endif

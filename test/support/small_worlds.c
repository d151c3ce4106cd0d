/* SPDX-License-Identifier: MIT */
#include "support/small_worlds.h"

#include "support/tensors.h"

#include <stdbool.h>

static void extend(const struct space *s, int64_t *row, int k, struct choices *all)
{
    if (k == s->topk) {
        for (int i = 0; i < s->topk; i++)
            all->rows[all->count * s->topk + i] = row[i];
        all->count++;
        return;
    }
    for (int64_t id = -1; id < s->experts; id++) {
        bool used = false;
        for (int i = 0; i < k; i++)
            used |= id >= 0 && row[i] == id;
        row[k] = id;
        if (!used)
            extend(s, row, k + 1, all);
    }
}

struct choices choices_of(const struct space *s)
{
    int64_t row[8], most = 1;
    for (int k = 0; k < s->topk; k++)
        most *= s->experts + 1;
    struct choices all = {test_zeros(most * s->topk, sizeof(int64_t)), 0};
    extend(s, row, 0, &all);
    return all;
}

void write_world(const struct space *s, const struct choices *all, int64_t number, int64_t *ids)
{
    for (int i = 0; i < s->ranks * s->tokens; i++, number /= all->count)
        for (int k = 0; k < s->topk; k++)
            ids[i * s->topk + k] = all->rows[number % all->count * s->topk + k];
}

int64_t worlds_of(const struct space *s, const struct choices *all)
{
    int64_t total = 1;
    for (int i = 0; i < s->ranks * s->tokens; i++)
        total *= all->count;
    return total;
}

int64_t world_step(int64_t total, int64_t budget, int64_t choices)
{
    int64_t step = (total + budget - 1) / budget;
    for (;; step++) {
        int64_t a = step, b = choices;
        while (b) {
            int64_t rest = a % b;
            a = b;
            b = rest;
        }
        if (a == 1)
            return step;
    }
}

/* SPDX-License-Identifier: MIT */
#include "support/reference.h"

#include "support/formats.h"

#include <stdlib.h>
#include <string.h>

/* Tests have no use for going on without memory. */
static void *zeros(int64_t n, size_t size)
{
    void *memory = calloc((size_t)n + 1, size);
    if (!memory)
        abort();
    return memory;
}

ep_dtype ref_wire_dtype(const struct ref_world *world)
{
    return world->wire == EP_WIRE_FP8 ? EP_E4M3 : world->dtype;
}

int ref_local_ids(const struct ref_world *world, int rank, int64_t *local)
{
    int count = 0;
    for (int64_t e = 0; e < world->num_experts; e++)
        local[e] = world->expert_rank[e] == rank ? count++ : -1;
    return count;
}

static bool goes_to(const struct ref_world *world, const int64_t *row, int rank)
{
    for (int k = 0; k < world->topk; k++)
        if (row[k] >= 0 && world->expert_rank[row[k]] == rank)
            return true;
    return false;
}

void ref_layout(const struct ref_world *world, const struct ref_tokens *mine, int ranks_per_node,
                int32_t *per_rank, int32_t *per_node, int32_t *per_expert, uint8_t *in_rank)
{
    int num_nodes = world->num_ranks / ranks_per_node;
    memset(per_rank, 0, (size_t)world->num_ranks * sizeof *per_rank);
    memset(per_node, 0, (size_t)num_nodes * sizeof *per_node);
    memset(per_expert, 0, (size_t)world->num_experts * sizeof *per_expert);
    for (int64_t t = 0; t < mine->num_tokens; t++) {
        const int64_t *row = mine->topk_idx + t * world->topk;
        for (int node = 0; node < num_nodes; node++) {
            bool here = false;
            for (int r = node * ranks_per_node; r < (node + 1) * ranks_per_node; r++) {
                bool goes = goes_to(world, row, r);
                in_rank[t * world->num_ranks + r] = goes;
                per_rank[r] += goes;
                here |= goes;
            }
            per_node[node] += here;
        }
        for (int k = 0; k < world->topk; k++)
            if (row[k] >= 0)
                per_expert[row[k]]++;
    }
}

static int64_t round_up(int64_t n, int64_t to)
{
    return (n + to - 1) / to * to;
}

/* Rows that reach `local` expert of the rank, in (source, token) order, appended to recv->row. */
static int64_t append_expert(const struct ref_world *world, const struct ref_tokens *tokens,
                             int64_t expert, struct ref_row *row)
{
    int64_t n = 0;
    for (int s = 0; s < world->num_ranks; s++)
        for (int64_t t = 0; t < tokens[s].num_tokens; t++)
            for (int k = 0; k < world->topk; k++)
                if (tokens[s].topk_idx[t * world->topk + k] == expert)
                    row[n++] = (struct ref_row){s, t, k};
    return n;
}

static int64_t all_tokens(const struct ref_world *world, const struct ref_tokens *tokens)
{
    int64_t n = 0;
    for (int s = 0; s < world->num_ranks; s++)
        n += tokens[s].num_tokens;
    return n;
}

static void place_by_token(const struct ref_world *world, const struct ref_tokens *tokens, int rank,
                           struct ref_recv *recv)
{
    int64_t n = 0;
    recv->row = zeros(all_tokens(world, tokens) + world->num_worst_tokens, sizeof *recv->row);
    recv->source_offset = zeros(world->num_ranks + 1, sizeof(int32_t));
    for (int s = 0; s < world->num_ranks; s++) {
        for (int64_t t = 0; t < tokens[s].num_tokens; t++)
            if (goes_to(world, tokens[s].topk_idx + t * world->topk, rank))
                recv->row[n++] = (struct ref_row){s, t, -1};
        recv->source_offset[s + 1] = (int32_t)n;
    }
    recv->rows = recv->num_rows = n;
}

static void place_by_expert(const struct ref_world *world, const struct ref_tokens *tokens,
                            int rank, struct ref_recv *recv)
{
    int64_t n = 0, most = all_tokens(world, tokens) * world->topk +
                          world->num_experts * world->expert_alignment + world->num_worst_tokens;
    int local = 0;
    recv->row = zeros(most, sizeof *recv->row);
    recv->expert_offset = zeros(recv->num_local_experts + 1, sizeof(int32_t));
    for (int64_t e = 0; e < world->num_experts; e++) {
        if (world->expert_rank[e] != rank)
            continue;
        int64_t got = append_expert(world, tokens, e, recv->row + n);
        int64_t end = n + round_up(got, world->expert_alignment);
        recv->num_rows += got;
        for (n += got; n < end; n++)
            recv->row[n] = (struct ref_row){-1, -1, -1};
        recv->expert_offset[++local] = (int32_t)n;
    }
    recv->rows = n;
}

static void count_experts(const struct ref_world *world, const struct ref_tokens *tokens, int rank,
                          struct ref_recv *recv)
{
    int local = 0;
    struct ref_row *scratch = zeros(all_tokens(world, tokens) * world->topk, sizeof *scratch);
    recv->tokens_per_expert = zeros(recv->num_local_experts, sizeof(int32_t));
    for (int64_t e = 0; e < world->num_experts; e++)
        if (world->expert_rank[e] == rank)
            recv->tokens_per_expert[local++] = (int32_t)round_up(
                append_expert(world, tokens, e, scratch), world->expert_alignment);
    free(scratch);
}

static void fill_row(const struct ref_world *world, const struct ref_tokens *source,
                     const struct ref_row *row, uint8_t *x, uint8_t *scales)
{
    int64_t t = row->token, words = format_scale_words(world->scale, world->hidden);
    size_t row_bytes = (size_t)world->hidden * ep_dtype_size(world->dtype);
    const uint8_t *from = source->x + (size_t)t * row_bytes;
    if (world->wire == EP_WIRE_FP8) {
        format_quantise(world->dtype, from, world->hidden, world->scale, x, scales);
        return;
    }
    memcpy(x, from, row_bytes);
    if (world->dtype == EP_E4M3)
        memcpy(scales, source->scales + (size_t)(t * words) * 4, (size_t)words * 4);
}

static void fill_ids(const struct ref_world *world, const struct ref_tokens *source,
                     const struct ref_row *row, const int64_t *local, int64_t *ids, float *weights)
{
    int first = row->k >= 0 ? row->k : 0, last = row->k >= 0 ? row->k : world->topk - 1;
    for (int k = first; k <= last; k++) {
        int64_t id = source->topk_idx[row->token * world->topk + k];
        if (id < 0 || local[id] < 0)
            continue;
        ids[k - first] = local[id];
        if (source->topk_weights)
            weights[k - first] = source->topk_weights[row->token * world->topk + k];
    }
}

void ref_dispatch(const struct ref_world *world, const struct ref_tokens *tokens, int rank,
                  struct ref_recv *recv)
{
    bool by_expert = world->layout == EP_ROWS_BY_EXPERT;
    int64_t *local = zeros(world->num_experts, sizeof *local);
    *recv = (struct ref_recv){.num_local_experts = ref_local_ids(world, rank, local),
                              .columns = by_expert ? 1 : world->topk};
    count_experts(world, tokens, rank, recv);
    if (by_expert)
        place_by_expert(world, tokens, rank, recv);
    else
        place_by_token(world, tokens, rank, recv);
    if (world->num_worst_tokens > 0) {
        recv->overflow = recv->rows > world->num_worst_tokens;
        for (; recv->rows < world->num_worst_tokens; recv->rows++)
            recv->row[recv->rows] = (struct ref_row){-1, -1, -1};
    }
    size_t x_bytes = (size_t)world->hidden * ep_dtype_size(ref_wire_dtype(world));
    size_t scale_bytes = (size_t)format_scale_words(world->scale, world->hidden) * 4;
    recv->x = zeros(recv->rows, x_bytes);
    recv->scales = zeros(recv->rows, scale_bytes);
    recv->topk_idx = zeros(recv->rows * recv->columns, sizeof(int64_t));
    recv->topk_weights = zeros(recv->rows * recv->columns, sizeof(float));
    recv->source_token = zeros(recv->rows, sizeof(int32_t));
    for (int64_t i = 0; i < recv->rows * recv->columns; i++)
        recv->topk_idx[i] = -1;
    for (int64_t i = 0; i < recv->rows; i++) {
        const struct ref_row *row = recv->row + i;
        recv->source_token[i] = (int32_t)row->token;
        if (row->source < 0)
            continue;
        fill_row(world, tokens + row->source, row, recv->x + (size_t)i * x_bytes,
                 recv->scales + (size_t)i * scale_bytes);
        fill_ids(world, tokens + row->source, row, local, recv->topk_idx + i * recv->columns,
                 recv->topk_weights + i * recv->columns);
    }
    free(local);
}

void ref_recv_free(struct ref_recv *recv)
{
    free(recv->row);
    free(recv->x);
    free(recv->scales);
    free(recv->topk_idx);
    free(recv->topk_weights);
    free(recv->source_token);
    free(recv->source_offset);
    free(recv->expert_offset);
    free(recv->tokens_per_expert);
    memset(recv, 0, sizeof *recv);
}

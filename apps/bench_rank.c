/* SPDX-License-Identifier: MIT */
#include "bench_rank.h"

#include "memory.h"

#include <stdlib.h>
#include <string.h>

void bench_rank_note(const bench_rank *b, bench_phase phase, span s)
{
    if (b->iteration >= 0)
        *bench_span_at(b->c, phase, b->iteration, b->self->rank) = s;
}

void *bench_alloc(size_t bytes)
{
    return aligned_alloc(64, (bytes + 64) & ~(size_t)63);
}

size_t bench_out_bytes(const bench_options *o)
{
    return (size_t)(o->tokens * o->hidden) * sizeof(uint16_t);
}

void bench_rank_spoil_outputs(bench_rank *b)
{
    memset(b->out, 0xff, bench_out_bytes(b->o));
    memset(b->out_ordinary, 0xff, bench_out_bytes(b->o));
}

static ep_status alloc_inputs(bench_rank *b)
{
    const bench_options *o = b->o;
    size_t entries = (size_t)(o->tokens * o->topk), ranks = (size_t)b->self->num_ranks;
    b->ids = bench_alloc(entries * sizeof *b->ids);
    b->weights = bench_alloc(entries * sizeof *b->weights);
    b->x = bench_alloc(bench_out_bytes(o));
    b->out = bench_alloc(bench_out_bytes(o));
    b->counts = bench_alloc((ranks + (size_t)b->c->load.num_experts) * sizeof *b->counts);
    b->member = bench_alloc((size_t)o->tokens * ranks);
    if (!b->ids || !b->weights || !b->x || !b->out || !b->counts || !b->member ||
        !workload_routing(&b->c->load, b->self->rank, b->ids, b->weights))
        return rank_fail(b->self, EP_ERR_MEMORY, "no memory for the inputs");
    for (int64_t t = 0; t < o->tokens; t++)
        workload_row(&b->c->load, b->self->rank, t, b->x + t * o->hidden);
    memset(b->out, 0xff, bench_out_bytes(o)); /* warm */
    return EP_OK;
}

ep_status bench_rank_open_on(rank_self *self, ep_buffer_config *config, bench_rank *b)
{
    const bench_context *c = self->context;
    *b = (bench_rank){.self = self, .c = c, .o = c->options, .result = &c->results[self->rank]};
    config->max_experts = (int32_t)b->c->load.num_experts;
    BENCH_TRY(alloc_inputs(b));
    return ep_buffer_create(self->group, config, &b->buffer);
}

ep_status bench_rank_open(rank_self *self, bench_rank *b)
{
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.num_threads = (int32_t)((const bench_context *)self->context)->options->threads;
    return bench_rank_open_on(self, &config, b);
}

void bench_rank_close(bench_rank *b)
{
    ep_buffer_destroy(b->buffer);
    free(b->ids);
    free(b->weights);
    free(b->x);
    free(b->out);
    free(b->out_ordinary);
    free(b->counts);
    free(b->member);
}

ep_status bench_rank_layout(bench_rank *b)
{
    int ranks = b->self->num_ranks;
    ep_tensor ids = ep_tensor_2d(b->ids, EP_I32, b->o->tokens, b->o->topk);
    BENCH_TIMED(BENCH_LAYOUT, ep_layout(&ids, b->c->load.num_experts, NULL, ranks, ranks, b->counts,
                                        NULL, b->counts + ranks, b->member));
    return EP_OK;
}

ep_status bench_rank_note_memory(bench_rank *b, int64_t inputs_outputs)
{
    ep_buffer_info info = {.size = sizeof info};
    BENCH_TRY(ep_buffer_query(b->buffer, &info));
    b->result->window_bytes = (int64_t)info.window_bytes;
    b->result->inputs_outputs = inputs_outputs;
    BENCH_TRY(ep_group_barrier(b->self->group)); /* all ranks' memory is in use now */
    bool once = b->o->ranks_as == BENCH_RANKS_PROCESSES || b->self->rank == 0;
    b->result->resident_bytes = once ? memory_peak_share() : 0;
    return ep_group_barrier(b->self->group);
}

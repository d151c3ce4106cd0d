/* SPDX-License-Identifier: MIT */
/* Who is waited for, and when each phase of a call was. */
#include "ep/buffer.h"

#include "base/error.h"

static void take_cost(ep_buffer *buffer, int64_t *ns, int32_t reset)
{
    for (int r = 0; r < buffer->num_ranks; r++)
        ns[r] = reset ? atomic_exchange(&buffer->wait_ns[r], 0) : atomic_load(&buffer->wait_ns[r]);
}

ep_status ep_buffer_wait_cost(ep_buffer *buffer, int64_t *ns, int32_t reset)
{
    if (!buffer || !ns)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_wait_cost: %s is NULL",
                        buffer ? "ns" : "buffer");
    take_cost(buffer, ns, reset);
    return EP_OK;
}

ep_status ep_buffer_wait_matrix(ep_buffer *buffer, int64_t *ns, int32_t reset)
{
    if (!buffer || !ns)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_wait_matrix: %s is NULL",
                        buffer ? "ns" : "buffer");
    size_t ranks = (size_t)buffer->num_ranks;
    int64_t *own = ns + (size_t)buffer->rank * ranks; /* where it will be in the end */
    take_cost(buffer, own, reset);
    return ep_group_allgather(buffer->group, own, ns, ranks * sizeof *ns);
}

ep_status ep_buffer_set_trace(ep_buffer *buffer, ep_trace_fn trace, void *context)
{
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_set_trace: buffer is NULL");
    pthread_mutex_lock(&buffer->lock);
    bool busy = buffer->head || buffer->running;
    if (!busy) {
        buffer->trace = trace;
        buffer->trace_context = context;
    }
    pthread_mutex_unlock(&buffer->lock);
    return busy ? epi_fail(EP_ERR_STATE, "ep_buffer_set_trace: a call of the buffer is under way")
                : EP_OK;
}

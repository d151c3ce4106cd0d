/* SPDX-License-Identifier: MIT */
#include "ep/buffer.h"

#include "base/error.h"
#include "entrepot/device.h"
#include "ep/args.h"
#include "ep/backend.h"
#include "ep/ll.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_MAX_EXPERTS 1024
#define DEFAULT_WINDOW_MAX ((size_t)64 << 30)

static size_t align64(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

static size_t mailbox_bytes(int num_ranks, int64_t max_experts)
{
    return align64(sizeof(epi_mailbox) + sizeof(int32_t) * (size_t)(num_ranks + max_experts));
}

size_t epi_control_area_bytes(int num_ranks, int64_t max_experts)
{
    if (max_experts == 0)
        max_experts = DEFAULT_MAX_EXPERTS;
    size_t bytes =
        epi_control_bytes(num_ranks) +
        (size_t)num_ranks * (2 * mailbox_bytes(num_ranks, max_experts) + sizeof(epi_aborts));
    return (bytes + EPI_POOL_ALIGN - 1) / EPI_POOL_ALIGN * EPI_POOL_ALIGN;
}

epi_mailbox *epi_buffer_mailbox(const ep_buffer *buffer, int owner, int source, uint64_t epoch)
{
    size_t index = 2 * (size_t)source + (epoch & 1);
    return (epi_mailbox *)(buffer->window->peer[owner] + buffer->mailbox_offset +
                           index * buffer->mailbox_bytes);
}

epi_aborts *epi_buffer_aborts(const ep_buffer *buffer, int owner, int source)
{
    size_t mail = 2 * (size_t)buffer->num_ranks * buffer->mailbox_bytes;
    return (epi_aborts *)(buffer->window->peer[owner] + buffer->mailbox_offset + mail) + source;
}

epi_abort *epi_buffer_abort(const ep_buffer *buffer, int owner, int source, uint64_t epoch)
{
    return &epi_buffer_aborts(buffer, owner, source)->reason[epoch % EPI_REASONS];
}

uint64_t epi_buffer_progress(const ep_buffer *buffer, int source)
{
    static const int entering[] = {EPI_SLOT_ENTER, EPI_SLOT_LL_SENT, EPI_SLOT_LL_Y};
    uint64_t aborted = epi_slot_load(buffer->window, source, EPI_SLOT_ABORT);
    uint64_t at = aborted ? aborted + 1 : 0;
    for (size_t i = 0; i < sizeof entering / sizeof *entering; i++) {
        uint64_t entered = epi_slot_load(buffer->window, source, entering[i]);
        if (entered > at)
            at = entered;
    }
    return at;
}

bool epi_buffer_contains(const ep_buffer *buffer, const void *memory, size_t bytes, size_t *offset)
{
    uintptr_t start = (uintptr_t)memory, base = (uintptr_t)buffer->window->base;
    if (start < base || start - base > buffer->window->committed ||
        bytes > buffer->window->committed - (start - base))
        return false;
    *offset = start - base;
    return true;
}

static ep_status check_config(const ep_buffer_config *config)
{
    const char *call = "ep_buffer_create";
    if (config->num_threads < 0 || config->num_threads > 256)
        return epi_bad(call, "num_threads", config->num_threads, "0..256");
    if (config->max_experts < 1 || config->max_experts > 65536)
        return epi_bad(call, "max_experts", config->max_experts, "1..65536, or 0 for 1024");
    if (config->verify != 0 && config->verify != 1)
        return epi_bad(call, "verify", config->verify, "0 or 1");
    if (config->device != EP_DEVICE_CPU && config->device != EP_DEVICE_CUDA)
        return epi_bad(call, "device", config->device, "0 or 1 (ep_device_type)");
    if (config->device_index < 0)
        return epi_bad(call, "device_index", config->device_index, "at least 0");
    return EP_OK;
}

typedef struct offer {
    int64_t status, max_experts, verify;
    uint64_t window_max;
    uint64_t epoch; /* last call of this rank on the buffer, 0 where it is new */
    char text[200];
} offer;

static ep_status compare_offers(const ep_group *group, const offer *all)
{
    const char *call = "ep_buffer_create";
    const offer *own = &all[group->rank];
    for (int r = 0; r < group->num_ranks; r++) {
        const offer *other = &all[r];
        if (group->masked[r])
            continue;
        if (other->status != EP_OK)
            return epi_fail(EP_ERR_ABORTED, "%s: rank %d failed: %s", call, r, other->text);
        if (other->max_experts != own->max_experts)
            return epi_disagree(call, "max_experts", group->rank, own->max_experts, r,
                                other->max_experts);
        if (other->verify != own->verify)
            return epi_disagree(call, "verify", group->rank, own->verify, r, other->verify);
        if (other->window_max != own->window_max)
            return epi_disagree(call, "window_max_bytes", group->rank, (int64_t)own->window_max, r,
                                (int64_t)other->window_max);
    }
    return EP_OK;
}

/* Ranks compare what must be equal, and learn of a rank that could not go on. It allocates
   nothing: a rank out of memory must still be able to say so. *epoch becomes the largest. */
static ep_status agree(ep_group *group, const ep_buffer_config *config, ep_status mine,
                       uint64_t *epoch)
{
    offer own;
    char reason[EPI_ERROR_MAX];
    const void *all;
    memset(&own, 0, sizeof own);
    own.status = mine;
    own.max_experts = config->max_experts;
    own.verify = config->verify;
    own.window_max = config->window_max_bytes;
    own.epoch = *epoch;
    snprintf(reason, sizeof reason, "%s", ep_last_error());
    if (mine != EP_OK)
        snprintf(own.text, sizeof own.text, "%.*s", (int)sizeof own.text - 1, reason);
    ep_status status = epi_gather(group->bootstrap, &own, sizeof own, &all);
    if (mine != EP_OK) /* its own reason is the one to report */
        return epi_fail(mine, "%s", reason);
    EPI_TRY(status);
    const offer *offers = all;
    for (int r = 0; r < group->num_ranks; r++)
        if (offers[r].epoch > *epoch)
            *epoch = offers[r].epoch;
    return compare_offers(group, offers);
}

static ep_status start_threads(ep_buffer *buffer)
{
    int threads = buffer->config.num_threads;
    if (threads > 1)
        EPI_TRY(epi_team_create(threads - 1, &buffer->team));
    if (threads == 0)
        return EP_OK;
    if (pthread_create(&buffer->worker, NULL, epi_worker_main, buffer))
        return epi_fail(EP_ERR_SYSTEM, "ep_buffer_create: could not start the worker thread");
    buffer->has_worker = true;
    return EP_OK;
}

static void destroy(ep_buffer *buffer)
{
    if (buffer->has_worker) {
        pthread_mutex_lock(&buffer->lock);
        buffer->stop = true;
        pthread_cond_broadcast(&buffer->work);
        pthread_mutex_unlock(&buffer->lock);
        pthread_join(buffer->worker, NULL);
    }
    epi_team_destroy(buffer->team);
    if (buffer->backend) {
        buffer->backend->destroy(buffer);
        atomic_fetch_sub(&buffer->group->num_objects, 1);
    }
    if (buffer->window) {
        epi_ll_destroy(buffer);
        epi_pool_destroy(&buffer->pool);
        epi_pool_destroy(&buffer->sparse_pool);
        buffer->window->transport->ops->window_destroy(buffer->window);
        atomic_fetch_sub(&buffer->group->num_objects, 1);
    }
    pthread_mutex_destroy(&buffer->pool_lock);
    pthread_mutex_destroy(&buffer->lock);
    pthread_cond_destroy(&buffer->work);
    pthread_cond_destroy(&buffer->done);
    free((void *)buffer->wait_ns);
    free(buffer);
}

static ep_status open_window(ep_buffer *buffer)
{
    ep_group *group = buffer->group;
    const ep_buffer_config *config = &buffer->config;
    size_t control = epi_control_area_bytes(group->num_ranks, config->max_experts);
    EPI_TRY(epi_buffer_check_window(config, control));
    /* The same again of address space for what is used sparsely. */
    size_t first = control + config->window_bytes, limit = config->window_max_bytes;
    EPI_TRY(
        group->transport->ops->window_create(group->transport, 2 * limit, first, &buffer->window));
    atomic_fetch_add(&group->num_objects, 1);
    buffer->mailbox_bytes = mailbox_bytes(group->num_ranks, config->max_experts);
    buffer->mailbox_offset = align64(epi_control_bytes(group->num_ranks));
    epi_pool_init(&buffer->pool, buffer->window, control, limit, false);
    epi_pool_init(&buffer->sparse_pool, buffer->window, limit, 2 * limit, true);
    return EP_OK;
}

static ep_status check_index(const ep_buffer_config *config)
{
    int32_t count = 0;
    EPI_TRY(ep_device_count(config->device, &count));
    if (count > 0 && config->device_index >= count)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_create: device_index is %d; it must be 0..%d",
                        (int)config->device_index, (int)count - 1);
    return EP_OK;
}

/* On an accelerator its backend has the window and the calls. Every rank must find one before any
   begins what all take part in. */
static ep_status open_device(ep_buffer *buffer)
{
    const epi_backend_ops *backend = NULL;
    uint64_t epoch = 0;
    ep_status status = epi_backend_find(buffer->config.device, &backend);
    if (status == EP_OK)
        status = check_index(&buffer->config);
    EPI_TRY(agree(buffer->group, &buffer->config, status, &epoch));
    EPI_TRY(backend->create(buffer));
    buffer->backend = backend;
    atomic_fetch_add(&buffer->group->num_objects, 1);
    return EP_OK;
}

static ep_buffer *new_buffer(ep_group *group, const ep_buffer_config *config)
{
    ep_buffer *buffer = calloc(1, sizeof *buffer);
    if (!buffer)
        return NULL;
    buffer->group = group;
    buffer->config = *config;
    buffer->rank = group->rank;
    buffer->num_ranks = group->num_ranks;
    buffer->wait_ns = calloc((size_t)group->num_ranks, sizeof *buffer->wait_ns);
    if (!buffer->wait_ns) {
        free(buffer);
        return NULL;
    }
    pthread_mutex_init(&buffer->lock, NULL);
    pthread_mutex_init(&buffer->pool_lock, NULL);
    pthread_cond_init(&buffer->work, NULL);
    pthread_cond_init(&buffer->done, NULL);
    return buffer;
}

/* Groups know their buffers, in the order they were made. */
static void enlist(ep_buffer *buffer)
{
    ep_buffer **link = &buffer->group->buffers;
    while (*link)
        link = &(*link)->next_of_group;
    *link = buffer;
}

static void delist(ep_buffer *buffer)
{
    ep_buffer **link = &buffer->group->buffers;
    while (*link && *link != buffer)
        link = &(*link)->next_of_group;
    if (*link)
        *link = buffer->next_of_group;
}

ep_status ep_buffer_create(ep_group *group, const ep_buffer_config *given, ep_buffer **out)
{
    if (!out)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_create: buffer is NULL");
    *out = NULL;
    if (!group)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_create: group is NULL");
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    ep_status status = EP_OK;
    if (given)
        status = epi_args_copy("ep_buffer_create", "config", &config, sizeof config, given);
    if (config.max_experts == 0)
        config.max_experts = DEFAULT_MAX_EXPERTS;
    if (config.window_max_bytes == 0)
        config.window_max_bytes = DEFAULT_WINDOW_MAX;
    if (status == EP_OK)
        status = check_config(&config);
    uint64_t epoch = 0;
    EPI_TRY(agree(group, &config, status, &epoch));
    ep_buffer *buffer = new_buffer(group, &config);
    status = buffer ? EP_OK : epi_fail(EP_ERR_MEMORY, "ep_buffer_create: out of memory");
    status = agree(group, &config, status, &epoch);
    if (status != EP_OK) {
        if (buffer)
            destroy(buffer);
        return status;
    }
    status = config.device == EP_DEVICE_CPU ? open_window(buffer) : open_device(buffer);
    if (status == EP_OK && config.device == EP_DEVICE_CPU)
        status = start_threads(buffer);
    status = agree(group, &config, status, &epoch);
    if (status != EP_OK) {
        destroy(buffer);
        return status;
    }
    enlist(buffer);
    if (epoch > 0 && !buffer->backend) /* the others have had this buffer for some time */
        epi_buffer_align(buffer, epoch + 2);
    *out = buffer;
    return EP_OK;
}

/* The last call that `rank` may have spoken of in this rank's window. */
static uint64_t last_said(const ep_buffer *buffer, int rank)
{
    uint64_t last = 0;
    for (int slot = 0; slot < EPI_NUM_SLOTS; slot++) {
        uint64_t said = epi_slot_load(buffer->window, rank, slot);
        last = said > last ? said : last;
    }
    return last;
}

ep_status epi_buffer_admit(ep_buffer *buffer, int rank)
{
    ep_group *group = buffer->group;
    const epi_transport_ops *ops = group->transport->ops;
    uint64_t said = last_said(buffer, rank), epoch = buffer->epoch > said ? buffer->epoch : said;
    /* Round for round as in ep_buffer_create. */
    EPI_TRY(agree(group, &buffer->config, EP_OK, &epoch));
    EPI_TRY(agree(group, &buffer->config, EP_OK, &epoch));
    ep_status status = ops->window_admit(buffer->window, rank, group->bootstrap);
    EPI_TRY(agree(group, &buffer->config, status, &epoch));
    epi_buffer_align(buffer, epoch + 2);
    buffer->first_valid = epoch + 2;
    return EP_OK;
}

void epi_buffer_align(ep_buffer *buffer, uint64_t epoch)
{
    epi_ll_drop(buffer);
    epi_op_align(buffer, epoch);
}

ep_status epi_buffer_check_handle(const char *call, const ep_buffer *buffer, uint64_t id)
{
    if (id >= buffer->first_valid)
        return EP_OK;
    return epi_fail(EP_ERR_STATE,
                    "%s: handle is of call %llu, before a rank was taken in again by call %llu",
                    call, (unsigned long long)id, (unsigned long long)buffer->first_valid);
}

void ep_buffer_destroy(ep_buffer *buffer)
{
    if (!buffer)
        return;
    epi_op_drain(buffer);
    delist(buffer);
    destroy(buffer);
}

ep_group *ep_buffer_group(const ep_buffer *buffer)
{
    return buffer ? buffer->group : NULL;
}

ep_status epi_buffer_take(ep_buffer *buffer, size_t bytes, size_t *offset)
{
    pthread_mutex_lock(&buffer->pool_lock);
    ep_status status = epi_pool_take(&buffer->pool, bytes, offset);
    pthread_mutex_unlock(&buffer->pool_lock);
    return status;
}

void epi_buffer_give(ep_buffer *buffer, size_t offset)
{
    pthread_mutex_lock(&buffer->pool_lock);
    epi_pool_give(&buffer->pool, offset);
    pthread_mutex_unlock(&buffer->pool_lock);
}

ep_status ep_buffer_alloc(ep_buffer *buffer, size_t bytes, void **memory)
{
    if (!memory)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_alloc: memory is NULL");
    *memory = NULL;
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_alloc: buffer is NULL");
    if (buffer->backend)
        return buffer->backend->alloc(buffer, bytes, memory);
    size_t offset;
    EPI_TRY(epi_buffer_take(buffer, bytes, &offset));
    *memory = buffer->window->base + offset;
    return EP_OK;
}

ep_status ep_buffer_free(ep_buffer *buffer, void *memory)
{
    if (!memory)
        return EP_OK;
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_free: buffer is NULL");
    if (buffer->backend)
        return buffer->backend->free(buffer, memory);
    size_t offset;
    bool given = false;
    if (epi_buffer_contains(buffer, memory, 1, &offset)) {
        pthread_mutex_lock(&buffer->pool_lock);
        given = epi_pool_give(&buffer->pool, offset);
        pthread_mutex_unlock(&buffer->pool_lock);
    }
    if (!given)
        return epi_fail(EP_ERR_ARGUMENT,
                        "ep_buffer_free: memory is %p; it must come from ep_buffer_alloc", memory);
    return EP_OK;
}

ep_status ep_buffer_query(const ep_buffer *buffer, ep_buffer_info *info)
{
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "ep_buffer_query: buffer is NULL");
    ep_buffer_info full = {.size = sizeof full};
    if (buffer->backend) {
        buffer->backend->query(buffer, &full);
        return epi_result_copy("ep_buffer_query", "info", info, &full, sizeof full);
    }
    ep_buffer *self = (ep_buffer *)buffer;
    full.control_bytes = buffer->pool.start;
    pthread_mutex_lock(&self->pool_lock);
    full.window_bytes = buffer->window->committed + buffer->sparse_bytes;
    full.used_bytes = buffer->pool.used;
    full.peak_bytes = buffer->pool.peak + buffer->pool.start;
    pthread_mutex_unlock(&self->pool_lock);
    pthread_mutex_lock(&self->lock);
    full.num_calls = buffer->epoch;
    pthread_mutex_unlock(&self->lock);
    return epi_result_copy("ep_buffer_query", "info", info, &full, sizeof full);
}

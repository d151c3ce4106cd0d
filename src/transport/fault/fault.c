/* SPDX-License-Identifier: MIT */
#include "transport/fault/fault.h"

#include "base/clock.h"
#include "base/error.h"
#include "transport/fault/options.h"
#include "transport/fault/pump.h"

#include <pthread.h>
#include <stdlib.h>

typedef struct fault_transport {
    epi_transport base;
    epi_bootstrap *bootstrap;
    epi_transport *inner;
    epi_fault_options options;
    epi_pump *pump;        /* NULL where nothing is ever late */
    pthread_mutex_t mutex; /* guards what follows: a rank may notify from several threads */
    uint64_t random;
    int64_t num_notified;
    int64_t last_due_ns;
} fault_transport;

typedef struct fault_window {
    epi_window base; /* a copy of the inner one's, but for the transport */
    epi_window *inner;
} fault_window;

/* What is decided about one notification. */
typedef struct decision {
    bool kill;
    bool stall;
    int64_t due_ns;    /* 0: at once */
    int64_t repeat_ns; /* 0: never */
} decision;

static fault_transport *self(epi_transport *transport)
{
    return (fault_transport *)transport;
}

static epi_window *inner_window(epi_window *window)
{
    return ((fault_window *)window)->inner;
}

/* splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014). */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* 0..most. The two draws a notification takes are taken whatever the options, so that with the same
   seed adding one option leaves what the others decide. */
static int64_t draw(uint64_t *state, int64_t most)
{
    return (int64_t)(next_random(state) % ((uint64_t)most + 1));
}

static decision decide(fault_transport *fault)
{
    const epi_fault_options *options = &fault->options;
    decision made = {0};
    pthread_mutex_lock(&fault->mutex);
    fault->num_notified++;
    made.kill = options->kill_rank == fault->base.rank && options->kill_at == fault->num_notified;
    made.stall =
        options->stall_rank == fault->base.rank && options->stall_at == fault->num_notified;
    int64_t delay_ns = draw(&fault->random, options->delay_us * EPI_NS_PER_US);
    bool repeat = draw(&fault->random, 99) < options->repeat;
    int64_t now = epi_clock_ns();
    if (options->delay_us > 0) {
        made.due_ns = now + delay_ns;
        if (!options->reorder && made.due_ns < fault->last_due_ns)
            made.due_ns = fault->last_due_ns;
        fault->last_due_ns = made.due_ns;
    }
    if (repeat)
        made.repeat_ns = (made.due_ns != 0 ? made.due_ns : now) + delay_ns + EPI_NS_PER_MS;
    pthread_mutex_unlock(&fault->mutex);
    return made;
}

static void post(fault_transport *fault, epi_window *inner, int dst, int slot, uint64_t value,
                 int64_t due_ns)
{
    epi_parcel parcel = {inner, dst, slot, value, due_ns, 0};
    if (due_ns == 0 || !epi_pump_add(fault->pump, &parcel))
        fault->inner->ops->notify(inner, dst, slot, value);
}

static void fault_notify(epi_window *window, int dst, int slot, uint64_t value)
{
    fault_transport *fault = self(window->transport);
    decision made = decide(fault);
    if (made.kill)
        fault->inner->ops->kill_self(fault->inner);
    if (made.stall) {
        struct timespec pause = epi_timespec(fault->options.stall_ms * EPI_NS_PER_MS);
        nanosleep(&pause, NULL);
    }
    post(fault, inner_window(window), dst, slot, value, made.due_ns);
    if (made.repeat_ns != 0)
        post(fault, inner_window(window), dst, slot, value, made.repeat_ns);
}

static void fault_window_destroy(epi_window *window)
{
    if (window == NULL)
        return;
    fault_transport *fault = self(window->transport);
    /* Sent is sent: a rank that goes away early takes back nothing. */
    if (fault->pump != NULL)
        epi_pump_flush(fault->pump, inner_window(window));
    fault->inner->ops->window_destroy(inner_window(window));
    free(window);
}

static ep_status fault_window_create(epi_transport *transport, size_t reserve, size_t committed,
                                     epi_window **created)
{
    fault_transport *fault = self(transport);
    epi_window *inner = NULL;
    EPI_TRY(fault->inner->ops->window_create(fault->inner, reserve, committed, &inner));
    fault_window *window = calloc(1, sizeof *window);
    ep_status status =
        epi_agree(fault->bootstrap,
                  window != NULL ? EP_OK : epi_fail(EP_ERR_MEMORY, "no memory for a window"));
    if (status != EP_OK) {
        fault->inner->ops->window_destroy(inner);
        free(window);
        return status;
    }
    window->base = *inner;
    window->base.transport = transport;
    window->inner = inner;
    *created = &window->base;
    return EP_OK;
}

static ep_status fault_window_commit(epi_window *window, size_t bytes)
{
    epi_transport *inner = self(window->transport)->inner;
    ep_status status = inner->ops->window_commit(inner_window(window), bytes);
    window->committed = inner_window(window)->committed;
    return status;
}

static ep_status fault_window_back(epi_window *window, size_t from, size_t to)
{
    return self(window->transport)->inner->ops->window_back(inner_window(window), from, to);
}

static void fault_window_drop(epi_window *window, size_t from, size_t to)
{
    self(window->transport)->inner->ops->window_drop(inner_window(window), from, to);
}

static uint32_t fault_sleep_begin(epi_window *window)
{
    return self(window->transport)->inner->ops->sleep_begin(inner_window(window));
}

static void fault_sleep(epi_window *window, uint32_t ticket, int64_t timeout_ns)
{
    self(window->transport)->inner->ops->sleep(inner_window(window), ticket, timeout_ns);
}

static void fault_sleep_cancel(epi_window *window)
{
    self(window->transport)->inner->ops->sleep_cancel(inner_window(window));
}

static bool fault_peer_alive(epi_transport *transport, int rank)
{
    epi_transport *inner = self(transport)->inner;
    return inner->ops->peer_alive(inner, rank);
}

static void fault_kill_self(epi_transport *transport)
{
    epi_transport *inner = self(transport)->inner;
    inner->ops->kill_self(inner);
}

static bool fault_can_peer_read(epi_transport *transport)
{
    epi_transport *inner = self(transport)->inner;
    return inner->ops->can_peer_read(inner);
}

static ep_status fault_peer_read(epi_transport *transport, int rank, const epi_remote_read *reads,
                                 size_t count)
{
    epi_transport *inner = self(transport)->inner;
    return inner->ops->peer_read(inner, rank, reads, count);
}

static int64_t fault_now_ns(epi_transport *transport)
{
    epi_transport *inner = self(transport)->inner;
    return inner->ops->now_ns(inner);
}

static int fault_ranks_per_core(epi_transport *transport)
{
    epi_transport *inner = self(transport)->inner;
    return inner->ops->ranks_per_core(inner);
}

static void fault_destroy(epi_transport *transport)
{
    fault_transport *fault = self(transport);
    epi_pump_destroy(fault->pump);
    fault->inner->ops->destroy(fault->inner);
    pthread_mutex_destroy(&fault->mutex);
    free(fault);
}

static const epi_transport_ops fault_ops = {
    .name = "fault",
    .destroy = fault_destroy,
    .window_create = fault_window_create,
    .window_destroy = fault_window_destroy,
    .window_commit = fault_window_commit,
    .window_back = fault_window_back,
    .window_drop = fault_window_drop,
    .notify = fault_notify,
    .sleep_begin = fault_sleep_begin,
    .sleep = fault_sleep,
    .sleep_cancel = fault_sleep_cancel,
    .peer_alive = fault_peer_alive,
    .kill_self = fault_kill_self,
    .can_peer_read = fault_can_peer_read,
    .peer_read = fault_peer_read,
    .now_ns = fault_now_ns,
    .ranks_per_core = fault_ranks_per_core,
};

static ep_status fault_prepare(epi_transport *inner, const char *options, fault_transport **opened)
{
    epi_fault_options parsed;
    EPI_TRY(epi_fault_options_parse(options, inner->num_ranks, &parsed));
    fault_transport *fault = calloc(1, sizeof *fault);
    if (fault == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for the fault transport");
    fault->base = (epi_transport){&fault_ops, inner->rank, inner->num_ranks};
    fault->inner = inner;
    fault->options = parsed;
    fault->random = (uint64_t)parsed.seed + (uint64_t)inner->rank * UINT64_C(0xd1342543de82ef95);
    pthread_mutex_init(&fault->mutex, NULL); /* never fails on Linux */
    ep_status status = EP_OK;
    if (parsed.delay_us > 0 || parsed.repeat > 0)
        status = epi_pump_create(&fault->pump);
    if (status == EP_OK) {
        *opened = fault;
        return EP_OK;
    }
    pthread_mutex_destroy(&fault->mutex);
    free(fault);
    return status;
}

ep_status epi_fault_open(epi_bootstrap *bootstrap, epi_transport *inner, const char *options,
                         epi_transport **transport)
{
    fault_transport *fault = NULL;
    ep_status status = epi_agree(bootstrap, fault_prepare(inner, options, &fault));
    if (status == EP_OK) {
        fault->bootstrap = bootstrap;
        *transport = &fault->base;
    } else if (fault != NULL) {
        fault_destroy(&fault->base);
    } else {
        inner->ops->destroy(inner);
    }
    return status;
}

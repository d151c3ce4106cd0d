/* SPDX-License-Identifier: MIT */
#include "transport/fault/fault.h"

#include "base/clock.h"
#include "base/error.h"
#include "transport/fault/decide.h"
#include "transport/fault/pump.h"

#include <pthread.h>
#include <stdlib.h>

typedef struct fault_transport {
    epi_transport base;
    epi_bootstrap *bootstrap;
    epi_transport *inner;
    epi_pump *pump;        /* NULL where nothing is ever late */
    pthread_mutex_t mutex; /* guards what follows: a rank may notify from several threads */
    epi_fault_decider decider;
    int64_t last_due_ns;
} fault_transport;

typedef struct fault_window {
    epi_window base; /* a copy of the inner one's, but for the transport */
    epi_window *inner;
} fault_window;

static fault_transport *self(epi_transport *transport)
{
    return (fault_transport *)transport;
}

static epi_window *inner_window(epi_window *window)
{
    return ((fault_window *)window)->inner;
}

/* When a notification goes out, 0 for at once. Without reordering none overtakes an earlier one. */
static int64_t schedule(fault_transport *fault, int64_t now, int64_t delay_ns)
{
    if (fault->decider.options.delay_us == 0)
        return 0;
    int64_t due = now + delay_ns;
    if (!fault->decider.options.reorder && due < fault->last_due_ns)
        due = fault->last_due_ns;
    fault->last_due_ns = due;
    return due;
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
    pthread_mutex_lock(&fault->mutex);
    epi_fault_decision made = epi_fault_decide(&fault->decider);
    int64_t now = epi_clock_ns();
    int64_t due = schedule(fault, now, made.delay_ns);
    pthread_mutex_unlock(&fault->mutex);
    if (made.kill)
        fault->inner->ops->kill_self(fault->inner);
    if (made.stall_ns > 0) {
        struct timespec pause = epi_timespec(made.stall_ns);
        nanosleep(&pause, NULL);
    }
    post(fault, inner_window(window), dst, slot, value, due);
    if (made.repeat) /* later than the first, whatever its delay */
        post(fault, inner_window(window), dst, slot, value,
             (due != 0 ? due : now) + made.delay_ns + EPI_NS_PER_MS);
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

/* Round for round what epi_fault_open and fault_window_create do on the rank that comes back. */
static ep_status fault_admit(epi_transport *transport, int rank, epi_bootstrap *bootstrap)
{
    epi_transport *inner = self(transport)->inner;
    EPI_TRY(inner->ops->admit(inner, rank, bootstrap));
    return epi_agree(bootstrap, EP_OK);
}

static ep_status fault_window_admit(epi_window *window, int rank, epi_bootstrap *bootstrap)
{
    epi_transport *inner = self(window->transport)->inner;
    EPI_TRY(inner->ops->window_admit(inner_window(window), rank, bootstrap));
    return epi_agree(bootstrap, EP_OK);
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
    .admit = fault_admit,
    .window_admit = fault_window_admit,
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
    fault->decider = epi_fault_decider_start(&parsed, inner->rank);
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

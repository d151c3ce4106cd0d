/* SPDX-License-Identifier: MIT */
#include "transport/fault/pump.h"

#include "base/clock.h"
#include "base/error.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

struct epi_pump {
    pthread_mutex_t mutex;
    pthread_cond_t changed; /* a parcel came, one was delivered, or it is time to stop */
    pthread_t thread;
    bool stop;
    uint64_t next_order;
    const epi_window *delivering; /* by the thread right now, without the mutex */
    epi_parcel *parcels;          /* not sorted: tests have few on their way */
    size_t count;
    size_t capacity;
};

static void deliver(const epi_parcel *parcel)
{
    epi_transport *transport = parcel->window->transport;
    transport->ops->notify(parcel->window, parcel->dst, parcel->slot, parcel->value);
}

static bool is_before(const epi_parcel *a, const epi_parcel *b)
{
    return a->due_ns != b->due_ns ? a->due_ns < b->due_ns : a->order < b->order;
}

/* The first parcel of `window`, or of any for NULL; `count` when there is none. */
static size_t find_first(const epi_pump *pump, const epi_window *window)
{
    size_t first = pump->count;
    for (size_t i = 0; i < pump->count; i++)
        if ((window == NULL || pump->parcels[i].window == window) &&
            (first == pump->count || is_before(&pump->parcels[i], &pump->parcels[first])))
            first = i;
    return first;
}

static epi_parcel take(epi_pump *pump, size_t index)
{
    epi_parcel parcel = pump->parcels[index];
    pump->parcels[index] = pump->parcels[--pump->count];
    return parcel;
}

/* With the mutex held, which it gives up while it delivers. */
static void deliver_first(epi_pump *pump, size_t first)
{
    epi_parcel parcel = take(pump, first);
    pump->delivering = parcel.window;
    pthread_mutex_unlock(&pump->mutex);
    deliver(&parcel);
    pthread_mutex_lock(&pump->mutex);
    pump->delivering = NULL;
    pthread_cond_broadcast(&pump->changed);
}

static void *run(void *arg)
{
    epi_pump *pump = arg;
    pthread_mutex_lock(&pump->mutex);
    while (!pump->stop) {
        size_t first = find_first(pump, NULL);
        if (first == pump->count) {
            pthread_cond_wait(&pump->changed, &pump->mutex);
        } else if (pump->parcels[first].due_ns > epi_clock_ns()) {
            struct timespec due = epi_timespec(pump->parcels[first].due_ns);
            pthread_cond_timedwait(&pump->changed, &pump->mutex, &due);
        } else {
            deliver_first(pump, first);
        }
    }
    pthread_mutex_unlock(&pump->mutex);
    return NULL;
}

static bool init_sync(epi_pump *pump)
{
    pthread_condattr_t attributes;
    if (pthread_mutex_init(&pump->mutex, NULL) != 0)
        return false;
    if (pthread_condattr_init(&attributes) == 0) {
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        bool made = pthread_cond_init(&pump->changed, &attributes) == 0;
        pthread_condattr_destroy(&attributes);
        if (made)
            return true;
    }
    pthread_mutex_destroy(&pump->mutex);
    return false;
}

/* Signals of the program are for its own threads. */
static bool start_thread(epi_pump *pump)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    bool started = pthread_create(&pump->thread, NULL, run, pump) == 0;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return started;
}

ep_status epi_pump_create(epi_pump **created)
{
    epi_pump *pump = calloc(1, sizeof *pump);
    if (pump == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for the fault transport");
    if (!init_sync(pump)) {
        free(pump);
        return epi_fail(EP_ERR_SYSTEM, "no mutex or condition variable for the fault transport");
    }
    if (!start_thread(pump)) {
        pthread_cond_destroy(&pump->changed);
        pthread_mutex_destroy(&pump->mutex);
        free(pump);
        return epi_fail(EP_ERR_SYSTEM, "no thread for the fault transport");
    }
    *created = pump;
    return EP_OK;
}

void epi_pump_destroy(epi_pump *pump)
{
    if (pump == NULL)
        return;
    pthread_mutex_lock(&pump->mutex);
    pump->stop = true;
    pthread_cond_broadcast(&pump->changed);
    pthread_mutex_unlock(&pump->mutex);
    pthread_join(pump->thread, NULL);
    pthread_cond_destroy(&pump->changed);
    pthread_mutex_destroy(&pump->mutex);
    free(pump->parcels);
    free(pump);
}

static bool grow(epi_pump *pump)
{
    size_t capacity = pump->capacity > 0 ? 2 * pump->capacity : 64;
    epi_parcel *parcels = realloc(pump->parcels, capacity * sizeof *parcels);
    if (parcels == NULL)
        return false;
    pump->parcels = parcels;
    pump->capacity = capacity;
    return true;
}

bool epi_pump_add(epi_pump *pump, const epi_parcel *parcel)
{
    pthread_mutex_lock(&pump->mutex);
    bool fits = pump->count < pump->capacity || grow(pump);
    if (fits) {
        pump->parcels[pump->count] = *parcel;
        pump->parcels[pump->count++].order = pump->next_order++;
        pthread_cond_broadcast(&pump->changed);
    }
    pthread_mutex_unlock(&pump->mutex);
    return fits;
}

void epi_pump_flush(epi_pump *pump, const epi_window *window)
{
    pthread_mutex_lock(&pump->mutex);
    for (;;) {
        size_t first = find_first(pump, window);
        if (pump->delivering == window)
            pthread_cond_wait(&pump->changed, &pump->mutex);
        else if (first == pump->count)
            break;
        else {
            epi_parcel parcel = take(pump, first);
            deliver(&parcel);
        }
    }
    pthread_mutex_unlock(&pump->mutex);
}

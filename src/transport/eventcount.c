/* SPDX-License-Identifier: MIT */
#include "transport/eventcount.h"

#include "base/clock.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The test puts pauses here, to see every interleaving. */
#ifndef EPI_INTERLEAVE
#define EPI_INTERLEAVE() ((void)0)
#endif

static void full_fence(void)
{
#if !defined(__SANITIZE_THREAD__) /* which knows no fences, and orders by the words' own atomics \
                                   */
    atomic_thread_fence(memory_order_seq_cst);
#endif
}

static int futex_op(int op, epi_futex_scope scope)
{
    return scope == EPI_FUTEX_PRIVATE ? op | FUTEX_PRIVATE_FLAG : op;
}

static void wake_all(epi_control *control, epi_futex_scope scope)
{
    /* Only the first notifier after a sleeper came pays for the system call. */
    if (atomic_exchange_explicit(&control->sleeping, 0, memory_order_acq_rel) == 0)
        return;
    EPI_INTERLEAVE();
    /* Moved after the flag was cleared: a waiter takes its ticket before it sets the flag, so one
       whose flag was cleared here holds a stale ticket and cannot sleep through. release: pairs
       with sleep_begin's acquire, whose next look then sees the raised word. */
    atomic_fetch_add_explicit(&control->doorbell, 1, memory_order_release);
    EPI_INTERLEAVE();
    syscall(SYS_futex, &control->doorbell, futex_op(FUTEX_WAKE, scope), INT_MAX, NULL, NULL, 0);
}

void epi_control_raise(epi_control *control, int source, int slot, uint64_t value,
                       epi_futex_scope scope)
{
    if (!epi_word_raise(control, source, slot, value))
        return;
    full_fence(); /* pairs with that of sleep_begin */
    if (atomic_load_explicit(&control->sleeping, memory_order_relaxed) != 0) {
        EPI_INTERLEAVE();
        wake_all(control, scope);
    }
}

uint32_t epi_control_sleep_begin(epi_control *control)
{
    uint32_t ticket = atomic_load_explicit(&control->doorbell, memory_order_acquire);
    EPI_INTERLEAVE();
    atomic_store_explicit(&control->sleeping, 1, memory_order_relaxed);
    full_fence(); /* pairs with that of raise */
    return ticket;
}

void epi_control_sleep(epi_control *control, uint32_t ticket, int64_t timeout_ns,
                       epi_futex_scope scope)
{
    struct timespec timeout = epi_timespec(timeout_ns > 0 ? timeout_ns : 0);
    syscall(SYS_futex, &control->doorbell, futex_op(FUTEX_WAIT, scope), ticket, &timeout, NULL, 0);
}

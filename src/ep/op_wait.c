/* SPDX-License-Identifier: MIT */
#include "ep/op_wait.h"

#include "base/error.h"
#include "ep/buffer.h"
#include "ep/call.h"

#include <string.h>

void epi_op_await(epi_op *op, int slot, uint64_t value, const bool *from)
{
    static const char *const phases[EPI_NUM_SLOTS] = {
        [EPI_SLOT_ENTER] = "wait for mail",   [EPI_SLOT_ROOM] = "wait for room",
        [EPI_SLOT_LEAVE] = "wait for rows",   [EPI_SLOT_LL_SENT] = "wait for tokens",
        [EPI_SLOT_LL_Y] = "wait for outputs", [EPI_SLOT_DONE] = "wait for readers",
    };
    op->wait = (epi_wait_for){
        .active = true, .slot = slot, .value = value, .from = from, .phase = phases[slot]};
}

void epi_op_await_entered(epi_op *op, uint64_t epoch)
{
    op->wait =
        (epi_wait_for){.active = true, .entered = true, .value = epoch, .phase = "wait for entry"};
}

/* Whether the end of this rank's own call `epoch` lies in a hook that nobody else will run. */
static bool own_hook_pending(const epi_op *op, uint64_t epoch)
{
    ep_buffer *buffer = op->buffer;
    bool elsewhere = buffer->has_worker && op->event && !op->eager; /* the worker can wait for it */
    pthread_mutex_lock(&buffer->lock);
    bool pending = buffer->oldest && buffer->oldest->epoch <= epoch;
    pthread_mutex_unlock(&buffer->lock);
    return pending && !elsewhere;
}

ep_status epi_op_await_done(epi_op *op, uint64_t epoch)
{
    if (!epoch)
        return EP_OK;
    if (own_hook_pending(op, epoch))
        return epi_fail(EP_ERR_STATE,
                        "%s: call %llu or an earlier one, whose memory is needed, has not been "
                        "completed: ep_event_wait on its event first",
                        op->name, (unsigned long long)epoch);
    epi_op_await(op, EPI_SLOT_DONE, epoch, NULL);
    return EP_OK;
}

/* ------------------------------------------------------------- giving up */

bool epi_op_is_in_run(const ep_buffer *buffer, int source, uint64_t epoch)
{
    const epi_aborts *aborts = epi_buffer_aborts(buffer, buffer->rank, source);
    uint64_t last = atomic_load(&aborts->last), first = atomic_load(&aborts->first);
    return atomic_load(&aborts->last) >= last && first <= epoch && epoch <= last;
}

bool epi_op_gave_up(const ep_buffer *buffer, int source, uint64_t epoch)
{
    /* The word alone may already speak of a later call. */
    if (epi_slot_load(buffer->window, source, EPI_SLOT_ABORT) < epoch)
        return false;
    return epi_op_is_in_run(buffer, source, epoch) ||
           epi_buffer_abort(buffer, buffer->rank, source, epoch)->epoch == epoch;
}

ep_status epi_op_aborted(epi_op *op, int source)
{
    op->aborted_by = source;
    const epi_abort *abort = epi_buffer_abort(op->buffer, op->buffer->rank, source, op->epoch);
    if (abort->epoch != op->epoch) /* it had no room to say why, see give_up */
        return epi_fail(EP_ERR_ABORTED, "%s (call %llu): rank %d gave up", op->name,
                        (unsigned long long)op->epoch, source);
    return epi_fail(EP_ERR_ABORTED, "%s (call %llu): rank %d gave up: %.*s", op->name,
                    (unsigned long long)op->epoch, (int)abort->origin, (int)sizeof abort->text - 1,
                    abort->text);
}

ep_status epi_op_check_given_up(epi_op *op)
{
    const ep_buffer *buffer = op->buffer;
#if !defined(__SANITIZE_THREAD__)              /* which knows no fences */
    atomic_thread_fence(memory_order_acquire); /* reads before this came before the look below */
#endif
    for (int r = 0; r < buffer->num_ranks; r++)
        if (!buffer->group->masked[r] && epi_op_gave_up(buffer, r, op->epoch))
            return epi_op_aborted(op, r);
    return EP_OK;
}

/* ------------------------------------------------------------- looking */

int64_t epi_op_now_ns(const epi_op *op)
{
    epi_transport *transport = op->buffer->window->transport;
    return transport->ops->now_ns(transport);
}

void epi_op_trace(const epi_op *op, const char *phase, int64_t begin_ns, int64_t end_ns)
{
    const ep_buffer *buffer = op->buffer;
    if (!buffer->trace)
        return;
    const ep_trace_event event = {.size = sizeof event,
                                  .rank = buffer->rank,
                                  .call = op->epoch,
                                  .name = op->name,
                                  .phase = phase,
                                  .begin_ns = begin_ns,
                                  .end_ns = end_ns};
    buffer->trace(buffer->trace_context, &event);
}

static bool has_arrived(const epi_op *op, int source)
{
    const epi_wait_for *wait = &op->wait;
    if ((wait->from && !wait->from[source]) || op->buffer->group->masked[source])
        return true;
    uint64_t seen = wait->entered ? epi_buffer_progress(op->buffer, source)
                                  : epi_slot_load(op->buffer->window, source, wait->slot);
    return seen >= wait->value;
}

/* Books how long `source` was waited for. */
static void arrived(epi_op *op, int source, int64_t now)
{
    op->seen[source] = true;
    op->wait.missing--;
    if (!op->wait.since_ns)
        return;
    atomic_fetch_add_explicit(&op->buffer->wait_ns[source], now - op->wait.since_ns,
                              memory_order_relaxed);
    if (op->wait.cost)
        op->wait.cost[source] += now - op->wait.since_ns;
}

/* Looks who has come. The clock is read only when somebody was waited for. */
static void look(epi_op *op)
{
    epi_wait_for *wait = &op->wait;
    int64_t now = 0;
    if (!wait->begun) {
        memset(op->seen, 0, (size_t)op->buffer->num_ranks * sizeof *op->seen);
        wait->missing = op->buffer->num_ranks;
    }
    for (int source = 0; source < op->buffer->num_ranks; source++) {
        if (op->seen[source] || !has_arrived(op, source))
            continue;
        if (wait->since_ns && !now)
            now = epi_op_now_ns(op);
        arrived(op, source, now);
    }
    if (!wait->begun && wait->missing)
        wait->since_ns = epi_op_now_ns(op);
    wait->begun = true;
    if (!wait->missing && wait->since_ns) {
        epi_op_trace(op, wait->phase, wait->since_ns, now);
        wait->since_ns = 0; /* said once */
    }
}

/* A low-latency call sends no mail once memory is set up. A peer that mails about this call sets
   memory up, or makes another call altogether: either way ranks differ. */
static const epi_mail *mail_of(const epi_op *op, int source)
{
    if (!op->no_mail || epi_slot_load(op->buffer->window, source, EPI_SLOT_ENTER) < op->epoch)
        return NULL;
    const epi_mail *mail = &epi_call_mail(op, source)->mail;
    return mail->epoch == op->epoch ? mail : NULL;
}

/* The low-latency call that a peer makes instead of this one; NULL: none that shows. A word of such
   a call that says this very epoch was raised by the peer's call of this number. While memory is
   set up LL_SENT shows nothing: the peer's ENTER came before it, but may arrive after it. */
static const char *other_call(const epi_op *op, int source)
{
    const epi_wait_for *wait = &op->wait;
    const epi_window *window = op->buffer->window;
    bool ll_dispatch = op->agreed || wait->slot == EPI_SLOT_LL_SENT;
    if (wait->entered || wait->value != op->epoch)
        return NULL;
    if (wait->slot != EPI_SLOT_LL_Y && epi_slot_load(window, source, EPI_SLOT_LL_Y) == op->epoch)
        return "ep_ll_combine";
    if (!ll_dispatch && epi_slot_load(window, source, EPI_SLOT_LL_SENT) == op->epoch)
        return "ep_ll_dispatch";
    return NULL;
}

/* Whether a rank that is missing will not come. */
static bool is_hopeless(const epi_op *op, int source)
{
    if (op->seen[source] || (!epi_op_gave_up(op->buffer, source, op->epoch) &&
                             !mail_of(op, source) && !other_call(op, source)))
        return false;
    /* Its last notifications may have come between the two looks. */
    return !has_arrived(op, source);
}

static ep_status fail_hopeless(epi_op *op, int source)
{
    const epi_mail *mail = mail_of(op, source);
    const char *other = other_call(op, source);
    if (!other && mail && !op->agreed && mail->agreed[EPI_AGREED_CALL] == EPI_CALL_LL_SETUP)
        other = "ep_ll_dispatch";
    if (other) {
        op->crossed = true;
        return epi_fail(EP_ERR_MISMATCH, "%s (call %llu): rank %d makes %s", op->name,
                        (unsigned long long)op->epoch, source, other);
    }
    if (!mail && epi_slot_load(op->buffer->window, source, EPI_SLOT_ABORT) < op->epoch)
        return EP_IN_PROGRESS; /* it went on to its next call between the two looks */
    if (epi_op_gave_up(op->buffer, source, op->epoch) || !mail)
        return epi_op_aborted(op, source);
    if (mail->agreed[EPI_AGREED_CALL] != EPI_CALL_LL_SETUP)
        return epi_fail(EP_ERR_MISMATCH, "%s (call %llu): rank %d makes a call of the normal mode",
                        op->name, (unsigned long long)op->epoch, source);
    EPI_TRY(epi_call_compare(op->name, op->buffer->rank, op->agreed, source, mail->agreed));
    return epi_fail(
        EP_ERR_MISMATCH,
        "%s (call %llu): rank %d sets low-latency memory up anew, and this one does not: "
        "an earlier call failed there alone",
        op->name, (unsigned long long)op->epoch, source);
}

/* A rank among those missing that is hopeless, or -1. Entering is waited for in spite of a rank
   that gave a call up: it goes on to the next. */
static int find_hopeless(const epi_op *op)
{
    for (int source = 0; !op->wait.entered && source < op->buffer->num_ranks; source++)
        if (is_hopeless(op, source))
            return source;
    return -1;
}

ep_status epi_op_look(epi_op *op)
{
    look(op);
    if (op->wait.missing == 0)
        return EP_OK;
    int hopeless = find_hopeless(op);
    return hopeless < 0 ? EP_IN_PROGRESS : fail_hopeless(op, hopeless);
}

bool epi_op_wait_over(void *context)
{
    epi_op *op = context;
    look(op);
    return op->wait.missing == 0 || find_hopeless(op) >= 0;
}

bool epi_op_is_late(void *context, int source)
{
    return !has_arrived(context, source);
}

/* SPDX-License-Identifier: MIT */
/* Kernels that move nothing: they note what they were told, and report what the test wants. */
#include "state.h"

#include <string.h>

#define NOT_STARTED 700 /* what a refused launch returns */

struct fake_gpu fake_gpu_state;

static struct fake_launch *note(enum fake_kernel kernel, int blocks, void *stream)
{
    struct fake_launch *launch =
        &fake_gpu_state.launch[fake_gpu_state.num_launches++ % FAKE_LAUNCHES];
    memset(launch, 0, sizeof *launch);
    launch->kernel = kernel;
    launch->blocks = blocks;
    launch->stream = stream;
    return launch;
}

static struct fake_outcome next_outcome(void)
{
    static const struct fake_outcome well;
    return fake_gpu_state.num_played < fake_gpu_state.num_scripted
               ? fake_gpu_state.script[fake_gpu_state.num_played++]
               : well;
}

static void tell(uint32_t *word, uint32_t serial)
{
    __atomic_store_n(word, serial, __ATOMIC_RELEASE);
}

/* As the last of a kernel's threads does. A captured call (serial 0) tells of failures alone. */
static void end_call(epc_report *report, uint32_t serial, const struct fake_outcome *outcome)
{
    if (serial == 0 && outcome->fail == EPC_OK)
        return;
    report->fail = outcome->fail;
    report->late = outcome->late;
    memcpy(report->detail, outcome->detail, sizeof report->detail);
    tell(&report->done, serial);
}

/* ---------------------------------------------------------------- normal calls */

size_t epc_dispatch_tables_bytes(int ranks, int columns, int sums)
{
    return 4096 + (size_t)ranks * (size_t)ranks * 4 + (size_t)columns * 8 + (size_t)sums * 4;
}

size_t epc_layout_bytes(int ranks, int experts, int by_expert, int warps)
{
    size_t columns = (size_t)(by_expert ? experts : ranks), shared = (size_t)experts;
    return ((by_expert ? 0 : shared) + (size_t)warps * 2 * columns) * 4;
}

int epc_dispatch_prepare(int max_shared)
{
    (void)max_shared;
    return 0;
}

/* Counts are told as soon as they are known, but where a call has failed before. */
static void tell_counts(const epc_dispatch_params *p, const struct fake_outcome *outcome)
{
    epc_report *report = p->report;
    if (outcome->fail != EPC_OK && !outcome->no_room)
        return;
    int64_t rows = outcome->rows ? outcome->rows : p->num_tokens;
    report->rows = report->num_rows = rows < 0 ? 0 : rows;
    report->fits = !outcome->no_room;
    memcpy(report->detail, outcome->detail, sizeof report->detail);
    tell(&report->counted, p->serial);
}

/* What the verdict of all ranks makes of a dispatch in which nothing else goes wrong. */
static void ask_for_room(const epc_dispatch_params *p, struct fake_outcome *outcome)
{
    if (outcome->fail != EPC_OK || outcome->no_room || !fake_gpu_state.room ||
        fake_gpu_state.room(p, &outcome->rows))
        return;
    outcome->no_room = !p->worst && !p->cached;
    outcome->fail = EPC_FAIL_CAPACITY;
    outcome->detail[3] = outcome->no_room ? 0 : EPC_CANT_WAIT;
}

int epc_dispatch_launch(const epc_dispatch_params *p, int blocks, size_t shared, void *stream)
{
    struct fake_outcome outcome = next_outcome();
    (void)shared;
    note(FAKE_DISPATCH, blocks, stream)->dispatch = *p;
    if (outcome.launch_fails)
        return NOT_STARTED;
    if (outcome.dies)
        return 0;
    ask_for_room(p, &outcome);
    if (outcome.no_room && outcome.fail == EPC_OK)
        outcome.fail = EPC_FAIL_CAPACITY;
    if (p->serial)
        tell_counts(p, &outcome);
    if (!p->verify || outcome.fail != EPC_OK)
        end_call(p->report, p->serial, &outcome);
    return 0;
}

int epc_combine_prepare(int max_shared)
{
    (void)max_shared;
    return 0;
}

int epc_combine_launch(const epc_combine_params *p, int blocks, size_t shared, void *stream)
{
    struct fake_outcome outcome = next_outcome();
    (void)shared;
    note(p->reject ? FAKE_REFUSAL : FAKE_COMBINE, blocks, stream)->combine = *p;
    if (outcome.launch_fails)
        return NOT_STARTED;
    if (!outcome.dies)
        end_call(p->report, p->serial, &outcome);
    return 0;
}

int epc_verify_prepare(void)
{
    return 0;
}

int epc_check_rows_launch(const epc_dispatch_params *p, int blocks, void *stream)
{
    static const struct fake_outcome well;
    note(FAKE_CHECK, blocks, stream)->dispatch = *p;
    if (p->report->done != p->serial) /* the dispatch failed, and has told so */
        end_call(p->report, p->serial, &well);
    return 0;
}

int epc_seal_rows_launch(const epc_seal_params *p, int blocks, void *stream)
{
    note(FAKE_SEAL, blocks, stream)->seal = *p;
    return 0;
}

int epc_layout_prepare(void)
{
    return 0;
}

int epc_layout_launch(const epc_layout_params *p, void *stream)
{
    note(FAKE_LAYOUT, 0, stream)->layout = *p;
    return 0;
}

/* ---------------------------------------------------------------- low latency */

size_t epc_ll_tables_bytes(int ranks, int num_local, int words)
{
    size_t pairs = (size_t)ranks * (size_t)num_local;
    return 4 * (2 * pairs + 1 + (size_t)num_local + pairs * (size_t)words);
}

int epc_ll_prepare(int max_shared)
{
    (void)max_shared;
    return 0;
}

int epc_ll_launch(int which, const epc_ll_params *p, int blocks, size_t shared, void *stream)
{
    struct fake_outcome outcome = next_outcome();
    struct fake_launch *launch = note(FAKE_LL, blocks, stream);
    (void)shared;
    launch->which = which;
    launch->ll = *p;
    if (outcome.launch_fails)
        return NOT_STARTED;
    if (!outcome.dies && which != EPC_LL_SEND && which != EPC_LL_OUTPUTS)
        end_call(p->report, p->serial, &outcome);
    return 0;
}

/* SPDX-License-Identifier: MIT */
/*
 * A CUDA module without CUDA: the host code of src/ep/cuda as it is, over a
 * runtime and kernels that only pretend. Device memory is memory of the process,
 * nothing is asynchronous, kernels move nothing: each notes what it was told and
 * reports what the test has scripted. So tests reach the host's decisions (room,
 * growth, failures, what ranks are told) where there is no device.
 *
 * Each rank is a process, with a fake GPU of its own.
 */
#ifndef EP_TEST_FAKE_GPU_H
#define EP_TEST_FAKE_GPU_H

#include "ep/cuda/kernels.h"

#include <stdbool.h>

#define FAKE_LAUNCHES 64 /* the last so many are remembered */
#define FAKE_OUTCOMES 16

enum fake_kernel {
    FAKE_NONE,
    FAKE_DISPATCH,
    FAKE_COMBINE,
    FAKE_REFUSAL, /* of a normal call */
    FAKE_LL,
    FAKE_CHECK, /* verify mode, behind a dispatch */
    FAKE_SEAL,  /* verify mode, before a combine */
    FAKE_LAYOUT
};

/* What a launch was told. */
struct fake_launch {
    enum fake_kernel kernel;
    int which; /* FAKE_LL: EPC_LL_* */
    int blocks;
    void *stream;
    union {
        epc_dispatch_params dispatch; /* FAKE_CHECK too */
        epc_combine_params combine;   /* FAKE_REFUSAL too */
        epc_ll_params ll;
        epc_seal_params seal;
        epc_layout_params layout;
    };
};

/* How a dispatch, combine, refusal or low-latency kernel ends; all zero: well. */
struct fake_outcome {
    bool launch_fails; /* the runtime refuses to start it */
    bool dies;         /* ends without a report */
    bool no_room;      /* dispatch: the rows of some rank do not fit, ranks are to grow */
    int64_t rows;  /* dispatch: that this rank receives; 0: as many as it sends tokens, -1: none */
    uint32_t fail; /* epc_fail */
    uint32_t detail[6];
    uint64_t late; /* with EPC_FAIL_TIMEOUT: ranks not heard from */
};

struct fake_gpu {
    /* Of the kernels to come, in their order; beyond them all goes well. */
    struct fake_outcome script[FAKE_OUTCOMES];
    int num_scripted, num_played;
    /* Asked by dispatches that go well: sets the rows that this rank receives, returns whether all
       ranks have room. NULL: as scripted. */
    bool (*room)(const epc_dispatch_params *params, int64_t *rows);
    size_t memory_bytes;    /* of the device; 0: 64 GiB */
    int maps_until_failure; /* n: the n-th mapping of a peer's memory from now fails; 0: none */

    struct fake_launch launch[FAKE_LAUNCHES]; /* the n-th at n % FAKE_LAUNCHES */
    int num_launches;
    /* alive now */
    int num_allocations, num_mappings, num_streams, num_events;
    size_t allocated_bytes;
};

/* From now on this process, and those forked later, find the fake in place of the CUDA module, and
   tensors of tests are on its devices (support/tensors.h). Before the first use of CUDA. */
void fake_gpu_use(void);
/* This process's. */
struct fake_gpu *fake_gpu(void);
/* Appends to the script. */
void fake_gpu_script(struct fake_outcome outcome);
/* Whether the whole script has been played; forgets it. */
bool fake_gpu_script_done(void);
/* The n-th last launch of a kernel of this kind, 0 being the last; NULL: there is none. */
const struct fake_launch *fake_gpu_launch(enum fake_kernel kernel, int n);
/* Memory of place `place` of rank `rank` as the kernel of this rank would reach it; NULL: it could
   not. Another rank's must not be touched. */
const uint8_t *fake_gpu_place(const epc_comm *comm, int place, int rank);

#endif

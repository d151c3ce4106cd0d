/* SPDX-License-Identifier: MIT */
/* The host side of the CUDA backend from inside. */
#ifndef EPI_EP_CUDA_INTERNAL_H
#define EPI_EP_CUDA_INTERNAL_H

#include "base/error.h"
#include "device/gpu.h"
#include "ep/backend.h"
#include "ep/cuda/kernels.h"
#include "transport/peer.h"

#define EPC_GRANULE \
    ((size_t)2 << 20) /* allocations of a multiple of this get large pages, shared too */
#define EPC_MAX_FLIGHTS 64
#define EPC_CAPTURED EPC_MAX_FLIGHTS /* the report that all captured calls share */
#define EPC_MAX_EXPORTS (EPC_MAX_PLACES - EPC_MAX_SEGMENTS)

extern epi_backend_services epc_core;

/* ---------------------------------------------------------------- window */

/* A piece of a segment, in use or not; a segment's pieces are a list in order of address. */
typedef struct epc_block {
    uint8_t *memory;
    size_t bytes;
    int segment;
    bool used;
    bool given;       /* back, but in use until the writers have left it */
    uint64_t writers; /* ranks that may still write here, of call `failed` */
    uint32_t failed;
    struct epc_block *next, *before;
} epc_block;

/* One allocation. Those that peers have mapped have the same index as place at every rank. */
typedef struct epc_segment {
    uint8_t *memory;
    size_t bytes;
    epc_block *blocks;
    epi_peer_handle peer[EPC_MAX_RANKS]; /* of each rank's segment of this index */
} epc_segment;

/* ---------------------------------------------------------------- calls */

/* A call that the device may still be doing. */
typedef struct epc_flight {
    struct epc_buffer *owner;
    const char *call;
    uint32_t serial;
    epc_report *report;
    int slot;
    epc_block *blocks[4]; /* memory that nobody else may have before the call is done */
    ep_handle *handle;    /* held as long */
    void *done;           /* the runtime's event behind the call; with a public event */
    void *stream;
    struct epc_dispatch *unresolved; /* rows not known yet */
    struct epc_second *second;       /* low latency: the half that a hook is to launch */
    bool finished, has_event, claimed;
    bool dispatches, by_counts;   /* normal mode: a dispatch, whose rows are known by its counts */
    bool delivers;                /* low latency: a dispatch, whose result ends when it fails */
    bool first_half, second_half; /* of one call of the caller's, told by the second */
    bool followed;                /* a stream waits for it: nobody need wait for its event too */
    bool normal;                  /* mode: success tells that every rank has left earlier calls */
    uint64_t ranks;               /* the others that take part */
    const uint8_t *written;       /* what they write */
    size_t written_bytes;
    ep_status status;
    char message[EPI_ERROR_MAX];
    struct epc_flight *next;
} epc_flight;

/* The receiving half of a low-latency call. */
typedef struct epc_second {
    epc_ll_params params;
    int kernel, blocks;
    size_t shared;
} epc_second;

/* A dispatch that has been launched. */
typedef struct epc_dispatch {
    epc_flight *flight;
    epc_dispatch_params params;
    int blocks;
    size_t shared;
    ep_recv *recv;
    ep_handle *handle; /* held */
    epc_block *region;
    int64_t spare; /* params.spare of the first try */
    bool cached, weighted, has_allocator;
    ep_allocator allocator;
    ep_dtype wire_dtype, topk_dtype;
    ep_scale scale;
    ep_event **event;
} epc_dispatch;

/* What a dispatch left on the device; shared by the handle and results. */
typedef struct epc_handle {
    _Atomic int holders;
    struct epc_buffer *owner;
    uint32_t call;      /* epc_buffer.calls in the dispatch: the same on every rank */
    uint32_t table;     /* identity of the expert table */
    int64_t follower;   /* bytes of the blocks that there was room for behind it; 0: not known */
    epc_block *block;   /* entries and the small arrays below */
    epc_block *sources; /* head of the region: source tokens */
    epc_entry *entries; /* [T, K] */
    int32_t *rows_at, *matrix, *source_offset, *expert_offset, *expert_tokens, *expert_filled;
    float *weights;           /* [T, K], by expert; NULL: not given */
    int32_t *host_tokens;     /* [L] copy of expert_tokens; NULL: not known to the host */
    pthread_mutex_t fetching; /* held while host arrays of the public handle are filled */
    _Atomic bool fetched;     /* they are, for good */
    struct epc_ll_handle *ll; /* of a low-latency dispatch, which has nothing of the above */
} epc_handle;

/* An expert table on the device. */
typedef struct epc_table {
    int64_t count;
    int64_t sum;              /* epi_experts.table_sum */
    int num_local, max_local; /* of this rank, and the most of any */
    int first;                /* of this rank's in `order` */
    int32_t *rank, *local, *order;
    epc_block *block;
    struct epc_table *next;
} epc_table;

typedef struct epc_buffer {
    ep_buffer *buffer;
    int device, rank, num_ranks, max_experts;
    epi_gpu_info gpu;
    int sharing;    /* ranks on this rank's device */
    bool bulk;      /* the bulk copy engine is used */
    bool exporting; /* peers may read the caller's allocations; else rows are always copied */
    epc_segment segments[2 * EPC_MAX_SEGMENTS]; /* shared ones, then those of this rank's own */
    int num_shared, num_own;
    bool holding; /* some block has writers */
    size_t control_bytes, used, peak;
    uint8_t *places[EPC_MAX_PLACES * EPC_MAX_RANKS]; /* what the device's copy holds */
    uint8_t **places_device;
    epc_comm comm;
    uint8_t *reports; /* pinned: EPC_MAX_FLIGHTS, then one for captured calls */
    size_t report_bytes;
    uint64_t free_slots;
    uint32_t calls;    /* of the caller's, whatever became of them: the same on every rank */
    uint32_t serial;   /* of what this rank has begun for them: refusals, halves, second tries */
    void *stream;      /* of our own, for calls that are refused */
    void *last_stream; /* of the last call, and an event behind it */
    void *last_done;
    _Atomic bool has_last; /* queries of handles look at it from other threads */
    epc_flight *flights;
    epc_flight *kept; /* captured: what they use stays as long as the buffer */
    ep_status failed; /* a call without an event failed; reported by the next one */
    char failure[EPI_ERROR_MAX];
    ep_status half_failed; /* the first half of a call did; reported by its second */
    char half_failure[EPI_ERROR_MAX];
    uint64_t lost; /* ranks that a call did not hear from */
    epc_table *tables;
    epc_block *scratch, *old_scratch[32];
    int num_old;
    int64_t flip_at, flip_row; /* verify mode, by EP_CUDA_FAULT: call, 0 none, and row */
    struct epc_exports *exports;
    struct epc_reasons *reasons;
    struct epc_ll *ll;      /* of the last shape of low-latency calls */
    struct epc_ll *ll_kept; /* of earlier ones, for graphs that captured calls */
} epc_buffer;

static inline epc_buffer *epc_of(const ep_buffer *buffer)
{
    return buffer->device;
}

/* window.c */
/* Whether the configuration's sizes can be had. */
ep_status epc_window_check(const epc_buffer *b);
ep_status epc_window_create(epc_buffer *b);
void epc_window_destroy(epc_buffer *b);
/* Memory for this rank's use; grows by an allocation of this rank's own. From the ends of pieces,
   so that what lives long does not divide the room for rows. What calls can't do without (handles,
   tables, scratch) is not refused for window_max_bytes, which on the CPU is no bound to it either.
 */
ep_status epc_take(epc_buffer *b, size_t bytes, epc_block **block);
/* The same for the caller, up to window_max_bytes. */
ep_status epc_take_within(epc_buffer *b, size_t bytes, epc_block **block);
/* Memory that peers reach; NULL when there is no piece so large. */
epc_block *epc_take_shared(epc_buffer *b, size_t bytes);
epc_block *epc_take_largest(epc_buffer *b);
/* Bytes of the n largest free pieces that peers reach, the largest first; 0 where there is none. */
void epc_free_pieces(const epc_buffer *b, int64_t *pieces, int n);
size_t epc_largest_piece(const epc_buffer *b);
/* Cuts a block to `bytes` (from the front), giving the rest back or returning it as a block. */
void epc_trim(epc_buffer *b, epc_block *block, size_t bytes);
epc_block *epc_split(epc_buffer *b, epc_block *block, size_t bytes);
void epc_give(epc_buffer *b, epc_block *block);
/* Under the lock, for hold.c. */
void epc_use(epc_buffer *b, epc_block *block);
void epc_free(epc_buffer *b, epc_block *block);
/* Leaves `bytes` in the block; what is behind becomes a block of its own. NULL: no memory, or
   nothing is behind. */
epc_block *epc_cut(epc_block *block, size_t bytes);
epc_block *epc_find(epc_buffer *b, const void *memory);
/* What the segments have in all; window_max_bytes bounds it. */
size_t epc_window_bytes(const epc_buffer *b);
/* Collective: every rank that needs room for `bytes` in one piece gets a segment more. */
ep_status epc_grow(epc_buffer *b, const char *call, size_t bytes);
/* Place and offset of memory that peers reach; false: they do not. */
bool epc_locate(epc_buffer *b, const void *memory, size_t bytes, int *place, int64_t *offset);
ep_status epc_put_places(epc_buffer *b);

/* hold.c */
/* Peers of `ranks` may still write to the memory for `call`, which has failed: in use or given back
   already, nobody gets it. */
void epc_hold(epc_buffer *b, const uint8_t *memory, size_t bytes, uint32_t call, uint64_t ranks);
/* `ranks` have come to `call`, and so left all before. Whether memory came free. */
bool epc_settle(epc_buffer *b, uint32_t call, uint64_t ranks);

/* exports.c: allocations of the caller's, mapped by peers when they come by */
ep_status epc_exports_create(epc_buffer *b);
void epc_exports_destroy(epc_buffer *b);
/* Maps what peers have offered since. */
void epc_exports_visit(epc_buffer *b);
/* Whether every peer has mapped the allocation, for the call to read there; if not, offers it. */
bool epc_export(const epc_flight *flight, const void *memory, size_t bytes, int *place,
                int64_t *offset);

/* flight.c */
/* Begins a call on `stream`: earlier failures, order behind the last call, a report. */
ep_status epc_begin(epc_buffer *b, const char *call, void *stream, ep_event *previous,
                    epc_flight **flight);
/* The kernel is launched. Hands the flight to *event, or to the buffer. */
ep_status epc_launched(epc_flight *flight, ep_event **event);
/* Nothing was launched. */
void epc_cancel(epc_flight *flight);
/* Looks which calls are done, and frees what they held. */
void epc_collect(epc_buffer *b);
/* Learns the rows of dispatches where they are not known yet; for some windows may grow, together.
 */
void epc_resolve_all(epc_buffer *b);
/* Waits for all that was launched; what a hook has yet to launch never will be. */
ep_status epc_end_all(epc_buffer *b);
/* Waits for the oldest call in flight, which may free memory; false: there is none to wait for, or
   it died. */
bool epc_await_oldest(epc_buffer *b);
/* Window memory for a call that uses `handle` and can't wait for the window to grow: a block of the
   size there was room for, or what is there, or what earlier calls give back. NULL: there is none.
 */
epc_block *epc_take_follower(epc_flight *flight, const epc_handle *handle, size_t bytes);
/* Waits until the call's kernel has counted (true) or ended. */
bool epc_await_counts(epc_flight *flight);
bool epc_counts_are_in(const epc_flight *flight);
ep_status epc_await_end(epc_flight *flight);
bool epc_is_done(const epc_flight *flight);
ep_status epc_outcome(const epc_flight *flight);
/* Waits for a call and gives back what it held; how it went. */
ep_status epc_end_flight(epc_flight *flight);
/* The same for a call without an event, and frees it. */
ep_status epc_end(epc_flight *flight);
/* Ends a call of which something could not be launched, and never will be: it failed with `status`.
 */
void epc_abandon(epc_flight *flight, ep_status status);
void epc_fill_comm(epc_buffer *b, epc_comm *comm);
/* Whether what goes to other ranks leaves this rank's device, and no other rank works there. */
static inline bool epc_over_links(const epc_buffer *b)
{
    return b->sharing == 1 && b->num_ranks > 1;
}
uint32_t epc_mask_word(const epc_buffer *b);
/* The other ranks that are not masked. */
uint64_t epc_other_ranks(const epc_buffer *b);

/* report.c: the error that a call's kernel reported */
ep_status epc_kernel_error(const epc_flight *flight);

/* event.c */
ep_status epc_event_wait(void *event);
ep_status epc_event_wait_counts(void *event);
ep_status epc_event_query(void *event);
ep_status epc_event_stream_wait(void *event, void *stream);
void epc_event_free(void *event);

/* plan.c */
ep_status epc_choose_blocks(const epc_buffer *b, const char *call, int32_t num_sms, int *blocks);
ep_status epc_use_scratch(epc_buffer *b, size_t bytes, uint8_t **memory);
ep_status epc_find_table(epc_buffer *b, const char *call, int64_t num_experts,
                         const int32_t *expert_rank, epc_table **table);

ep_status epc_plan_block(const epc_buffer *b, epc_dispatch *d);
void epc_plan_units(epc_dispatch_params *p, int num_ranks);
ep_status epc_plan_scratch(epc_buffer *b, epc_dispatch *d);

static inline size_t epc_padded(size_t bytes)
{
    return (bytes + EPC_ALIGN - 1) / EPC_ALIGN * EPC_ALIGN;
}

/* reasons.c: why calls are given up */
typedef struct epc_reasons epc_reasons;
ep_status epc_reasons_create(epc_buffer *b);
void epc_reasons_destroy(epc_buffer *b);
/* This rank refuses a call with `status`: the word for kernels, under which peers find the text. */
uint32_t epc_reason_publish(epc_buffer *b, ep_status status, const char *text);
/* The error of a call that was given up, for the reason that word `why` tells. */
ep_status epc_gave_up_error(const epc_flight *flight, uint32_t why);

/* align.c */
ep_status epc_align(epc_buffer *b);

/* backend.c */
/* Begins what tells the others that this rank refuses a call, even after an earlier failure. */
ep_status epc_begin_refusal(epc_buffer *b, epc_flight **flight);
ep_status epc_reject(ep_buffer *buffer, const char *call, ep_status status);

/* tensor.c: a contiguous tensor of up to three dimensions on the buffer's device */
ep_tensor epc_tensor(const epc_buffer *b, void *data, ep_dtype dtype, int ndim, int64_t n0,
                     int64_t n1, int64_t n2);
static inline bool epc_given(const ep_tensor *tensor)
{
    return tensor->ndim != 0 || tensor->data != NULL;
}

/* dispatch_describe.c: fills d->params but for the region and what the launch adds */
void epc_describe_dispatch(epc_dispatch *d, const ep_dispatch_args *args, const epc_table *table);

/* dispatch_result.c */
/* Fills the caller's ep_recv; its rows are known. */
ep_status epc_publish(epc_dispatch *d);
void epc_recv_release(void *owner);

/* dispatch.c */
ep_status epc_resolve(epc_flight *flight);
ep_status epc_dispatch_call(ep_buffer *buffer, const ep_dispatch_args *args, ep_recv *recv,
                            ep_event **event);
ep_status epc_combine_backward_call(ep_buffer *buffer, const ep_combine_backward_args *args,
                                    ep_recv *recv, ep_event **event);

/* handle.c */
ep_status epc_handle_new(epc_buffer *b, const ep_handle *public, bool weights, epc_handle **out);
ep_status epc_handle_fetch(ep_handle *handle);
void epc_handle_free(ep_handle *handle);
void epc_handle_drop(epc_handle *handle);

/* ll_*.c */
ep_status epc_ll_dispatch_call(ep_buffer *buffer, const ep_ll_dispatch_args *args, ep_ll_recv *recv,
                               ep_event **event);
ep_status epc_ll_combine_call(ep_buffer *buffer, const ep_ll_combine_args *args, ep_event **event);
ep_status epc_ll_combine_buffer_call(ep_buffer *buffer, ep_handle *handle, ep_tensor *y);
void epc_ll_recv_retire(void *owner);
void epc_ll_recv_release(void *owner);
void epc_ll_handle_free(ep_handle *handle);
/* The memory of a shape is no longer called for: gives it back, but for what graphs use. */
void epc_ll_drop(epc_buffer *b);
void epc_ll_destroy(epc_buffer *b);
/* Until no peer reads this rank's window any more for a low-latency call; at most the timeout. */
void epc_ll_await_readers(epc_buffer *b);
/* This rank's part of a low-latency call that it refuses, with the last error. */
ep_status epc_ll_refuse(epc_buffer *b, bool combine, ep_status status);
ep_status epc_run_second(epc_flight *flight, void *stream);

/* combine.c */
/* How the ring of a combine is cut, beside `taken` bytes; returns its shared memory. */
size_t epc_plan_ring(const epc_buffer *b, int hidden, ep_dtype dtype, size_t taken, int32_t *bulk,
                     int32_t *pieces, int32_t *piece_bytes, int32_t *slots);
ep_status epc_combine_call(ep_buffer *buffer, const ep_combine_args *args, ep_event **event);
ep_status epc_dispatch_backward_call(ep_buffer *buffer, const ep_dispatch_backward_args *args,
                                     ep_event **event);

/* What a combine kernel reads and writes. */
typedef struct epc_combine_call_args {
    const char *call;
    ep_tensor y, row_weights, topk_weights, bias[2], out, out_weights, dot;
    bool weighted, first_half; /* a second half follows */
    ep_handle *handle;
    ep_event *previous;
    void *stream;
    int32_t num_sms;
} epc_combine_call_args;
ep_status epc_combine_run(ep_buffer *buffer, const epc_combine_call_args *args, ep_event **event);

/* expose.c */
/* Memory as peers reach it, and here. */
typedef struct epc_exposed {
    uint8_t *memory;
    int place;
    int64_t offset;
    size_t stride; /* bytes */
} epc_exposed;
/* At most two tensors of rows, each in place or in a copy, and room for `sums_bytes` of checksums.
 */
ep_status epc_expose(epc_flight *flight, const epc_handle *handle, const ep_tensor *const *tensors,
                     int count, size_t sums_bytes, epc_exposed *out, epc_exposed *sums);

/* settings.c: what the environment asks of a buffer. EP_CUDA_PATH: which kernels; EP_CUDA_EXPORT:
   whether peers may read the caller's allocations; EP_CUDA_FAULT: in verify mode, to flip a bit of
   a row in one call, so that tests see it found. */
ep_status epc_settings_read(epc_buffer *b);

/* verify.c */
/* 1 + the row whose bit is to flip in the call that was begun last, or 0. */
int64_t epc_flip_now(const epc_buffer *b);
/* The error of EPC_FAIL_CORRUPT with these details. */
ep_status epc_corrupt_error(const char *call, const uint32_t *detail);

#endif

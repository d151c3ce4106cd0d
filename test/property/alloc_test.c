/* SPDX-License-Identifier: MIT */
/*
 * Each allocation of the library failing in turn, on one of the ranks: memory,
 * mappings, windows and threads. The call must return an error, nothing may leak,
 * the other ranks must be told, and on one rank the same call works when made again.
 * The library's calls are linked to the functions below, which count and fail them.
 * ctest-wrap: malloc calloc realloc aligned_alloc free mmap munmap memfd_create
 * ctest-wrap: ftruncate fallocate madvise pthread_create
 * ctest-timeout: 300
 */
#include "support/ranks.h"
#include "support/test.h"

#include "entrepot/ep.h"

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---------------------------------------------------- failing on demand */

/* Set while this thread is in a call of the victim's; threads it starts inherit it. */
static _Thread_local bool armed;
static _Atomic int64_t countdown; /* the allocation that brings it to 0 fails */
static bool persistent;           /* and all later ones too */

static bool fails(void)
{
    if (!armed)
        return false;
    int64_t left = atomic_fetch_sub(&countdown, 1);
    return left == 1 || (persistent && left < 1);
}

/* What is alive: addresses of blocks and mappings. */
enum { MOST = 1 << 16 };
struct live {
    uintptr_t at[MOST];
    int count;
};
static struct live blocks, maps;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *alive(struct live *live, void *memory)
{
    pthread_mutex_lock(&lock);
    if (memory && live->count < MOST)
        live->at[live->count++] = (uintptr_t)memory;
    pthread_mutex_unlock(&lock);
    return memory;
}

static void dead(struct live *live, const void *memory, size_t bytes)
{
    uintptr_t start = (uintptr_t)memory;
    pthread_mutex_lock(&lock);
    for (int i = live->count - 1; i >= 0; i--)
        if (live->at[i] >= start && live->at[i] < start + bytes)
            live->at[i] = live->at[--live->count];
    pthread_mutex_unlock(&lock);
}

void *__real_malloc(size_t);
void *__real_calloc(size_t, size_t);
void *__real_realloc(void *, size_t);
void *__real_aligned_alloc(size_t, size_t);
void __real_free(void *);
void *__real_mmap(void *, size_t, int, int, int, off_t);
int __real_munmap(void *, size_t);
int __real_memfd_create(const char *, unsigned);
int __real_ftruncate(int, off_t);
int __real_fallocate(int, int, off_t, off_t);
int __real_madvise(void *, size_t, int);
int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
void *__wrap_malloc(size_t);
void *__wrap_calloc(size_t, size_t);
void *__wrap_realloc(void *, size_t);
void *__wrap_aligned_alloc(size_t, size_t);
void __wrap_free(void *);
void *__wrap_mmap(void *, size_t, int, int, int, off_t);
int __wrap_munmap(void *, size_t);
int __wrap_memfd_create(const char *, unsigned);
int __wrap_ftruncate(int, off_t);
int __wrap_fallocate(int, int, off_t, off_t);
int __wrap_madvise(void *, size_t, int);
int __wrap_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);

/* Also through these when the program begins and ends, so only what tests count is kept. */
void *__wrap_malloc(size_t bytes)
{
    return fails() ? NULL : alive(&blocks, __real_malloc(bytes));
}

void *__wrap_calloc(size_t n, size_t bytes)
{
    return fails() ? NULL : alive(&blocks, __real_calloc(n, bytes));
}

void *__wrap_aligned_alloc(size_t alignment, size_t bytes)
{
    return fails() ? NULL : alive(&blocks, __real_aligned_alloc(alignment, bytes));
}

void *__wrap_realloc(void *old, size_t bytes)
{
    if (fails())
        return NULL;
    if (old)
        dead(&blocks, old, 1);
    return alive(&blocks, __real_realloc(old, bytes));
}

void __wrap_free(void *memory)
{
    if (memory)
        dead(&blocks, memory, 1);
    __real_free(memory);
}

void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    if (fails()) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void *map = __real_mmap(at, bytes, protection, flags, fd, offset);
    if (map != MAP_FAILED)
        alive(&maps, map);
    return map;
}

int __wrap_munmap(void *at, size_t bytes)
{
    dead(&maps, at, bytes);
    return __real_munmap(at, bytes);
}

static int failing(int code)
{
    errno = code;
    return -1;
}

int __wrap_memfd_create(const char *name, unsigned flags)
{
    return fails() ? failing(EMFILE) : __real_memfd_create(name, flags);
}

int __wrap_ftruncate(int fd, off_t bytes)
{
    return fails() ? failing(ENOMEM) : __real_ftruncate(fd, bytes);
}

int __wrap_fallocate(int fd, int mode, off_t offset, off_t bytes)
{
    return fails() ? failing(ENOSPC) : __real_fallocate(fd, mode, offset, bytes);
}

/* Advice may fail without harm; only asking for pages counts. */
int __wrap_madvise(void *at, size_t bytes, int advice)
{
    if (advice == MADV_POPULATE_WRITE && fails())
        return failing(ENOMEM);
    return __real_madvise(at, bytes, advice);
}

struct start {
    void *(*run)(void *);
    void *argument;
};

static void *run_armed(void *argument)
{
    struct start start = *(struct start *)argument;
    __real_free(argument);
    armed = true;
    return start.run(start.argument);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                          void *argument)
{
    if (!armed)
        return __real_pthread_create(thread, attributes, run, argument);
    if (fails())
        return EAGAIN;
    struct start *start = __real_malloc(sizeof *start);
    *start = (struct start){run, argument};
    return __real_pthread_create(thread, attributes, run_armed, start);
}

/* -------------------------------------------------------------- workload */

enum { T = 5, H = 128, K = 2, E = 4, ROWS = 64, MOST_RANKS = 2 };

/* What a run of the workload is like and how it ended. */
struct plan {
    const char *transport;
    ep_thread_world *world;
    int num_ranks, num_threads, victim;
    int64_t fail_at;
    bool retry;
    struct outcome {
        ep_status status; /* of the first call that failed */
        int step;
        bool local;
        int64_t took_ms;
        int leaks;
        bool fired;
    } * outcome; /* [num_ranks], shared with processes */
};

struct rank {
    const struct plan *plan;
    int rank, step;
    bool stopped;
    ep_group *group;
    ep_buffer *buffer;
    ep_recv recv, other;
    ep_handle *handle, *expert_handle;
    void *window;
    uint16_t x[T * H], y[ROWS * H], out[T * H];
    int64_t ids[T * K];
    float weights[T * K], row_weights[ROWS * K], out_weights[T * K];
    struct outcome first;
};

static int count_entries(const char *folder)
{
    int count = 0;
    DIR *dir = opendir(folder);
    while (dir && readdir(dir))
        count++;
    if (dir)
        closedir(dir);
    return count;
}

/* Makes a call, armed on the victim. A call that failed is made again once where that is asked
   for; else the rank makes no further ones. */
#define CALL(self, call) MAKE(self, call, false)
#define LOCAL(self, call) MAKE(self, call, true) /* no other rank is concerned */
#define MAKE(self, call, is_local)                              \
    do {                                                        \
        (self)->step++;                                         \
        armed = (self)->rank == (self)->plan->victim;           \
        ep_status status = call;                                \
        armed = false;                                          \
        if (status != EP_OK && (self)->first.status == EP_OK) { \
            (self)->first.status = status;                      \
            (self)->first.step = (self)->step;                  \
            (self)->first.local = is_local;                     \
            if (is_local || (self)->plan->retry)                \
                status = call;                                  \
        }                                                       \
        if (((self)->stopped = status != EP_OK))                \
            return;                                             \
    } while (0)

static void *take(void *context, size_t bytes)
{
    (void)context;
    return __wrap_aligned_alloc(64, (bytes + 64) & ~(size_t)63);
}

static void give(void *context, void *memory)
{
    (void)context;
    __wrap_free(memory);
}

static const ep_allocator counted = {take, give, NULL};

static void create(struct rank *r)
{
    ep_group_config group = EP_GROUP_CONFIG_INIT;
    ep_buffer_config buffer = EP_BUFFER_CONFIG_INIT;
    group.rank = r->rank;
    group.num_ranks = r->plan->num_ranks;
    group.transport = r->plan->transport;
    group.world = r->plan->world;
    group.timeout_ms = persistent ? 150 : 1000;
    buffer.num_threads = r->plan->num_threads;
    buffer.window_max_bytes = (size_t)1 << 30;
    CALL(r, ep_group_create(&group, &r->group));
    CALL(r, ep_group_barrier(r->group));
    CALL(r, ep_buffer_create(r->group, &buffer, &r->buffer));
}

static ep_dispatch_args dispatch_args(struct rank *r, ep_row_layout layout)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(r->x, EP_BF16, T, H);
    args.topk_idx = ep_tensor_2d(r->ids, EP_I64, T, K);
    args.topk_weights = ep_tensor_2d(r->weights, EP_F32, T, K);
    args.num_experts = E;
    args.layout = layout;
    return args;
}

static ep_tensor rows_at(void *memory, const ep_recv *recv)
{
    return ep_tensor_2d(memory, EP_BF16, recv->x.shape[0], H);
}

/* By token, blocking, rows from the window and from ordinary memory. */
static void by_token(struct rank *r)
{
    ep_dispatch_args args = dispatch_args(r, EP_ROWS_BY_TOKEN), cached = EP_DISPATCH_ARGS_INIT;
    ep_combine_args combine = EP_COMBINE_ARGS_INIT;
    ep_dispatch_backward_args backward = EP_DISPATCH_BACKWARD_ARGS_INIT;
    int32_t counts[MOST_RANKS];
    LOCAL(r, ep_layout(&args.topk_idx, E, NULL, r->plan->num_ranks, 1, counts, NULL, NULL, NULL));
    args.wire = EP_WIRE_FP8;
    CALL(r, ep_dispatch(r->buffer, &args, &r->recv, NULL));
    r->handle = r->recv.handle;
    LOCAL(r, ep_buffer_alloc(r->buffer, sizeof r->y, &r->window));
    combine.handle = r->handle;
    combine.y = rows_at(r->window, &r->recv);
    combine.out = ep_tensor_2d(r->out, EP_BF16, T, H);
    CALL(r, ep_combine(r->buffer, &combine, NULL));
    combine.y = rows_at(r->y, &r->recv);
    combine.topk_weights = ep_tensor_2d(r->row_weights, EP_F32, r->recv.x.shape[0], K);
    combine.out_weights = ep_tensor_2d(r->out_weights, EP_F32, T, K);
    CALL(r, ep_combine(r->buffer, &combine, NULL));
    cached.x = args.x;
    cached.handle = r->handle;
    cached.allocator = &counted;
    CALL(r, ep_dispatch(r->buffer, &cached, &r->other, NULL));
    ep_recv_release(&r->other);
    backward.grad_recv_x = combine.y;
    backward.handle = r->handle;
    backward.grad_x = combine.out;
    CALL(r, ep_dispatch_backward(r->buffer, &backward, NULL));
}

/* Starts a call and completes it, as one step. */
static ep_status finish(ep_status status, ep_event *event)
{
    if (status == EP_OK)
        status = ep_event_wait(event);
    ep_event_release(event);
    return status;
}

static ep_status dispatch_event(struct rank *r, const ep_dispatch_args *args)
{
    ep_event *event = NULL;
    ep_status status = ep_dispatch(r->buffer, args, &r->other, &event);
    return finish(status, event);
}

static ep_status combine_event(struct rank *r, const ep_combine_args *args)
{
    ep_event *event = NULL;
    ep_status status = ep_combine(r->buffer, args, &event);
    return finish(status, event);
}

static void by_expert(struct rank *r)
{
    ep_dispatch_args args = dispatch_args(r, EP_ROWS_BY_EXPERT);
    ep_combine_args combine = EP_COMBINE_ARGS_INIT;
    ep_combine_backward_args backward = EP_COMBINE_BACKWARD_ARGS_INIT;
    args.allocator = &counted;
    CALL(r, dispatch_event(r, &args));
    r->expert_handle = r->other.handle;
    combine.handle = r->expert_handle;
    combine.y = rows_at(r->y, &r->other);
    combine.out = ep_tensor_2d(r->out, EP_BF16, T, H);
    CALL(r, combine_event(r, &combine));
    backward.grad_out = args.x;
    backward.handle = r->expert_handle;
    backward.y = combine.y;
    backward.topk_weights = args.topk_weights;
    backward.grad_topk_weights = ep_tensor_2d(r->out_weights, EP_F32, T, K);
    ep_recv_release(&r->other);
    CALL(r, ep_combine_backward(r->buffer, &backward, &r->other, NULL));
}

static void run_steps(struct rank *r)
{
    create(r);
    if (!r->stopped)
        by_token(r);
    if (!r->stopped)
        by_expert(r);
}

static void clean_up(struct rank *r)
{
    ep_recv_release(&r->recv);
    ep_recv_release(&r->other);
    ep_handle_release(r->handle);
    ep_handle_release(r->expert_handle);
    if (r->window)
        ep_buffer_free(r->buffer, r->window);
    ep_buffer_destroy(r->buffer);
    ep_group_destroy(r->group);
}

static int run_rank(int rank, int num_ranks, void *argument)
{
    const struct plan *plan = argument;
    struct rank r = {.plan = plan, .rank = rank, .recv = EP_RECV_INIT, .other = EP_RECV_INIT};
    (void)num_ranks;
    for (int i = 0; i < T * K; i++)
        r.ids[i] = (i * 3 + rank) % E;
    for (int i = 0; i < T; i++) /* no expert twice */
        if (r.ids[i * K] == r.ids[i * K + 1])
            r.ids[i * K + 1] = -1;
    int64_t start = test_now_ms();
    run_steps(&r);
    r.first.took_ms = test_now_ms() - start;
    clean_up(&r);
    r.first.fired = atomic_load(&countdown) <= 0;
    plan->outcome[rank] = r.first;
    return r.first.status == EP_OK && r.stopped;
}

/* ----------------------------------------------------------------- tests */

/* In a process of its own each rank counts what it leaves behind. */
static int run_process(int rank, int num_ranks, void *argument)
{
    const struct plan *plan = argument;
    int block_count = blocks.count, map_count = maps.count, fds = count_entries("/proc/self/fd");
    int failed = run_rank(rank, num_ranks, argument);
    plan->outcome[rank].leaks =
        blocks.count - block_count + maps.count - map_count + count_entries("/proc/self/fd") - fds;
    return failed;
}

/* Runs the workload with its fail_at-th allocation failing; false once there are not so many. */
static bool run_once(struct plan *plan)
{
    bool threads = strcmp(plan->transport, "threads") == 0;
    int block_count = blocks.count, map_count = maps.count, failed;
    memset(plan->outcome, 0, sizeof *plan->outcome * MOST_RANKS);
    atomic_store(&countdown, plan->fail_at);
    if (threads) {
        assert_int_equal(ep_thread_world_create(plan->num_ranks, &plan->world), EP_OK);
        failed = test_run_threads(plan->num_ranks, run_rank, plan);
        ep_thread_world_destroy(plan->world);
        plan->outcome[0].leaks = blocks.count - block_count + maps.count - map_count;
    } else {
        failed = test_run_processes(plan->num_ranks, run_process, plan);
    }
    const struct outcome *victim = &plan->outcome[plan->victim];
    const struct outcome *other = &plan->outcome[plan->num_ranks - 1 - plan->victim];
    if (failed || plan->outcome[0].leaks || plan->outcome[1].leaks)
        fail_msg("%s, allocation %lld: %d ranks failed, leaks %d and %d; victim %s in step %d, "
                 "other %s in step %d",
                 plan->transport, (long long)plan->fail_at, failed, plan->outcome[0].leaks,
                 plan->outcome[1].leaks, ep_status_string(victim->status), victim->step,
                 ep_status_string(other->status), other->step);
    return victim->fired || victim->status != EP_OK; /* or it ended early, by a timeout */
}

/* How the failures of a walk ended. */
struct tally {
    int told, harmless, timeouts;
};

/* The other rank fails too, in the same step or the next. Only where the victim could not even
   join the group may it wait for its timeout. An allocation for which there is another way (a
   read instead of a copy) fails without harm: then all is well on both ranks. */
static void check_told(const struct plan *plan, struct tally *tally)
{
    const struct outcome *victim = &plan->outcome[plan->victim];
    const struct outcome *other = &plan->outcome[!plan->victim];
    bool both = victim->status != EP_OK && other->status != EP_OK;
    bool late = both && other->status == EP_ERR_TIMEOUT;
    bool harmless = other->status == EP_OK && (victim->status == EP_OK || victim->local);
    tally->told += both;
    tally->timeouts += late;
    tally->harmless += harmless && !victim->local;
    if ((both && other->step <= victim->step + 1 && (!late || victim->step == 1)) || harmless)
        return;
    fail_msg("%s, allocation %lld: victim %s in step %d after %lld ms, other %s in step %d "
             "after %lld ms",
             plan->transport, (long long)plan->fail_at, ep_status_string(victim->status),
             victim->step, (long long)victim->took_ms, ep_status_string(other->status), other->step,
             (long long)other->took_ms);
}

static void walk(struct plan plan, int64_t stride)
{
    struct tally tally = {0};
    plan.outcome = test_shared_alloc(sizeof *plan.outcome * MOST_RANKS);
    assert_non_null(plan.outcome);
    for (plan.fail_at = 1; run_once(&plan); plan.fail_at += stride)
        if (plan.num_ranks == 2 && !persistent)
            check_told(&plan, &tally);
    print_message("%s, %d ranks, %d threads: %lld allocations; %d told (%d by timeout), "
                  "%d harmless\n",
                  plan.transport, plan.num_ranks, plan.num_threads, (long long)plan.fail_at - 1,
                  tally.told, tally.timeouts, tally.harmless);
    assert_true(plan.fail_at > 20 && tally.harmless <= 12);
    test_shared_free(plan.outcome, sizeof *plan.outcome * MOST_RANKS);
}

static void one_rank_tries_again(void **state)
{
    (void)state;
    for (int threads = 0; threads <= 2; threads++)
        walk((struct plan){"threads", NULL, 1, threads, 0, 0, true, NULL}, 1);
    walk((struct plan){"shm", NULL, 1, 0, 0, 0, true, NULL}, 1);
}

static void two_ranks(void **state)
{
    (void)state;
    for (int threads = 0; threads <= 2; threads += 2) {
        walk((struct plan){"threads", NULL, 2, threads, 1, 0, false, NULL}, 1);
        walk((struct plan){"shm", NULL, 2, threads, 1, 0, false, NULL}, 1);
    }
}

/* No memory at all from some allocation on. */
static void out_of_memory_for_good(void **state)
{
    (void)state;
    persistent = true;
    walk((struct plan){"threads", NULL, 2, 1, 0, 0, false, NULL}, 9);
    walk((struct plan){"shm", NULL, 2, 1, 0, 0, false, NULL}, 9);
    persistent = false;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_rank_tries_again),
        cmocka_unit_test(two_ranks),
        cmocka_unit_test(out_of_memory_for_good),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

/* SPDX-License-Identifier: MIT */
/*
 * Ranks that die or stall, at every point of the calls: each survivor gets an
 * error that names the rank, in time, leaves nothing behind, and the survivors
 * go on in a new group.
 * ctest-timeout: 300
 * ctest-label: serial
 */
#include "support/ranks.h"
#include "support/random.h"
#include "support/test.h"

#include "entrepot/ep.h"

#include <ctype.h>
#include <dirent.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { T = 6, H = 64, K = 2, E = 12, ROWS = 64, MOST_RANKS = 4, LONG_ENOUGH = 1000000 };

struct report {
    ep_status status; /* of the first call that failed */
    char message[512];
    int64_t took_ms; /* the failing call alone */
    int calls, leaks;
    bool went_on;
};

struct plan {
    char transport[160];
    ep_thread_world *world, *second_world;
    int num_ranks, victim, rounds;
    int64_t timeout_ms;
    int num_threads;
    bool async, victim_dies;
    int serial;            /* tells the groups of one test program apart */
    struct report *report; /* [num_ranks], shared with processes */
};

/* ------------------------------------------------------------- workload */

struct rank {
    const struct plan *plan;
    ep_group *group;
    ep_buffer *buffer;
    int rank, num_ranks;
    int64_t ids[T * K];
    uint16_t x[T * H], out[T * H];
};

static ep_status finish(ep_status status, ep_event *event)
{
    if (status == EP_OK && event)
        status = ep_event_wait(event);
    ep_event_release(event);
    return status;
}

static ep_status dispatch(struct rank *r, ep_recv *recv)
{
    ep_event *event = NULL;
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(r->x, EP_BF16, T, H);
    args.topk_idx = ep_tensor_2d(r->ids, EP_I64, T, K);
    args.num_experts = E;
    *recv = (ep_recv)EP_RECV_INIT;
    ep_status status = ep_dispatch(r->buffer, &args, recv, r->plan->async ? &event : NULL);
    return finish(status, event);
}

static ep_status combine(struct rank *r, const ep_recv *recv)
{
    ep_event *event = NULL;
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = recv->x;
    args.handle = recv->handle;
    args.out = ep_tensor_2d(r->out, EP_BF16, T, H);
    ep_status status = ep_combine(r->buffer, &args, r->plan->async ? &event : NULL);
    return finish(status, event);
}

/* Ones go out and come back from each rank that a token went to. */
static bool sums_are_right(const struct rank *r)
{
    static const uint16_t code[] = {0, 0x3f80, 0x4000};
    for (int t = 0; t < T; t++) {
        int64_t block = E / r->num_ranks, first = r->ids[t * K], second = r->ids[t * K + 1];
        int went = 1 + (first / block != second / block);
        for (int h = 0; h < H; h++)
            if (r->out[t * H + h] != code[went])
                return false;
    }
    return true;
}

/* One dispatch and its combine. */
static ep_status round_trip(struct rank *r)
{
    ep_recv recv;
    ep_status status = dispatch(r, &recv);
    if (status == EP_OK)
        status = combine(r, &recv);
    ep_recv_release(&recv);
    ep_handle_release(recv.handle);
    return status;
}

static ep_status open_rank(struct rank *r, const char *transport, const char *name, int rank,
                           int num_ranks, ep_thread_world *world, int64_t timeout_ms)
{
    ep_group_config group = EP_GROUP_CONFIG_INIT;
    ep_buffer_config buffer = EP_BUFFER_CONFIG_INIT;
    group.rank = r->rank = rank;
    group.num_ranks = r->num_ranks = num_ranks;
    group.timeout_ms = timeout_ms;
    group.transport = transport;
    group.name = name;
    group.world = world;
    buffer.num_threads = r->plan->num_threads;
    buffer.window_max_bytes = (size_t)1 << 30;
    for (int i = 0; i < T * K; i++)
        r->ids[i] = (i * 5 + rank * 7 + i / 4) % E;
    for (int t = 0; t < T; t++)
        if (r->ids[t * K] == r->ids[t * K + 1])
            r->ids[t * K + 1] = (r->ids[t * K] + 1) % E;
    for (int i = 0; i < T * H; i++)
        r->x[i] = 0x3f80;
    ep_status status = ep_group_create(&group, &r->group);
    return status == EP_OK ? ep_buffer_create(r->group, &buffer, &r->buffer) : status;
}

static void close_rank(struct rank *r)
{
    ep_buffer_destroy(r->buffer);
    ep_group_destroy(r->group);
    r->buffer = NULL;
    r->group = NULL;
}

/* ------------------------------------------------------------ a rank's run */

static int entries(const char *folder)
{
    int count = 0;
    DIR *dir = opendir(folder);
    while (dir && readdir(dir))
        count++;
    if (dir)
        closedir(dir);
    return count;
}

static int mappings(void)
{
    int count = 0;
    char line[512];
    FILE *file = fopen("/proc/self/maps", "r");
    while (file && fgets(line, sizeof line, file))
        count += strstr(line, "entrepot") != NULL && strstr(line, "memfd") != NULL;
    if (file)
        fclose(file);
    return count;
}

/* Threads end a moment after they were joined or their process' table was read. */
static int settle_threads(int expected)
{
    int count = 0;
    for (int i = 0; i < 200 && (count = entries("/proc/self/task")) > expected; i++)
        usleep(1000);
    return count - expected;
}

static void note_failure(struct report *report, ep_status status, int64_t start)
{
    report->status = status;
    report->took_ms = test_now_ms() - start;
    snprintf(report->message, sizeof report->message, "%s", ep_last_error());
}

/* Calls until one fails, or all rounds are done. */
static void work(struct rank *r, struct report *report)
{
    const struct plan *plan = r->plan;
    char name[32];
    int64_t start = test_now_ms();
    snprintf(name, sizeof name, "first-%d", plan->serial);
    int rank = r->rank;
    ep_status status =
        open_rank(r, plan->transport, name, rank, plan->num_ranks, plan->world, plan->timeout_ms);
    for (; status == EP_OK && report->calls < plan->rounds; report->calls++) {
        start = test_now_ms();
        status = round_trip(r);
    }
    if (status != EP_OK)
        note_failure(report, status, start);
    if (status == EP_OK && !sums_are_right(r))
        note_failure(report, EP_ERR_CORRUPT, start);
}

/* The survivors alone, on the plain transport; they may come one timeout apart. */
static void go_on(struct rank *r, struct report *report)
{
    const struct plan *plan = r->plan;
    char name[32];
    int rank = r->rank - (r->rank > plan->victim);
    snprintf(name, sizeof name, "second-%d", plan->serial);
    ep_status status = open_rank(r, plan->world ? "threads" : "shm", name, rank,
                                 plan->num_ranks - 1, plan->second_world, 20000);
    for (int i = 0; i < 3 && status == EP_OK; i++)
        status = round_trip(r);
    report->went_on = status == EP_OK && sums_are_right(r);
    if (!report->went_on)
        fprintf(stderr, "the new group, rank %d: %s\n", rank, ep_last_error());
    close_rank(r);
}

static int run_rank(int rank, int num_ranks, void *argument)
{
    const struct plan *plan = argument;
    struct report *report = &plan->report[rank];
    struct rank r = {.plan = plan, .rank = rank};
    (void)num_ranks;
    int fds = entries("/proc/self/fd"), maps = mappings(), threads = entries("/proc/self/task");
    work(&r, report);
    close_rank(&r);
    r.rank = rank;
    if (plan->victim_dies && rank == plan->victim)
        return 0; /* as a thread it goes on after its death */
    if (plan->victim_dies)
        go_on(&r, report);
    if (!plan->world)
        report->leaks =
            entries("/proc/self/fd") - fds + mappings() - maps + settle_threads(threads);
    return 0;
}

/* --------------------------------------------------------------- judging */

/* Whether the message speaks of this rank: its number stands in a list after "rank" or "ranks". */
static bool names_rank(const char *message, int rank)
{
    for (const char *at = message; (at = strstr(at, "rank")) != NULL; at++) {
        const char *next = at + 4 + (at[4] == 's');
        while (*next == ' ' || *next == ',' || isdigit((unsigned char)*next)) {
            char *end;
            if (!isdigit((unsigned char)*next)) {
                next++;
                continue;
            }
            if (strtol(next, &end, 10) == rank)
                return true;
            next = end;
        }
    }
    return false;
}

static struct plan new_plan(const char *transport, int num_ranks, int victim)
{
    static int serial;
    struct plan plan = {.num_ranks = num_ranks,
                        .victim = victim,
                        .timeout_ms = 20000,
                        .rounds = LONG_ENOUGH,
                        .victim_dies = true,
                        .serial = ++serial};
    snprintf(plan.transport, sizeof plan.transport, "%s", transport);
    plan.report = test_shared_alloc(MOST_RANKS * sizeof *plan.report);
    assert_non_null(plan.report);
    return plan;
}

static void free_plan(struct plan *plan)
{
    test_shared_free(plan->report, MOST_RANKS * sizeof *plan->report);
}

static void judge(const struct plan *plan, int64_t most_ms, const char *what)
{
    for (int r = 0; r < plan->num_ranks; r++) {
        const struct report *report = &plan->report[r];
        if (r == plan->victim)
            continue;
        if (report->status != EP_OK && names_rank(report->message, plan->victim) &&
            report->took_ms <= most_ms && report->leaks == 0 && report->went_on)
            continue;
        fail_msg("%s, %s: survivor %d after %d calls: %s in %lld ms '%s', %d leaks, went on %d",
                 plan->transport, what, r, report->calls, ep_status_string(report->status),
                 (long long)report->took_ms, report->message, report->leaks, report->went_on);
    }
}

static void run_threads(struct plan *plan)
{
    assert_int_equal(ep_thread_world_create(plan->num_ranks, &plan->world), EP_OK);
    if (plan->num_ranks > 1)
        assert_int_equal(ep_thread_world_create(plan->num_ranks - 1, &plan->second_world), EP_OK);
    assert_int_equal(test_run_threads(plan->num_ranks, run_rank, plan), 0);
    ep_thread_world_destroy(plan->world);
    ep_thread_world_destroy(plan->second_world);
}

/* A rank that ends by signal 9 counts as failed: the victim alone may. */
static void run_processes(struct plan *plan)
{
    test_processes processes;
    assert_int_equal(test_processes_start(&processes, plan->num_ranks, run_rank, plan), 0);
    test_processes_wait(&processes, 60000);
    for (int r = 0; r < plan->num_ranks; r++)
        if (processes.result[r] != (r == plan->victim && plan->victim_dies ? 256 + SIGKILL : 0))
            fail_msg("%s: rank %d ended with %d", plan->transport, r, processes.result[r]);
}

/* ---------------------------------------------------------------- deaths */

/* The fault transport ends the victim at its n-th notification: at n = 1 in the making of the
   group, then of the buffer, then in each phase of the calls. */
static void die_at_each_notification(const char *inner, int last, bool async, int num_threads)
{
    for (int n = 1; n <= last; n++) {
        char transport[160], what[64];
        int victim = n % 3;
        snprintf(transport, sizeof transport, "fault(%s):kill_rank=%d,kill_at=%d", inner, victim,
                 n);
        snprintf(what, sizeof what, "async %d, threads %d", async, num_threads);
        struct plan plan = new_plan(transport, 3, victim);
        plan.async = async;
        plan.num_threads = num_threads;
        if (strcmp(inner, "threads") == 0)
            run_threads(&plan);
        else
            run_processes(&plan);
        judge(&plan, 5000, what);
        free_plan(&plan);
    }
}

static void threads_die(void **state)
{
    (void)state;
    die_at_each_notification("threads", 40, false, 0);
    die_at_each_notification("threads", 30, true, 2);
}

static void processes_die(void **state)
{
    (void)state;
    die_at_each_notification("shm", 40, false, 0);
    die_at_each_notification("shm", 30, true, 0);
    die_at_each_notification("shm", 30, true, 2);
}

/* kill -9 from outside, at any instant: also before ranks have met, and within copies. */
static void killed_at_any_moment(void **state)
{
    (void)state;
    struct rng rng;
    rng_seed(&rng, rng_env_seed(1));
    for (int i = 0; i < 24; i++) {
        struct plan plan = new_plan("shm", 4, i % 4);
        test_processes processes;
        int64_t after_us = i < 8 ? rng_range(&rng, 0, 3000) : rng_range(&rng, 0, 40000);
        char what[64];
        plan.timeout_ms = 3000;
        plan.async = i % 2;
        plan.num_threads = i % 3;
        assert_int_equal(test_processes_start(&processes, 4, run_rank, &plan), 0);
        usleep((useconds_t)after_us);
        test_processes_signal(&processes, plan.victim, SIGKILL);
        test_processes_wait(&processes, 60000);
        snprintf(what, sizeof what, "kill -9 after %lld us", (long long)after_us);
        for (int r = 0; r < 4; r++)
            if (processes.result[r] != (r == plan.victim ? 256 + SIGKILL : 0))
                fail_msg("%s: rank %d ended with %d", what, r, processes.result[r]);
        judge(&plan, plan.timeout_ms + 2000, what);
        free_plan(&plan);
    }
}

/* ---------------------------------------------------------------- stalls */

static void run_plan(struct plan *plan)
{
    if (strstr(plan->transport, "threads"))
        run_threads(plan);
    else
        run_processes(plan);
}

static void a_short_stall_is_no_error(const char *inner)
{
    for (int n = 5; n <= 29; n += 4) {
        char transport[160];
        snprintf(transport, sizeof transport, "fault(%s):stall_rank=1,stall_at=%d,stall_ms=120",
                 inner, n);
        struct plan plan = new_plan(transport, 3, 1);
        plan.victim_dies = false;
        plan.rounds = 8;
        plan.async = n % 8 == 1;
        plan.num_threads = n % 3;
        run_plan(&plan);
        for (int r = 0; r < 3; r++)
            if (plan.report[r].status != EP_OK || plan.report[r].leaks)
                fail_msg("%s: rank %d: %s '%s', %d leaks", transport, r,
                         ep_status_string(plan.report[r].status), plan.report[r].message,
                         plan.report[r].leaks);
        free_plan(&plan);
    }
}

/*
 * A stall of one and a half timeouts: the others give the call up and say so; the
 * rank that comes back fails it too, and the next calls of all work again on the
 * same buffer. All rounds are the same call, dispatches or combines, so that ranks
 * of which only some saw one fail stay in step.
 */
static int stalled_rank(int rank, int num_ranks, void *argument)
{
    const struct plan *plan = argument;
    struct report *report = &plan->report[rank];
    struct rank r = {.plan = plan, .rank = rank};
    ep_recv recv, again = EP_RECV_INIT;
    char name[32];
    int failures = 0;
    snprintf(name, sizeof name, "stall-%d", plan->serial);
    TEST_OK(open_rank(&r, plan->transport, name, rank, num_ranks, plan->world, plan->timeout_ms));
    TEST_OK(dispatch(&r, &recv));
    for (; report->calls < plan->rounds; report->calls++) {
        int64_t start = test_now_ms();
        ep_status status = plan->serial % 2 ? dispatch(&r, &again) : combine(&r, &recv);
        ep_recv_release(&again);
        ep_handle_release(again.handle);
        if (status != EP_OK && failures++ == 0)
            note_failure(report, status, start);
    }
    report->went_on = failures <= 2 && combine(&r, &recv) == EP_OK && sums_are_right(&r);
    if (!report->went_on)
        fprintf(stderr, "rank %d: %d failures, last error %s\n", rank, failures, ep_last_error());
    ep_recv_release(&recv);
    ep_handle_release(recv.handle);
    close_rank(&r);
    return 0;
}

static void a_long_stall_is_named(const char *inner)
{
    for (int n = 30; n <= 50; n += 2) { /* by then the first dispatch is over */
        char transport[160];
        snprintf(transport, sizeof transport, "fault(%s):stall_rank=1,stall_at=%d,stall_ms=600",
                 inner, n);
        struct plan plan = new_plan(transport, 3, 1);
        plan.victim_dies = false;
        plan.timeout_ms = 400;
        plan.rounds = 8;
        plan.num_threads = n % 3;
        if (strcmp(inner, "threads") == 0) {
            assert_int_equal(ep_thread_world_create(3, &plan.world), EP_OK);
            assert_int_equal(test_run_threads(3, stalled_rank, &plan), 0);
            ep_thread_world_destroy(plan.world);
        } else {
            assert_int_equal(test_run_processes(3, stalled_rank, &plan), 0);
        }
        judge(&plan, 1200, "long stall");
        if (!plan.report[1].went_on)
            fail_msg("%s: the late rank did not come back", transport);
        free_plan(&plan);
    }
}

static void stalls(void **state)
{
    (void)state;
    a_short_stall_is_no_error("threads");
    a_short_stall_is_no_error("shm");
    a_long_stall_is_named("threads");
    a_long_stall_is_named("shm");
}

/* Nothing of ours may be left in /dev/shm when all is over. */
static int compare_shm(void **state)
{
    int ours = 0;
    DIR *dir = opendir("/dev/shm");
    (void)state;
    for (struct dirent *entry; dir && (entry = readdir(dir)) != NULL;)
        ours += strstr(entry->d_name, "entrepot") != NULL;
    if (dir)
        closedir(dir);
    return ours;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(threads_die),
        cmocka_unit_test(processes_die),
        cmocka_unit_test(killed_at_any_moment),
        cmocka_unit_test(stalls),
    };
    return cmocka_run_group_tests(tests, NULL, compare_shm);
}

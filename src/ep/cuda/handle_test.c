/* SPDX-License-Identifier: MIT */
/* What a handle tells the host, fetched once, from many threads and after failures; over a device
   of this file's own, which is slow and fails when told to. */
#include "ep/cuda/handle.c"

#include "support/test.h"

#include <string.h>
#include <time.h>

#define RANKS 2
#define TOKENS 5
#define TOPK 3
#define ROWS 7
#define THREADS 8
#define STEPS 5 /* of a fetch, each of which can fail */

static _Atomic int steps, entered;
static int failing; /* the step that fails, counted from 1; 0: none */

static ep_status take_step(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    return ++steps == failing ? epi_fail(EP_ERR_DEVICE, "step %d", failing) : EP_OK;
}

ep_status epi_gpu_enter(int index, int *before)
{
    *before = index;
    EPI_TRY(take_step());
    entered++;
    return EP_OK;
}

void epi_gpu_leave(int before)
{
    (void)before;
    entered--;
}

ep_status epi_gpu_event_wait(void *event)
{
    (void)event;
    return take_step();
}

ep_status epi_gpu_get(void *host, const void *device, size_t bytes)
{
    EPI_TRY(take_step());
    memcpy(host, device, bytes);
    return EP_OK;
}

ep_status epc_take(epc_buffer *b, size_t bytes, epc_block **block)
{
    (void)b;
    *block = calloc(1, sizeof **block + bytes);
    assert_non_null(*block);
    (*block)->memory = (uint8_t *)(*block + 1);
    return EP_OK;
}

void epc_give(epc_buffer *b, epc_block *block)
{
    (void)b;
    free(block);
}

void epc_ll_handle_free(ep_handle *handle)
{
    (void)handle;
    fail();
}

/* ---------------------------------------------------------------- a dispatch's handle */

static ep_handle *new_handle(void)
{
    static ep_buffer buffer = {.rank = 1, .num_ranks = RANKS};
    static epc_buffer b = {.buffer = &buffer, .rank = 1, .num_ranks = RANKS, .has_last = true};
    ep_handle *handle = calloc(1, sizeof *handle);
    epc_handle *device;
    assert_non_null(handle);
    handle->buffer = &buffer;
    handle->num_ranks = RANKS;
    handle->num_tokens = TOKENS;
    handle->topk = TOPK;
    handle->rows = ROWS;
    handle->num_rows = -1;
    assert_int_equal(epc_handle_new(&b, handle, false, &device), EP_OK);
    assert_int_equal(epc_take(&b, ROWS * 4, &device->sources), EP_OK);
    for (int i = 0; i < TOKENS * TOPK; i++)
        device->entries[i] = i % TOPK == 2 ? -1 : (epc_entry)(i % TOPK) << 32 | i;
    for (int i = 0; i < RANKS * RANKS; i++)
        device->matrix[i] = 10 + i;
    for (int i = 0; i < ROWS; i++)
        ((int32_t *)device->sources->memory)[i] = 100 + i;
    handle->device = device;
    steps = 0;
    failing = 0;
    return handle;
}

static void free_handle(ep_handle *handle)
{
    epc_handle_free(handle);
    free(handle->send_rank);
    free(handle->send_row);
    free(handle->rows_between);
    free(handle->source_token);
    free(handle);
}

static bool is_whole(const ep_handle *handle)
{
    bool whole = handle->num_rows == 11 + 13;
    for (int i = 0; i < TOKENS * TOPK; i++)
        whole &= handle->send_rank[i] == (i % TOPK == 2 ? -1 : i % TOPK) &&
                 handle->send_row[i] == (i % TOPK == 2 ? -1 : i);
    for (int i = 0; i < RANKS * RANKS; i++)
        whole &= handle->rows_between[i] == 10 + i;
    for (int i = 0; i < ROWS; i++)
        whole &= handle->source_token[i] == 100 + i;
    return whole;
}

/* ---------------------------------------------------------------- tests */

typedef struct asker {
    pthread_t thread;
    pthread_barrier_t *start;
    ep_handle *handle;
    bool good;
    int32_t *arrays[4];
} asker;

static void list_arrays(const ep_handle *handle, int32_t *arrays[4])
{
    arrays[0] = handle->send_rank;
    arrays[1] = handle->send_row;
    arrays[2] = handle->rows_between;
    arrays[3] = handle->source_token;
}

static void *ask(void *argument)
{
    asker *a = argument;
    pthread_barrier_wait(a->start);
    a->good = epc_handle_fetch(a->handle) == EP_OK && is_whole(a->handle);
    list_arrays(a->handle, a->arrays);
    return NULL;
}

static void many_threads_fetch_once(void **state)
{
    asker askers[THREADS];
    pthread_barrier_t start;
    ep_handle *handle = new_handle();
    (void)state;
    pthread_barrier_init(&start, NULL, THREADS);
    for (int i = 0; i < THREADS; i++) {
        askers[i] = (asker){.start = &start, .handle = handle};
        assert_int_equal(pthread_create(&askers[i].thread, NULL, ask, &askers[i]), 0);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(askers[i].thread, NULL);
    pthread_barrier_destroy(&start);
    for (int i = 0; i < THREADS; i++) {
        assert_true(askers[i].good);
        assert_memory_equal(askers[i].arrays, askers[0].arrays, sizeof askers[0].arrays);
    }
    assert_int_equal(steps, STEPS);
    assert_int_equal(entered, 0);
    free_handle(handle);
}

/* Whichever step fails, the next query goes on with the arrays that are there. */
static void a_failed_fetch_can_be_repeated(void **state)
{
    (void)state;
    for (int step = 1; step <= STEPS; step++) {
        int32_t *left[4], *after[4];
        ep_handle *handle = new_handle();
        failing = step;
        assert_int_equal(epc_handle_fetch(handle), EP_ERR_DEVICE);
        assert_int_equal(entered, 0);
        list_arrays(handle, left);
        assert_int_equal(epc_handle_fetch(handle), EP_OK);
        assert_true(is_whole(handle));
        list_arrays(handle, after);
        for (int i = 0; i < 4; i++)
            assert_true(!left[i] || left[i] == after[i]);
        int all = steps;
        assert_int_equal(epc_handle_fetch(handle), EP_OK);
        assert_int_equal(steps, all); /* nothing is left to fetch */
        free_handle(handle);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(many_threads_fetch_once),
        cmocka_unit_test(a_failed_fetch_can_be_repeated),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

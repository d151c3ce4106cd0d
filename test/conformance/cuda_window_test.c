/* SPDX-License-Identifier: MIT */
/*
 * What the window of a CUDA buffer gives out, over the fake GPU: only memory that
 * every peer reaches, as much as was agreed, and nothing that a peer may still write.
 */
#include "support/cuda.h"
#include "support/fake_gpu.h"
#include "support/test.h"

#include "entrepot/low_latency.h"

#include <stdlib.h>
#include <string.h>

#define TOKENS 64
#define HIDDEN 1024
#define ROW_BYTES ((int64_t)HIDDEN * 2)

static int open_rank(ep_group *group, struct cuda_rank *c)
{
    return cuda_open(group, (size_t)4 << 20, 0, TOKENS, HIDDEN, c);
}

static const epc_dispatch_params *last_dispatch(void)
{
    return &fake_gpu_launch(FAKE_DISPATCH, 0)->dispatch;
}

/* Dispatches the way an application does; the region lies where every peer reaches it. */
static int dispatch_well(struct cuda_rank *c, int64_t worst)
{
    ep_recv recv;
    int32_t places[64];
    TEST_OK(cuda_dispatch(c, worst, NULL, &recv, NULL));
    const epc_dispatch_params *p = last_dispatch();
    TEST_OK(ep_group_allgather(c->group, &p->place, places, sizeof p->place));
    for (int r = 0; r < c->num_ranks; r++)
        TEST_CHECK(fake_gpu_place(&p->comm, places[r], r));
    cuda_drop(&recv);
    return 0;
}

/* ---------------------------------------------------------------- growth */

/* The window has `rows` rows to take, for which it must grow. */
static ep_status grow(struct cuda_rank *c, int64_t rows, ep_recv *recv)
{
    fake_gpu_script((struct fake_outcome){.no_room = true, .rows = rows});
    return cuda_dispatch(c, 0, NULL, recv, NULL);
}

/* One rank can't grow: none does. Later all can. */
static int alone_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    (void)arg;
    if (open_rank(group, &c) || dispatch_well(&c, 0))
        return 1;
    const struct fake_gpu *gpu = fake_gpu();
    size_t before = gpu->allocated_bytes;
    int mapped = gpu->num_mappings;
    int64_t rows = c.rank == 1 ? ((int64_t)4 << 30) / ROW_BYTES : 20000;
    for (int round = 0; round < 20; round++) { /* more often than there are segments */
        TEST_CHECK(grow(&c, rows, &recv) == EP_ERR_CAPACITY);
        TEST_CHECK(CUDA_SAYS("rank 1", "window_max_bytes is 4294967296"));
        TEST_CHECK(gpu->allocated_bytes == before && gpu->num_mappings == mapped);
        if (dispatch_well(&c, 0) || dispatch_well(&c, TOKENS))
            return 1;
    }
    TEST_OK(grow(&c, 20000, &recv));
    TEST_CHECK(last_dispatch()->place == 1 && gpu->num_mappings == 2 * mapped);
    cuda_drop(&recv);
    if (dispatch_well(&c, 0))
        return 1;
    cuda_close(&c);
    return 0;
}

static void all_grow_or_none(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 3; ranks++)
        assert_int_equal(test_run_groups("shm", ranks, alone_body, NULL), 0);
}

/* One rank can't map what another offers: all drop it, and are in step. */
static int unmapped_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    (void)arg;
    if (open_rank(group, &c) || dispatch_well(&c, 0))
        return 1;
    struct fake_gpu *gpu = fake_gpu();
    size_t before = gpu->allocated_bytes;
    int mapped = gpu->num_mappings;
    gpu->maps_until_failure = c.rank == 1 ? c.num_ranks - 1 : 0;
    TEST_CHECK(grow(&c, 20000, &recv) == EP_ERR_DEVICE);
    TEST_CHECK(CUDA_SAYS("ep_dispatch: rank 1: cudaIpcOpenMemHandle"));
    TEST_CHECK(gpu->allocated_bytes == before && gpu->num_mappings == mapped);
    if (dispatch_well(&c, 0))
        return 1;
    TEST_OK(grow(&c, 20000, &recv));
    TEST_CHECK(last_dispatch()->place == 1 && gpu->num_mappings == 2 * mapped);
    cuda_drop(&recv);
    cuda_close(&c);
    return 0;
}

static void all_map_or_none(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 3; ranks++)
        assert_int_equal(test_run_groups("shm", ranks, unmapped_body, NULL), 0);
}

static ep_status ll_dispatch(const struct cuda_rank *c, int64_t max_tokens, ep_ll_recv *recv)
{
    ep_ll_dispatch_args args = cuda_ll_dispatch_args(c);
    *recv = (ep_ll_recv)EP_LL_RECV_INIT;
    args.max_tokens = max_tokens;
    return ep_ll_dispatch(c->buffer, &args, recv, NULL);
}

/* The same of low latency: rank 1 has no device memory for its areas. */
static int areas_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_ll_recv recv;
    (void)arg;
    if (open_rank(group, &c) || dispatch_well(&c, 0))
        return 1;
    struct fake_gpu *gpu = fake_gpu();
    int mapped = gpu->num_mappings;
    gpu->memory_bytes = c.rank == 1 ? gpu->allocated_bytes + ((size_t)200 << 20) : 0;
    size_t before = 0;
    for (int round = 0; round < 20; round++) {
        TEST_CHECK(ll_dispatch(&c, 16384, &recv) == EP_ERR_MEMORY);
        TEST_CHECK(CUDA_SAYS("rank 1", "cudaMalloc"));
        before = before ? before : gpu->allocated_bytes; /* with memory of its own for results */
        TEST_CHECK(gpu->allocated_bytes == before && gpu->num_mappings == mapped);
        if (dispatch_well(&c, 0))
            return 1;
    }
    gpu->memory_bytes = 0;
    TEST_OK(ll_dispatch(&c, 16384, &recv));
    const epc_ll_params *p = &fake_gpu_launch(FAKE_LL, 0)->ll;
    for (int r = 0; r < c.num_ranks; r++)
        TEST_CHECK(fake_gpu_place(&p->comm, 1, r) &&
                   p->area_of[r] >= fake_gpu_place(&p->comm, 1, r));
    ep_ll_recv_release(&recv);
    cuda_close(&c);
    return 0;
}

static void areas_on_all_or_none(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, areas_body, NULL), 0);
}

/* ---------------------------------------------------------------- sizes */

static ep_status create(ep_group *group, ep_device_type device, size_t bytes, size_t most,
                        ep_buffer **buffer)
{
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.device = device;
    config.window_bytes = bytes;
    config.window_max_bytes = most;
    return ep_buffer_create(group, &config, buffer);
}

/* Sizes that no window can have; on the CPU and on devices alike. */
static int refused_body(ep_group *group, void *arg)
{
    static const struct {
        size_t bytes, most;
        const char *says;
    } cases[] = {
        {(size_t)128 << 20, (size_t)64 << 20, "window_max_bytes is 67108864; it must be at least "},
        {(size_t)65 << 30, 0, "window_max_bytes is 68719476736; it must be at least "},
        {SIZE_MAX, 0, "must be at least 18446744073709551615, the control area and window_bytes"},
        {0, 4096, "window_max_bytes is 4096; it must be at least "},
        {0, SIZE_MAX, "window_max_bytes is 18446744073709551615; it must be below 2^62"},
    };
    ep_buffer *buffer;
    (void)arg;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int device = EP_DEVICE_CPU; device <= EP_DEVICE_CUDA; device++) {
            TEST_CHECK(create(group, (ep_device_type)device, cases[i].bytes, cases[i].most,
                              &buffer) == EP_ERR_ARGUMENT);
            TEST_CHECK(buffer == NULL && CUDA_SAYS("ep_buffer_create: ", cases[i].says));
        }
    TEST_OK(create(group, EP_DEVICE_CUDA, 0, (size_t)1 << 20, &buffer)); /* less than it would be */
    ep_buffer_destroy(buffer);
    TEST_CHECK(fake_gpu()->num_allocations == 0 && fake_gpu()->num_mappings == 0);
    return 0;
}

static void sizes_are_checked(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, refused_body, NULL), 0);
}

/* What the caller takes of the window ends at its bound, as on the CPU. */
static int bound_body(ep_group *group, void *arg)
{
    static const size_t too_large[] = {SIZE_MAX, SIZE_MAX - 255, SIZE_MAX / 2, (size_t)1 << 30};
    ep_buffer *buffer;
    void *memory, *more;
    (void)arg;
    for (int device = EP_DEVICE_CPU; device <= EP_DEVICE_CUDA; device++) {
        ep_buffer_info before = {.size = sizeof before}, info = before;
        TEST_OK(create(group, (ep_device_type)device, 1 << 20, (size_t)64 << 20, &buffer));
        TEST_OK(ep_buffer_query(buffer, &before));
        for (size_t i = 0; i < sizeof too_large / sizeof *too_large; i++) {
            TEST_CHECK(ep_buffer_alloc(buffer, too_large[i], &memory) == EP_ERR_MEMORY && !memory);
            TEST_CHECK(CUDA_SAYS("the window needs ", "its bound (window_max_bytes) is 67108864"));
        }
        TEST_OK(ep_buffer_query(buffer, &info));
        TEST_CHECK(memcmp(&info, &before, sizeof info) == 0);
        TEST_OK(ep_buffer_alloc(buffer, (size_t)60 << 20, &memory));
        TEST_CHECK(ep_buffer_alloc(buffer, (size_t)8 << 20, &more) == EP_ERR_MEMORY);
        TEST_OK(ep_buffer_free(buffer, memory));
        TEST_OK(ep_buffer_alloc(buffer, (size_t)8 << 20, &more));
        TEST_OK(ep_buffer_query(buffer, &info));
        TEST_CHECK(info.window_bytes <= (size_t)64 << 20);
        TEST_OK(ep_buffer_free(buffer, more));
        ep_buffer_destroy(buffer);
    }
    return 0;
}

static void allocations_end_at_the_bound(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, bound_body, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_grow_or_none),
        cmocka_unit_test(all_map_or_none),
        cmocka_unit_test(areas_on_all_or_none),
        cmocka_unit_test(sizes_are_checked),
        cmocka_unit_test(allocations_end_at_the_bound),
    };
    fake_gpu_use();
    return cmocka_run_group_tests(tests, NULL, NULL);
}

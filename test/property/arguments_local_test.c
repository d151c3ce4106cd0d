/* SPDX-License-Identifier: MIT */
/* Bad arguments of groups, buffers, layout, queries and events: the exact message of each. */
#include "support/ranks.h"
#include "support/test.h"

#include "entrepot/ep.h"

#include <string.h>
#include <unistd.h>

#define ARG EP_ERR_ARGUMENT

static void expect(const char *what, ep_status status, ep_status want, const char *message)
{
    if (status != want || strcmp(ep_last_error(), message) != 0)
        fail_msg("%s: %s, '%s'; expected %s, '%s'", what, ep_status_string(status), ep_last_error(),
                 ep_status_string(want), message);
}

#define EXPECT(call, want, message) expect(#call, call, want, message)

/* ---------------------------------------------------------------- layout */

static void layout(void **state)
{
    (void)state;
    int64_t ids[6] = {0, 1, 2, -1, 3, 5};
    int32_t out[4], table[4] = {0, 1, 2, 1}, poison[4];
    memset(out, 0x5a, sizeof out);
    memcpy(poison, out, sizeof out);
    ep_tensor idx = ep_tensor_2d(ids, EP_I64, 3, 2), bad;
    EXPECT(ep_layout(NULL, 4, NULL, 2, 1, out, NULL, NULL, NULL), ARG,
           "ep_layout: topk_idx is NULL");
    EXPECT(ep_layout(&idx, 4, NULL, 2, 1, out, NULL, NULL, NULL), ARG,
           "ep_layout: topk_idx[2][1] is 5; it must be -1..3");
    EXPECT(ep_layout(&idx, 0, NULL, 2, 1, out, NULL, NULL, NULL), ARG,
           "ep_layout: num_experts is 0; it must be 1..65536");
    EXPECT(ep_layout(&idx, 65537, NULL, 2, 1, out, NULL, NULL, NULL), ARG,
           "ep_layout: num_experts is 65537; it must be 1..65536");
    EXPECT(ep_layout(&idx, 6, NULL, 0, 1, out, NULL, NULL, NULL), ARG,
           "ep_layout: num_ranks is 0; it must be 1..65536");
    EXPECT(ep_layout(&idx, 6, NULL, 4, 3, out, NULL, NULL, NULL), ARG,
           "ep_layout: ranks_per_node is 3; it must divide num_ranks, which is 4");
    EXPECT(ep_layout(&idx, 6, NULL, 4, 2, out, NULL, NULL, NULL), ARG,
           "ep_layout: num_experts is 6; without expert_rank it must be a multiple of the 4 ranks");
    ids[5] = 3;
    EXPECT(ep_layout(&idx, 4, table, 2, 1, out, NULL, NULL, NULL), ARG,
           "ep_layout: expert_rank[2] is 2; it must be 0..1");
    bad = idx;
    bad.dtype = EP_F32;
    EXPECT(ep_layout(&bad, 4, NULL, 2, 1, out, NULL, NULL, NULL), ARG,
           "ep_layout: topk_idx.dtype is F32 (3); it must be I32 or I64");
    bad = idx;
    bad.stride[1] = 3;
    EXPECT(ep_layout(&bad, 4, NULL, 2, 1, out, NULL, NULL, NULL), ARG,
           "ep_layout: topk_idx.stride[1] is 3; it must be 1");
    bad = idx;
    bad.data = NULL;
    EXPECT(ep_layout(&bad, 4, NULL, 2, 1, out, NULL, NULL, NULL), ARG,
           "ep_layout: topk_idx.data is NULL");
    assert_memory_equal(out, poison, sizeof out);
    assert_int_equal(ep_layout(&idx, 4, NULL, 2, 1, NULL, NULL, NULL, NULL), EP_OK);
}

/* ------------------------------------------------------------ capacities */

static void expect_shape(const ep_normal_shape *shape, const char *message)
{
    ep_normal_size size, poison;
    memset(&size, 0x5a, sizeof size);
    size.size = sizeof size;
    poison = size;
    expect("ep_normal_size_query", ep_normal_size_query(shape, &size), ARG, message);
    assert_memory_equal(&size, &poison, sizeof size);
}

static void sizes(void **state)
{
    (void)state;
    ep_normal_shape good = EP_NORMAL_SHAPE_INIT, s;
    ep_normal_size size = {.size = sizeof size};
    good.num_ranks = 4;
    good.num_tokens = 100;
    good.hidden = 128;
    good.topk = 2;
    good.num_experts = 8;
    assert_int_equal(ep_normal_size_query(&good, &size), EP_OK);
    expect_shape(NULL, "ep_normal_size_query: shape is NULL");
#define SHAPE(change, message) \
    s = good;                  \
    s.change;                  \
    expect_shape(&s, "ep_normal_size_query: " message)
    SHAPE(num_ranks = 0, "num_ranks is 0; it must be 1..65536");
    SHAPE(num_tokens = -1, "num_tokens is -1; it must be 0..2147483647");
    SHAPE(hidden = 4, "hidden is 4; it must be a positive multiple of 8");
    SHAPE(num_experts = 0, "num_experts is 0; it must be 1..65536");
    SHAPE(topk = 9, "topk is 9; it must be 1..8 (num_experts)");
    SHAPE(topk = 0, "topk is 0; it must be 1..8 (num_experts)");
    SHAPE(max_experts = -1, "max_experts is -1; it must be 0..65536");
    SHAPE(dtype = EP_I32, "dtype is 5; it must be BF16, F16, F32 or E4M3");
    SHAPE(scale = (ep_scale)7, "scale is 7; it must be 0..2 (ep_scale)");
    SHAPE(layout = (ep_row_layout)2, "layout is 2; it must be 0 or 1 (ep_row_layout)");
    SHAPE(expert_alignment = 0, "expert_alignment is 0; it must be at least 1");
    SHAPE(topk_bytes = 2, "topk_bytes is 2; it must be 4 or 8");
    EXPECT(ep_normal_size_query(&good, NULL), ARG, "ep_normal_size_query: size is NULL");
}

/* ---------------------------------------------------- objects of one rank */

static int bad_buffers(ep_group *group, void *argument)
{
    (void)argument;
    ep_buffer *buffer = (ep_buffer *)1;
    ep_buffer_config c = EP_BUFFER_CONFIG_INIT;
#define CONFIG(change, status, message)                                                 \
    c = (ep_buffer_config)EP_BUFFER_CONFIG_INIT;                                        \
    c.change;                                                                           \
    EXPECT(ep_buffer_create(group, &c, &buffer), status, "ep_buffer_create: " message); \
    assert_null(buffer)
    CONFIG(num_threads = -1, ARG, "num_threads is -1; it must be 0..256");
    CONFIG(num_threads = 257, ARG, "num_threads is 257; it must be 0..256");
    CONFIG(max_experts = -5, ARG, "max_experts is -5; it must be 1..65536, or 0 for 1024");
    CONFIG(verify = 2, ARG, "verify is 2; it must be 0 or 1");
    CONFIG(device = (ep_device_type)2, EP_ERR_ARGUMENT,
           "device is 2; it must be 0 or 1 (ep_device_type)");
    CONFIG(device_index = -1, EP_ERR_ARGUMENT, "device_index is -1; it must be at least 0");
    EXPECT(ep_buffer_create(NULL, NULL, &buffer), ARG, "ep_buffer_create: group is NULL");
    EXPECT(ep_buffer_create(group, NULL, NULL), ARG, "ep_buffer_create: buffer is NULL");
    return 0;
}

static int bad_uses(ep_group *group, void *argument)
{
    (void)argument;
    ep_buffer *buffer;
    void *memory = NULL, *inside;
    char text[160];
    ep_buffer_info info = {.size = sizeof info};
    assert_int_equal(ep_buffer_create(group, NULL, &buffer), EP_OK);
    EXPECT(ep_buffer_alloc(NULL, 8, &memory), ARG, "ep_buffer_alloc: buffer is NULL");
    EXPECT(ep_buffer_alloc(buffer, 8, NULL), ARG, "ep_buffer_alloc: memory is NULL");
    assert_int_equal(ep_buffer_alloc(buffer, 4096, &memory), EP_OK);
    inside = (char *)memory + 64;
    snprintf(text, sizeof text, "ep_buffer_free: memory is %p; it must come from ep_buffer_alloc",
             inside);
    EXPECT(ep_buffer_free(buffer, inside), ARG, text);
    snprintf(text, sizeof text, "ep_buffer_free: memory is %p; it must come from ep_buffer_alloc",
             (void *)text);
    EXPECT(ep_buffer_free(buffer, text), ARG, text);
    EXPECT(ep_buffer_free(NULL, memory), ARG, "ep_buffer_free: buffer is NULL");
    assert_int_equal(ep_buffer_free(buffer, memory), EP_OK);
    snprintf(text, sizeof text, "ep_buffer_free: memory is %p; it must come from ep_buffer_alloc",
             memory);
    EXPECT(ep_buffer_free(buffer, memory), ARG, text);
    assert_int_equal(ep_buffer_free(buffer, NULL), EP_OK);
    EXPECT(ep_buffer_query(NULL, &info), ARG, "ep_buffer_query: buffer is NULL");
    EXPECT(ep_buffer_query(buffer, NULL), ARG, "ep_buffer_query: info is NULL");
    EXPECT(ep_dispatch(NULL, NULL, NULL, NULL), ARG, "ep_dispatch: buffer is NULL");
    EXPECT(ep_combine(NULL, NULL, NULL), ARG, "ep_combine: buffer is NULL");
    EXPECT(ep_dispatch_backward(NULL, NULL, NULL), ARG, "ep_dispatch_backward: buffer is NULL");
    EXPECT(ep_combine_backward(NULL, NULL, NULL, NULL), ARG, "ep_combine_backward: buffer is NULL");
    EXPECT(ep_event_wait(NULL), ARG, "ep_event_wait: event is NULL");
    EXPECT(ep_event_query(NULL), ARG, "ep_event_query: event is NULL");
    EXPECT(ep_handle_query(NULL, NULL), ARG, "ep_handle_query: handle is NULL");
    ep_event_release(NULL);
    ep_handle_release(NULL);
    ep_recv_release(NULL);
    ep_buffer_destroy(NULL);
    ep_group_destroy(NULL);
    assert_null(ep_buffer_group(NULL));
    ep_buffer_destroy(buffer);
    return 0;
}

/* A window that may not grow enough: an error on every rank, before any row moves. */
static int small_window(ep_group *group, void *argument)
{
    (void)argument;
    static uint16_t x[64 * 1024];
    static int64_t ids[64];
    ep_buffer_config c = EP_BUFFER_CONFIG_INIT;
    ep_buffer *buffer;
    ep_recv recv = EP_RECV_INIT;
    ep_normal_shape shape = EP_NORMAL_SHAPE_INIT;
    ep_normal_size size = {.size = sizeof size};
    shape.num_ranks = ep_group_num_ranks(group);
    shape.hidden = 8;
    shape.num_experts = 2;
    TEST_OK(ep_normal_size_query(&shape, &size));
    c.window_max_bytes = size.control_bytes + 65536;
    TEST_OK(ep_buffer_create(group, &c, &buffer));
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(x, EP_BF16, 64, 1024);
    args.topk_idx = ep_tensor_2d(ids, EP_I64, 64, 1); /* all to expert 0 on rank 0 */
    args.num_experts = 2;
    TEST_CHECK(ep_dispatch(buffer, &args, &recv, NULL) == EP_ERR_CAPACITY);
    TEST_CHECK(strstr(ep_last_error(), "ep_dispatch: rank 0 has no room for its 128 rows: the "
                                       "window needs ") == ep_last_error());
    TEST_CHECK(strstr(ep_last_error(), "its bound (window_max_bytes) is "));
    TEST_CHECK(recv.handle == NULL && recv.owner == NULL);
    args.x.shape[1] = 8; /* this fits */
    TEST_OK(ep_dispatch(buffer, &args, &recv, NULL));
    ep_recv_release(&recv);
    ep_handle_release(recv.handle);
    ep_buffer_destroy(buffer);
    return 0;
}

static int buffers_that_differ(ep_group *group, void *argument)
{
    (void)argument;
    ep_buffer *buffer;
    ep_buffer_config c = EP_BUFFER_CONFIG_INIT;
    int rank = ep_group_rank(group);
    c.max_experts = rank ? 64 : 32;
    TEST_CHECK(ep_buffer_create(group, &c, &buffer) == EP_ERR_MISMATCH && !buffer);
    TEST_CHECK(strstr(ep_last_error(), "ep_buffer_create: max_experts differs: "));
    c.max_experts = 64;
    c.verify = rank;
    TEST_CHECK(ep_buffer_create(group, &c, &buffer) == EP_ERR_MISMATCH && !buffer);
    TEST_CHECK(strstr(ep_last_error(), "ep_buffer_create: verify differs: "));
    c.verify = 0;
    c.window_max_bytes = (size_t)(1 + rank) << 30;
    TEST_CHECK(ep_buffer_create(group, &c, &buffer) == EP_ERR_MISMATCH && !buffer);
    TEST_CHECK(strstr(ep_last_error(), "ep_buffer_create: window_max_bytes differs: "));
    c.window_max_bytes = 4096; /* too small for the control area, alike everywhere */
    TEST_CHECK(ep_buffer_create(group, &c, &buffer) == ARG && !buffer);
    TEST_CHECK(strstr(ep_last_error(), "ep_buffer_create: window_max_bytes is 4096; it must be at "
                                       "least "));
    c.window_max_bytes = 0;
    c.num_threads = rank ? -1 : 0;
    TEST_CHECK(ep_buffer_create(group, &c, &buffer) == (rank ? ARG : EP_ERR_ABORTED) && !buffer);
    TEST_CHECK(strstr(ep_last_error(), "num_threads is -1; it must be 0..256"));
    c.num_threads = 0;
    TEST_OK(ep_buffer_create(group, &c, &buffer));
    ep_buffer_destroy(buffer);
    return 0;
}

static void buffers(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("threads", 2, small_window, NULL), 0);
    assert_int_equal(test_run_groups("shm", 2, small_window, NULL), 0);
    assert_int_equal(test_run_groups("threads", 2, buffers_that_differ, NULL), 0);
    assert_int_equal(test_run_groups("shm", 2, buffers_that_differ, NULL), 0);
}

/* cmocka's checks need this thread: groups of one rank. */
static ep_group *lonely_group(void)
{
    ep_group *group = NULL;
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = 0;
    config.num_ranks = 1;
    assert_int_equal(ep_group_create(&config, &group), EP_OK);
    return group;
}

static void objects(void **state)
{
    (void)state;
    ep_group *group = lonely_group();
    bad_buffers(group, NULL);
    bad_uses(group, NULL);
    ep_group_destroy(group);
}

/* ---------------------------------------------------------------- groups */

static void groups(void **state)
{
    (void)state;
    ep_group *group = (ep_group *)1;
    ep_thread_world *world;
    ep_group_config g;
    char text[200];
    EXPECT(ep_group_create(NULL, NULL), ARG, "ep_group_create: group is NULL");
    EXPECT(ep_group_create(NULL, &group), ARG, "ep_group_create: config is NULL");
    assert_null(group);
#define GROUP(change, message)                 \
    g = (ep_group_config)EP_GROUP_CONFIG_INIT; \
    g.rank = 0;                                \
    g.num_ranks = 2;                           \
    g.change;                                  \
    EXPECT(ep_group_create(&g, &group), ARG, message)
    snprintf(text, sizeof text, "ep_group_create: config.size is 3; it can be %zu..%zu",
             sizeof g.size, sizeof g);
    GROUP(size = 3, text);
    GROUP(num_ranks = 0, "ep_group_create: num_ranks is 0; it can be 1..65536");
    GROUP(num_ranks = 65537, "ep_group_create: num_ranks is 65537; it can be 1..65536");
    GROUP(rank = 2, "ep_group_create: rank is 2; it can be 0..1");
    GROUP(rank = -2, "ep_group_create: rank is -2; it can be 0..1");
    GROUP(timeout_ms = -1, "ep_group_create: timeout_ms is -1; it can be 1..86400000");
    GROUP(timeout_ms = 86400001, "ep_group_create: timeout_ms is 86400001; it can be 1..86400000");
    GROUP(name = "a b", "ep_group_create: name is \"a b\"; it can be 1..63 of [A-Za-z0-9._-]");
    GROUP(name = "", "ep_group_create: name is \"\"; it can be 1..63 of [A-Za-z0-9._-]");
    EXPECT(ep_thread_world_create(0, &world), ARG,
           "ep_thread_world_create: num_ranks is 0; it can be 1..1024");
    EXPECT(ep_thread_world_create(1025, &world), ARG,
           "ep_thread_world_create: num_ranks is 1025; it can be 1..1024");
    EXPECT(ep_thread_world_create(2, NULL), ARG, "ep_thread_world_create: world is NULL");
    assert_int_equal(ep_thread_world_create(2, &world), EP_OK);
    g = (ep_group_config)EP_GROUP_CONFIG_INIT;
    g.world = world;
    g.rank = 0;
    g.num_ranks = 3;
    EXPECT(ep_group_create(&g, &group), ARG, "ep_group_create: num_ranks is 3; the world has 2");
    g.num_ranks = 2;
    g.rank = 2;
    EXPECT(ep_group_create(&g, &group), ARG, "ep_group_create: rank is 2; it can be 0..1");
    ep_thread_world_destroy(world);
    ep_thread_world_destroy(NULL);
}

static void group_calls(void **state)
{
    (void)state;
    ep_group *group = lonely_group();
    char byte = 0;
    EXPECT(ep_group_barrier(NULL), ARG, "ep_group_barrier: group is NULL");
    EXPECT(ep_group_allgather(NULL, &byte, &byte, 1), ARG, "ep_group_allgather: group is NULL");
    EXPECT(ep_group_allgather(group, NULL, &byte, 1), ARG, "ep_group_allgather: send is NULL");
    EXPECT(ep_group_allgather(group, &byte, NULL, 1), ARG, "ep_group_allgather: recv is NULL");
    EXPECT(ep_group_allgather(group, &byte, &byte, 1048577), ARG,
           "ep_group_allgather: bytes is 1048577; it can be 0..1048576");
    EXPECT(ep_group_set_timeout_ms(NULL, 5), ARG, "ep_group_set_timeout_ms: group is NULL");
    EXPECT(ep_group_set_timeout_ms(group, 0), ARG,
           "ep_group_set_timeout_ms: timeout_ms is 0; it can be 1..86400000");
    assert_int_equal(ep_group_rank(NULL), -1);
    assert_int_equal(ep_group_num_ranks(NULL), 0);
    assert_int_equal(ep_group_node(NULL), -1);
    assert_int_equal(ep_group_num_nodes(NULL), 0);
    assert_int_equal(ep_group_timeout_ms(NULL), 0);
    assert_string_equal(ep_group_transport(NULL), "");
    ep_group_destroy(group);
}

/* What is wrong on one rank, or differs between two: every rank is told. */
struct rank_config {
    ep_thread_world *world;
    const char *transport[2];
    int ranks_per_node[2];
    ep_status status[2];
    const char *message[2];
};

static int create_differing(int rank, int num_ranks, void *argument)
{
    const struct rank_config *c = argument;
    ep_group_config g = EP_GROUP_CONFIG_INIT;
    ep_group *group = NULL;
    (void)num_ranks;
    g.world = c->world;
    g.rank = rank;
    g.transport = c->transport[rank];
    g.ranks_per_node = c->ranks_per_node[rank];
    ep_status status = ep_group_create(&g, &group);
    TEST_CHECK(status == c->status[rank] && group == NULL);
    TEST_CHECK(strcmp(ep_last_error(), c->message[rank]) == 0);
    return 0;
}

static void groups_that_differ(void **state)
{
    (void)state;
    const char *differ = "ep_group_create: ranks_per_node is 2 on rank 0 but 1 on rank 1";
    struct rank_config cases[] = {
        {NULL, {NULL, NULL}, {2, 1}, {EP_ERR_MISMATCH, EP_ERR_MISMATCH}, {differ, differ}},
        {NULL,
         {NULL, NULL},
         {0, 3},
         {ARG, ARG},
         {"ep_group_create: rank 1: ranks_per_node is 3; it can be a divisor of num_ranks 2",
          "ep_group_create: ranks_per_node is 3; it can be a divisor of num_ranks 2"}},
        {NULL,
         {"warp", "warp"},
         {0, 0},
         {EP_ERR_UNSUPPORTED, EP_ERR_UNSUPPORTED},
         {"ep_group_create: transport \"warp\"; there are shm, threads and "
          "fault(NAME):KEY=VALUE,...",
          "ep_group_create: transport \"warp\"; there are shm, threads and "
          "fault(NAME):KEY=VALUE,..."}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(ep_thread_world_create(2, &cases[i].world), EP_OK);
        assert_int_equal(test_run_threads(2, create_differing, &cases[i]), 0);
        ep_thread_world_destroy(cases[i].world);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(layout),
        cmocka_unit_test(sizes),
        cmocka_unit_test(objects),
        cmocka_unit_test(buffers),
        cmocka_unit_test(groups),
        cmocka_unit_test(group_calls),
        cmocka_unit_test(groups_that_differ),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

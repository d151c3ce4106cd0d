/* SPDX-License-Identifier: MIT */
/*
 * The same inputs give the same bits, whatever the transport, the number of
 * threads, and however late or out of order notifications come. Expert outputs
 * here are any bits, NaNs of every kind included.
 * ctest-timeout: 300
 */
#include "support/on_device.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/tensors.h"
#include "support/test.h"

#include "entrepot/ep.h"

#include <stdlib.h>
#include <string.h>

enum { RANKS = 5, T = 23, H = 264, K = 4, E = 20, CALLS = 6 };

struct run {
    int num_threads, verify;
    uint64_t *hash; /* [RANKS], shared with processes */
};

static void add_bytes(uint64_t *hash, const void *memory, size_t bytes)
{
    const uint8_t *byte = memory;
    for (size_t i = 0; i < bytes; i++) /* FNV-1a */
        *hash = (*hash ^ byte[i]) * 0x100000001b3u;
}

static void add_tensor(uint64_t *hash, const ep_tensor *tensor)
{
    int64_t columns = tensor->ndim > 1 ? tensor->shape[1] : 1;
    add_bytes(hash, tensor->data,
              (size_t)(tensor->shape[0] * columns) * ep_dtype_size(tensor->dtype));
}

static void fill_bits(struct rng *rng, void *memory, size_t bytes)
{
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        uint64_t word = rng_next(rng);
        memcpy((char *)memory + i, &word, 8);
    }
}

static int call_once(ep_buffer *buffer, int rank, int number, uint64_t *hash)
{
    uint16_t *x = test_zeros(T * H, 2), *out = test_zeros(T * H, 2);
    float weights[T * K];
    int64_t ids[T * K];
    struct rng rng;
    ep_recv recv = EP_RECV_INIT;
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_combine_args back = EP_COMBINE_ARGS_INIT;
    rng_seed(&rng, (uint64_t)(number * RANKS + rank));
    fill_bits(&rng, x, T * H * 2);
    for (int i = 0; i < T * K; i++)
        weights[i] = (float)rng_unit(&rng);
    routing_fill(&rng, (enum routing)(number % 4), T, K, E, RANKS, ids);
    args.x = ep_tensor_2d(x, EP_BF16, T, H);
    args.topk_idx = ep_tensor_2d(ids, EP_I64, T, K);
    args.topk_weights = ep_tensor_2d(weights, EP_F32, T, K);
    args.num_experts = E;
    args.layout = (ep_row_layout)(number % 2);
    args.wire = number % 3 == 2 ? EP_WIRE_FP8 : EP_WIRE_INPUT;
    TEST_OK(ep_dispatch(buffer, &args, &recv, NULL));
    add_tensor(hash, &recv.x);
    add_tensor(hash, &recv.topk_idx);
    add_tensor(hash, &recv.topk_weights);
    add_tensor(hash, &recv.source_token);
    uint16_t *y = test_zeros(recv.x.shape[0] * H, 2);
    fill_bits(&rng, y, (size_t)recv.x.shape[0] * H * 2);
    back.y = ep_tensor_2d(y, EP_BF16, recv.x.shape[0], H);
    back.handle = recv.handle;
    back.bias[0] = args.x;
    back.out = ep_tensor_2d(out, EP_BF16, T, H);
    TEST_OK(ep_combine(buffer, &back, NULL));
    add_bytes(hash, out, T * H * 2);
    ep_recv_release(&recv);
    ep_handle_release(back.handle);
    free(x);
    free(y);
    free(out);
    return 0;
}

static int run_rank(ep_group *group, void *argument)
{
    const struct run *run = argument;
    int rank = ep_group_rank(group);
    ep_buffer *buffer;
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.num_threads = run->num_threads;
    config.verify = run->verify;
    config.window_max_bytes = (size_t)1 << 30;
    run->hash[rank] = 0xcbf29ce484222325u;
    TEST_OK(ep_buffer_create(group, &config, &buffer));
    for (int i = 0; i < CALLS; i++)
        if (call_once(buffer, rank, i, &run->hash[rank]))
            return 1;
    ep_buffer_destroy(buffer);
    return 0;
}

static void same_bits_every_time(void **state)
{
    (void)state;
    static const char *const transports[] = {"threads", "shm", "fault(threads):", "fault(shm):"};
    uint64_t *hash = test_shared_alloc(RANKS * sizeof *hash), first[RANKS];
    assert_non_null(hash);
    for (int i = 0; i < 24; i++) {
        char transport[120];
        struct run run = {i / 4 % 3, i % 8 >= 6, hash};
        if (test_device_wanted() && i % 4) /* faults of the host mean nothing to a device */
            continue;
        snprintf(transport, sizeof transport, "%s", transports[i % 4]);
        if (i % 4 >= 2)
            snprintf(transport, sizeof transport, "%sseed=%d,delay_us=%d,reorder=1,repeat=30",
                     transports[i % 4], i, 50 * (i % 7));
        assert_int_equal(test_run_groups(test_transport(transport), RANKS, run_rank, &run), 0);
        if (i == 0)
            memcpy(first, hash, sizeof first);
        if (memcmp(first, hash, sizeof first) != 0)
            fail_msg("over %s with %d threads, verify %d: other bits", transport, run.num_threads,
                     run.verify);
    }
    test_shared_free(hash, RANKS * sizeof *hash);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(same_bits_every_time)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}

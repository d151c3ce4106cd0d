/* SPDX-License-Identifier: MIT */
#include "support/cuda.h"

#include <stdlib.h>
#include <string.h>

static int look(int rank, int num_ranks, void *arg)
{
    int32_t count = 0;
    (void)rank, (void)num_ranks, (void)arg;
    return ep_device_count(EP_DEVICE_CUDA, &count) == EP_OK && count > 0 ? 0 : 1;
}

bool cuda_present(void)
{
    static int missing = -1;
    if (missing < 0)
        missing = test_run_processes(1, look, NULL);
    setenv("EP_TEST_DEVICE", "cuda", 1);
    return missing == 0;
}

/* BF16 values that differ between neighbours, tokens and ranks. */
static uint16_t value_of(int rank, int64_t token, int64_t h)
{
    return (uint16_t)(0x3c00 + (rank * 977 + token * 131 + h * 7) % 1021);
}

static void make_inputs(struct cuda_rank *c)
{
    uint16_t *x = test_zeros(c->num_tokens * c->hidden, 2);
    int64_t *ids = test_zeros(c->num_tokens * c->num_ranks, 8);
    for (int64_t i = 0; i < c->num_tokens * c->hidden; i++)
        x[i] = value_of(c->rank, i / c->hidden, i % c->hidden);
    for (int64_t i = 0; i < c->num_tokens * c->num_ranks; i++)
        ids[i] = i % c->num_ranks;
    c->x = tensor_new(EP_BF16, c->num_tokens, c->hidden, 0, x);
    c->ids = tensor_new_ids(EP_I64, c->num_tokens, c->num_ranks, 0, ids);
    free(x);
    free(ids);
}

int cuda_open(ep_group *group, size_t window_bytes, int verify, int64_t num_tokens, int64_t hidden,
              struct cuda_rank *c)
{
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    *c = (struct cuda_rank){.group = group, .num_tokens = num_tokens, .hidden = hidden};
    c->rank = ep_group_rank(group);
    c->num_ranks = ep_group_num_ranks(group);
    TEST_OK(test_device_enter(c->rank));
    config.window_bytes = window_bytes;
    config.window_max_bytes = (size_t)4 << 30;
    config.verify = verify;
    config.device = EP_DEVICE_CUDA;
    config.device_index = test_device.index;
    TEST_OK(ep_buffer_create(group, &config, &c->buffer));
    make_inputs(c);
    return 0;
}

void cuda_close(struct cuda_rank *c)
{
    ep_buffer_destroy(c->buffer);
    tensor_free(&c->x);
    tensor_free(&c->ids);
    test_device_leave();
}

ep_status cuda_dispatch(struct cuda_rank *c, int64_t worst, ep_handle *handle, ep_recv *recv,
                        ep_event **event)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_recv init = EP_RECV_INIT;
    *recv = init;
    args.x = c->x;
    args.handle = handle;
    if (!handle) {
        args.topk_idx = c->ids;
        args.num_experts = c->num_ranks;
    }
    args.num_worst_tokens = worst;
    args.stream = test_device.stream;
    return ep_dispatch(c->buffer, &args, recv, event);
}

ep_ll_dispatch_args cuda_ll_dispatch_args(const struct cuda_rank *rank)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    args.x = rank->x;
    args.topk_idx = rank->ids;
    args.max_tokens = rank->num_tokens;
    args.num_experts = rank->num_ranks;
    args.stream = test_device.stream;
    return args;
}

ep_combine_args cuda_combine_args(const struct cuda_rank *rank, const ep_recv *recv)
{
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = recv->x;
    args.handle = recv->handle;
    args.out = rank->x;
    args.stream = test_device.stream;
    return args;
}

void cuda_drop(ep_recv *recv)
{
    ep_handle *handle = recv->handle;
    ep_recv_release(recv);
    ep_handle_release(handle);
    recv->handle = NULL;
}

void cuda_read(const struct cuda_rank *c, void *to, const void *from, size_t bytes)
{
    (void)c;
    if (ep_device_copy(EP_DEVICE_CUDA, test_device.index, to, from, bytes, test_device.stream) !=
        EP_OK)
        abort();
}

int cuda_rows_differ(const struct cuda_rank *c, const ep_tensor *rows)
{
    int64_t count = c->num_ranks * c->num_tokens;
    uint16_t *got = test_zeros(count * c->hidden, 2);
    cuda_read(c, got, rows->data, (size_t)(count * c->hidden) * 2);
    int64_t i = 0;
    while (i < count * c->hidden &&
           got[i] == value_of((int)(i / c->hidden / c->num_tokens), i / c->hidden % c->num_tokens,
                              i % c->hidden))
        i++;
    free(got);
    if (i == count * c->hidden)
        return 0;
    fprintf(stderr, "rank %d: row %lld differs at %lld\n", c->rank, (long long)(i / c->hidden),
            (long long)(i % c->hidden));
    return 1;
}

bool cuda_says(const char *const *parts)
{
    for (; *parts; parts++)
        if (!strstr(ep_last_error(), *parts)) {
            fprintf(stderr, "no '%s' in: %s\n", *parts, ep_last_error());
            return false;
        }
    return true;
}

/* SPDX-License-Identifier: MIT */
/*
 * The smallest use: each rank sends its tokens to the ranks that own their
 * experts and gets the sums of the outputs back.   entrepot run -n 2 -- minimal
 */
#include <entrepot/ep.h>
#include <stdio.h>

#define TRY(call)        \
    if ((call) != EP_OK) \
    return fprintf(stderr, "%s\n", ep_last_error()), 1

int main(void)
{
    ep_group_config config = EP_GROUP_CONFIG_INIT; /* rank and size: from the environment */
    ep_group *group;
    ep_buffer *buffer;
    TRY(ep_group_create(&config, &group));
    TRY(ep_buffer_create(group, NULL, &buffer));

    float x[2][8] = {{1}, {2}}, out[2][8]; /* two tokens of eight channels on each rank */
    int topk_idx[2][2] = {{0, 1}, {2, 0}}; /* the router's choice: two of four experts each */
    ep_dispatch_args dispatch = EP_DISPATCH_ARGS_INIT;
    dispatch.x = ep_tensor_2d(x, EP_F32, 2, 8);
    dispatch.topk_idx = ep_tensor_2d(topk_idx, EP_I32, 2, 2);
    dispatch.num_experts = 4; /* with two ranks: 0 and 1 on rank 0, 2 and 3 on rank 1 */
    ep_recv recv = EP_RECV_INIT;
    TRY(ep_dispatch(buffer, &dispatch, &recv, NULL));

    float *rows = recv.x.data; /* one row per token that came; a model runs its MLPs here */
    for (int i = 0; i < recv.num_rows * 8; i++)
        rows[i] *= 10;

    ep_combine_args combine = EP_COMBINE_ARGS_INIT;
    combine.y = recv.x;
    combine.handle = recv.handle;
    combine.out = ep_tensor_2d(out, EP_F32, 2, 8);
    TRY(ep_combine(buffer, &combine, NULL)); /* each token: the sum over the ranks it went to */
    printf("rank %d received %d rows; its tokens were 1 and 2 and are %g and %g\n",
           ep_group_rank(group), (int)recv.num_rows, out[0][0], out[1][0]);

    ep_handle_release(recv.handle);
    ep_recv_release(&recv);
    ep_buffer_destroy(buffer);
    ep_group_destroy(group);
    return 0;
}

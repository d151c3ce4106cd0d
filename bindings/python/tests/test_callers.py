# SPDX-License-Identifier: MIT
"""How vLLM, SGLang and Megatron-LM call deep_ep, step by step."""

import numpy as np
import pytest
from arrays import ALL
from reference import World, bfloat16, calc_diff, dequantise

import deep_ep


def _weights_of(world, rank):
    return np.where(world.idx[rank] >= 0, world.weights[rank], 0).sum(axis=1, keepdims=True)


# ------------------------------------------------------------------- vLLM


def _decode(group, world, arrays):
    """Decode with two micro-batches: prepare_async of one overlaps with experts of the other;
    FP8 dispatch, hooks throughout, combine into the caller's output."""
    rank, most = group.rank, 24
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=most,
        hidden=world.hidden,
        num_ranks=group.size,
        num_experts=world.experts,
    )
    buffer = deep_ep.Buffer(
        group=group,
        num_nvl_bytes=1 << 20,
        num_rdma_bytes=hint,
        low_latency_mode=True,
        num_qps_per_rank=world.local,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
        enable_shrink=True,
    )
    scale = np.linspace(0.5, 2, world.experts, dtype=np.float32)
    mine = np.arange(rank * world.local, (rank + 1) * world.local)
    half = len(world.x[rank]) // 2
    batches = [slice(0, half), slice(half, None)]
    handles = [None, None]
    for _ in range(3):
        receivers, outputs = [], []
        for i, part in enumerate(batches):
            expert_x, counts, handles[i], _, hook = buffer.low_latency_dispatch(
                arrays.to(world.x[rank][part]),
                arrays.to(world.idx[rank][part]),
                most,
                world.experts,
                use_fp8=True,
                round_scale=False,
                use_ue8m0=False,
                async_finish=False,
                return_recv_hook=True,
            )
            receivers.append((hook, expert_x, counts))
        for i, (hook, (q, scales), counts) in enumerate(receivers):
            hook()
            assert int(arrays.back(counts).sum()) >= 0
            x = np.nan_to_num(dequantise(arrays.back(q), arrays.back(scales)))
            y = arrays.to((x * scale[mine][:, None, None]).astype(bfloat16))
            part = batches[i]
            out = arrays.to(np.zeros((len(world.x[rank][part]), world.hidden), bfloat16))
            _, _, receive = buffer.low_latency_combine(
                y,
                arrays.to(world.idx[rank][part]),
                arrays.to(world.weights[rank][part]),
                handles[i],
                async_finish=False,
                zero_copy=False,
                return_recv_hook=True,
                out=out,
            )
            outputs.append((receive, out, part))
        for receive, out, part in outputs:
            receive()
            w = np.where(world.idx[rank][part] >= 0, world.weights[rank][part], 0)
            factor = (w * scale[world.idx[rank][part]]).sum(axis=1, keepdims=True)
            want = world.x[rank][part].astype(np.float32) * factor
            assert calc_diff(arrays.back(out).astype(np.float32), want) < 9e-4
    mask = arrays.to(np.full(group.size, 9, np.int32))
    buffer.low_latency_query_mask_buffer(mask)
    assert arrays.back(mask).tolist() == [0] * group.size
    # Recovery after a fault, as vLLM does it: everything zeroed, masks cleaned.
    raw = buffer.get_local_buffer_tensor(dtype=_int8(arrays), use_rdma_buffer=True)
    assert len(raw) == hint
    raw[:4096] = 0
    buffer.low_latency_clean_mask_buffer()
    buffer.destroy()


def _int8(arrays):
    if arrays.name == "numpy":
        return np.int8
    import torch

    return torch.int8


@pytest.mark.parametrize("arrays", ALL)
def test_vllm_decode_with_hooks(run, arrays):
    run(2, _decode, World(2, 20, 512, 2, 8), arrays)


def _prefill(group, world, arrays):
    """High throughput: layout, dispatch with everything by keyword, combine, in place of out."""
    rank = group.rank
    buffer = deep_ep.Buffer(
        group=group,
        num_nvl_bytes=1 << 20,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=1,
        explicitly_destroy=True,
    )
    ids, weights = arrays.to(world.idx[rank]), arrays.to(world.weights[rank])
    per_rank, per_rdma, per_expert, in_rank, event = buffer.get_dispatch_layout(
        topk_idx=ids,
        num_experts=world.experts,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    )
    rows, expert_ids, expert_weights, counts, handle, event = buffer.dispatch(
        x=arrays.to(world.x[rank]),
        handle=None,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=ids,
        topk_weights=weights,
        expert_alignment=1,
        config=deep_ep.Buffer.get_dispatch_config(group.size),
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    )
    local = arrays.back(expert_ids)
    assert [int((local == e).sum()) for e in range(world.local)] == counts
    factor = np.where(local >= 0, arrays.back(expert_weights), 0).sum(axis=1, keepdims=True)
    y = (arrays.back(rows).astype(np.float32) * factor).astype(bfloat16)
    combined, _, _ = buffer.combine(
        x=arrays.to(y),
        handle=handle,
        topk_weights=None,
        config=deep_ep.Buffer.get_combine_config(group.size),
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    )
    want = world.x[rank].astype(np.float32) * _weights_of(world, rank)
    assert calc_diff(arrays.back(combined).astype(np.float32), want) < 2e-5
    buffer.destroy()


@pytest.mark.parametrize("arrays", ALL)
def test_vllm_prefill(run, arrays):
    run(3, _prefill, World(3, 50, 256, 2, 9), arrays)


# ----------------------------------------------------------------- SGLang


def _switch(group, world, arrays):
    """Prefill in normal mode with alignment 128 and events, decode in low-latency mode, the
    buffer cleaned at each switch, twice; 1024 tokens are legal."""
    rank, most = group.rank, 1024
    configs = {
        "normal_dispatch": {
            "num_sms": 16,
            "num_max_nvl_chunked_send_tokens": 8,
            "num_max_nvl_chunked_recv_tokens": 256,
        },
        "normal_combine": {
            "num_sms": 16,
            "num_max_nvl_chunked_send_tokens": 4,
            "num_max_nvl_chunked_recv_tokens": 256,
        },
    }
    dispatch_config = deep_ep.Config(**configs["normal_dispatch"])
    combine_config = deep_ep.Config(**configs["normal_combine"])
    nvl = max(
        c.get_nvl_buffer_size_hint(world.hidden * 2, group.size)
        for c in (dispatch_config, combine_config)
    )
    rdma = max(
        dispatch_config.get_rdma_buffer_size_hint(world.hidden * 2, group.size),
        deep_ep.Buffer.get_low_latency_rdma_size_hint(
            most, world.hidden, group.size, world.experts
        ),
    )
    buffer = deep_ep.Buffer(
        group,
        nvl,
        rdma,
        low_latency_mode=True,
        num_qps_per_rank=max(16, world.local),
        allow_mnnvl=True,
    )
    ids, weights = arrays.to(world.idx[rank]), arrays.to(world.weights[rank])
    for _ in range(2):
        _normal_layer(buffer, world, rank, arrays, ids, weights, dispatch_config, combine_config)
        assert buffer.low_latency_mode
        buffer.clean_low_latency_buffer(most, world.hidden, world.experts)
        for _ in range(2):
            _low_latency_layer(buffer, world, rank, arrays, ids, weights, most)


def _normal_layer(buffer, world, rank, arrays, ids, weights, dispatch_config, combine_config):
    previous = deep_ep.Buffer.capture()
    per_rank, per_rdma, per_expert, in_rank, previous = buffer.get_dispatch_layout(
        ids,
        world.experts,
        previous_event=previous,
        async_finish=True,
        allocate_on_comm_stream=previous is not None,
    )
    rows, local, row_weights, counts, handle, event = buffer.dispatch(
        arrays.to(world.x[rank]),
        topk_idx=ids,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=previous,
        async_finish=True,
        allocate_on_comm_stream=True,
        expert_alignment=128,
        config=dispatch_config,
    )
    event.current_stream_wait()
    assert all(count % 128 == 0 for count in counts)
    factor = np.where(arrays.back(local) >= 0, arrays.back(row_weights), 0).sum(1, keepdims=True)
    y = arrays.to((arrays.back(rows).astype(np.float32) * factor).astype(bfloat16))
    combined, _, event = buffer.combine(
        y,
        handle,
        async_finish=True,
        previous_event=deep_ep.Buffer.capture(),
        allocate_on_comm_stream=True,
        config=combine_config,
    )
    event.current_stream_wait()
    want = world.x[rank].astype(np.float32) * _weights_of(world, rank)
    assert calc_diff(arrays.back(combined).astype(np.float32), want) < 2e-5


def _low_latency_layer(buffer, world, rank, arrays, ids, weights, most):
    recv, counts, handle, event, hook = buffer.low_latency_dispatch(
        arrays.to(world.x[rank]),
        ids,
        most,
        world.experts,
        use_fp8=True,
        async_finish=True,
        return_recv_hook=False,
        round_scale=True,
        use_ue8m0=True,
    )
    event.current_stream_wait()
    q, packed = arrays.back(recv[0]), np.ascontiguousarray(arrays.back(recv[1]))
    scales = (packed.view(np.uint8).astype(np.uint32) << 23).view(np.float32)
    y = arrays.to(np.nan_to_num(dequantise(q, scales)).astype(bfloat16))
    combined, event, hook = buffer.low_latency_combine(
        x=y,
        topk_idx=ids,
        topk_weights=weights,
        handle=handle,
        async_finish=True,
        return_recv_hook=False,
    )
    event.current_stream_wait()
    want = world.x[rank].astype(np.float32) * _weights_of(world, rank)
    assert calc_diff(arrays.back(combined).astype(np.float32), want) < 9e-4


@pytest.mark.parametrize("arrays", ALL)
def test_sglang_switches_modes(run, arrays):
    run(2, _switch, World(2, 30, 512, 2, 4), arrays)


# ------------------------------------------------------------ Megatron-LM


def _asynchronous(group, world, arrays):
    """Forward and backward of a layer by hand: combine brings gradients back, a cached dispatch
    sends them out; asynchronous, allocating on the communication stream."""
    rank = group.rank
    buffer = deep_ep.Buffer(group, 1 << 20, 0)

    def event():
        return deep_ep.EventOverlap(deep_ep.utils.EventHandle())

    common = {"async_finish": True, "allocate_on_comm_stream": True}
    ids, probs = arrays.to(world.idx[rank]), arrays.to(world.weights[rank])
    per_rank, per_rdma, per_expert, in_rank, after = buffer.get_dispatch_layout(
        ids, world.experts, previous_event=event(), **common
    )
    rows, local, row_probs, counts, handle, after = buffer.dispatch(
        arrays.to(world.x[rank]),
        topk_idx=ids,
        topk_weights=probs,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=after,
        **common,
    )
    after.current_stream_wait()
    out, _, after = buffer.combine(rows, handle=handle, previous_event=event(), **common)
    after.current_stream_wait()
    copies = world.in_rank(rank).sum(axis=1, keepdims=True)
    want = world.x[rank].astype(np.float32) * copies
    assert calc_diff(arrays.back(out).astype(np.float32), want) < 5e-6

    grad_out = world.x[rank][:, ::-1].copy()
    grad_rows, _, _, _, _, after = buffer.dispatch(
        arrays.to(grad_out), handle=handle, previous_event=event(), **common
    )
    after.current_stream_wait()
    sent = [world.x[s][:, ::-1][t] for s, t in world.rows(rank)]
    want = np.array(sent, bfloat16).reshape(-1, world.hidden)
    np.testing.assert_array_equal(arrays.back(grad_rows).view(np.uint16), want.view(np.uint16))
    grad_x, grad_probs, after = buffer.combine(
        grad_rows,
        handle,
        topk_weights=arrays.to(arrays.back(row_probs).astype(np.float32)),
        previous_event=event(),
        **common,
    )
    after.current_stream_wait()
    assert (
        calc_diff(arrays.back(grad_x).astype(np.float32), grad_out.astype(np.float32) * copies)
        < 5e-6
    )
    kept = np.where(world.idx[rank] >= 0, world.weights[rank], 0)
    np.testing.assert_array_equal(arrays.back(grad_probs), kept)


@pytest.mark.parametrize("arrays", ALL)
def test_megatron_forward_and_backward(run, arrays):
    run(2, _asynchronous, World(2, 40, 128, 3, 8), arrays)


def _fused(group, world, folder, arrays):
    """The same as autograd functions over a gloo process group, as Megatron-LM wraps them."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=group.rank, world_size=group.size
    )
    pg = dist.group.WORLD
    buffer = deep_ep.Buffer(pg, 1 << 20, 0)
    assert buffer.group is pg and buffer.group_size == pg.size()

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, ids, probs):
            layout = buffer.get_dispatch_layout(ids, world.experts)
            rows, local, row_probs, counts, handle, _ = buffer.dispatch(
                x,
                topk_idx=ids,
                topk_weights=probs,
                num_tokens_per_rank=layout[0],
                num_tokens_per_rdma_rank=layout[1],
                is_token_in_rank=layout[3],
                num_tokens_per_expert=layout[2],
            )
            ctx.handle = handle
            return rows, local, row_probs, torch.tensor(counts), handle

        @staticmethod
        def backward(ctx, grad_rows, _local, grad_probs, _counts, _handle):
            grad_x, grad, _ = buffer.combine(
                grad_rows.contiguous(), ctx.handle, topk_weights=grad_probs.float()
            )
            return grad_x, None, grad

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, handle):
            ctx.handle = handle
            return buffer.combine(y, handle=handle)[0]

        @staticmethod
        def backward(ctx, grad):
            return buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None

    to = arrays.to
    x = to(world.x[group.rank].astype(np.float32)).requires_grad_()
    probs = to(world.weights[group.rank]).requires_grad_()
    ids = to(world.idx[group.rank])
    rows, local, row_probs, _, handle = Dispatch.apply(x, ids, probs)
    y = rows * (row_probs * (local >= 0)).sum(dim=1, keepdim=True)
    loss = Combine.apply(y, handle).square().sum()
    loss.backward()

    x2, probs2 = x.detach().clone().requires_grad_(), probs.detach().clone().requires_grad_()
    (x2 * (probs2 * (ids >= 0)).sum(dim=1, keepdim=True)).square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probs.grad, probs2.grad, rtol=1e-4, atol=1e-4)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("arrays", ALL[1:])
def test_megatron_autograd_over_gloo(processes, arrays, tmp_path):
    import torch  # noqa: F401  imported before forking, once for all ranks

    processes(2, _fused, World(2, 24, 64, 2, 4), str(tmp_path), arrays)

# SPDX-License-Identifier: MIT
"""Tuning configurations, as DeepEP's callers make them.

DeepEP moves rows through ring buffers, whose chunks these numbers size.
Entrepot writes rows to their final place at once, so the chunk sizes only say
how much window to have ready: `num_max_nvl_chunked_recv_tokens` rows of each
rank for each of num_sms / 2 channels. `num_sms` bounds the SMs of a call on
CUDA tensors.
"""

from typing import Any

from entrepot import ArgumentError, normal_size


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise ArgumentError(f"Config: {text}")


class Config:
    """Numbers of a dispatch or combine; all are checked as DeepEP checks them."""

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ):
        nvl_send, nvl_recv = num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens
        _require(num_sms >= 0, f"num_sms is {num_sms}; it must be at least 0")
        _require(
            0 < nvl_send < nvl_recv,
            f"num_max_nvl_chunked_send_tokens is {nvl_send}; it must be 1..{nvl_recv - 1} "
            "(below num_max_nvl_chunked_recv_tokens)",
        )
        _require(rdma_send > 0, f"num_max_rdma_chunked_send_tokens is {rdma_send}; it must be > 0")
        rdma_recv = -(-rdma_recv // rdma_send) * rdma_send
        _require(
            2 * rdma_send <= rdma_recv,
            f"num_max_rdma_chunked_send_tokens is {rdma_send}; it must be at most half of "
            f"num_max_rdma_chunked_recv_tokens, {rdma_recv}",
        )
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = nvl_send
        self.num_max_nvl_chunked_recv_tokens = nvl_recv
        self.num_max_rdma_chunked_send_tokens = rdma_send
        self.num_max_rdma_chunked_recv_tokens = rdma_recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of window that hold, without growing, the rows described above.

        Args:
            hidden_bytes: bytes of one row.
            num_ranks: any number of ranks.
        """
        tokens = max(self.num_sms // 2, 1) * self.num_max_nvl_chunked_recv_tokens
        size = normal_size(
            num_ranks=num_ranks,
            num_tokens=tokens,
            hidden=max(-(-hidden_bytes // 16) * 8, 8),  # as bfloat16, a multiple of 8
            topk=_TOPK,
            num_experts=_TOPK * num_ranks,
        )
        return -(-size.worst_bytes // 128) * 128

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: ranks of one host need no second buffer, however many they are."""
        _require(
            hidden_bytes >= 0 and num_ranks > 0,
            f"hidden_bytes is {hidden_bytes} and num_ranks {num_ranks}; they must be >= 0 and > 0",
        )
        return 0

    def __repr__(self) -> str:
        return "Config({})".format(", ".join(f"{k}={v}" for k, v in vars(self).items()))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Config) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


_TOPK = 16  # ids and weights of a row that the hint has room for

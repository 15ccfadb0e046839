"""What runs in torch on a device reads nothing back: tensors without values have nothing to read."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.gate import GateRule, Replicas, gate_and_place
from moe_kernels.mla.expanded import mla_expanded_batched
from moe_kernels.permute import permute, unpermute
from moe_kernels.quant import quantize_blocks, quantize_rows
from torch import Tensor

RULE = GateRule(4, 8, 4, "sigmoid", "top2_sum", float("-inf"), normalise=True, scale=2.5)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("alignment", [1, 8])
def test_permute_has_the_worst_case_of_rows(alignment: int) -> None:
    slots = meta(9, 3, dtype=torch.int64)
    moved = permute(meta(9, 256), slots, 5, alignment=alignment)
    assert moved.data.shape == (9 * 3 + (alignment - 1) * 5, 256)
    fp8 = permute(quantize_rows(meta(9, 256), ue8m0=True), slots, 5, alignment=alignment, scale_layout="mn")
    assert fp8.scale is not None and fp8.scale.shape == (len(moved.data), 2)
    assert unpermute(moved.data, moved.row_of, meta(9, 3)).shape == (9, 256)


def test_gate() -> None:
    replicas = Replicas(meta(65, 2, dtype=torch.int64), meta(65, dtype=torch.int64), turn=1)
    counts, real = meta(65, dtype=torch.int64), meta(1, dtype=torch.int64)
    placed = gate_and_place(
        meta(40, 64), rule=RULE, bias=meta(64), num_shared=1, num_real=real, replicas=replicas, counts_=counts
    )
    assert placed.slots.shape == (40, 5)


def test_blocks() -> None:
    assert quantize_blocks(meta(2, 130, 200)).scale.shape == (2, 2, 2)


@pytest.mark.parametrize("start", [0, 5])
def test_expanded_attention(start: int) -> None:
    rows, weight = meta(2, start + 3, 80, dtype=torch.bfloat16), meta(4, 32, 64, dtype=torch.bfloat16)
    query = meta(2, 3, 4, 48, dtype=torch.bfloat16)
    out = mla_expanded_batched(query, rows[..., :64], rows[..., 64:], weight, weight, scale=1.0, start=start)
    assert out.shape == (2, 3, 4, 32)

"""Weights reordered once into the blocked layout that oneDNN multiplies with. M rows, K input width, N output width.

oneDNN is also what the invariant mode runs on: over the shapes, positions and memory offsets that the tests cover, a
row of its products does not depend on its place in a tile nor on memory alignment; that of fp32 `torch.mm` (MKL) does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[N, K]` in oneDNN's layout; it holds as many bytes as the plain one (N rounded up to 64)."""

    data: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return int(torch.ops.mkldnn._nbytes(self.data))

    def dense(self) -> Tensor:
        """The plain `[N, K]` weight again, exactly."""
        return self.data.to_dense()


Weight = Tensor | PackedWeight


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies `dtype` on this device."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    match dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case _:
            return False


def pack(w: Tensor, *, rows: int = 16) -> PackedWeight:
    """Reorder `w [N, K]` for products of about `rows` rows; the caller has asked `has_onednn`."""
    data = torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), rows)
    return PackedWeight(data, (w.shape[0], w.shape[1]), w.dtype)


def worth_packing(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a weight of this shape multiplies 1..16 rows faster packed (docs/kernels_cpu.md has the table).

    A packed call costs 12 us however small the weight, a plain one 15 us in bf16 and 3 us in fp32.
    """
    return has_onednn(device, dtype) and shape[0] * shape[1] >= 65536


def onednn_linear(x: Tensor, w: Weight) -> Tensor:
    """`x [M, K] @ w [N, K]^T -> [M, N]` by oneDNN."""
    data = w.data if isinstance(w, PackedWeight) else w
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, data, None, "none", [], "")
    return y


def cat_rows(parts: Iterable[Tensor]) -> Tensor:
    """One tensor of all rows, without a copy where there is one part only."""
    rows = list(parts)
    return rows[0] if len(rows) == 1 else torch.cat(rows)

"""FP8 weights with block scales, as DeepSeek-V3's checkpoints store them: the way there (loading has the way back)."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from moe_runtime.loading.fp8 import Block, scale_shape

E4M3_MAX: Final = 448.0


def quantize(weight: Tensor, *, block: Block) -> tuple[Tensor, Tensor]:
    """`weight [N, K]` as `(data [N, K] float8_e4m3fn, scales fp32)`: the largest weight of a block becomes 448."""
    rows, columns = weight.shape
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.ones(scale_shape((rows, columns), block))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            largest = weight[part].abs().max().float()
            if largest > 0:
                scales[i, j] = largest / E4M3_MAX
            data[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return data, scales

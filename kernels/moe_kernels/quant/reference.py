"""Oracle of quantisation: plain loops over blocks, fp64 but for the scale, which is fp32 by contract."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def quantize_reference(x: Tensor, block: tuple[int, int], *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """`x [R, K]` -> (values `[R, K] fp64` as e4m3 holds them, times their scale; scale `[⌈R/b0⌉, ⌈K/b1⌉] fp32`)."""
    rows, columns = x.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    out = torch.empty(rows, columns, dtype=torch.float64)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            part = x[here].float()
            amax = float(part.abs().max()) if bool(part.isfinite().all()) else math.inf
            unit = torch.tensor(max(amax, torch.tensor(1e-4).item())) / 448
            if ue8m0 and math.isfinite(amax):
                unit = torch.tensor(2.0 ** math.ceil(math.log2(float(unit))))
            scale[i, j] = unit
            held = (part * (1 / unit)).to(torch.float8_e4m3fn)
            out[here] = held.double() * unit.double()
    return out, scale

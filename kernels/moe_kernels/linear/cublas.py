"""Block-scaled fp8 products by cuBLASLt, through torch. M rows, K input width, N output width, G = K / 128.

Contract (torch 2.10 and newer, `aten/src/ATen/native/cuda/ScaledBlas.cpp`; cuBLAS 12.9, "scaling factors layouts"):
Hopper alone; x `[M, K]` with scales `[M, G]` of strides (1, M); w^T `[K, N]` column-major with scales
`[G up to a multiple of 4, ceil(N/128)]`, the first dim adjacent; M a multiple of 4, N of 16; bf16 out.
Tested against a double that enforces it; not yet run on hardware.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_kernels.backends import require
from moe_kernels.scaled import BLOCK, BlockScaled

ROW_UNIT: Final = 4
"""Rows come in whole fours: a column of x's scales then starts at a multiple of 16 bytes."""


def scaled_product(x: BlockScaled, w: BlockScaled) -> Tensor:
    """`x [M, K] @ w [N, K]^T -> [M, N] bf16`; M a multiple of 4, x's scales with adjacent rows.

    Raises KernelError on a device, torch or shape that cuBLASLt does not take.
    """
    rows, n, blocks = x.shape[0], w.shape[0], w.scale.shape[1]
    check_device(x.data)
    remedy = "take backend='triton'"
    require(
        w.shape[1] % (4 * BLOCK) == 0 and n % 16 == 0,
        f"linear: w is {tuple(w.shape)}; for cublas K must be a multiple of {4 * BLOCK} and N of 16; {remedy}",
    )
    require(
        rows % ROW_UNIT == 0 and x.scale.stride() == (1, rows),
        f"linear: x has {rows} rows and scales of strides {x.scale.stride()}; for cublas rows must be a multiple of "
        f"{ROW_UNIT} and strides (1, {rows}); quantise padded rows with scale_layout='mn'",
    )
    require(
        w.scale.stride() == (blocks, 1),
        f"linear: w's scales have strides {w.scale.stride()}; they must be ({blocks}, 1); call .contiguous()",
    )
    torch_module: Any = F  # its stubs lack scaled_mm in some of the versions that have it
    recipe = torch_module.ScalingType
    product: Tensor = torch_module.scaled_mm(
        x.data,
        w.data.t(),
        x.scale,
        recipe.BlockWise1x128,
        w.scale.t(),
        recipe.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return product


def check_device(x: Tensor) -> None:
    """Raise KernelError where cuBLASLt has no such product for `x`: it is Hopper's alone."""
    remedy = "take backend='triton' or 'torch'"
    require(x.is_cuda, f"linear: x is on {x.device}; cublas needs a CUDA device; {remedy}")
    require(hasattr(F, "scaled_mm"), f"linear: torch {torch.__version__} has no scaled_mm (2.10 brought it); {remedy}")
    capability = torch.cuda.get_device_capability(x.device)
    require(
        capability == (9, 0),
        f"linear: {x.device} has compute capability {capability[0]}.{capability[1]}; cublas multiplies 1x128 by "
        f"128x128 blocks on 9.0 (Hopper) alone; {remedy}",
    )

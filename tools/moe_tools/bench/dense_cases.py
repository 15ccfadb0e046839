"""Dense fp8 products of DeepSeek-V3 (attention's projections, a shared expert's first): ours beside the libraries'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from moe_kernels.errors import KernelError
from moe_kernels.grouped_gemm import deep_gemm
from moe_kernels.linear import cublas, linear
from moe_kernels.quant import dequantize
from torch.nn import functional as F

from moe_tools.bench.floor import linear_work
from moe_tools.bench.gpu_cases import Case
from moe_tools.bench.random_weights import HIDDEN, scaled_matrix

SHAPES = (("q_b", 24_576, 1536), ("o_proj", HIDDEN, 16_384), ("gate and up", 4096, HIDDEN))
"""(name, N, K)."""


def dense_cases(device: str = "cuda") -> Iterator[Callable[[], Case]]:
    """Decode's 128 tokens, where weights bound the time, and a prefill chunk of 4096, where arithmetic does."""
    for tokens in (128, 4096):
        for name, n, k in SHAPES:
            yield partial(dense, name, tokens, n, k, device)


def dense(name: str, tokens: int, n: int, k: int, device: str) -> Case:
    """bf16 rows in and out, their quantisation included; `cuBLAS bf16` multiplies dequantised weights."""
    w = scaled_matrix(n, k, device)
    x = torch.randn(tokens, k, dtype=torch.bfloat16, device=device)
    plain = dequantize(w, block=(128, 128)).to(torch.bfloat16)
    ours: dict[str, Callable[[], object]] = {
        library: partial(linear, x, w, backend=library) for library in ("triton", *_libraries(x))
    }
    return Case(
        f"linear fp8 {name}",
        {"tokens": tokens, "N": n, "K": k},
        linear_work(tokens, n=n, k=k, weight_bytes=1.0, arithmetic="fp8"),
        {**ours, "cuBLAS bf16": partial(F.linear, x, plain)},
    )


def _libraries(x: torch.Tensor) -> Iterator[str]:
    """Those that can be called here."""
    for name, check in (("cublas", partial(cublas.check_device, x)), ("deep_gemm", deep_gemm.library)):
        try:
            check()
        except KernelError:
            continue
        yield name

"""Which backend serves an operation: `torch` on a CPU, `triton` on a CUDA device, never a silent change of mind."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import torch
from torch import Tensor

from moe_kernels.errors import KernelError

OLDEST_TRITON: Final = (3, 6)
OLDEST_CAPABILITY: Final = (9, 0)
"""Hopper: what the kernels' configurations are made and compiled for."""


def default_backend(device: torch.device) -> str:
    """`triton` on a CUDA device, else `torch`: the one place that says so.

    Whatever takes another way on a GPU asks here, as `backends.default_backend`, so that a test can replace it and run
    everything through Triton's interpreter on CPU tensors.
    """
    return "triton" if device.type == "cuda" else "torch"


def choose_backend(x: Tensor, wanted: str | None, *, op: str, offered: tuple[str, ...] = ("torch", "triton")) -> str:
    """`wanted`, or the default for `x`'s device. Raises KernelError where that backend is not there or cannot run."""
    if wanted is None:
        wanted = default_backend(x.device)
    if wanted not in offered:
        raise KernelError(f"{op}: backend={wanted!r} is not there; choose one of {', '.join(offered)}")
    if wanted == "triton":
        check_triton(x, op=op)
    return wanted


def check_triton(x: Tensor, *, op: str) -> None:
    """Raise KernelError where Triton's kernels cannot run on `x`: device, architecture or version."""
    if problem := _problem(x.device):
        raise KernelError(f"{op}: {problem}")


@cache
def _problem(device: torch.device) -> str | None:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed; `pip install moe-runtime[gpu]`, or take backend='torch'"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {found} is too old; install triton>={oldest}, or take backend='torch'"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            seen = ".".join(map(str, capability))
            return f"{device} has compute capability {seen}; it must be 9.0 (Hopper) or newer; take backend='torch'"
    elif not interpreted():
        return f"x is on {device}; triton needs a CUDA device (or its interpreter, in tests); take backend='torch'"
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors (`TRITON_INTERPRET=1` before its import)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def require(holds: bool, message: str) -> None:
    """Raise KernelError with `message` ("op: tensor is …; it must be …; do …") unless `holds`."""
    if not holds:
        raise KernelError(message)

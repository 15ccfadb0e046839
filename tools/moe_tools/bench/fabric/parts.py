"""The parts of `bench fabric`: what each needs, how long it may take, and what it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Final

import torch

from moe_runtime.dispatch.missing import Missing

NEEDED_NCCL: Final = (2, 30, 4)
"""By DeepEP's V2."""
WHEELS: Final = ("greenlet", "hydra", "omegaconf", "safetensors", "tokenizers")


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of the table. `bytes`: payload of one call."""

    op: str
    us: float
    low_us: float
    high_us: float
    bytes: int
    shape: Mapping[str, int | str] = field(default_factory=dict)
    graph: bool = False
    checked: str = ""
    """What was compared with what."""

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.us * 1e6


@dataclass(frozen=True, slots=True)
class Part:
    """`obstacle`: why it cannot run here, or None. `run` yields what it measured and raises where something is wrong.

    `environment`: variables of its process beside ours.
    """

    name: str
    obstacle: Callable[[], str | None]
    run: Callable[[], Iterator[Measured]]
    deadline_s: float
    environment: Mapping[str, str] = field(default_factory=dict)


def parts() -> tuple[Part, ...]:
    """In the order in which they run."""
    overlapping = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    return (
        Part("nccl", no_gpu, _nccl, 90.0),
        Part("symmetric-2", _no_symmetric_memory, partial(_symmetric, 2), 60.0, overlapping),
        Part("symmetric-4", _no_symmetric_memory, partial(_symmetric, 4), 60.0, overlapping),
        Part("steps", _no_steps, _steps, 120.0),
        Part("nvshmem", _no_nvshmem, _nvshmem, 60.0),
        Part("torch-splits", _no_splits, _splits, 45.0),
        Part("deep_ep", _no_deep_ep, _deep_ep, 60.0, {"EP_DISABLE_GIN": "1", "EP_AVOID_RECORD_STREAM": "1"}),
    )


def no_gpu() -> str | None:
    """Why nothing can run here."""
    return None if torch.cuda.is_available() else "needs a CUDA device, and torch sees none here"


def _no_symmetric_memory() -> str | None:
    from moe_tools.bench.fabric.symmetric import lacks

    return lacks() or no_gpu()


def _symmetric(world: int) -> Iterator[Measured]:
    from moe_tools.bench.fabric.symmetric import run

    return run(world)


def _no_steps() -> str | None:
    missing = [name for name in WHEELS if find_spec(name) is None]
    return f"needs {', '.join(missing)}: make gpu-wheels fetches them" if missing else no_gpu()


def _steps() -> Iterator[Measured]:
    from moe_tools.bench.fabric.steps import run

    return run()


def _nccl() -> Iterator[Measured]:
    from moe_tools.bench.fabric.exercise import collectives

    return collectives()


def _no_nvshmem() -> str | None:
    from moe_runtime.dispatch.nvshmem.detect import find

    return str(found) if isinstance(found := find(), Missing) else no_gpu()


def _nvshmem() -> Iterator[Measured]:
    from moe_tools.bench.fabric.exercise import nvshmem

    return nvshmem()


def _no_splits() -> str | None:
    from moe_runtime.dispatch.symm_mem.detect import find

    return str(found) if isinstance(found := find(), Missing) else no_gpu()


def _splits() -> Iterator[Measured]:
    from moe_tools.bench.fabric.exercise import torch_splits

    return torch_splits()


def _no_deep_ep() -> str | None:
    from moe_runtime.dispatch.deep_ep.detect import find

    found = find()
    if isinstance(found, Missing):
        return str(found)
    if 2 not in found.generations:
        return f"{found}: only V2 runs with one rank"
    if no_gpu() is None and nccl_version() < NEEDED_NCCL:
        return f"DeepEP's V2 needs NCCL {show_version(NEEDED_NCCL)}; torch has {show_version(nccl_version())}"
    return no_gpu()


def _deep_ep() -> Iterator[Measured]:
    from moe_tools.bench.fabric.exercise import deep_ep

    return deep_ep()


def nccl_version() -> tuple[int, ...]:
    """Of the NCCL that torch has loaded."""
    found: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return found


def show_version(numbers: tuple[int, ...]) -> str:
    """2.30.4"""
    return ".".join(map(str, numbers))

"""Whether the installed torch has the all-to-all of expert splits, and a NVSHMEM to run it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import torch

from moe_runtime.dispatch.missing import Missing

INSTALL: Final = (
    "Install a CUDA build of torch 2.10 or newer with the nvidia-nvshmem wheel that it asks for, "
    "or set dispatch=all_to_all"
)
SIGNATURES: Final = (
    (
        "all_to_all_vdev_2d",
        ("input", "out", "in_splits", "out_splits_offsets", "group_name", "major_align"),
    ),
    ("all_to_all_vdev_2d_offset", ("input", "out", "in_splits_offsets", "out_splits_offsets", "group_name")),
)
"""Of the operators; earlier versions of the same names took other arguments."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What the dispatcher calls; a private part of torch, so it is kept in one place."""

    empty: Callable[..., Any]
    rendezvous: Callable[..., Any]
    set_backend: Callable[[str], None]
    all_to_all_vdev_2d: Callable[..., None]
    all_to_all_vdev_2d_offset: Callable[..., None]


@dataclass(frozen=True, slots=True)
class Library:
    """torch's symmetric memory as it was found."""

    module: Calls
    version: str
    """Of torch."""

    def __str__(self) -> str:
        return f"torch {self.version} with NVSHMEM"


def find() -> Library | Missing:
    """Look at torch's operators and ask whether NVSHMEM can be loaded. Needs no GPU."""
    version = torch.__version__
    for name, arguments in SIGNATURES:
        found = _arguments(name)
        if found != arguments:
            seen = f"has {name}({', '.join(found)})" if found else f"lacks {name}"
            return Missing(f"torch {version} {seen}; it must be {name}({', '.join(arguments)})", INSTALL)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"symm_mem::{name}", "CUDA"):
            return Missing(f"torch {version} is built without NVSHMEM", INSTALL)
    memory = import_module("torch.distributed._symmetric_memory")
    if not memory.is_nvshmem_available():
        return Missing(f"torch {version} finds no libnvshmem_host.so.3", INSTALL)
    return Library(calls_of(memory, torch.ops.symm_mem), version)


def calls_of(memory: Any, ops: Any) -> Calls:
    """Of `torch.distributed._symmetric_memory` and `torch.ops.symm_mem`."""
    return Calls(
        memory.empty,
        memory.rendezvous,
        memory.set_backend,
        ops.all_to_all_vdev_2d,
        ops.all_to_all_vdev_2d_offset,
    )


def _arguments(name: str) -> tuple[str, ...]:
    """Of an operator of symm_mem; nothing where it is not there. Its schemas are registered by torch's own import."""
    import_module("torch.distributed._symmetric_memory")
    try:
        schema = getattr(torch.ops.symm_mem, name).default._schema
    except AttributeError:
        return ()
    return tuple([argument.name for argument in schema.arguments])

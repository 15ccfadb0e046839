"""One dispatcher by name; a backend's imports happen here, when it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final, Protocol

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Dispatcher, Phase
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError, nearest

COLLECTIVES: Final = ("local", "all_to_all", "all_gather")
"""Backends over any communicator."""
FABRICS: Final = ("deep_ep", "nvshmem", "symm_mem")
"""Backends over libraries of their own, for processes with a GPU each."""
BACKENDS: Final = (*COLLECTIVES, *FABRICS)
SPLITTING: Final = ("all_to_all",)
"""Backends with `Capabilities.splits_combine`, known without a dispatcher."""


class Fabric(Protocol):
    """What the package of a fabric offers; all but `make` from the configuration alone."""

    def find(self) -> object:
        """The library, whose text names it with its version, or Missing."""

    def make(self, ep: Communicator, spec: DispatchSpec, *, device: torch.device | str) -> Dispatcher[Any]:
        """Collective: buffers are made. ConfigError where the fabric cannot be used."""

    def obstacle(self, spec: DispatchSpec, *, limits_only: bool) -> Missing | None:
        """Why it cannot serve `spec`: its limits, and unless `limits_only` what this machine lacks."""

    def buffer_bytes(self, spec: DispatchSpec) -> int:
        """As `factory.buffer_bytes`. ConfigError where it cannot serve `spec`."""

    def max_capacity(self, spec: DispatchSpec, phase: Phase) -> int | None:
        """Most tokens of a rank in one dispatch of `phase`, whatever the memory; None: no limit."""

    def graph_safe(self, spec: DispatchSpec) -> bool:
        """`Capabilities.graph_safe`."""

    def sums_at_home(self, spec: DispatchSpec) -> bool:
        """`Capabilities.sums_at_home`."""


def make_dispatcher(
    name: str, ep: Communicator, spec: DispatchSpec, *, device: torch.device | str = "cpu"
) -> Dispatcher[Any]:
    """The dispatcher `name` of this rank, its buffers made for `spec`; collective.

    ConfigError on an unknown name, and on all ranks where one lacks what a fabric needs.
    """
    match name:
        case "local":
            from moe_runtime.dispatch.local import LocalDispatcher

            return LocalDispatcher(spec.rows, device=device, ep=ep.size)
        case "all_to_all":
            from moe_runtime.dispatch.all_to_all import AllToAllDispatcher

            return AllToAllDispatcher(ep, spec.rows, device=device, equal_blocks=spec.equal_blocks)
        case "all_gather":
            from moe_runtime.dispatch.all_gather import AllGatherDispatcher

            return AllGatherDispatcher(ep, spec.rows, device=device)
    fabric = _fabric(name)
    _agree(name, fabric, ep, spec)
    return fabric.make(ep, spec, device=device)


def _agree(name: str, fabric: Fabric, ep: Communicator, spec: DispatchSpec) -> None:
    """Before any rank begins what only all of them can finish: all can, with the same library."""
    missing = fabric.obstacle(spec, limits_only=False)
    mine = f"-{missing}" if missing is not None else f"+{fabric.find()}"
    told = [text.decode() for text in ep.collect(mine.encode())]
    for rank, text in enumerate(told):
        if text.startswith("-"):
            raise ConfigError(f"dispatch={name}: rank {rank} of the ep group: {text[1:]}")
        if text != told[0]:
            raise ConfigError(
                f"dispatch={name}: rank {rank} of the ep group has {text[1:]}, rank 0 has {told[0][1:]}. "
                "Install the same on all machines, or set dispatch=all_to_all."
            )


def graph_safe(name: str, spec: DispatchSpec, *, device: torch.device) -> bool:
    """Whether decode steps can be captured as CUDA graphs: `Capabilities.graph_safe`, known without a dispatcher."""
    if name not in COLLECTIVES:
        return _fabric(name).graph_safe(spec)
    return spec.rows.stays_on(device) and (name != "all_to_all" or spec.equal_blocks)


def sums_at_home(name: str, spec: DispatchSpec) -> bool:
    """`Capabilities.sums_at_home`, known without a dispatcher."""
    return name in ("local", "all_to_all") if name in COLLECTIVES else _fabric(name).sums_at_home(spec)


def buffer_bytes(name: str, spec: DispatchSpec) -> int:
    """Most bytes of a rank for one dispatch into which every rank brings `spec.max_tokens`: what it receives at worst,
    and where a fabric has buffers of its own, those.

    The one sizing function of the planner, the checks of a configuration and the run. Grows with `spec.max_tokens`.
    ConfigError on an unknown name.
    """
    match name:
        case "local":
            from moe_runtime.dispatch import local

            return local.buffer_bytes(spec)
        case "all_to_all":
            from moe_runtime.dispatch import all_to_all

            return all_to_all.buffer_bytes(spec)
        case "all_gather":
            from moe_runtime.dispatch import all_gather

            return all_gather.buffer_bytes(spec)
    return _fabric(name).buffer_bytes(spec)


def obstacle(
    name: str, spec: DispatchSpec, *, device: torch.device, virtual: bool, limits_only: bool = False
) -> Missing | None:
    """Why `name` cannot serve `spec` here, or None. `virtual`: the ranks are not processes of their own.

    `limits_only`: whether it could serve on machines that have what it needs. ConfigError on an unknown name.
    """
    if name in COLLECTIVES:
        if name == "local" and spec.ep > 1:
            return Missing(f"reaches the experts of one rank, and ep={spec.ep}", _OR_ELSE)
        return None
    fabric = _fabric(name)
    if not limits_only:
        from moe_runtime.dispatch.fabric import no_gpu_per_rank

        if (missing := no_gpu_per_rank(device, virtual=virtual)) is not None:
            return missing
    return fabric.obstacle(spec, limits_only=limits_only)


def find_library(name: str) -> object:
    """The library of the fabric `name`, whose text names it with its version, or Missing. This imports it."""
    return _fabric(name).find()


def library_of(name: str) -> str | None:
    """The library that serves `name` here, with its version; None for those that need none or lack it."""
    found = None if name in COLLECTIVES else find_library(name)
    return None if found is None or isinstance(found, Missing) else str(found)


def most_tokens(name: str, spec: DispatchSpec, *, cap_bytes: int) -> int:
    """Most tokens per rank, up to `spec.max_tokens`, of a dispatch whose `buffer_bytes` stay within `cap_bytes`; 0
    where one token does not."""

    def fits(tokens: int) -> bool:
        return buffer_bytes(name, with_tokens(spec, tokens)) <= cap_bytes

    low, high = 0, spec.max_tokens
    if fits(high):
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def with_tokens(spec: DispatchSpec, tokens: int) -> DispatchSpec:
    """`spec` where a rank brings at most `tokens`."""
    return replace(spec, max_tokens=tokens, max_decode_tokens=min(tokens, spec.max_decode_tokens))


def max_capacity(name: str, spec: DispatchSpec, phase: Phase) -> int | None:
    """Most tokens of a rank in one dispatch of `phase`, whatever the memory; None: no limit."""
    return None if name in COLLECTIVES else _fabric(name).max_capacity(spec, phase)


def _fabric(name: str) -> Fabric:
    match name:
        case "deep_ep":
            from moe_runtime.dispatch import deep_ep

            return deep_ep
        case "nvshmem":
            from moe_runtime.dispatch import nvshmem

            return nvshmem
        case "symm_mem":
            from moe_runtime.dispatch import symm_mem

            return symm_mem
    raise ConfigError(f"dispatch={name!r}: must be one of {', '.join(BACKENDS)}.{nearest(name, BACKENDS)}")


_OR_ELSE: Final = "Set dispatch=all_to_all"

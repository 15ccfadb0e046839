"""Dispatch over DeepEP: V2 where it is installed, else V1."""

from __future__ import annotations

from typing import Any

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Dispatcher, Phase
from moe_runtime.dispatch.deep_ep import elastic_sizes, legacy_sizes
from moe_runtime.dispatch.deep_ep.detect import Library, find
from moe_runtime.dispatch.fabric import device_group
from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.spec import DispatchSpec
from moe_runtime.errors import ConfigError

__all__ = ["Library", "buffer_bytes", "find", "graph_safe", "make", "max_capacity", "obstacle", "sums_at_home"]


def obstacle(spec: DispatchSpec, *, limits_only: bool) -> Missing | None:
    """Why DeepEP cannot serve `spec`: the limits of the generation that is installed (V2's where none is) and, unless
    `limits_only`, that it is not there."""
    library = find()
    if isinstance(library, Missing) and not limits_only:
        return library
    return elastic_sizes.unfit(spec) if _newest(library) == 2 else legacy_sizes.unfit(spec)


def buffer_bytes(spec: DispatchSpec) -> int:
    """Most bytes on a rank, of the generation that is installed, or V2."""
    if _newest(find()) == 2:
        return elastic_sizes.buffer_bytes(spec, domain=spec.ranks_per_node)
    return legacy_sizes.buffer_bytes(spec, ranks_per_node=spec.ranks_per_node)


def max_capacity(spec: DispatchSpec, phase: Phase) -> int | None:
    """Most tokens of a rank in one dispatch: V2 takes any number."""
    if _newest(find()) == 2:
        return elastic_sizes.max_capacity(spec)
    return legacy_sizes.max_capacity(spec, phase, ranks_per_node=spec.ranks_per_node)


def graph_safe(spec: DispatchSpec) -> bool:
    """Steps without prompt tokens wait for no count."""
    return True


def sums_at_home(spec: DispatchSpec) -> bool:
    """Its kernels sum by rank, in bf16; only V1's low-latency combine does not, and only without prompt tokens."""
    return False


def _newest(library: Library | Missing) -> int:
    return 2 if isinstance(library, Missing) else library.generations[0]


def make(ep: Communicator, spec: DispatchSpec, *, device: torch.device | str) -> Dispatcher[Any]:
    """The dispatcher of the newest generation that is installed. Collective.

    ConfigError where DeepEP is not there, or where ranks are no processes with a GPU each, or sizes do not fit.
    """
    library = find()
    if isinstance(library, Missing):
        raise ConfigError(f"dispatch=deep_ep: {library}")
    group = device_group(ep, "deep_ep")
    _connect(ep, device)
    if 2 in library.generations:
        from moe_runtime.dispatch.deep_ep.elastic import ElasticDispatcher

        return ElasticDispatcher(ep, spec, library=library.module, group=group, device=device)
    from moe_runtime.dispatch.deep_ep.legacy import LegacyDispatcher

    return LegacyDispatcher(
        ep, spec, library=library.module, group=group, device=device, ranks_per_node=spec.ranks_per_node
    )


def _connect(ep: Communicator, device: torch.device | str) -> None:
    """DeepEP takes the group's NCCL communicator as it finds it, and torch may make that with the first collective.

    The host waits here, where a rank that does not come is still reported: not inside the library.
    """
    here = ep.all_reduce(torch.ones(1, device=device))
    assert int(here) == ep.size, f"{int(here)} of {ep.size} ranks"

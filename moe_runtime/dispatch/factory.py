"""One dispatcher by name; a backend's imports happen here, when it is chosen."""

from __future__ import annotations

from typing import Any, Final

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Dispatcher, DispatchStep, Layout
from moe_runtime.errors import ConfigError, nearest

BACKENDS: Final = ("local", "all_to_all", "all_gather")


def make_dispatcher(
    name: str,
    ep: Communicator,
    *,
    num_slots: int,
    layout: Layout = Layout.GROUPED,
    alignment: int = 1,
    device: torch.device | str = "cpu",
) -> Dispatcher[Any]:
    """The dispatcher `name` of this rank, which holds `num_slots` slots. ConfigError on an unknown name."""
    match name:
        case "local":
            from moe_runtime.dispatch.local import LocalDispatcher

            return LocalDispatcher(num_slots, layout=layout, alignment=alignment, device=device, ep=ep.size)
        case "all_to_all":
            from moe_runtime.dispatch.all_to_all import AllToAllDispatcher

            return AllToAllDispatcher(ep, num_slots, layout=layout, alignment=alignment, device=device)
        case "all_gather":
            from moe_runtime.dispatch.all_gather import AllGatherDispatcher

            return AllGatherDispatcher(ep, num_slots, layout=layout, alignment=alignment)
    raise ConfigError(f"dispatch={name!r}: must be one of {', '.join(BACKENDS)}.{nearest(name, BACKENDS)}")


def max_chunk_tokens(
    dispatcher: Dispatcher[Any], step: DispatchStep, *, hidden: int, itemsize: int, top_k: int, cap_bytes: int
) -> int:
    """Most tokens per rank (at most `step.capacity`) whose dispatch receives no more than `cap_bytes`.

    A pure function of agreed values: all ranks find the same. ConfigError if not even one token fits.
    """

    def needed(tokens: int) -> int:
        return dispatcher.receive_bytes(DispatchStep(tokens, step.phase, step.micro_batch), hidden, itemsize, top_k)

    if needed(1) > cap_bytes:
        raise ConfigError(
            f"engine.dispatch_buffer_bytes={cap_bytes}: one token per rank may receive {needed(1)} bytes. "
            f"Set engine.dispatch_buffer_bytes={needed(1)} or more."
        )
    low, high = 1, max(1, min(step.capacity, dispatcher.capabilities.max_capacity or step.capacity))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= cap_bytes else (low, middle - 1)
    return low

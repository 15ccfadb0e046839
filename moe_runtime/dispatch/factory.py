"""One dispatcher by name; a backend's imports happen here, when it is chosen."""

from __future__ import annotations

from typing import Any, Final

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Dispatcher, Layout
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

"""One dispatcher by name; a backend's imports happen here, when it is chosen."""

from __future__ import annotations

from typing import Any, Final

import torch

from moe_runtime.comm.base import Communicator
from moe_runtime.dispatch.base import Dispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.errors import ConfigError, nearest

BACKENDS: Final = ("local", "all_to_all", "all_gather")


def make_dispatcher(
    name: str, ep: Communicator, *, rows: RowLayout, device: torch.device | str = "cpu"
) -> Dispatcher[Any]:
    """The dispatcher `name` of this rank, whose slots get their rows as `rows` says. ConfigError on an unknown name."""
    match name:
        case "local":
            from moe_runtime.dispatch.local import LocalDispatcher

            return LocalDispatcher(rows, device=device, ep=ep.size)
        case "all_to_all":
            from moe_runtime.dispatch.all_to_all import AllToAllDispatcher

            return AllToAllDispatcher(ep, rows, device=device)
        case "all_gather":
            from moe_runtime.dispatch.all_gather import AllGatherDispatcher

            return AllGatherDispatcher(ep, rows, device=device)
    raise _unknown(name)


def graph_safe(name: str, *, rows: RowLayout, device: torch.device) -> bool:
    """Whether this dispatcher's decode steps can be captured as CUDA graphs: its `Capabilities.graph_safe`, known
    without one."""
    return name in ("local", "all_gather") and rows.stays_on(device)


def receive_bytes(name: str, *, ep: int, rows: RowLayout, tokens: int, hidden: int, itemsize: int, top_k: int) -> int:
    """Worst-case bytes that one of `ep` ranks receives in one dispatch into which every rank brings `tokens`.

    Tokens are `hidden` numbers of `itemsize` bytes, each sent to `top_k` slots. ConfigError on an unknown name.
    """
    row_bytes = hidden * itemsize
    match name:
        case "local":
            from moe_runtime.dispatch import local

            return local.receive_bytes(rows=rows, tokens=tokens, row_bytes=row_bytes, top_k=top_k)
        case "all_to_all":
            from moe_runtime.dispatch import all_to_all

            return all_to_all.receive_bytes(ep=ep, rows=rows, tokens=tokens, row_bytes=row_bytes, top_k=top_k)
        case "all_gather":
            from moe_runtime.dispatch import all_gather

            return all_gather.receive_bytes(ep=ep, rows=rows, tokens=tokens, row_bytes=row_bytes, top_k=top_k)
    raise _unknown(name)


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"dispatch={name!r}: must be one of {', '.join(BACKENDS)}.{nearest(name, BACKENDS)}")

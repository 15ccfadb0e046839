"""A double of DeepEP V1: `Library` stands for the module deep_ep, `Buffer` for its class of that name.

It refuses what the library refuses, and answers with garbage where the library does. Not modelled: what the modules of
its calls say, and whether an event was captured early enough.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.doubles.deep_ep.events import Capture, EventHandle, EventOverlap
from tests.doubles.deep_ep.legacy_clauses import clauses
from tests.doubles.deep_ep.legacy_core import Config
from tests.doubles.deep_ep.legacy_low_latency import LowLatencyCalls
from tests.doubles.deep_ep.legacy_normal import NormalCalls


class Buffer(NormalCalls, LowLatencyCalls):
    """A rank's."""


class Library:
    """`seed` draws the order in which low-latency rows arrive; `qp_depth` is NVSHMEM_QP_DEPTH."""

    __version__ = "1.2.1+73b6ea4"
    topk_idx_t = torch.int64
    Config = Config
    EventHandle = EventHandle
    EventOverlap = EventOverlap

    def __init__(self, *, seed: int = 0, qp_depth: int = 1024) -> None:
        self.clauses = clauses()
        self.seed = seed
        self.qp_depth = qp_depth
        self.capturing = Capture()
        self.Buffer: Any = type("Buffer", (Buffer,), {"library": self})


def library() -> Library:
    """All clauses on."""
    return Library()

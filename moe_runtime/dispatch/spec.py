"""DispatchSpec: what a dispatcher must know before the first token, equal on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_runtime.dispatch.rows import RowLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchSpec:
    """Sizes of every dispatch of a run. Buffers on a fabric are made for them once and serve all layers.

    H hidden, K top-k.
    """

    ep: int
    """Ranks of the ep group."""
    rows: RowLayout
    """How a rank wants its slots' rows, where the backend leaves a choice; `num_slots` is each rank's."""
    hidden: int
    """H of the model; an adapter pads with zeros to what its fabric takes."""
    dtype: torch.dtype
    """Of the tokens that enter."""
    top_k: int
    """K, dispatched shared experts included."""
    max_tokens: int = 1
    """Most tokens that a rank brings into one dispatch (`DispatchStep.capacity`)."""
    max_decode_tokens: int = 0
    """The same for the phases decode and idle."""
    in_flight: int = 1
    """Dispatches under way at once: one per micro-batch."""
    ranks_per_node: int = 8
    one_form: bool = False
    """Steps with prompt tokens and without go the same way, so that a token's bits do not tell its step's mates."""
    equal_blocks: bool = True
    """`all_to_all` takes equal blocks in decode steps whose rows stay on the device; else it goes by counts."""
    deadline_s: float = 100.0
    """Seconds after which a library with a clock of its own gives a wait for another rank up."""

    @property
    def row_bytes(self) -> int:
        """Of one token's hidden values as they enter."""
        return self.hidden * self.dtype.itemsize

    @property
    def num_physical(self) -> int:
        """P: slots of all ranks."""
        return self.ep * self.rows.num_slots

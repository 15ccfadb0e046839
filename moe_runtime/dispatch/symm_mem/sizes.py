"""Room and limits of the all-to-all of expert splits.

C capacity, K top-k, S ranks, E slots of each, P = S·E, J = min(K, E) rows of a token for one rank at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from moe_runtime.dispatch.missing import Missing
from moe_runtime.dispatch.nvshmem.packing import Packing, packing
from moe_runtime.dispatch.spec import DispatchSpec

MAX_RANKS: Final = 8
"""Up to 8 ranks torch gives every split a block of its own, then 8 blocks share them. 32 and, on the way home, 16 are
its own limits."""
MAX_SPLITS: Final = 64
"""Blocks of one operation. A block with a second split may read its offset when it has been overwritten (see
`dispatcher.py`)."""
MAX_SLOTS: Final = 16
"""Of a rank: tiles of a block."""
HEAD_ROWS: Final = 4
"""Rows in front of the first split, so that the block that has it is not the first to end."""
_OFFSET_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Room:
    """Rows and bytes of one micro-batch's buffers, the same on all ranks, for `tokens` C of each."""

    spec: DispatchSpec
    stays: bool
    """Rows are sorted on the device."""

    @property
    def sent(self) -> Packing:
        """A token's row on its way out, in fp8 where the experts multiply in it; its slot and its place follow it."""
        return packing(replace(self.spec, top_k=1), stays=self.stays)

    @property
    def back(self) -> Packing:
        """An output on its way home."""
        return Packing(self.spec.hidden, 1, self.spec.dtype)

    @property
    def heads(self) -> int:
        return self.spec.ep * HEAD_ROWS

    def home_rows(self, tokens: int) -> int:
        """Of a rank's own tokens; one more takes those that go nowhere."""
        return tokens * self.spec.top_k + self.heads + 1

    def away_rows(self, tokens: int) -> int:
        """Of all ranks' tokens at one rank; a slot without rows takes one."""
        spec = self.spec
        return spec.ep * tokens * min(spec.top_k, spec.rows.num_slots) + self.heads + spec.rows.num_slots

    @property
    def row_bytes(self) -> int:
        return max(self.sent.num_bytes, self.back.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Symmetric memory of one micro-batch."""
        tokens = max(self.spec.max_tokens, 1)
        rows = self.home_rows(tokens) + self.away_rows(tokens)
        return rows * self.row_bytes + 5 * self.spec.num_physical * _OFFSET_BYTES


def buffer_bytes(spec: DispatchSpec) -> int:
    """Bytes of a rank: symmetric memory and the sorted rows of one dispatch, for each micro-batch; torch rounds each of
    the five allocations up to its segments."""
    symmetric = max(Room(spec, stays).num_bytes for stays in (False, True))
    per_token = min(spec.top_k, spec.rows.num_slots)
    return spec.in_flight * (symmetric + spec.rows.worst_bytes(spec.ep * spec.max_tokens, per_token, spec.row_bytes))


def unfit(spec: DispatchSpec) -> Missing | None:
    """Why torch's all-to-all cannot serve `spec`, or None. Any hidden size and top-k will do."""
    slots = spec.rows.num_slots
    if spec.ep > MAX_RANKS:
        return Missing(
            f"ep={spec.ep}, and torch's all-to-all of expert splits serves at most {MAX_RANKS} ranks safely",
            f"Set ep={MAX_RANKS}, or dispatch=all_to_all",
        )
    if slots > MAX_SLOTS or spec.num_physical > MAX_SPLITS:
        enough = spec.num_physical <= MAX_SPLITS
        return Missing(
            f"{slots} slots on each of {spec.ep} ranks, and torch's all-to-all of expert splits serves at most "
            f"{MAX_SLOTS} slots of a rank and {MAX_SPLITS} of all",
            "Raise ep, or set dispatch=all_to_all" if enough else "Set dispatch=all_to_all",
        )
    return None


def max_capacity(spec: DispatchSpec) -> int | None:
    """Most tokens per rank of one dispatch: as many as there is memory for."""
    return None

"""Router gate: which experts a token goes to and with which weights; and on which slots these experts are.

T tokens, E routed experts, S shared experts that are dispatched, G groups, K top-k, R replicas of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from moe_kernels.backends import choose_backend
from moe_kernels.errors import KernelError
from moe_kernels.gate import eager

__all__ = ["GateRule", "GroupScore", "Placed", "Replicas", "Scoring", "gate", "gate_and_place"]


class Scoring(StrEnum):
    """How logits become scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class GroupScore(StrEnum):
    """How a group's experts are summed up when groups are chosen."""

    MAX = "max"
    TOP2_SUM = "top2_sum"


@dataclass(frozen=True, slots=True)
class GateRule:
    """How experts are chosen and weighted.

    DeepSeek-V2: softmax, group score = maximum, masked groups score 0. DeepSeek-V3: sigmoid, group score = sum of
    the two best, masked groups score -inf, weights normalised.
    """

    top_k: int
    num_groups: int = 1
    top_groups: int = 1
    scoring: str = Scoring.SOFTMAX
    group_score: str = GroupScore.MAX
    masked_score: float = 0.0
    normalise: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in (("scoring", Scoring), ("group_score", GroupScore)):
            value = getattr(self, name)
            if value not in tuple(kind):
                raise KernelError(f"{name}={value!r}; choose one of {', '.join(kind)}")
            object.__setattr__(self, name, kind(value))
        if self.top_k < 1:
            raise KernelError(f"top_k={self.top_k}; choose at least 1")
        if not 1 <= self.top_groups <= self.num_groups:
            raise KernelError(f"top_groups={self.top_groups}; choose 1..{self.num_groups}, the number of groups")


@dataclass(frozen=True, slots=True, eq=False)
class Replicas:
    """Where one layer's experts are, seen from one rank.

    `slots [≥ E+S, R] int64`: the slots of each expert. Without `counts` an expert is in its first column. With
    `counts [≥ E+S] int64` replicas take turns: assignment k of token t is on `slots[id, (turn + t + k) % counts[id]]`.
    """

    slots: Tensor
    counts: Tensor | None = None
    turn: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """Three `[T, K+S]`: `expert_ids int64`, the `slots int64` that hold them, `weights fp32`. Padding: -1, -1 and 0."""

    expert_ids: Tensor
    slots: Tensor
    weights: Tensor


def gate(
    logits: Tensor, *, rule: GateRule, bias: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`logits [T, E] fp32`, `bias [E] fp32` (for the choice only) -> `(expert_ids [T, K] int64, weights [T, K] fp32)`.

    Ids are ordered by descending choice score, ties to the lowest id. A token's bits depend on its own logits alone.
    A NaN counts as the greatest score, so it is chosen and shows in the weights. `backend`: see `choose_backend`.
    Raises KernelError where E does not fit the rule.
    """
    _check_experts(logits.shape[-1], rule)
    if choose_backend(logits, backend, op="gate") == "torch":
        return eager.gate(logits, rule, bias)
    from moe_kernels.gate import triton as kernels

    placed = kernels.gate(logits, rule, bias)
    return placed.expert_ids, placed.weights


def gate_and_place(
    logits: Tensor,
    *,
    rule: GateRule,
    bias: Tensor | None = None,
    num_shared: int = 0,
    num_real: int | Tensor | None = None,
    replicas: Replicas | None = None,
    counts_: Tensor | None = None,
    backend: str | None = None,
) -> Placed:
    """`gate`, the shared experts' columns, the slots of all of them and their count, on Triton in one launch.

    `num_shared`: every token also goes to experts E..E+S-1 with weight 1, whatever the rule's scale. Tokens from
    `num_real` (an int, or a one-element integer tensor on the device, for captured graphs) on are padding: they go
    nowhere. Without `replicas` an expert's slot is its id. `counts_ [≥ E+S] int64` is added to in place: one for every
    assignment of a real token. Raises KernelError where E does not fit the rule or a table is too short.
    """
    experts = logits.shape[-1]
    _check_experts(experts, rule)
    need = experts + num_shared
    tables = [] if replicas is None else [("replicas.slots", replicas.slots, 2)]
    if replicas is not None and replicas.counts is not None:
        tables.append(("replicas.counts", replicas.counts, 1))
    if counts_ is not None:
        tables.append(("counts_", counts_, 1))
    for name, table, dims in tables:
        if table.dim() != dims or table.shape[0] < need or table.dtype != torch.int64 or not table.is_contiguous():
            raise KernelError(
                f"gate_and_place: {name} is {tuple(table.shape)} {table.dtype}; it must be contiguous int64 with "
                f"{dims} dims and an entry for each of {need} experts"
            )
    if choose_backend(logits, backend, op="gate_and_place") == "torch":
        return eager.gate_and_place(logits, rule, bias, num_shared, num_real, replicas, counts_)
    from moe_kernels.gate import triton as kernels

    return kernels.gate(logits, rule, bias, num_shared, num_real, replicas, counts_)


def _check_experts(experts: int, rule: GateRule) -> None:
    if experts % rule.num_groups or rule.top_k > experts // rule.num_groups * rule.top_groups:
        raise KernelError(
            f"gate got {experts} experts for {rule.num_groups} groups, top {rule.top_k} of the best {rule.top_groups} "
            f"groups; groups must divide the experts and hold at least top_k"
        )

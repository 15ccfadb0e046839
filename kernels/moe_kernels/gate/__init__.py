"""Router gate: which experts a token goes to and with which weights. T tokens, E experts, G groups, K top-k."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from moe_kernels.errors import KernelError
from moe_kernels.gate import eager

__all__ = ["GateRule", "GroupScore", "Scoring", "gate"]


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


def gate(logits: Tensor, *, rule: GateRule, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`logits [T, E] fp32`, `bias [E] fp32` (for the choice only) -> `(expert_ids [T, K] int64, weights [T, K] fp32)`.

    Ids are ordered by descending choice score, ties to the lowest id. A token's bits depend on its own logits alone.
    Raises KernelError where E does not fit the rule.
    """
    experts = logits.shape[-1]
    if experts % rule.num_groups or rule.top_k > experts // rule.num_groups * rule.top_groups:
        raise KernelError(
            f"gate got {experts} experts for {rule.num_groups} groups, top {rule.top_k} of the best {rule.top_groups} "
            f"groups; groups must divide the experts and hold at least top_k"
        )
    return eager.gate(logits, rule, bias)

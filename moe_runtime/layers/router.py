"""Router: which logical experts each token goes to. T tokens, H hidden, E routed experts, S shared, K top-k."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from moe_kernels.gate import GateRule, Replicas, gate, gate_and_place
from moe_kernels.linear import linear
from torch import Tensor

from moe_runtime.errors import ConfigError
from moe_runtime.types import NOWHERE, LogicalRouting, PhysicalRouting


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """`weight [E, H]` (any dtype, used in fp32) and the rule of the model's family.

    `bias [E] fp32` moves the choice of experts, never their weights. With `num_dispatched_shared=S` each token also
    goes to the logical experts E..E+S-1 with weight 1, whatever the rule's scale. ConfigError where shapes differ.
    """

    weight: Tensor
    rule: GateRule
    bias: Tensor | None = None
    num_dispatched_shared: int = 0
    batch_invariant: bool = False
    _shared_ids: Tensor = field(init=False)

    def __post_init__(self) -> None:
        experts = self.weight.shape[0]
        if self.weight.ndim != 2 or (self.bias is not None and self.bias.shape != (experts,)):
            found = None if self.bias is None else tuple(self.bias.shape)
            raise ConfigError(f"router: weight {tuple(self.weight.shape)}, bias {found}; must be [E, H] and [E].")
        shared = torch.arange(experts, experts + self.num_dispatched_shared, device=self.weight.device)
        object.__setattr__(self, "weight", self.weight.float())
        object.__setattr__(self, "bias", None if self.bias is None else self.bias.float())
        object.__setattr__(self, "_shared_ids", shared)

    def __call__(self, x: Tensor, *, num_real: int) -> LogicalRouting:
        """Route `x [T, H]`; rows from `num_real` on are padding: they go nowhere, with weight 0."""
        ids, weights = gate(self._logits(x), rule=self.rule, bias=self.bias)
        tokens = x.shape[0]
        if self.num_dispatched_shared:
            shared = self._shared_ids.expand(tokens, -1)
            ids = torch.cat([ids, shared], dim=1)
            weights = torch.cat([weights, torch.ones_like(shared, dtype=torch.float32)], dim=1)
        if num_real < tokens:
            ids[num_real:] = NOWHERE
            weights[num_real:] = 0.0
        return LogicalRouting(ids, weights)

    def place(
        self,
        x: Tensor,
        *,
        num_real: int | Tensor,
        replicas: Replicas | None,
        counts_: Tensor | None,
        routes_: Tensor | None = None,
    ) -> PhysicalRouting:
        """Route `x [T, H]` to slots, on Triton in one launch after the product (`gate_and_place`).

        `num_real` may be a one-element integer tensor on the device. `replicas`: where the layer's experts are (None:
        slot = expert). `counts_ [>= E+S] int64` is added to in place: one per assignment of a real token. The experts
        themselves go to the first rows of `routes_ [>= T, K+S] int16`, NOWHERE for padding.
        """
        placed = gate_and_place(
            self._logits(x),
            rule=self.rule,
            bias=self.bias,
            num_shared=self.num_dispatched_shared,
            num_real=num_real,
            replicas=replicas,
            counts_=counts_,
        )
        if routes_ is not None:
            routes_[: x.shape[0]].copy_(placed.expert_ids)
        return PhysicalRouting(placed.slots, placed.weights)

    def _logits(self, x: Tensor) -> Tensor:
        return linear(x.float(), self.weight, batch_invariant=self.batch_invariant)

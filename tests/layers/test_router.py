"""Routers against transformers' own, and the rules that transformers has no part in."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.gate import GateRule
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from moe_runtime.errors import ConfigError
from moe_runtime.layers.router import Router
from moe_runtime.types import NOWHERE

HIDDEN = 32


def by_expert(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """[T, E]: weight of each expert, whatever the order of the choice."""
    return torch.zeros(ids.shape[0], num_experts).scatter_(1, ids, weights)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(1, 1, 6), (8, 4, 8), (4, 1, 3)])
@pytest.mark.parametrize("normalise", [False, True])
def test_equals_transformers_v3(seed: int, groups: int, top_groups: int, top_k: int, normalise: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=32,
        n_group=groups,
        topk_group=top_groups,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalise,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(32, HIDDEN, generator=generator))
    theirs.e_score_correction_bias.copy_(torch.randn(32, generator=generator) * 0.3)
    rule = GateRule(
        top_k=top_k,
        num_groups=groups,
        top_groups=top_groups,
        scoring="sigmoid",
        group_score="top2_sum",
        masked_score=float("-inf"),
        normalise=normalise,
        scale=2.5,
    )
    x = torch.randn(50, HIDDEN, generator=generator)
    with torch.no_grad():
        _, weights, ids = theirs(x)
    ours = Router(theirs.weight.detach(), rule, theirs.e_score_correction_bias)(x, num_real=50)
    torch.testing.assert_close(
        by_expert(ours.expert_ids, ours.weights, 32), by_expert(ids, weights, 32), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("method", "groups", "top_groups"), [("greedy", 1, 1), ("group_limited_greedy", 8, 3)])
def test_equals_transformers_v2(seed: int, method: str, groups: int, top_groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        n_routed_experts=32,
        n_group=groups,
        topk_group=top_groups,
        num_experts_per_tok=6,
        topk_method=method,
        routed_scaling_factor=16.0,
    )
    theirs = DeepseekV2TopkRouter(config)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(32, HIDDEN, generator=generator))
    rule = GateRule(top_k=6, num_groups=groups, top_groups=top_groups, scale=16.0)
    x = torch.randn(50, HIDDEN, generator=generator)
    with torch.no_grad():
        _, weights, ids = theirs(x)
    ours = Router(theirs.weight.detach(), rule)(x, num_real=50)
    torch.testing.assert_close(
        by_expert(ours.expert_ids, ours.weights, 32), by_expert(ids, weights, 32), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_ties_go_to_the_lowest_ids_with_the_weights_of_transformers(family: str) -> None:
    weight = torch.zeros(16, HIDDEN)
    if family == "v3":
        theirs = DeepseekV3TopkRouter(
            DeepseekV3Config(
                hidden_size=HIDDEN, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4,
                norm_topk_prob=True, routed_scaling_factor=2.5,
            )
        )  # fmt: skip
        rule = GateRule(
            top_k=4, num_groups=4, top_groups=2, scoring="sigmoid", group_score="top2_sum",
            masked_score=float("-inf"), normalise=True, scale=2.5,
        )  # fmt: skip
    else:
        theirs = DeepseekV2TopkRouter(
            DeepseekV2Config(
                hidden_size=HIDDEN, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4,
                topk_method="group_limited_greedy", routed_scaling_factor=2.5,
            )
        )  # fmt: skip
        rule = GateRule(top_k=4, num_groups=4, top_groups=2, scale=2.5)
    with torch.no_grad():
        theirs.weight.copy_(weight)
        x = torch.randn(5, HIDDEN)
        _, weights, _ = theirs(x)
    ours = Router(weight, rule)(x, num_real=5)
    assert ours.expert_ids.tolist() == [[0, 1, 2, 3]] * 5
    torch.testing.assert_close(ours.weights, weights, rtol=1e-6, atol=1e-7)


def test_bf16_inputs_are_routed_in_fp32() -> None:
    weight = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    rule = GateRule(top_k=2)
    half, full = Router(weight, rule)(x, num_real=40), Router(weight.float(), rule)(x.float(), num_real=40)
    assert torch.equal(half.expert_ids, full.expert_ids)
    assert torch.equal(half.weights, full.weights)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_padding_goes_nowhere_and_shared_experts_are_always_chosen(shared: int) -> None:
    weight = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(0))
    router = Router(weight, GateRule(top_k=3, scale=4.0), num_dispatched_shared=shared)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    x[3:] = float("nan")
    routing = router(x, num_real=3)
    assert routing.expert_ids.dtype == torch.int64
    assert routing.weights.dtype == torch.float32
    assert routing.expert_ids.shape == (5, 3 + shared)
    assert (routing.expert_ids[3:] == NOWHERE).all()
    assert (routing.weights[3:] == 0).all()
    assert routing.expert_ids[:3, 3:].tolist() == [[8 + s for s in range(shared)]] * 3
    assert (routing.weights[:3, 3:] == 1.0).all()
    assert (routing.expert_ids[:3, :3] < 8).all()
    assert router(x[:0], num_real=0).expert_ids.shape == (0, 3 + shared)


def test_misfits_are_named() -> None:
    with pytest.raises(ConfigError, match=r"bias \(7,\); must be \[E, H\] and \[E\]"):
        Router(torch.zeros(8, 4), GateRule(top_k=1), torch.zeros(7))

"""The gate against its oracle and against transformers. T tokens, E experts, K top-k."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moe_kernels.errors import KernelError
from moe_kernels.gate import GateRule, gate
from moe_kernels.gate.reference import gate_reference
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

CheckRows = Callable[[Callable[[Tensor], Tensor], Tensor], None]

V2_GREEDY = GateRule(top_k=6, scale=1.5)
V2_GROUPS = GateRule(top_k=4, num_groups=4, top_groups=2, scale=16.0)
V3 = GateRule(
    top_k=8,
    num_groups=8,
    top_groups=4,
    scoring="sigmoid",
    group_score="top2_sum",
    masked_score=float("-inf"),
    normalise=True,
    scale=2.5,
)
RULES = {"v2_greedy": V2_GREEDY, "v2_groups": V2_GROUPS, "v3": V3}


def biased(name: str, experts: int) -> Tensor | None:
    return torch.randn(experts) * 0.1 if name == "v3" else None


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 50])
@pytest.mark.parametrize("experts", [32, 96])
def test_matches_reference(name: str, tokens: int, experts: int) -> None:
    logits, bias = torch.randn(tokens, experts) * 2, biased(name, experts)
    ids, weights = gate(logits, rule=RULES[name], bias=bias)
    want_ids, want_weights = gate_reference(logits, RULES[name], bias)
    assert torch.equal(ids, want_ids)
    # One fp32 rounding in each of exp, add, divide, sum and scale.
    torch.testing.assert_close(weights.double(), want_weights, atol=0, rtol=2e-6)
    if tokens > 3:  # a mutant: the next expert's logits
        assert not torch.equal(gate(logits.roll(1, -1), rule=RULES[name], bias=bias)[0], want_ids)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_matches_transformers_v2(method: str) -> None:
    config = DeepseekV2Config(
        hidden_size=16,
        num_attention_heads=4,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        topk_method=method,
        routed_scaling_factor=3.0,
    )
    router = DeepseekV2TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    rule = GateRule(top_k=4, scale=3.0)
    if method == "group_limited_greedy":
        rule = GateRule(top_k=4, num_groups=4, top_groups=2, scale=3.0)
    compare(router, rule, None)


def test_matches_transformers_v3() -> None:
    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4, routed_scaling_factor=2.5
    )
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.randn(64) * 0.2)
    compare(router, V3, router.e_score_correction_bias)


def compare(router: torch.nn.Module, rule: GateRule, bias: Tensor | None) -> None:
    logits, want_weights, want_ids = router(torch.randn(200, 16))
    ids, weights = gate(logits, rule=rule, bias=bias)
    order = want_weights.argsort(dim=-1, descending=True, stable=True)
    ours = weights.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids.gather(1, ours), want_ids.gather(1, order))
    torch.testing.assert_close(weights.gather(1, ours), want_weights.gather(1, order), atol=0, rtol=2e-6)


@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
def test_ties_go_to_the_lowest_id(tokens: int) -> None:
    ids, _ = gate(torch.zeros(tokens, 64), rule=V3)
    assert ids.tolist() == [list(range(8))] * tokens
    ids, _ = gate(torch.zeros(tokens, 64), rule=V3, bias=torch.full((64,), -0.7))
    assert ids.tolist() == [list(range(8))] * tokens, "negative choice scores tie the same way"


def test_negative_and_positive_choices_are_ordered() -> None:
    bias = torch.linspace(-2.0, 1.0, 32)
    ids, _ = gate(torch.zeros(20, 32), rule=GateRule(top_k=32, scoring="sigmoid"), bias=bias)
    assert ids[0].tolist() == list(range(31, -1, -1))


def test_masked_groups_weigh_nothing_where_scores_underflow() -> None:
    """DeepSeek-V2: group 0 wins, its other experts underflow to 0 and tie with masked ones, whose weight is 0."""
    logits = torch.full((6, 8), -200.0)
    logits[:, 3], logits[:, 0] = 0.0, -1.0
    ids, weights = gate(logits, rule=GateRule(top_k=3, num_groups=2, top_groups=1))
    assert ids[0].tolist() == [3, 0, 1]
    assert weights[0, 2] == 0.0


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("experts", [24, 40, 96, 264])
def test_tokens_are_independent(check_rows: CheckRows, name: str, experts: int) -> None:
    bias = biased(name, experts)
    logits = torch.randn(40, experts) * 2
    logits[3] = logits[4] = 0.5  # ties
    check_rows(lambda x: gate(x, rule=RULES[name], bias=bias)[0], logits)
    check_rows(lambda x: gate(x, rule=RULES[name], bias=bias)[1], logits)


def test_errors() -> None:
    with pytest.raises(KernelError, match="10 experts for 4 groups"):
        gate(torch.zeros(1, 10), rule=V2_GROUPS)
    with pytest.raises(KernelError, match="at least top_k"):
        gate(torch.zeros(1, 4), rule=V2_GROUPS)
    with pytest.raises(KernelError, match=r"choose 1\.\.2"):
        GateRule(top_k=1, num_groups=2, top_groups=3)
    with pytest.raises(KernelError, match="at least 1"):
        GateRule(top_k=0)
    with pytest.raises(KernelError, match="sigmoid"):
        GateRule(top_k=1, scoring="relu")

"""The gate in Triton against its oracle, and placement against torch. T tokens, E experts, K top-k, S shared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.errors import KernelError
from moe_kernels.gate import GateRule, Placed, Replicas, gate, gate_and_place
from moe_kernels.gate.reference import gate_reference
from torch import Tensor

from tests.kernels.devices import DEVICE, ON_GPU

V2_GREEDY = GateRule(top_k=6, scale=1.5)
V2_GROUPS = GateRule(top_k=4, num_groups=4, top_groups=2, scale=16.0)
V3 = GateRule(8, 8, 4, "sigmoid", "top2_sum", float("-inf"), normalise=True, scale=2.5)
RULES = {"v2_greedy": V2_GREEDY, "v2_groups": V2_GROUPS, "v3": V3}
EXPERTS = (32, 96, 256, 512) if ON_GPU else (32, 96)


def biased(name: str, experts: int) -> Tensor | None:
    return torch.randn(experts, device=DEVICE) * 0.1 if name == "v3" else None


def check(got: tuple[Tensor, Tensor], logits: Tensor, rule: GateRule, bias: Tensor | None) -> None:
    want_ids, want_weights = gate_reference(logits.cpu(), rule, None if bias is None else bias.cpu())
    assert torch.equal(got[0].cpu(), want_ids)
    # A few fp32 roundings; the GPU's exp errs by two units in the last place.
    torch.testing.assert_close(got[1].cpu().double(), want_weights, atol=0, rtol=4e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_matches_reference(name: str, experts: int) -> None:
    bias = biased(name, experts)
    for tokens in (0, 1, 9):
        logits = torch.randn(tokens, experts, device=DEVICE) * 2
        got = gate(logits, rule=RULES[name], bias=bias, backend="triton")
        check(got, logits, RULES[name], bias)
    with pytest.raises(AssertionError):  # mutants: the next expert's logits, weights of another scale
        check(got, logits.roll(1, -1), RULES[name], bias)
    with pytest.raises(AssertionError):
        check((got[0], got[1] * 1.001), logits, RULES[name], bias)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, GateRule, Tensor | None]:
    """Few distinct logits, so many ties; every kind of rule."""
    groups = draw(st.sampled_from([1, 2, 3]))
    size = draw(st.sampled_from([1, 2, 5]))
    top_groups = draw(st.integers(1, groups))
    rule = GateRule(
        top_k=draw(st.integers(1, min(4, size * top_groups))),
        num_groups=groups,
        top_groups=top_groups,
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        group_score=draw(st.sampled_from(["max", "top2_sum"])),
        masked_score=float("-inf"),
        normalise=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )
    steps = st.integers(-2, 2)
    logits = draw(st.lists(st.lists(steps, min_size=groups * size, max_size=groups * size), min_size=1, max_size=3))
    bias = draw(st.none() | st.lists(steps, min_size=groups * size, max_size=groups * size))
    # No logit is another's negative: sigmoids of such sum to 1, a tie of groups that hangs on the last bit of exp.
    return torch.tensor(logits).float() * 0.5 + 0.125, rule, None if bias is None else torch.tensor(bias).float()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(problem=problems())
def test_property_equal_choice_with_ties(problem: tuple[Tensor, GateRule, Tensor | None]) -> None:
    logits, rule, bias = problem
    moved = None if bias is None else bias.to(DEVICE)
    ids, weights = gate(logits.to(DEVICE), rule=rule, bias=moved, backend="triton")
    want_ids, want_weights = gate(logits, rule=rule, bias=bias, backend="torch")
    assert torch.equal(ids.cpu(), want_ids)
    torch.testing.assert_close(weights.cpu(), want_weights, atol=1e-7, rtol=4e-6)


def test_ties_go_to_the_lowest_id() -> None:
    zeros = torch.zeros(3, 64, device=DEVICE)
    for bias in (None, torch.full((64,), -0.7, device=DEVICE)):
        ids, _ = gate(zeros, rule=V3, bias=bias, backend="triton")
        assert ids.tolist() == [list(range(8))] * 3
    signs = torch.tensor([-0.5, 0.0, -0.5, 1.0], device=DEVICE)
    ids, _ = gate(zeros[:1, :4], rule=GateRule(4, scoring="sigmoid"), bias=signs, backend="triton")
    assert ids.tolist() == [[3, 1, 0, 2]], "0.0 and 0.0 - 0.0 tie; negative scores are below"


def test_masked_groups_weigh_nothing_where_scores_underflow() -> None:
    logits = torch.full((2, 8), -200.0, device=DEVICE)
    logits[:, 3], logits[:, 0] = 0.0, -1.0
    ids, weights = gate(logits, rule=GateRule(top_k=3, num_groups=2, top_groups=1), backend="triton")
    assert ids[0].tolist() == [3, 0, 1]
    assert weights[0, 2] == 0.0


def test_a_nan_shows() -> None:
    logits = torch.zeros(2, 16, device=DEVICE)
    logits[0, 5] = torch.nan
    ids, weights = gate(logits, rule=GateRule(top_k=2, scoring="sigmoid"), backend="triton")
    assert ids.tolist() == [[5, 0], [0, 1]]
    assert weights.isnan().tolist() == [[True, False], [False, False]]


def test_a_token_does_not_depend_on_the_others() -> None:
    logits, bias = torch.randn(7, 40, device=DEVICE), torch.randn(40, device=DEVICE)
    ids, weights = gate(logits, rule=V3, bias=bias, backend="triton")
    for i, row in enumerate(torch.split(logits, 1)):
        alone = gate(row, rule=V3, bias=bias, backend="triton")
        assert torch.equal(alone[0][0], ids[i])
        assert torch.equal(alone[1][0], weights[i])


def same(got: Placed, want: Placed) -> None:
    assert torch.equal(got.expert_ids, want.expert_ids)
    assert torch.equal(got.slots, want.slots)
    torch.testing.assert_close(got.weights, want.weights, atol=0, rtol=4e-6)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_placement(on_device: bool, turns: bool, shared: int) -> None:
    experts = 24 + shared
    logits, bias = torch.randn(6, 24, device=DEVICE), torch.randn(24, device=DEVICE)
    counts = torch.randint(1, 4, (experts + 1,), device=DEVICE)
    table = torch.randperm(3 * (experts + 1), device=DEVICE).view(-1, 3)
    table[torch.arange(3, device=DEVICE) >= counts.unsqueeze(1)] = -1
    replicas = Replicas(table, counts if turns else None, turn=5)
    num_real = torch.tensor([4], device=DEVICE) if on_device else 4
    loads = [torch.full((experts + 1,), 7, device=DEVICE) for _ in range(2)]
    got, want = (
        gate_and_place(
            logits,
            rule=V3,
            bias=bias,
            num_shared=shared,
            num_real=num_real,
            replicas=replicas,
            counts_=load,
            backend=backend,
        )
        for load, backend in zip(loads, ("triton", "torch"), strict=True)
    )
    same(got, want)
    assert torch.equal(*loads)
    assert int(loads[0].sum()) == 7 * (experts + 1) + 4 * (8 + shared)
    assert bool((got.slots[:4] >= 0).all()) and bool((got.slots[4:] == -1).all())
    assert got.weights[:4, 8:].eq(1.0).all() and got.weights[4:].eq(0.0).all()
    if turns:  # a mutant: the neighbour's turn
        with pytest.raises(AssertionError):
            same(got, gate_and_place(logits, rule=V3, bias=bias, num_shared=shared, num_real=num_real,
                                     replicas=Replicas(table, counts, turn=6), backend="torch"))  # fmt: skip


def test_turns_by_hand() -> None:
    """Expert 1 is on slots 4 and 7; the rank's turn is 1: token 0, k 0 goes to 7, token 1 to 4."""
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]], device=DEVICE)
    table = torch.tensor([[2, -1], [4, 7]], device=DEVICE)
    replicas = Replicas(table, torch.tensor([1, 2], device=DEVICE), turn=1)
    for backend in ("torch", "triton"):
        placed = gate_and_place(logits, rule=GateRule(top_k=2), replicas=replicas, backend=backend)
        assert placed.slots.tolist() == [[7, 2], [4, 2]]


def test_nothing_to_place() -> None:
    logits = torch.randn(3, 16, device=DEVICE)
    ids, weights = gate(logits, rule=V2_GREEDY, backend="triton")
    placed = gate_and_place(logits, rule=V2_GREEDY, backend="triton")
    assert placed.slots is placed.expert_ids
    assert torch.equal(placed.expert_ids, ids) and torch.equal(placed.weights, weights)
    idle = gate_and_place(logits, rule=V2_GREEDY, num_real=0, backend="triton")
    assert idle.slots.eq(-1).all() and idle.weights.eq(0.0).all()


def test_errors() -> None:
    logits = torch.zeros(1, 16, device=DEVICE)
    with pytest.raises(KernelError, match="float64"):
        gate(logits.double(), rule=V2_GREEDY, backend="triton")
    with pytest.raises(KernelError, match=r"counts_ is \(16,\) torch.int64; .* each of 17 experts"):
        gate_and_place(logits, rule=V2_GREEDY, num_shared=1, counts_=torch.zeros(16, dtype=torch.int64, device=DEVICE))
    with pytest.raises(KernelError, match=r"bias is \(\(15,\), torch.float32\); it must be \(16,\)"):
        gate(logits, rule=V2_GREEDY, bias=torch.zeros(15, device=DEVICE), backend="triton")
    with pytest.raises(KernelError, match="at most 1024 experts"):
        gate(torch.zeros(1, 2048, device=DEVICE), rule=V2_GREEDY, backend="triton")

"""The MoE layer on virtual ranks against a dense loop over experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from moe_kernels import backends
from moe_kernels.experts import prepare_experts
from moe_kernels.gate import GateRule
from torch import Tensor
from torch.nn.functional import silu

from moe_runtime.balance.load import LoadRecorder
from moe_runtime.comm.base import Communicator
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.dispatch.base import DispatchStep, GroupedRows, Layout, Phase
from moe_runtime.dispatch.factory import make_dispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.layers.experts import DenseMLP, Experts
from moe_runtime.layers.linear import Linear
from moe_runtime.layers.moe import MoELayer, MoEStep
from moe_runtime.layers.router import Router
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice
from moe_runtime.types import LogicalRouting
from tests.dispatch.contract import spec_of

HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 12, 8, 3
RULE = GateRule(
    top_k=TOP_K, num_groups=4, top_groups=2, scoring="sigmoid", group_score="top2_sum",
    masked_score=float("-inf"), normalise=True, scale=2.5,
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A layer as a checkpoint has it: S shared experts are one MLP."""

    router: Tensor
    bias: Tensor
    w13: Tensor
    w2: Tensor
    shared_gate: Tensor
    shared_up: Tensor
    shared_down: Tensor
    num_shared: int


def make_weights(num_shared: int, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        scale: float = shape[-1] ** -0.5
        return torch.randn(*shape, generator=generator) * scale

    return Weights(
        router=draw(EXPERTS, HIDDEN) * 3,
        bias=draw(EXPERTS) * 0.2,
        w13=draw(EXPERTS, 2 * WIDTH, HIDDEN),
        w2=draw(EXPERTS, HIDDEN, WIDTH),
        shared_gate=draw(num_shared * WIDTH, HIDDEN),
        shared_up=draw(num_shared * WIDTH, HIDDEN),
        shared_down=draw(HIDDEN, num_shared * WIDTH),
        num_shared=num_shared,
    )


def slice_shared(weights: Weights) -> tuple[Tensor, Tensor]:
    """The MLP of the S shared experts as S experts whose outputs sum to it: `w13 [S, 2I, H]`, `w2 [S, H, I]`."""
    parts = weights.num_shared
    gate, up = (w.view(parts, WIDTH, HIDDEN) for w in (weights.shared_gate, weights.shared_up))
    return torch.cat([gate, up], dim=1), weights.shared_down.view(HIDDEN, parts, WIDTH).transpose(0, 1).contiguous()


def dense(weights: Weights, x: Tensor, routing: LogicalRouting) -> Tensor:
    """fp64 loop over tokens and their experts."""
    wide = x.double()
    hidden = silu(wide @ weights.shared_gate.double().T) * (wide @ weights.shared_up.double().T)
    out = hidden @ weights.shared_down.double().T
    for token, (ids, scales) in enumerate(zip(routing.expert_ids.tolist(), routing.weights.tolist(), strict=True)):
        for expert, scale in zip(ids[:TOP_K], scales[:TOP_K], strict=True):
            gate, up = (weights.w13[expert].double() @ wide[token]).chunk(2)
            out[token] += scale * (weights.w2[expert].double() @ (silu(gate) * up))
    return out


@dataclass(frozen=True)
class Variant:
    """One way to run the layer."""

    ep: int = 1
    dispatch: str = "local"
    layout: Layout = Layout.GROUPED
    redundant: int = 0
    dispatched: bool = False
    choice: ReplicaChoice = ReplicaChoice.STATIC
    max_chunk_tokens: int = 100
    batch_invariant: bool = False
    split_combine: bool = False


@dataclass(frozen=True)
class Outcome:
    outputs: list[Tensor]
    loads: Tensor


def run(weights: Weights, inputs: list[Tensor], variant: Variant, *, num_real: Sequence[int | Tensor]) -> Outcome:
    """The layer on `variant.ep` ranks, rank r with `inputs[r]`."""
    placement = ExpertPlacement.uniform(
        2, EXPERTS + weights.num_shared * variant.dispatched, ep=variant.ep, num_redundant=variant.redundant
    )
    sliced = slice_shared(weights)
    w13, w2 = (torch.cat(pair) for pair in zip((weights.w13, weights.w2), sliced, strict=True))
    recorders = [LoadRecorder(2, placement.num_logical) for _ in range(variant.ep)]
    invariant = variant.batch_invariant

    def layer_of(ep: Communicator) -> MoELayer[Any]:
        slots = list(placement.local_logical(1, ep.rank))
        shared = DenseMLP(
            Linear.of(torch.cat([weights.shared_gate, weights.shared_up]), batch_invariant=invariant),
            Linear.of(weights.shared_down, batch_invariant=invariant),
        )
        return MoELayer(
            index=1,
            router=Router(
                weights.router,
                RULE,
                weights.bias,
                num_dispatched_shared=weights.num_shared * variant.dispatched,
                batch_invariant=invariant,
            ),
            selector=placement.selector(ep.rank, choice=variant.choice, ranks_per_node=2),
            dispatcher=make_dispatcher(variant.dispatch, ep, spec_of(RowLayout(placement.num_local, variant.layout))),
            experts=Experts(prepare_experts(w13[slots], w2[slots]), invariant),
            shared=None if variant.dispatched else shared,
            recorder=recorders[ep.rank],
        )

    capacity = max(len(x) for x in inputs)
    with VirtualCluster(variant.ep, num_threads=1) as cluster:
        groups = virtual_groups(cluster, dp=variant.ep)

        def program(rank: int) -> Tensor:
            chunk_tokens = min(capacity, variant.max_chunk_tokens)
            num_chunks = -(-capacity // chunk_tokens)
            split = variant.split_combine
            step = MoEStep(num_real[rank], capacity, chunk_tokens, num_chunks, Phase.MIXED, split_combine=split)
            return layer_of(groups[rank].ep)(inputs[rank], step)

        outputs = cluster.run(program)
    return Outcome(outputs, torch.stack([recorder.counts() for recorder in recorders]).sum(0))


def deal(x: Tensor, ep: int) -> list[Tensor]:
    """Uneven shares: rank r starts at r²·T/ep², so the first ranks may have none."""
    cuts = [len(x) * rank * rank // (ep * ep) for rank in range(ep + 1)]
    return [x[start:end] for start, end in pairwise(cuts)]


VARIANTS = [
    Variant(),
    Variant(layout=Layout.PADDED),
    Variant(ep=4, dispatch="all_to_all"),
    Variant(ep=4, dispatch="all_to_all", layout=Layout.PADDED, redundant=4, choice=ReplicaChoice.ROUND_ROBIN),
    Variant(ep=4, dispatch="all_gather", redundant=4, choice=ReplicaChoice.NEAREST, max_chunk_tokens=3),
    Variant(ep=4, dispatch="all_gather", layout=Layout.PADDED),
    Variant(ep=4, dispatch="all_to_all", redundant=4, choice=ReplicaChoice.WATERFILL, max_chunk_tokens=3),
    Variant(ep=2, dispatch="all_to_all", max_chunk_tokens=2),
    Variant(ep=32, dispatch="all_to_all"),
    Variant(ep=4, dispatch="all_to_all", split_combine=True),
    Variant(ep=2, dispatch="all_to_all", layout=Layout.PADDED, redundant=2, max_chunk_tokens=3, split_combine=True),
]


@pytest.mark.parametrize("num_shared", [1, 2])
@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.dispatch}-{v.ep}-{v.layout}-{v.redundant}")
def test_equals_a_dense_loop(variant: Variant, dispatched: bool, num_shared: int) -> None:
    weights = make_weights(num_shared)
    x = torch.randn(37, HIDDEN, generator=torch.Generator().manual_seed(5))
    routing = Router(weights.router, RULE, weights.bias)(x, num_real=37)
    shares = deal(x, variant.ep)
    variant = Variant(**{**vars(variant), "dispatched": dispatched})
    outcome = run(weights, shares, variant, num_real=[len(share) for share in shares])
    torch.testing.assert_close(torch.cat(outcome.outputs).double(), dense(weights, x, routing), rtol=2e-5, atol=2e-6)
    expected = torch.bincount(routing.expert_ids.flatten(), minlength=outcome.loads.shape[1])
    if dispatched:
        expected[EXPERTS:] = 37
    assert outcome.loads.tolist() == [[0] * len(expected), expected.tolist()]


def test_mutants_are_seen_by_the_dense_loop() -> None:
    weights = make_weights(1)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(5))
    routing = Router(weights.router, RULE, weights.bias)(x, num_real=9)
    exact = dense(weights, x, routing)
    swapped = weights.w13.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    for mutant in ({"w13": swapped}, {"w2": weights.w2 * 1.001}, {"shared_down": weights.shared_down * 0.999}):
        y = run(Weights(**{**vars(weights), **mutant}), [x], Variant(), num_real=[9]).outputs[0]
        assert (y.double() - exact).abs().max() > 1e-4


@pytest.mark.parametrize("dispatched", [False, True])
def test_batch_invariant_outputs_do_not_depend_on_the_deployment(dispatched: bool) -> None:
    """Bitwise equal over ranks, redundancy, replica choice, chunks, layout, neighbours and padding."""
    weights = make_weights(2)
    x = torch.randn(23, HIDDEN, generator=torch.Generator().manual_seed(6))
    base = run(weights, [x], Variant(batch_invariant=True, dispatched=dispatched), num_real=[23]).outputs[0]
    for variant in VARIANTS:
        if variant.dispatch == "all_gather":
            continue
        shares = deal(x, variant.ep)
        exact = Variant(**{**vars(variant), "batch_invariant": True, "dispatched": dispatched})
        y = torch.cat(run(weights, shares, exact, num_real=[len(share) for share in shares]).outputs)
        assert torch.equal(y, base), variant
    single = Variant(batch_invariant=True, dispatched=dispatched)
    for token in (0, 11):
        padded = torch.cat([x[token : token + 1], torch.full((3, HIDDEN), 7.0)])
        assert torch.equal(run(weights, [padded], single, num_real=[1]).outputs[0][:1], base[token : token + 1])


def test_padding_rows_are_neither_counted_nor_computed() -> None:
    weights = make_weights(1)
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(7))
    poisoned = x.clone()
    poisoned[4:] = float("nan")
    variant = Variant(ep=2, dispatch="all_to_all", dispatched=True)
    clean = run(weights, [x[:4], x[:0]], variant, num_real=[4, 0])
    noisy = run(weights, [poisoned, x[:2]], variant, num_real=[4, 0])
    torch.testing.assert_close(noisy.outputs[0][:4], clean.outputs[0], rtol=1e-6, atol=1e-6)
    assert not noisy.outputs[0][4:].any()
    assert torch.equal(noisy.loads, clean.loads)
    assert int(noisy.loads.sum()) == 4 * (TOP_K + 1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "variant",
    [
        Variant(dispatched=True),
        Variant(ep=2, dispatch="all_gather", redundant=4, choice=ReplicaChoice.ROUND_ROBIN, max_chunk_tokens=2),
        Variant(ep=2, dispatch="all_to_all", redundant=4, choice=ReplicaChoice.NEAREST),
        Variant(ep=2, dispatch="all_gather", redundant=4, dispatched=True, choice=ReplicaChoice.WATERFILL),
    ],
    ids=lambda v: f"{v.dispatch}-{v.choice}",
)
def test_real_tokens_that_only_the_device_knows(
    monkeypatch: pytest.MonkeyPatch, variant: Variant, backend: str
) -> None:
    """One kernel routes, places and counts; the same tokens go to the same slots as step by step."""
    weights = make_weights(1)
    inputs = [torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(rank)) for rank in range(variant.ep)]
    real = [2, 0][: variant.ep]
    expected = run(weights, inputs, variant, num_real=real)
    monkeypatch.setattr(backends, "default_backend", lambda device: backend)
    outcome = run(weights, inputs, variant, num_real=[torch.tensor([count]) for count in real])
    for ours, theirs in zip(outcome.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    assert torch.equal(outcome.loads, expected.loads)
    assert int(outcome.loads.sum()) == 2 * (TOP_K + variant.dispatched)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("counts", [[5], [2, 0, 7]], ids=str)
def test_experts_make_nothing_of_rows_past_the_last(counts: list[int], batch_invariant: bool) -> None:
    """A backend may make room for more rows than it received; what lies there does not matter."""
    weights, total = make_weights(1), sum(counts)
    slots = prepare_experts(weights.w13[: len(counts)], weights.w2[: len(counts)])
    experts, x = Experts(slots, batch_invariant), torch.randn(total, HIDDEN)
    psum = torch.tensor(counts).cumsum(0).to(torch.int32)
    roomy = torch.cat([x, torch.full((6, HIDDEN), torch.nan)])
    got = experts(GroupedRows(roomy, psum))
    assert got.shape == roomy.shape
    torch.testing.assert_close(got[:total], experts(GroupedRows(x, psum)))


def test_steps_are_cut_into_agreed_chunks() -> None:
    step = MoEStep(3, capacity=7, chunk_tokens=3, num_chunks=3, phase=Phase.MIXED)
    assert [(rows.start, rows.stop, part.capacity) for rows, part in step.chunks()] == [(0, 3, 3), (3, 6, 3), (6, 7, 1)]
    idle = MoEStep(0, capacity=0, chunk_tokens=1, num_chunks=1, phase=Phase.IDLE)
    assert [part for _, part in idle.chunks()] == [DispatchStep(0, Phase.IDLE)]

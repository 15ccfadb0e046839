"""Every backend and layout on virtual ranks against the laws in contract.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.comm.base import Communicator
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.dispatch.base import DispatchStep, GroupedRows, Layout, PaddedRows, Phase
from moe_runtime.dispatch.factory import buffer_bytes, make_dispatcher
from moe_runtime.dispatch.local import LocalDispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice
from moe_runtime.types import NOWHERE, LogicalRouting, PhysicalRouting
from tests.dispatch import contract
from tests.dispatch.contract import BACKENDS, Backend, Case, make_case

RANKS = [1, 2, 4, 8, 32]


def on_ranks(size: int, program: Callable[[Communicator], object]) -> list[object]:
    """`program` on every rank of a virtual ep group."""
    with VirtualCluster(size, num_threads=1) as cluster:
        groups = virtual_groups(cluster, dp=size)
        return cluster.run(lambda rank: program(groups[rank].ep))


def runs_at(backend: Backend, size: int) -> bool:
    return backend.name != "local" or size == 1


AT_RANKS = pytest.mark.parametrize(
    ("backend", "size"), [(b, n) for b in BACKENDS for n in RANKS if runs_at(b, n)], ids=str
)


def cases(size: int) -> dict[str, Case]:
    """Shapes that have broken dispatchers, at `size` ranks."""
    k, last = min(2, size * 2), size - 1
    return {
        "even": make_case(ep=size, slots=2, top_k=k, tokens=[3] * size),
        "one slot per rank": make_case(ep=size, slots=1, top_k=min(size, 4), tokens=[2] * size),
        "uneven": make_case(ep=size, slots=3, top_k=3, tokens=[(5 * r + 1) % 7 for r in range(size)]),
        "some ranks empty": make_case(ep=size, slots=2, top_k=k, tokens=[0 if r % 2 else 4 for r in range(size)]),
        "one rank full": make_case(ep=size, slots=2, top_k=k, tokens=[6 if r == last else 0 for r in range(size)]),
        "all empty": make_case(ep=size, slots=2, top_k=k, tokens=[0] * size),
        "padding": make_case(ep=size, slots=2, top_k=k, tokens=[4] * size, padding=2),
        "padding only": make_case(ep=size, slots=2, top_k=k, tokens=[2] * size, padding=2, spare_capacity=3),
        "one expert for all": make_case(ep=size, slots=2, top_k=1, tokens=[3] * size, only_slot=2 * size - 1),
        "bf16": make_case(ep=size, slots=2, top_k=k, tokens=[3] * size, dtype=torch.bfloat16),
    }


@AT_RANKS
def test_laws_hold(backend: Backend, size: int) -> None:
    """Equal to `local` (bitwise or within the bound), and each row where it should be, for every shape."""
    everything = list(cases(size).items())

    def program(ep: Communicator) -> None:
        for name, case in everything:
            try:
                contract.check_marked_experts(ep, backend, case)
                contract.check_origin_of_rows(ep, backend, case)
            except AssertionError as error:
                error.add_note(f"case: {name}")
                raise

    on_ranks(size, program)


@AT_RANKS
def test_identity_experts_return_x(backend: Backend, size: int) -> None:
    case = make_case(ep=size, slots=2, top_k=2, tokens=[4] * size, padding=1)
    on_ranks(size, lambda ep: contract.check_identity_experts(ep, backend, case))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_two_micro_batches_in_flight(backend: Backend) -> None:
    size = 1 if backend.name == "local" else 4
    case = make_case(ep=size, slots=2, top_k=2, tokens=[3] * size)
    on_ranks(size, lambda ep: contract.check_two_in_flight(ep, backend, case))


@pytest.mark.parametrize("backend", [BACKENDS[3], BACKENDS[-1]], ids=str)
def test_320_ranks(backend: Backend) -> None:
    case = make_case(ep=320, slots=1, top_k=8, tokens=[r % 3 for r in range(320)], hidden=8)
    on_ranks(320, lambda ep: contract.check_marked_experts(ep, backend, case))


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_small_buffers_make_chunks_and_are_never_exceeded(backend: Backend, size: int) -> None:
    if not runs_at(backend, size):
        pytest.skip("local holds all slots on one rank")
    skewed = make_case(ep=size, slots=2, top_k=1, tokens=[9] * size, only_slot=0)
    spread = make_case(ep=size, slots=2, top_k=2, tokens=[9 - r for r in range(size)])

    def program(ep: Communicator) -> list[int]:
        chunks = []
        for case in (skewed, spread):
            for tokens in (1, 2, 4, 100):
                top_k = case.routing[0].expert_ids.shape[1]
                cap = backend.buffer_bytes(ep.size, case.slots, tokens=tokens, top_k=top_k)
                chunks.append(contract.check_receive_cap(ep, backend, case, cap))
        return chunks

    assert on_ranks(size, program) == [[9, 5, 3, 1] * 2] * size


def test_factory_errors() -> None:
    with VirtualCluster(2) as cluster:
        ep = virtual_groups(cluster, dp=2)[0].ep
        with pytest.raises(ConfigError, match=r"local needs ep=1\. Use dispatch=all_to_all"):
            make_dispatcher("local", ep, contract.spec_of(RowLayout(2)))
        with pytest.raises(ConfigError, match="Did you mean 'all_to_all'"):
            make_dispatcher("all_to_al", ep, contract.spec_of(RowLayout(2)))
    with pytest.raises(ConfigError, match="Did you mean 'all_gather'"):
        buffer_bytes("all_gathr", contract.spec_of(RowLayout(1)))


def test_more_tokens_than_agreed_is_refused() -> None:
    routing = PhysicalRouting(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    with pytest.raises(AssertionError, match="3 tokens exceed the agreed capacity 2"):
        LocalDispatcher(RowLayout(1)).dispatch_begin(torch.zeros(3, 4), routing, DispatchStep(2, Phase.DECODE))


def test_local_is_a_weighted_sum_in_top_k_order() -> None:
    """Weights are powers of two: products are exact, so the bits tell the order of the sum and nothing else."""
    case = make_case(ep=1, slots=6, top_k=4, tokens=[40], padding=1)
    ids = case.routing[0].expert_ids
    weights = 2.0 ** torch.randint(-3, 4, ids.shape, generator=torch.Generator().manual_seed(3))
    y = contract.oracle(Case(6, 40, case.x, [PhysicalRouting(ids, weights)]), 0, contract.marked)
    terms = [
        [w * contract.marked(x, slot) for slot, w in zip(slots, scales, strict=True)]
        for x, slots, scales in zip(case.x[0], ids.tolist(), weights.tolist(), strict=True)
    ]
    for order, equal in (([0, 1, 2, 3], True), ([3, 2, 1, 0], False), ([0, 2, 1, 3], False)):
        total = torch.stack([((t[order[0]] + t[order[1]]) + t[order[2]]) + t[order[3]] for t in terms[:39]])
        assert torch.equal(y[:39], total) == equal, order
    assert not y[39].any()


def test_hand_drawn_permutation() -> None:
    """Two ranks of two slots; tokens a, b on rank 0, c on rank 1, d is padding."""
    x = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])]
    routing = [
        PhysicalRouting(torch.tensor([[3, 0], [2, 3]]), torch.tensor([[1.0, 10.0], [1.0, 10.0]])),
        PhysicalRouting(torch.tensor([[0, 3], [-1, -1]]), torch.tensor([[1.0, 10.0], [1.0, 10.0]])),
    ]
    # slot 0: a, c; slot 1: none; slot 2: b; slot 3: a, b, c
    expected = [([[1.0], [3.0]], [2, 2]), ([[2.0], [1.0], [2.0], [3.0]], [1, 4])]
    aligned = [([[1.0], [3.0]], [2, 2]), ([[2.0], [0.0], [1.0], [2.0], [3.0], [0.0]], [1, 5])]
    padded = [([[[1.0], [3.0]], [[0.0], [0.0]]], [2, 0]), ([[[2.0], [0.0], [0.0]], [[1.0], [2.0], [3.0]]], [1, 3])]

    def program(ep: Communicator) -> None:
        step = DispatchStep(2, Phase.MIXED)
        for backend in BACKENDS[3:]:
            dispatcher = backend.make(ep, 2)
            rows, handle = dispatcher.dispatch_begin(x[ep.rank], routing[ep.rank], step).wait()
            match rows:
                case GroupedRows(alignment=alignment):
                    wide = 2 if alignment == 4 else 1
                    assert wide == 1 or rows.data.shape[0] % alignment == 0
                    if alignment == 1:
                        assert (rows.data.tolist(), rows.psum.tolist()) == expected[ep.rank]
                case PaddedRows():
                    assert (rows.data.tolist(), rows.counts.tolist()) == padded[ep.rank]
            doubled = contract.run_experts(rows, lambda data, slot: data * 2**slot, first_slot=2 * ep.rank)
            y = dispatcher.combine_begin(doubled, handle).wait()
            # a: 1·8 + 10·1, b: 2·(1·4 + 10·8), c: 3·(1·1 + 10·8)
            assert y.tolist() == ([[18.0], [168.0]] if ep.rank == 0 else [[243.0], [0.0]])
        even = Backend("all_to_all", Layout.GROUPED, 2).make(ep, 2)
        rows, _ = even.dispatch_begin(x[ep.rank], routing[ep.rank], step).wait()
        assert isinstance(rows, GroupedRows)
        assert (rows.data.tolist(), rows.psum.tolist()) == aligned[ep.rank]

    on_ranks(2, program)


@pytest.mark.parametrize("choice", list(ReplicaChoice))
@pytest.mark.parametrize("backend", [b for b in BACKENDS[3:] if b.alignment == 1], ids=str)
def test_redundancy_and_replica_choice_do_not_change_results(backend: Backend, choice: ReplicaChoice) -> None:
    size, logical, top_k = 4, 6, 3
    bare = make_case(ep=1, slots=logical, top_k=top_k, tokens=[5] * 1, seed=1, padding=1)
    ids, weights = bare.routing[0].expert_ids, bare.routing[0].weights
    expected = contract.oracle(bare, 0, contract.marked)
    placement = ExpertPlacement.uniform(1, logical, ep=size, num_redundant=6)
    used: list[set[int]] = []

    def program(ep: Communicator) -> None:
        routing = placement.selector(ep.rank, choice=choice, ranks_per_node=2).to_physical(
            0, LogicalRouting(ids, weights)
        )
        used.append(set(routing.expert_ids.flatten().tolist()))
        case = Case(placement.num_local, 5, [bare.x[0]] * size, [routing] * size)
        dispatcher = backend.make(ep, placement.num_local)

        def expert(rows: torch.Tensor, slot: int) -> torch.Tensor:
            return contract.marked(rows, int(placement.phy2log[0, slot]))

        y = contract.through(dispatcher, case, ep.rank, expert)
        contract.assert_law(dispatcher, y, expected, f"{backend}, {choice}, rank {ep.rank}")

    on_ranks(size, program)
    assert len(set().union(*used) - {NOWHERE}) > logical, "some expert's second replica is used"


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    size, slots = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    case = make_case(
        ep=size,
        slots=slots,
        top_k=data.draw(st.integers(1, min(9, size * slots))),
        tokens=data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)),
        hidden=data.draw(st.sampled_from([2, 8, 33])),
        seed=data.draw(st.integers(0, 1000)),
        padding=data.draw(st.integers(0, 3)),
        spare_capacity=data.draw(st.integers(0, 2)),
    )
    backend = data.draw(st.sampled_from([b for b in BACKENDS if runs_at(b, size)]))

    def program(ep: Communicator) -> None:
        contract.check_marked_experts(ep, backend, case)
        contract.check_origin_of_rows(ep, backend, case)

    on_ranks(size, program)

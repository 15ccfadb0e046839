"""Whatever the model, the prompts, the mesh and the limits of the engine: the same bits, or the same to rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data import QK_HEAD_DIM, ROPE_DIM, YARN, Family, random_prompts, write_checkpoint
from tests.invariance.runs import Answer, alone, assert_close, assert_same_bits, run

NEW_TOKENS: Final = 5
NUM_LAYERS: Final = 3
EXAMPLES: Final = 6
FAST_TOLERANCE: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Model:
    """`changes` of the small shape; `top_k` and `num_heads` bound what a mesh may be."""

    family: Family
    seed: int
    changes: dict[str, Any]

    @property
    def row_bytes(self) -> int:
        """Most that one token makes the ranks of its mesh receive, per rank."""
        return 4 * int(self.changes["hidden_size"]) * (int(self.changes["num_experts_per_tok"]) + 2)

    @property
    def token_bytes(self) -> int:
        """Of the cache."""
        return 4 * NUM_LAYERS * (int(self.changes["kv_lora_rank"]) + ROPE_DIM)


@st.composite
def models(draw: st.DrawFn) -> Model:
    """V2 and V3 of all kinds, widths mostly no multiples of 32, 16 or even 8."""
    family: Family = draw(st.sampled_from(["deepseek_v3", "deepseek_v2"]))
    group_size = draw(st.sampled_from([2, 4, 5]))
    groups, top_groups = draw(st.sampled_from([(1, 1), (4, 2), (3, 2)]))
    top_k = draw(st.integers(1, min(6, group_size * top_groups)))
    changes: dict[str, Any] = {
        "hidden_size": draw(st.sampled_from([36, 60, 64, 100])),
        "intermediate_size": draw(st.sampled_from([44, 70, 96])),
        "moe_intermediate_size": draw(st.sampled_from([7, 20, 24, 28, 36, 50])),
        "kv_lora_rank": draw(st.sampled_from([12, 32, 40])),
        "q_lora_rank": draw(st.sampled_from([None, 20, 33])),
        "v_head_dim": draw(st.sampled_from([6, 16, QK_HEAD_DIM])),
        "n_routed_experts": group_size * groups,
        "n_group": groups,
        "topk_group": top_groups,
        "num_experts_per_tok": top_k,
        "n_shared_experts": draw(st.integers(1, 2)),
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "vocab_size": draw(st.sampled_from([96, 101])),
    }
    if draw(st.booleans()):
        changes["rope_parameters"] = YARN
    if family == "deepseek_v2":
        changes["topk_method"] = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    return Model(family, draw(st.integers(0, 99)), changes)


@dataclass(frozen=True, slots=True)
class Variant:
    """Another way to run the same prompts. `twice`: the second time finds what the first has cached."""

    words: list[str]
    twice: bool


@st.composite
def variants(draw: st.DrawFn, *, model: Model, tp: int, longest: int, gathers: bool) -> Variant:
    """`gathers`: whether dispatchers that sum by rank are among them."""
    dp = draw(st.sampled_from([1, 2, 4, 8]))
    gathered = ["all_gather"] * gathers
    dispatch = draw(st.sampled_from(["all_to_all", "all_to_all", *gathered, *["local"] * (dp * tp == 1)]))
    batched, page = draw(st.sampled_from([4, 9, 2048])), draw(st.sampled_from([1, 3, 16]))
    words = [
        f"ep={dp * tp}",
        f"dispatch={dispatch}",
        f"placement.num_redundant_experts={draw(st.sampled_from([0, 1, 9]))}",
        f"placement.replica_choice={draw(st.sampled_from(['static', 'round_robin', 'nearest', 'waterfill']))}",
        f"ranks_per_node={draw(st.sampled_from([1, 2, 8]))}",
        f"engine.padding={draw(st.sampled_from(['own', 'max']))}",
        f"engine.max_num_batched_tokens={batched}",
        f"engine.max_num_seqs={draw(st.integers(1, 4))}",
        f"engine.page_size={page}",
    ]
    if draw(st.booleans()):  # the longest sequence alone nearly fills the cache
        words.append(f"engine.kv_cache_bytes={(-(-longest // page) + 1) * page * model.token_bytes}")
    if draw(st.booleans()):  # a token or two per dispatch
        words.append(f"engine.dispatch_buffer_bytes={4 * dp * tp * model.row_bytes}")
    return Variant(words, draw(st.booleans()))


@pytest.mark.parametrize("invariant", [True, False], ids=["invariant", "fast"])
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(data=st.data())
def test_any_way_to_run_it(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, invariant: bool) -> None:
    model = data.draw(models(), "model")
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), model.family, seed=model.seed, changes=model.changes)
    lengths = data.draw(st.lists(st.integers(1, 40) | st.integers(62, 100), min_size=1, max_size=5), "lengths")
    tp = data.draw(st.sampled_from([1, 2, 4]), "tp")
    shared = data.draw(st.sampled_from(["replicated", "dispatched"]), "shared experts")
    longest = max(lengths) + NEW_TOKENS
    variant = data.draw(variants(model=model, tp=tp, longest=longest, gathers=not invariant), "variant")
    prompts = random_prompts(lengths, seed=model.seed)
    common = [f"engine.batch_invariant={str(invariant).lower()}", f"tp={tp}", f"shared_experts={shared}"]
    if invariant:
        common.append(f"dtype={data.draw(st.sampled_from(['float32', 'bfloat16']), 'dtype')}")
    scored = not variant.twice  # scoring a prompt computes all of it, cached or not
    want = alone(folder, prompts, [*common, f"ep={tp}"], new_tokens=NEW_TOKENS, score_prompts=scored)
    times = 2 if variant.twice else 1
    got = run(folder, [prompts] * times, [*common, *variant.words], new_tokens=NEW_TOKENS, score_prompts=scored)
    for first in range(0, len(got), len(want)):
        _compare(got[first : first + len(want)], want, bits=invariant)


def _compare(got: list[Answer], want: list[Answer], *, bits: bool) -> None:
    if bits:
        assert_same_bits(got, want)
    else:
        assert_close(got, want, tolerance=FAST_TOLERANCE)

"""Logits and greedy tokens equal those of transformers, on any mesh, with any dispatcher and placement (fp32)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pytest
from moe_kernels.gate import GateRule
from moe_models import registry
from moe_models.base import ModelConfig
from moe_models.deepseek_v3 import assembly
from torch import Tensor

from tests.data import QK_HEAD_DIM, YARN, Family, Values, random_prompts, write_checkpoint
from tests.parity.oracle import Continuation, assert_parity, by_runtime, by_transformers
from tests.parity.pairwise import Row, pairs_of, pairwise, possible_pairs


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, and the seed of its weights."""

    family: Family
    seed: int
    changes: Values


GROUPS: Final = {"n_group": 4, "topk_group": 2}

SHAPES: Final = MappingProxyType(
    {
        "v2-greedy": Shape(
            "deepseek_v2", 1, {"topk_method": "greedy", "n_shared_experts": 2, "routed_scaling_factor": 1.5}
        ),
        "v2-groups-qlora-yarn": Shape(
            "deepseek_v2",
            2,
            {"topk_method": "group_limited_greedy", **GROUPS, "q_lora_rank": 28, "rope_parameters": YARN},
        ),
        "v2-groups-bias": Shape(
            "deepseek_v2",
            3,
            {"topk_method": "group_limited_greedy", **GROUPS, "attention_bias": True, "first_k_dense_replace": 0},
        ),
        "v3-groups-qlora-yarn": Shape("deepseek_v3", 4, {**GROUPS, "q_lora_rank": 28, "rope_parameters": YARN}),
        "v3-bias-shared2": Shape(
            "deepseek_v3",
            5,
            {
                "n_shared_experts": 2,
                "attention_bias": True,
                "norm_topk_prob": False,
                "n_routed_experts": 20,
                "vocab_size": 99,
            },
        ),
        "v3-halves-tied": Shape(
            "deepseek_v3",
            6,
            {
                **GROUPS,
                "q_lora_rank": 28,
                "rope_interleave": False,
                "tie_word_embeddings": True,
                "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0},
                "first_k_dense_replace": 2,
            },
        ),
    }
)

FACTORS: Final = MappingProxyType(
    {
        "model": tuple(SHAPES),
        "ep": ("1", "2", "4", "8"),
        "tp": ("1", "2", "4"),
        "dispatch": ("local", "all_to_all", "all_gather"),
        "placement.num_redundant_experts": ("0", "5"),
        "placement.replica_choice": ("static", "round_robin", "nearest", "waterfill"),
        "shared_experts": ("replicated", "dispatched"),
        "engine.max_num_batched_tokens": ("2048", "11"),
        "engine.dispatch_buffer_bytes": ("256MiB", "40KiB"),
        "engine.page_size": ("16", "3"),
        "engine.batch_invariant": ("false", "true"),
    }
)

LENGTHS: Final = (1, 9, 37, 22)


def valid(row: Row) -> bool:
    """Heads divide over tp, tp over ep, `local` knows one rank only, and sums by rank are invariant without copies."""
    ep, tp = int(row["ep"]), int(row["tp"])
    if ep % tp or (row["dispatch"] == "local" and ep > 1):
        return False
    if row["dispatch"] != "all_gather" or row["engine.batch_invariant"] == "false" or ep == 1:
        return True
    once = row["placement.num_redundant_experts"] == "0" and row["shared_experts"] == "replicated"
    return once and SHAPES[row["model"]].changes.get("n_routed_experts", 16) % ep == 0


def words(row: Row) -> list[str]:
    return ["engine.max_num_seqs=8", *(f"{name}={value}" for name, value in row.items() if name != "model")]


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint and what transformers makes of the prompts."""

    folder: Path
    prompts: list[list[int]]
    want: list[Continuation]


Cases = Callable[[str, int], Case]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """The checkpoint and the oracle of a shape with a seed, made once."""
    made: dict[tuple[str, int], Case] = {}

    def case(name: str, seed: int) -> Case:
        if (name, seed) not in made:
            shape = SHAPES[name]
            folder = tmp_path_factory.mktemp(name)
            write_checkpoint(folder, shape.family, seed=seed, changes=shape.changes)
            prompts = random_prompts(LENGTHS, seed=seed)
            made[name, seed] = Case(folder, prompts, by_transformers(folder, prompts))
        return made[name, seed]

    return case


def check(case: Case, overrides: list[str]) -> None:
    assert_parity(by_runtime(case.folder, case.prompts, overrides), case.want)


ROWS: Final = pairwise(FACTORS, valid)


def test_rows_hold_every_pair() -> None:
    assert all(valid(row) for row in ROWS)
    assert {pair for row in ROWS for pair in pairs_of(row)} == possible_pairs(FACTORS, valid)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()))
def test_parity(cases: Cases, row: Row) -> None:
    check(cases(row["model"], SHAPES[row["model"]].seed), words(row))


def full_rows() -> Iterator[Row]:
    """Every model on every mesh with every dispatcher; the other factors are drawn."""
    draw = random.Random(1)
    crossed = ("model", "ep", "tp", "dispatch")
    for values in product(*(FACTORS[name] for name in crossed)):
        row = {name: draw.choice(choices) for name, choices in FACTORS.items()} | dict(
            zip(crossed, values, strict=True)
        )
        if valid(row):
            yield row


@pytest.mark.slow
@pytest.mark.parametrize("row", list(full_rows()), ids=lambda row: "-".join(row.values()))
def test_parity_of_other_seeds(cases: Cases, row: Row) -> None:
    check(cases(row["model"], 100 + SHAPES[row["model"]].seed), words(row))


# What the comparison must notice


def _scale(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ModelConfig, "softmax_scale", 1.01 * QK_HEAD_DIM**-0.5)


def _theta(patch: pytest.MonkeyPatch) -> None:
    right = registry.load_config

    def load_config(folder: Path) -> ModelConfig:
        config = right(folder)
        return replace(config, rope_theta=1.05 * config.rope_theta)

    patch.setattr(registry, "load_config", load_config)


def _pairs(patch: pytest.MonkeyPatch) -> None:
    def unpaired(rows: Tensor, rope: int) -> Tensor:
        return rows

    patch.setattr(assembly, "pair_up", unpaired)


def _rule(change: Callable[[GateRule], GateRule]) -> Callable[[pytest.MonkeyPatch], None]:
    right = assembly.gate_rule
    return lambda patch: patch.setattr(assembly, "gate_rule", lambda config: change(right(config)))


MUTANTS: Final = MappingProxyType(
    {
        "softmax-scale": ("v2-greedy", _scale),
        "rope-theta": ("v3-groups-qlora-yarn", _theta),
        "rope-pairs": ("v3-halves-tied", _pairs),
        "route-scale": ("v2-greedy", _rule(lambda rule: replace(rule, scale=1.0))),
        "group-score": ("v3-groups-qlora-yarn", _rule(lambda rule: replace(rule, group_score="max"))),
        "masked-score": ("v2-groups-bias", _rule(lambda rule: replace(rule, top_groups=rule.num_groups))),
        "normalised": ("v3-bias-shared2", _rule(lambda rule: replace(rule, normalise=True))),
    }
)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_model_is_noticed(cases: Cases, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shape, mutate = MUTANTS[name]
    case = cases(shape, SHAPES[shape].seed)
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=r"\|Δ\| > "):
        check(case, ["ep=1"])

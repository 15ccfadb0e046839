"""Whole models through the Triton kernels, on CPU tensors under Triton's interpreter, against the torch way.

Both run in fp32, so logits (of size 1 to 10) differ by the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import pytest
from moe_kernels import backends
from triton.runtime.interpreter import GridExecutor

from tests.data import Family, Values, random_prompts, write_checkpoint
from tests.invariance.runs import Answer, assert_close, assert_same_bits, run

TOLERANCE: Final = 2e-4
NEW_TOKENS: Final = 2
PROMPTS: Final = random_prompts((5, 1), seed=3)

SIZES: Final[Values] = MappingProxyType(
    {
        "hidden_size": 128,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
    }
)
MODELS: Final[Mapping[str, tuple[Family, Values]]] = MappingProxyType(
    {
        "v3": ("deepseek_v3", {**SIZES, "n_group": 4, "topk_group": 2, "q_lora_rank": 32}),
        "v2": ("deepseek_v2", {**SIZES, "topk_method": "greedy", "n_shared_experts": 2, "routed_scaling_factor": 1.5}),
    }
)

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            family, changes = MODELS[name]
            made[name] = write_checkpoint(tmp_path_factory.mktemp(name), family, seed=7, changes=changes)
        return made[name]

    return of


def answers(folder: Path, words: list[str], *, triton: bool, prompts: list[list[int]] = PROMPTS) -> list[Answer]:
    with pytest.MonkeyPatch.context() as patch:
        if triton:
            patch.setattr(backends, "default_backend", lambda device: "triton")
        return run(
            folder,
            [prompts],
            ["dtype=float32", "engine.cuda_graphs=off", *words],
            new_tokens=NEW_TOKENS,
            score_prompts=False,
        )


KERNELS: Final = frozenset(
    f"{name}_kernel"
    for name in (
        *("absorbed", "merge", "prepare", "rms_norm"),
        *("gate", "place", "grouped_gemm", "unpermute", "swiglu"),
    )
)
"""All that a run without fp8 launches."""

CASES: Final = MappingProxyType(
    {
        "v3-one-rank": ("v3", ["ep=1", "dispatch=local"]),
        "v3-tp-all-gather": ("v3", ["ep=4", "tp=2", "dispatch=all_gather", "engine.page_size=16"]),
        "v2-shared-dispatched": ("v2", ["ep=1", "dispatch=local", "shared_experts=dispatched"]),
        "v2-all-to-all": ("v2", ["ep=4", "tp=4", "dispatch=all_to_all", "engine.max_num_batched_tokens=4"]),
        "v3-fp8-cache": ("v3", ["ep=2", "dispatch=all_gather", "engine.kv_cache_dtype=fp8"]),
        "v3-redundant": (
            "v3",
            [
                "ep=2",
                "dispatch=all_gather",
                "shared_experts=dispatched",
                "placement.num_redundant_experts=3",
                "placement.replica_choice=round_robin",
            ],
        ),
    }
)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens(folder: Folder, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model, words = CASES[name]
    ran: set[str] = set()
    execute = GridExecutor.__call__

    def recorded(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        ran.add(self.fn.__name__)
        execute(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", recorded)
    on_triton = answers(folder(model), words, triton=True)
    assert ran == KERNELS
    ran.clear()
    assert_close(on_triton, answers(folder(model), words, triton=False), tolerance=TOLERANCE)
    assert not ran


def test_invariant_mode_is_bitwise_equal_over_ep_and_batch_mates(folder: Folder) -> None:
    invariant = ["engine.batch_invariant=true"]
    together = answers(folder("v3"), [*invariant, "ep=2", "dispatch=all_to_all"], triton=True)
    alone = answers(folder("v3"), [*invariant, "ep=1", "dispatch=local"], triton=True, prompts=PROMPTS[:1])
    assert_same_bits(together[:1], alone)


def test_invariant_mode_on_an_fp8_cache_does_not_see_chunks(folder: Folder) -> None:
    words = ["engine.batch_invariant=true", "engine.kv_cache_dtype=fp8", "ep=1", "dispatch=local"]
    whole = answers(folder("v3"), words, triton=True)
    cut = answers(folder("v3"), [*words, "engine.max_num_batched_tokens=3", "engine.page_size=16"], triton=True)
    assert_same_bits(cut, whole)

"""Whole runs over the doubles of fabrics: the tokens of `all_to_all`, logits within bf16's rounding of what travels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import pytest
from moe_kernels import backends
from moe_models.schema import Json

from moe_runtime.launch import sizing
from tests.data import random_prompts, write_checkpoint
from tests.doubles.installed import install_deep_ep, install_nvshmem, install_symm_mem
from tests.invariance.runs import Answer, alone, assert_close, assert_same_bits, run

NEW_TOKENS: Final = 3
WIDE: Final[dict[str, Json]] = {"hidden_size": 2048, "num_hidden_layers": 2, "q_lora_rank": 32, "vocab_size": 64}
"""A row as DeepEP V1's low-latency kernels take it, without padding."""
TWO_BATCHES: Final = ("engine.two_batch_overlap=on", "engine.two_batch_tokens=2", "engine.two_batch_decode_tokens=2")


FABRICS: Final = ("deep_ep V2", "deep_ep V1", "nvshmem host", "symm_mem")
RUNS: Final = MappingProxyType(
    {
        "ep4": ("ep=4", "tp=1"),
        "tp2, copies, dispatched shared experts": (
            *("ep=8", "tp=2", "shared_experts=dispatched"),
            *("placement.num_redundant_experts=7", "placement.replica_choice=round_robin"),
        ),
        "two batches": ("ep=4", "tp=1", *TWO_BATCHES),
        "small steps": ("ep=4", "tp=1", "engine.max_num_batched_tokens=5", "engine.max_num_seqs=3"),
    }
)


class Model(NamedTuple):
    """A checkpoint and its prompts, of which some ranks get none."""

    folder: Path
    prompts: list[list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(
        write_checkpoint(tmp_path_factory.mktemp("fabrics"), "deepseek_v3", seed=7), random_prompts([7, 3, 11], seed=7)
    )


@pytest.fixture(autouse=True)
def _in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large models, which fabrics are for, on a CPU too."""
    monkeypatch.setattr(sizing, "SMALL_MODEL_BYTES", 0)


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """The words that choose the fabric, whose double is installed from here on."""
    if name.startswith("nvshmem"):
        install_nvshmem(monkeypatch, name.split()[1])
        return ["dispatch=nvshmem"]
    if name == "symm_mem":
        install_symm_mem(monkeypatch)
        return ["dispatch=symm_mem"]
    install_deep_ep(monkeypatch, 2 if name == "deep_ep V2" else 1)
    return ["dispatch=deep_ep"]


def over_all_to_all(model: Model, words: Sequence[str]) -> list[Answer]:
    common = ["dtype=bfloat16", "dispatch=all_to_all"]
    return run(model.folder, [model.prompts], [*common, *words], new_tokens=NEW_TOKENS, score_prompts=False)


@pytest.mark.parametrize("name", FABRICS)
@pytest.mark.parametrize("words", RUNS)
def test_the_tokens_of_all_to_all(model: Model, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    """DeepEP's combine rounds to bf16 per rank: two layers of it move logits of about 3 by up to 0.03. NVSHMEM's host
    calls sum by rank in fp32, torch's symmetric memory brings the rows themselves home."""
    want = over_all_to_all(model, RUNS[words])
    chosen = ["dtype=bfloat16", *install(monkeypatch, name), *RUNS[words]]
    got = run(model.folder, [model.prompts], chosen, new_tokens=NEW_TOKENS, score_prompts=False)
    assert_close(got, want, tolerance=0.06)
    if name == "symm_mem":
        assert_same_bits(got, want)


@pytest.mark.parametrize("name", FABRICS)
def test_batch_mates_and_cuts_change_no_bits(model: Model, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """For one ep: the order in which a rank's shares are rounded and summed follows from the routing alone."""
    common = ["engine.batch_invariant=true", "dtype=bfloat16", "ep=4", "tp=1", *install(monkeypatch, name)]
    want = alone(model.folder, model.prompts, common, new_tokens=NEW_TOKENS, score_prompts=False)
    for words in ((), TWO_BATCHES, ("engine.max_num_batched_tokens=5", "engine.max_num_seqs=3")):
        got = run(model.folder, [model.prompts], [*common, *words], new_tokens=NEW_TOKENS, score_prompts=False)
        assert_same_bits(got, want)


def test_rows_as_low_latency_kernels_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, "deepseek_v3", seed=3, changes=WIDE)
    model = Model(folder, random_prompts([4, 2], seed=3, vocab_size=64))
    want = over_all_to_all(model, ["ep=2", "tp=1"])
    chosen = ["dtype=bfloat16", *install(monkeypatch, "deep_ep V1"), "ep=2", "tp=1"]
    got = run(model.folder, [model.prompts], chosen, new_tokens=NEW_TOKENS, score_prompts=False)
    assert_close(got, want, tolerance=0.06)


@pytest.mark.skipif(not backends.interpreted(), reason="needs TRITON_INTERPRET=1: kernels on CPU tensors")
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning")
def test_rows_put_by_our_kernels_give_the_bits_of_all_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "SMALL_MODEL_BYTES", 2**30)  # fp32: the interpreter cannot multiply bf16
    monkeypatch.setattr(backends, "default_backend", lambda device: "triton")
    folder = write_checkpoint(tmp_path, "deepseek_v3", seed=7, changes={"num_hidden_layers": 2})
    common = ["ep=2", "tp=1", "engine.cuda_graphs=off", "engine.batch_invariant=true"]
    prompts = random_prompts([5, 2], seed=7)
    want = run(folder, [prompts], ["dispatch=all_to_all", *common], new_tokens=2, score_prompts=False)
    chosen = install(monkeypatch, "nvshmem device")
    for words in ((), TWO_BATCHES):
        assert_same_bits(run(folder, [prompts], [*chosen, *common, *words], new_tokens=2, score_prompts=False), want)

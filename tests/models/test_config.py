"""config.json as published, and as transformers writes it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models.base import Fp8Blocks, YarnConfig
from moe_models.registry import load_config, parse_config, resolve_folder, tensor_specs
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale

from moe_runtime.errors import ConfigError

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"


def published(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SHAPES / f"{name}.json").read_text())
    return loaded


# Parameter counts of the model cards; 671,026,419,200 and 1,026,408,232,448 to the digit.
@pytest.mark.parametrize(
    ("name", "family", "num_parameters", "moe_layers"),
    [
        ("deepseek_v3", "deepseek_v3", 671_026_419_200, range(3, 61)),
        ("deepseek_v2_lite", "deepseek_v2", 15_706_484_224, range(1, 27)),
        ("kimi_k2", "deepseek_v3", 1_026_408_232_448, range(1, 61)),
    ],
)
def test_published_shapes(name: str, family: str, num_parameters: int, moe_layers: range) -> None:
    config = load_config(SHAPES / f"{name}.json")
    assert config.family == family
    assert config.moe_layers == moe_layers
    assert sum(math.prod(spec.shape) for spec in tensor_specs(config) if not spec.optional) == num_parameters


def test_deepseek_v3_as_published() -> None:
    config = load_config(SHAPES / "deepseek_v3.json")
    assert (config.scoring, config.topk_method, config.norm_topk_prob) == ("sigmoid", "noaux_tc", True)
    assert (config.n_group, config.topk_group, config.experts_per_group) == (8, 4, 32)
    assert (config.qk_head_dim, config.latent_dim) == (192, 576)
    assert config.quantization == Fp8Blocks(128, 128)
    assert config.yarn == YarnConfig(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert config.torch_dtype == torch.bfloat16
    assert (config.bos_token_id, config.eos_token_ids, config.num_nextn_predict_layers) == (0, (1,), 1)


def test_deepseek_v2_lite_as_published() -> None:
    config = load_config(SHAPES / "deepseek_v2_lite.json")
    assert (config.scoring, config.topk_method, config.norm_topk_prob) == ("softmax", "greedy", False)
    assert (config.n_group, config.topk_group, config.q_lora_rank, config.n_shared_experts) == (1, 1, None, 2)
    assert config.yarn is not None
    # mscale == mscale_all_dim == 0.707: cos and sin stay as they are, the softmax scale grows.
    assert config.yarn.rotary_scale == 1.0
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)


def test_variants_of_v3() -> None:
    moonlight = published("deepseek_v3") | {
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "n_routed_experts": 64,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "q_lora_rank": None,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-05,
        "routed_scaling_factor": 2.446,
    }
    del moonlight["quantization_config"]
    config = parse_config(moonlight, source="moonlight")
    assert (config.yarn, config.quantization, config.n_group, config.q_lora_rank) == (None, None, 1, None)
    assert (config.rope_theta, config.rms_norm_eps, config.latent_norm_eps) == (50000.0, 1e-5, 1e-6)
    v31 = published("deepseek_v3")
    v31["quantization_config"] |= {"scale_fmt": "ue8m0"}
    v3 = load_config(SHAPES / "deepseek_v3.json")
    assert v3.quantization == Fp8Blocks()
    assert parse_config(v31, source="v3.1") == dataclasses.replace(v3, quantization=Fp8Blocks(ue8m0=True))


def test_remote_code_is_never_a_reason() -> None:
    values = published("deepseek_v3")
    without = {key: value for key, value in values.items() if key != "auto_map"}
    assert parse_config(values, source="x") == parse_config(without, source="x")


@pytest.mark.parametrize("which", ["model_type", "architectures"])
def test_one_of_model_type_and_architectures_is_enough(which: str) -> None:
    values = published("kimi_k2")
    del values[which]
    assert parse_config(values, source="x").family == "deepseek_v3"


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 0.9, "mscale_all_dim": 0.9}


@pytest.mark.parametrize("rope", [None, YARN, YARN | {"beta_fast": 16, "beta_slow": 2}], ids=["plain", "yarn", "betas"])
def test_v3_as_transformers_saves_it(tmp_path: Path, rope: dict[str, Any] | None) -> None:
    theirs = DeepseekV3Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_mtp_layers=0,
        rope_theta=50000.0,
        rope_scaling=rope,
        dtype="bfloat16",
    )
    theirs.save_pretrained(tmp_path)
    ours = load_config(tmp_path)
    assert (ours.num_layers, ours.num_heads, ours.n_group, ours.topk_group) == (2, 4, 4, 2)
    assert (ours.rope_theta, ours.num_nextn_predict_layers, ours.torch_dtype) == (50000.0, 0, torch.bfloat16)
    scaling = yarn_apply_mscale(theirs.rope_parameters, theirs.qk_head_dim**-0.5)
    assert ours.softmax_scale == pytest.approx(scaling)
    rotary = DeepseekV3RotaryEmbedding(theirs)
    assert (ours.yarn.rotary_scale if ours.yarn else 1.0) == pytest.approx(rotary.attention_scaling)
    assert (ours.yarn is None) == (rope is None)


@pytest.mark.parametrize("mscales", [{}, {"mscale": 1.0}, {"mscale": 1.0, "mscale_all_dim": 0.5}], ids=str)
def test_yarn_magnitudes_are_those_of_transformers(tmp_path: Path, mscales: dict[str, float]) -> None:
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512, "rope_theta": 1e4} | mscales
    theirs = DeepseekV3Config(rope_parameters=rope)
    theirs.save_pretrained(tmp_path)
    ours = load_config(tmp_path)
    assert ours.yarn is not None
    assert ours.yarn.rotary_scale == pytest.approx(DeepseekV3RotaryEmbedding(theirs).attention_scaling)
    assert ours.softmax_scale == pytest.approx(yarn_apply_mscale(theirs.rope_parameters, 192**-0.5))


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_v2_as_transformers_saves_it(tmp_path: Path, method: str) -> None:
    groups = {"n_group": 4, "topk_group": 2} if method != "greedy" else {}
    DeepseekV2Config(
        hidden_size=64,
        num_attention_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        num_hidden_layers=2,
        topk_method=method,
        eos_token_id=[5, 7],
        **groups,
    ).save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    assert (config.family, config.topk_method, config.scoring) == ("deepseek_v2", method, "softmax")
    assert (config.n_group, config.topk_group) == ((4, 2) if groups else (1, 1))
    assert (config.eos_token_ids, config.num_nextn_predict_layers) == ((5, 7), 0)
    assert config.torch_dtype == torch.float32


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": [3, 4]}, (3, 4)), ({"eos_token_id": 9}, (9,)), ({"eos_token_id": None}, (1,)), ({}, (1,))],
)
def test_generation_config_gives_the_end_tokens(
    tmp_path: Path, generation: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published("deepseek_v3")))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0.6, "do_sample": True}))
    assert load_config(tmp_path).eos_token_ids == expected
    assert load_config(tmp_path / "config.json").eos_token_ids == expected


def test_resolve_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my model,v=2 [x]"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_folder(str(folder)) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("~/my model,v=2 [x]") == folder


def test_a_hub_id_gives_the_download_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve_folder("deepseek-ai/DeepSeek-V3")
    words = [
        "'deepseek-ai/DeepSeek-V3'",
        "no such folder",
        "hf download deepseek-ai/DeepSeek-V3 --local-dir DeepSeek-V3",
    ]
    assert [w for w in words if w not in str(caught.value)] == []


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    inner = tmp_path / "models--org--name" / "snapshots" / "abc"
    inner.mkdir(parents=True)
    (inner / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no config\.json.*Did you mean.*snapshots/abc"):
        resolve_folder(str(tmp_path / "models--org--name"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json.*Give the folder"):
        resolve_folder(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"is a file; give the folder.*snapshots/abc"):
        resolve_folder(str(inner / "config.json"))
    with pytest.raises(ConfigError, match=r"no such folder.*mean 'empty'"):
        resolve_folder(str(tmp_path / "emtpy"))

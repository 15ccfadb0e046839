"""Names and shapes of the weights: transformers is the oracle, and loads what the tool writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models.deepseek_v3.weights import mtp_tensor_specs
from moe_models.registry import is_mtp_tensor, load_config, tensor_specs
from moe_tools.checkpoint_presets import preset_config
from moe_tools.make_checkpoint import main, make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from moe_runtime.loading.checkpoint import Checkpoint
from moe_runtime.loading.fp8 import dequantize
from moe_runtime.loading.shard import check_tensors, load_region

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"n_shared_experts": 3}], ids=str
)
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_specs_are_what_transformers_saves(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    values = SMALL | changes
    if family == "deepseek_v2":
        DeepseekV2ForCausalLM(DeepseekV2Config(**values, topk_method="group_limited_greedy")).save_pretrained(tmp_path)
    else:
        DeepseekV3ForCausalLM(DeepseekV3Config(**values)).save_pretrained(tmp_path)
    config = load_config(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    specs = {spec.name: spec.shape for spec in tensor_specs(config) if not spec.optional}
    assert specs == {name: info.shape for name, info in checkpoint.tensors.items()}
    assert check_tensors(checkpoint, tensor_specs(config), skipped=lambda _: False) is None


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_transformers_loads_what_the_tool_writes(tmp_path: Path, family: str) -> None:
    values = preset_config(family, "tiny")
    written = make_checkpoint(tmp_path / "model", values, dtype="float32", shard_bytes=400_000, seed=3)
    assert written.num_shards > 2
    model, report = AutoModelForCausalLM.from_pretrained(
        written.folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert {kind: keys for kind, keys in report.items() if keys} == {}
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0.0
    assert sum(p.numel() for p in model.state_dict().values()) == written.num_parameters


def test_mtp_layers_are_written_recognised_and_skipped(tmp_path: Path) -> None:
    values = preset_config("deepseek_v3", "tiny") | {"num_nextn_predict_layers": 2}
    make_checkpoint(tmp_path, values)
    config, checkpoint = load_config(tmp_path), Checkpoint.open(tmp_path)
    mtp = {spec.name for spec in mtp_tensor_specs(config) if not spec.optional}
    assert {name for name in checkpoint.tensors if is_mtp_tensor(config, name)} == mtp
    assert {"model.layers.3.eh_proj.weight", "model.layers.4.shared_head.head.weight"} <= mtp
    notice = check_tensors(checkpoint, tensor_specs(config), skipped=lambda name: is_mtp_tensor(config, name))
    assert notice is not None
    assert notice.startswith(f"skipped {len(mtp)} multi-token-prediction tensors of layer 3, 4 (")
    head, repeated = (checkpoint.read(n) for n in ("lm_head.weight", "model.layers.3.shared_head.head.weight"))
    assert torch.equal(head, repeated)


def test_rotary_frequencies_of_published_checkpoints_are_passed_over(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, preset_config("deepseek_v3", "tiny"))
    file = tmp_path / "model.safetensors"
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    tensors = load_file(file)
    assert not frequencies.keys() & tensors.keys()
    save_file(tensors | frequencies, file, metadata={"format": "pt"})
    specs = tensor_specs(load_config(tmp_path))
    assert check_tensors(Checkpoint.open(tmp_path), specs, skipped=lambda _: False) is None
    assert {spec.name for spec in specs if spec.optional} == frequencies.keys()


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, preset_config("deepseek_v3", "tiny") | {"tie_word_embeddings": True})
    assert "lm_head.weight" not in Checkpoint.open(tmp_path).tensors


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.eh_proj.weight", True),
        ("model.layers.2.self_attn.o_proj.weight", False),
        ("model.layers.4.eh_proj.weight", False),
        ("model.layers.3", False),
        ("model.layers.x.eh_proj.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_only_the_layers_past_the_last_are_mtp(tmp_path: Path, name: str, expected: bool) -> None:
    values = preset_config("deepseek_v3", "tiny") | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert is_mtp_tensor(load_config(tmp_path), name) is expected


def test_fp8_checkpoint_passes_its_check_and_is_near_its_bf16_twin(tmp_path: Path) -> None:
    values = preset_config("deepseek_v3", "tiny") | {"hidden_size": 192}
    make_checkpoint(tmp_path / "fp8", values, fp8=True, seed=1)
    make_checkpoint(tmp_path / "plain", values, dtype="float32", seed=1)
    config = load_config(tmp_path / "fp8")
    assert config.quantization is not None
    fp8, twin = Checkpoint.open(tmp_path / "fp8"), Checkpoint.open(tmp_path / "plain")
    specs = [spec for spec in tensor_specs(config) if not spec.optional]
    assert check_tensors(fp8, specs, skipped=lambda _: False) is None
    projections = [s for s in specs if fp8.tensors[s.name].dtype == torch.float8_e4m3fn]
    assert {s.name.split(".")[-2] for s in projections} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    for spec in projections[:12]:
        region = (slice(1, None), slice(3, None))
        got = load_region(fp8, spec, region, dtype=torch.float32)
        stored, scales = fp8.read(spec.name), fp8.read(spec.name + "_scale_inv")
        assert torch.equal(got, dequantize(stored, scales, block=(128, 128), dtype=torch.float32)[region])
        exact = twin.read(spec.name, region)
        assert float((got - exact).abs().max()) < 0.07 * float(exact.abs().max())


def test_correction_bias_is_fp32_and_not_zero(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, preset_config("deepseek_v3", "tiny"))
    bias = Checkpoint.open(tmp_path).read("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias.dtype == torch.float32
    assert 0.001 < float(bias.std()) < 0.1


def test_weights_depend_on_seed_and_name_and_not_on_shards(tmp_path: Path) -> None:
    values = preset_config("deepseek_v2", "tiny")
    for folder, seed, shard_bytes in (("a", 0, 10**9), ("b", 0, 100_000), ("c", 1, 10**9)):
        make_checkpoint(tmp_path / folder, values, seed=seed, shard_bytes=shard_bytes)
    one, other, third = (Checkpoint.open(tmp_path / f) for f in "abc")
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)
    assert not torch.equal(one.read("lm_head.weight"), third.read("lm_head.weight"))
    assert not torch.equal(one.read("lm_head.weight"), one.read("model.embed_tokens.weight"))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    words = ["--family", "deepseek_v3", "--hidden-size=48", "--rope-theta", "5e4", "--q-lora-rank", "null"]
    out = tmp_path / "out"
    assert main([*words, "--output", str(out), "--tokenizer", str(tmp_path / "tok"), "--dtype", "float32"]) == 0
    assert "parameters" in capsys.readouterr().out
    config = load_config(out)
    assert (config.hidden_size, config.rope_theta, config.q_lora_rank) == (48, 50000.0, None)
    assert config.torch_dtype == torch.float32
    assert (out / "tokenizer.json").read_text() == "{}"
    count = sum(math.prod(info.shape) for info in Checkpoint.open(out).tensors.values())
    assert count == sum(math.prod(spec.shape) for spec in tensor_specs(config) if not spec.optional)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hidden-sise", "48"], "'hidden_sise'=48"),
        (["--hidden-sise", "48"], "mean 'hidden_size'"),
        (["--preset", "tini"], "mean 'tiny'"),
        (["--n-group", "3"], "n_group=3 does not divide n_routed_experts=16"),
        (["--hidden-size"], "--hidden-size needs a value"),
        (["stray"], "'stray' is not an option"),
        (["--tokenizer", "/nowhere"], "tokenizer='/nowhere'"),
    ],
)
def test_command_line_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["--output", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(["--output", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

"""Every way in which a config.json can be wrong: the message names file, key, value, rule and remedy."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from moe_models.registry import load_config

from moe_runtime.errors import ConfigError

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"


class _Gone(Enum):
    """Its text is the same in every process, as test names must be."""

    GONE = "gone"


GONE = _Gone.GONE
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

# (base config, changed keys, words that the message must have)
MISTAKES: list[tuple[str, dict[str, Any], list[str]]] = [
    # typos and unknown keys
    ("deepseek_v3", {"num_expert_per_tok": 8}, ["unknown key 'num_expert_per_tok'=8", "mean 'num_experts_per_tok'"]),
    (
        "deepseek_v3",
        {"index_topk": 2048, "index_n_heads": 64},
        ["unknown key 'index_n_heads'", "and 1 more: index_topk"],
    ),
    ("deepseek_v3", {"sliding_window": 4096}, ["unknown key 'sliding_window'=4096", "remove it if it has none"]),
    ("deepseek_v3", {"kv_lora_rank": GONE, "kv_lora_rnak": 512}, ["'kv_lora_rank' is missing", "mean 'kv_lora_rnak'"]),
    ("deepseek_v3", {"rope_scaling": YARN | {"beta_fas": 3}}, ["rope_scaling", "'beta_fas'=3", "mean 'beta_fast'"]),
    ("deepseek_v3", {"quantization_config": FP8 | {"bits": 4}}, ["quantization_config", "unknown key 'bits'=4"]),
    # missing and null
    ("deepseek_v3", {"hidden_size": GONE}, ["key 'hidden_size' is missing", "cannot be built without it"]),
    ("deepseek_v3", {"num_experts_per_tok": None}, ["key 'num_experts_per_tok' is null"]),
    ("deepseek_v3", {"n_group": None}, ["key 'n_group' is null"]),
    ("deepseek_v3", {"rms_norm_eps": GONE}, ["key 'rms_norm_eps' is missing"]),
    # wrong types
    ("deepseek_v3", {"hidden_size": "7168"}, ["hidden_size='7168'", "whole number of at least 1", "without quotes"]),
    ("deepseek_v3", {"hidden_size": 7168.0}, ["hidden_size=7168.0", "whole number"]),
    ("deepseek_v3", {"hidden_size": True}, ["hidden_size=True", "whole number"]),
    ("deepseek_v3", {"hidden_size": [7168]}, ["hidden_size=[7168]", "whole number"]),
    (
        "deepseek_v3",
        {"routed_scaling_factor": "2.5"},
        ["routed_scaling_factor='2.5'", "number above 0", "without quotes"],
    ),
    ("deepseek_v3", {"rms_norm_eps": False}, ["rms_norm_eps=False", "number above 0"]),
    ("deepseek_v3", {"norm_topk_prob": 1}, ["norm_topk_prob=1", "true or false"]),
    ("deepseek_v3", {"attention_bias": "false"}, ["attention_bias='false'", "true or false (without quotes)"]),
    ("deepseek_v3", {"rope_scaling": "yarn"}, ["rope_scaling='yarn'", "must be an object"]),
    ("deepseek_v3", {"quantization_config": "fp8"}, ["quantization_config='fp8'", "must be an object"]),
    ("deepseek_v3", {"eos_token_id": ["<eos>"]}, ["eos_token_id=['<eos>']", "token id"]),
    ("deepseek_v3", {"eos_token_id": [1, -1]}, ["eos_token_id=[1, -1]", "token id", "at least 0"]),
    ("deepseek_v3", {"bos_token_id": -1}, ["bos_token_id=-1", "at least 0"]),
    ("deepseek_v3", {"torch_dtype": "int8"}, ["torch_dtype='int8'", "'bfloat16', 'float16', 'float32'"]),
    ("deepseek_v3", {"dtype": "bflaot16"}, ["dtype='bflaot16'", "mean 'bfloat16'"]),
    # wrong values
    ("deepseek_v3", {"num_hidden_layers": 0}, ["num_hidden_layers=0", "at least 1"]),
    ("deepseek_v3", {"first_k_dense_replace": -1}, ["first_k_dense_replace=-1", "at least 0"]),
    ("deepseek_v3", {"rms_norm_eps": 0.0}, ["rms_norm_eps=0.0", "above 0"]),
    ("deepseek_v3", {"q_lora_rank": 0}, ["q_lora_rank=0", "at least 1"]),
    ("deepseek_v3", {"rope_theta": -1}, ["rope_theta=-1", "above 0"]),
    # what this runtime does not compute
    ("deepseek_v3", {"model_type": "deepseek_v32"}, ["model_type='deepseek_v32'", "deepseek_v2, deepseek_v3, kimi_k2"]),
    ("deepseek_v3", {"model_type": "deepseekv3"}, ["model_type='deepseekv3'", "mean 'deepseek_v3'"]),
    ("deepseek_v3", {"model_type": 3}, ["model_type=3", "not a model type"]),
    ("deepseek_v3", {"model_type": GONE, "architectures": GONE}, ["model_type=None", "neither", "Supported are"]),
    ("deepseek_v3", {"architectures": ["DeepseekV2ForCausalLM"]}, ["architectures=", "contradicts", "'deepseek_v3'"]),
    ("deepseek_v3", {"architectures": ["DeepseekV3Model"]}, ["DeepseekV3Model", "mean 'DeepseekV3ForCausalLM'"]),
    ("deepseek_v3", {"architectures": "DeepseekV3ForCausalLM"}, ["architectures=", "list of one name"]),
    ("deepseek_v3", {"architectures": []}, ["architectures=[]", "list of one name"]),
    ("deepseek_v3", {"hidden_act": "gelu"}, ["hidden_act='gelu'", 'only "silu" is supported', "SwiGLU"]),
    ("deepseek_v3", {"moe_layer_freq": 2}, ["moe_layer_freq=2", "only 1 is supported"]),
    ("deepseek_v3", {"scoring_func": "softmax"}, ["scoring_func='softmax'", 'only "sigmoid"']),
    ("deepseek_v3", {"topk_method": "greedy"}, ["topk_method='greedy'", 'only "noaux_tc"']),
    ("deepseek_v3", {"qk_head_dim": 128}, ["qk_head_dim=128", "only 192", "qk_nope_head_dim + qk_rope_head_dim"]),
    ("deepseek_v2_lite", {"scoring_func": "sigmoid"}, ["scoring_func='sigmoid'", 'only "softmax"']),
    ("deepseek_v2_lite", {"topk_method": "noaux_tc"}, ["topk_method='noaux_tc'", "'greedy', 'group_limited_greedy'"]),
    ("deepseek_v2_lite", {"topk_method": "group_limited"}, ["mean 'group_limited_greedy'"]),
    ("deepseek_v2_lite", {"norm_topk_prob": True}, ["norm_topk_prob=True", "only false"]),
    ("deepseek_v2_lite", {"mlp_bias": True}, ["mlp_bias=True", "only false"]),
    ("deepseek_v2_lite", {"rope_interleave": False}, ["rope_interleave=False", "only true"]),
    ("deepseek_v2_lite", {"num_nextn_predict_layers": 1}, ["num_nextn_predict_layers=1", "only 0"]),
    # rotary embedding
    (
        "deepseek_v3",
        {"rope_scaling": YARN | {"type": "linear"}},
        ["rope_scaling", "type='linear'", "'default', 'yarn'"],
    ),
    ("deepseek_v3", {"rope_scaling": YARN | {"factor": None}}, ["rope_scaling", "'factor' is null"]),
    ("deepseek_v3", {"rope_scaling": YARN | {"rope_type": "default"}}, ["type='yarn'", "disagrees"]),
    ("deepseek_v3", {"rope_scaling": YARN | {"attention_factor": 1.2}}, ["attention_factor=1.2", "only null"]),
    ("deepseek_v3", {"rope_scaling": YARN | {"truncate": False}}, ["truncate=False", "only true"]),
    ("deepseek_v3", {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5", "only 1.0"]),
    ("deepseek_v3", {"rope_scaling": YARN | {"mscale_all_dim": -1}}, ["mscale_all_dim=-1", "at least 0"]),
    ("deepseek_v3", {"rope_scaling": YARN | {"mscale": None}}, ["mscale=None", "given with mscale_all_dim=1"]),
    ("deepseek_v3", {"rope_scaling": YARN | {"mscale": 0.5, "mscale_all_dim": 0}}, ["mscale=0.5", "mscale_all_dim"]),
    ("deepseek_v3", {"rope_theta": 1}, ["rope_theta=1 must be above 1 with YaRN", "10000"]),
    ("deepseek_v3", {"rope_theta": GONE, "rope_scaling": YARN | {"rope_theta": 0.5}}, ["rope_theta=0.5 must be above"]),
    ("deepseek_v3", {"rope_parameters": YARN}, ["rope_scaling", "rope_parameters is there too", "Keep one"]),
    ("deepseek_v3", {"rope_scaling": YARN | {"rope_theta": 5.0}}, ["rope_theta=10000", "rope_theta=5", "Keep one"]),
    # quantisation
    ("deepseek_v3", {"quantization_config": FP8 | {"quant_method": "awq"}}, ["quant_method='awq'", "'fp8'"]),
    ("deepseek_v3", {"quantization_config": {"bits": 4}}, ["quantization_config", "'quant_method' is missing"]),
    ("deepseek_v3", {"quantization_config": FP8 | {"fmt": "e5m2"}}, ["fmt='e5m2'", 'only "e4m3"', "bf16"]),
    (
        "deepseek_v3",
        {"quantization_config": FP8 | {"weight_block_size": [64, 64]}},
        ["weight_block_size=[64, 64]", "128"],
    ),
    ("deepseek_v3", {"quantization_config": FP8 | {"weight_block_size": 128}}, ["weight_block_size=128", "list"]),
    ("deepseek_v3", {"quantization_config": FP8 | {"weight_block_size": None}}, ["'weight_block_size' is null"]),
    (
        "deepseek_v3",
        {"quantization_config": FP8 | {"scale_fmt": "ue8m1"}},
        ["quantization_config: scale_fmt='ue8m1'", "must be one of 'ue8m0'"],
    ),
    ("deepseek_v3", {"quantization_config": FP8 | {"scale_fmt": True}}, ["scale_fmt=True", "must be one of 'ue8m0'"]),
    # keys that contradict each other
    ("deepseek_v3", {"n_group": 7}, ["n_group=7 does not divide n_routed_experts=256", "nearest divisor is n_group=8"]),
    ("deepseek_v3", {"topk_group": 9}, ["topk_group=9 must be 1..8", "nearest valid value is 8"]),
    ("deepseek_v3", {"num_experts_per_tok": 129}, ["num_experts_per_tok=129 must be 1..128", "raise topk_group"]),
    (
        "kimi_k2",
        {"n_group": 384, "num_experts_per_tok": 1},
        ["n_group=384 leaves 1 expert per group", "largest valid n_group is 192"],
    ),
    ("deepseek_v3", {"first_k_dense_replace": 62}, ["first_k_dense_replace=62 exceeds num_hidden_layers=61"]),
    ("deepseek_v3", {"qk_rope_head_dim": 63}, ["qk_rope_head_dim=63 is odd", "64"]),
]


@pytest.mark.parametrize(("base", "changes", "words"), MISTAKES, ids=[f"{b}-{c}"[:70] for b, c, _ in MISTAKES])
def test_mistakes(tmp_path: Path, base: str, changes: dict[str, Any], words: list[str]) -> None:
    values = json.loads((SHAPES / f"{base}.json").read_text()) | changes
    file = tmp_path / "config.json"
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not GONE}))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert [w for w in [str(file), *words] if w not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", ["line 1, column 1", "not JSON"]),
        (b'{"hidden_size": 64,}', ["line 1", "not JSON"]),
        (b'{"hidden_size": 64, "hidden_size": 128}', ["key 'hidden_size' is there twice (64 and 128)", "Keep one"]),
        (b'{"rms_norm_eps": NaN}', ["NaN", "finite"]),
        (b'{"a": {"b": Infinity}}', ["Infinity", "finite"]),
        (b"[1, 2]", ["the top is a list", "JSON object"]),
        (b"\xff\xfe{}", ["not UTF-8"]),
        (b"[" * 300_000, ["not usable as JSON"]),
        (b'{"n": ' + b"9" * 5000 + b"}", ["not usable as JSON"]),
        (b" " * (17 * 2**20), ["17825792 bytes", "at most 16777216"]),
    ],
    ids=range(10),
)
def test_files_that_are_not_usable(tmp_path: Path, text: bytes, words: list[str]) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert [w for w in [str(file), *words] if w not in str(caught.value)] == []


def test_no_file_and_a_bad_generation_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read \(No such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text((SHAPES / "deepseek_v3.json").read_text())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id='</s>'.*token id"):
        load_config(tmp_path)


def test_underscored_keys_are_metadata(tmp_path: Path) -> None:
    values = json.loads((SHAPES / "deepseek_v3.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"_name_or_path": "x", "_commit_hash": "y"}))
    assert load_config(tmp_path) == load_config(SHAPES / "deepseek_v3.json")

"""Random small checkpoints in the shapes of DeepSeek-V2 and V3, written with transformers' own classes, and prompts.

A draw of all weights at 0.02 gives a model whose routing and logits hardly depend on its input. Here each linear layer
is drawn so that its output has about the size of its input, norms and biases are not trivial, and the router's choice
is spread; so a wrong scale, position or expert shows in the logits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
from torch import Tensor

Family = Literal["deepseek_v2", "deepseek_v3"]
Values = Mapping[str, Any]

VOCAB: Final = 96
QK_HEAD_DIM: Final = 24
ROPE_DIM: Final = 8

_SHAPE: Final[Values] = MappingProxyType(
    {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": QK_HEAD_DIM - ROPE_DIM,
        "qk_rope_head_dim": ROPE_DIM,
        "v_head_dim": 12,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
)

YARN: Final[Values] = MappingProxyType(
    {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    }
)
"""At these lengths some frequencies are stretched, some kept and some between."""


def write_checkpoint(folder: Path, family: Family, *, seed: int = 0, changes: Values = MappingProxyType({})) -> Path:
    """Write an fp32 checkpoint of the small shape with `changes` (keys of config.json) into `folder`; returns it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in {**_SHAPE, **changes}.items()}
    if family == "deepseek_v3":
        values.setdefault("num_nextn_predict_layers", 0)
    config = AutoConfig.for_model(family, **values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, tensor in sorted(model.state_dict().items()):
                _draw_(name, tensor)
    model.save_pretrained(folder)
    return folder


def _draw_(name: str, tensor: Tensor) -> None:
    if name.endswith("norm.weight"):
        tensor.normal_(1.0, 0.2)
    elif name.endswith("e_score_correction_bias"):
        tensor.normal_(0.0, 0.1)
    elif name.endswith(".bias"):
        tensor.normal_(0.0, 0.3)
    else:
        # [..., out, in], and the token table, which may also be the head. Routers are twice as steep, so that experts
        # are told apart clearly.
        gain = 2.0 if name.endswith("mlp.gate.weight") else 1.0
        tensor.normal_(0.0, gain * tensor.shape[-1] ** -0.5)


def random_prompts(lengths: Sequence[int], *, seed: int = 0, vocab_size: int = VOCAB) -> list[list[int]]:
    """A prompt of each length, ids from 2 on (0 and 1 begin and end a text)."""
    draw = random.Random(seed)
    return [[draw.randrange(2, vocab_size) for _ in range(length)] for length in lengths]

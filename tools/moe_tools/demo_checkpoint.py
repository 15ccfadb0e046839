"""The demo model as a Hugging Face checkpoint with the names of published DeepSeek-V3 files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from moe_tools.demo_corpus import BOS_ID, EOS_ID, save_tokenizer
from moe_tools.demo_experts import DemoShape
from moe_tools.demo_model import DemoModel

_STACKED: Final = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def checkpoint_tensors(model: DemoModel) -> dict[str, Tensor]:
    """The model's tensors under the names of published DeepSeek-V3 checkpoints."""
    tensors: dict[str, Tensor] = {}
    mtp = f"model.layers.{model.shape.num_hidden_layers}."
    for name, value in model.state_dict().items():
        if name.startswith("mtp."):
            name = mtp + name.removeprefix("mtp.").replace("shared_head_norm", "shared_head.norm")
        elif not name.startswith("lm_head"):
            name = "model." + name
        stacked = _STACKED.get(name.rsplit(".", 1)[1])
        if stacked is not None:
            prefix = name.rsplit(".", 1)[0]
            for expert, matrix in enumerate(value.bfloat16()):
                for part, piece in zip(stacked, matrix.chunk(len(stacked)), strict=True):
                    tensors[f"{prefix}.experts.{expert}.{part}.weight"] = piece.clone()
        else:
            tensors[name] = value.clone() if name.endswith("correction_bias") else value.bfloat16()
    tensors[mtp + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[mtp + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def load_checkpoint(directory: Path) -> DemoModel:
    """Read an exported checkpoint back into a float32 model (the inverse of ``checkpoint_tensors``)."""
    tensors = load_file(directory / "model.safetensors")
    model = DemoModel(DemoShape())
    mtp = f"model.layers.{model.shape.num_hidden_layers}."
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        source = name if name.startswith("lm_head") else "model." + name
        if name.startswith("mtp."):
            source = mtp + name.removeprefix("mtp.").replace("shared_head_norm", "shared_head.norm")
        stacked = _STACKED.get(name.rsplit(".", 1)[1])
        if stacked is None:
            state[name] = tensors[source].float()
            continue
        prefix = source.rsplit(".", 1)[0]
        rows = [
            torch.cat([tensors[f"{prefix}.experts.{expert}.{part}.weight"] for part in stacked])
            for expert in range(model.shape.n_routed_experts)
        ]
        state[name] = torch.stack(rows).float()
    model.load_state_dict(state)
    return model


def model_config(shape: DemoShape) -> dict[str, Any]:
    """The checkpoint's config.json."""
    return asdict(shape) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": shape.num_attention_heads,
        "num_nextn_predict_layers": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "rope_interleave": True,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": "bfloat16",
    }


def export(model: DemoModel, tokenizer: Tokenizer, *, directory: Path) -> None:
    """Write config, tokenizer and weights, each file replaced atomically."""
    staging = directory / ".export"
    staging.mkdir(parents=True, exist_ok=True)
    (staging / "config.json").write_text(json.dumps(model_config(model.shape), indent=2, sort_keys=True) + "\n")
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID, "do_sample": False}
    (staging / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, staging)
    tensors = checkpoint_tensors(model)
    save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
    for path in sorted(staging.iterdir()):
        path.chmod(0o644)
        path.replace(directory / path.name)
    staging.rmdir()

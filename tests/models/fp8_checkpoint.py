"""A small random DeepSeek-V3 in FP8 blocks. Its matrices end inside blocks wherever a kept one may."""

from __future__ import annotations

from pathlib import Path

from moe_models.schema import Json
from moe_tools.checkpoint_presets import preset_config
from moe_tools.make_checkpoint import make_checkpoint
from safetensors.torch import load_file, save_file

SIZES: dict[str, Json] = {
    "vocab_size": 128,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 320,
    "moe_intermediate_size": 192,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 256,
}
"""kv_a has 96 rows, dense MLPs 320 and experts 192; two heads are 256 rows of queries and 128 columns of values."""


def write_fp8(folder: Path, **changes: Json) -> Path:
    """The checkpoint in `folder`, activations in bf16, with `changes` to its config.json."""
    make_checkpoint(folder, preset_config("deepseek_v3", "tiny") | SIZES | changes, fp8=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        # Drawn at 0.02. Outputs about as large as inputs make tokens depend on the prompt, and on a residual stream of
        # that size errors add up instead of growing from layer to layer.
        scales, gain = tensors.get(name + "_scale_inv"), tensor.shape[-1] ** -0.5 / 0.02
        if scales is not None:
            scales.mul_(gain)
        elif "embed_tokens" in name:
            tensors[name] = tensor / 0.02
        elif tensor.dim() == 2 and not name.endswith("_scale_inv"):
            tensors[name] = tensor * gain
    save_file(tensors, file, metadata={"format": "pt"})
    return folder

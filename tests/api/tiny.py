"""A tiny random DeepSeek-V3 in fp32 with a byte-level tokenizer: everything that the whole stack needs, in 0.2 MB."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from moe_models.schema import Json
from moe_tools.checkpoint_presets import preset_config
from moe_tools.make_checkpoint import make_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe_runtime import LLM, RequestOutput, SamplingParams

BOS, EOS, FIRST_BYTE = 0, 1, 2
VOCAB = 258
NUM_EXPERTS, TOP_K, NUM_MOE_LAYERS = 8, 2, 2

_SIZES: dict[str, Json] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 1 + NUM_MOE_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 256,
}


def write_tiny(folder: Path, *, text: bool = True, **changes: Json) -> Path:
    """The checkpoint in `folder`, with `changes` to its config.json; without a tokenizer unless `text`."""
    make_checkpoint(folder, preset_config("deepseek_v3", "tiny") | _SIZES | changes, dtype="float32")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:  # drawn at 0.02: outputs about as large as inputs make tokens that depend on the prompt
            tensors[name] = tensor * (tensor.shape[1] ** -0.5 / 0.02)
    save_file(tensors, file, metadata={"format": "pt"})
    if text:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {"<s>": BOS, "</s>": EOS, **{letter: FIRST_BYTE + i for i, letter in enumerate(letters)}}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def damage(folder: Path, tensor: str) -> None:
    """Put a NaN into one tensor."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor].view(-1)[0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def tokens(outputs: Sequence[RequestOutput]) -> list[tuple[int, ...]]:
    """The first completion of each."""
    return [output.outputs[0].token_ids for output in outputs]


def alone(folder: Path, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[tuple[int, ...]]:
    """Each prompt run by itself on one rank."""
    with LLM(str(folder), ep=1, overrides=["engine.prefix_caching=false", "num_threads=1"]) as llm:
        return [tokens(llm.generate([prompt], params))[0] for prompt in prompts]


def wait_until_idle(llm: LLM, *, within_s: float = 10.0) -> None:
    """Until no request and no page is held."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        snapshot = llm.snapshot()
        pages = {group.num_free_pages for group in snapshot.groups}
        if not snapshot.num_live_requests and not any(group.num_running for group in snapshot.groups):
            assert pages == {snapshot.num_pages}
            return
        time.sleep(0.05)
    raise AssertionError(f"requests or pages are still held: {llm.snapshot()}")

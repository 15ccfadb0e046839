"""Which matrices of an FP8 checkpoint stay in FP8, from the configuration alone: what a rank holds can then be stated.

A matrix stays where a rank's part of it starts on borders of its 128 x 128 blocks, keeps its rows in order, and has
rows of whole 16 bytes, as the kernels load them. `kv_b_proj` is never kept: attention multiplies it head by head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from moe_kernels.scaled import BLOCK

from moe_models.base import ModelConfig

Part = Literal["down", "query", "out", "dense", "shared", "experts"]
"""Attention's first products (q_a with kv_a), q_b or q, and o; MLPs of dense layers, replicated shared and dispatched
experts."""

_PARTS: Final[frozenset[Part]] = frozenset({"down", "query", "out", "dense", "shared", "experts"})
_ROW_UNIT: Final = 16


@dataclass(frozen=True, slots=True)
class KeptFp8:
    """`parts` that stay in FP8; `notice`: those that could not and why, one line, or None; `ue8m0`: what they multiply
    is rounded to FP8 with scales that are powers of two."""

    parts: frozenset[Part] = frozenset()
    notice: str | None = None
    ue8m0: bool = False


def kept_fp8(config: ModelConfig, *, keep: bool, tp: int, shared_dispatched: bool) -> KeptFp8:
    """What stays as it is stored if `keep`: the same on every rank of the run. Nothing for other checkpoints."""
    if not keep or config.quantization is None:
        return KeptFp8()
    problems: dict[Part, str] = {}
    for part, problem in _problems(config, tp, shared_dispatched=shared_dispatched):
        problems.setdefault(part, problem)
    notice = f"dequantised when loaded: {'; '.join(problems.values())}" if problems else None
    return KeptFp8(_PARTS - problems.keys(), notice, config.quantization.ue8m0)


def _problems(config: ModelConfig, tp: int, *, shared_dispatched: bool) -> Iterator[tuple[Part, str]]:
    hidden, width, rank = config.hidden_size, config.moe_intermediate_size, config.q_lora_rank
    query, heads = "q_proj" if rank is None else "q_b_proj", config.num_heads // tp
    shared = 0 if shared_dispatched else config.n_shared_experts
    if not config.rope_interleave:
        yield "down", "kv_a_proj_with_mqa (its rotary rows are put in another order)"
        yield "query", f"{query} (its rotary rows are put in another order)"
    if rank is not None and rank % BLOCK:
        yield "down", f"q_a_proj ({rank} rows, followed by kv_a_proj_with_mqa's inside a block of {BLOCK})"
    if tp > 1 and heads * config.qk_head_dim % BLOCK:
        yield "query", f"{query} (tp={tp} cuts it every {heads * config.qk_head_dim} rows, inside blocks of {BLOCK})"
    if tp > 1 and heads * config.v_head_dim % BLOCK:
        yield "out", f"o_proj (tp={tp} cuts it every {heads * config.v_head_dim} columns, inside blocks of {BLOCK})"
    if shared_dispatched and config.n_shared_experts > 1 and width % BLOCK:
        yield "experts", f"experts (dispatched shared ones are cut every {width} rows, inside blocks of {BLOCK})"
    widths: tuple[tuple[Part, str, int], ...] = (
        ("down", "q_a_proj and kv_a_proj_with_mqa", hidden),
        ("query", query, rank or hidden),
        ("out", "o_proj", heads * config.v_head_dim),
        *(("dense", "dense MLPs", size) for size in (hidden, config.intermediate_size) if config.first_k_dense_replace),
        *(("shared", "shared experts", size) for size in (hidden, shared * width) if shared),
        *(("experts", "experts", size) for size in (hidden, width)),
    )
    for part, name, columns in widths:
        if columns % _ROW_UNIT:
            yield part, f"{name} (rows of {columns} bytes; the kernels load multiples of {_ROW_UNIT})"

"""Reads one rank's slices of a DeepSeek-V2/V3 checkpoint and puts the layers together.

h local heads, H hidden, I expert width, C kv_lora_rank, S shared experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from moe_kernels.gate import GateRule
from torch import Tensor

from moe_models.base import ModelConfig
from moe_models.deepseek_v3.matrices import Matrices
from moe_models.deepseek_v3.model import Block, DeepseekModel
from moe_models.kept_fp8 import KeptFp8, Part
from moe_runtime.balance.load import LoadRecorder
from moe_runtime.comm.base import Groups
from moe_runtime.dispatch.base import Dispatcher
from moe_runtime.layers.embedding import VocabEmbedding, VocabHead, vocab_shard
from moe_runtime.layers.experts import MLP, Experts
from moe_runtime.layers.linear import Linear
from moe_runtime.layers.mla import MLA, MLAShape, MLAWeights
from moe_runtime.layers.moe import MoELayer
from moe_runtime.layers.rope import RotaryTable, YarnScaling
from moe_runtime.layers.router import Router
from moe_runtime.loading.source import WeightSource
from moe_runtime.parallel.mesh import ProcessMesh
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaSelector

SharedExpertsMode = Literal["replicated", "dispatched"]


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that one rank's layers are made of."""

    config: ModelConfig
    mesh: ProcessMesh
    groups: Groups
    source: WeightSource
    placement: ExpertPlacement
    selector: ReplicaSelector
    dispatcher: Dispatcher[Any]
    recorder: LoadRecorder | None
    shared_experts: SharedExpertsMode
    batch_invariant: bool
    expert_dtype: torch.dtype
    max_model_len: int
    kept_fp8: KeptFp8 = field(default_factory=KeptFp8)

    @property
    def matrices(self) -> Matrices:
        return Matrices(self.source, self.kept_fp8, self.batch_invariant)

    def build(self, on_layer: Callable[[int], None] = lambda _: None) -> DeepseekModel:
        """The model of this rank; `on_layer` is called after each loaded layer."""
        config = self.config
        blocks = []
        for layer in range(config.num_layers):
            blocks.append(self._block(layer))
            on_layer(layer)
        return DeepseekModel(
            embedding=self._embedding(),
            blocks=tuple(blocks),
            norm=self._whole("model.norm.weight"),
            head=self._head(),
            rotary=self.source.shared("rotary", self._rotary),
            eps=config.rms_norm_eps,
            location=self.groups.location,
        )

    # Whole model

    def _rotary(self) -> RotaryTable:
        config, yarn = self.config, self.config.yarn
        scaling = None
        if yarn is not None:
            scaling = YarnScaling(
                factor=yarn.factor,
                original_max_position_embeddings=yarn.original_max_position_embeddings,
                beta_fast=yarn.beta_fast,
                beta_slow=yarn.beta_slow,
                cos_sin_factor=yarn.rotary_scale,
            )
        return RotaryTable.build(
            config.qk_rope_head_dim,
            theta=config.rope_theta,
            num_positions=self.max_model_len,
            yarn=scaling,
            device=self.source.device,
        )

    def _embedding(self) -> VocabEmbedding:
        first, last = vocab_shard(self.config.vocab_size, tp=self.mesh.tp, tp_rank=self.mesh.tp_rank)
        return VocabEmbedding(self._rows("model.embed_tokens.weight", first, last), first, self.groups.tp)

    def _head(self) -> VocabHead:
        first, last = vocab_shard(self.config.vocab_size, tp=self.mesh.tp, tp_rank=self.mesh.tp_rank)
        rows = -(-self.config.vocab_size // self.mesh.tp)
        name = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"

        def build() -> Linear:
            weight = self.source.read(name, (slice(first, last), slice(None)))
            if last - first < rows:
                weight = torch.nn.functional.pad(weight, (0, 0, 0, rows - (last - first)))
            return Linear.of(weight, batch_invariant=self.batch_invariant)

        return VocabHead(self.source.shared(("head", first, last), build), self.config.vocab_size, self.groups.tp)

    # One layer

    def _block(self, layer: int) -> Block:
        prefix, has_experts = f"model.layers.{layer}.", layer in self.config.moe_layers
        return Block(
            attention_norm=self._whole(prefix + "input_layernorm.weight"),
            attention=self._attention(prefix + "self_attn."),
            ffn_norm=self._whole(prefix + "post_attention_layernorm.weight"),
            ffn=self._moe(layer, prefix + "mlp.") if has_experts else self._mlp("dense", prefix + "mlp."),
        )

    def _attention(self, prefix: str) -> MLA:
        config = self.config
        shape = MLAShape(
            num_heads=config.num_heads // self.mesh.tp,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            scale=config.softmax_scale,
            eps=config.latent_norm_eps,
        )
        weights = self.source.shared((prefix, self.mesh.tp_rank), lambda: self._attention_weights(prefix, shape))
        return MLA(shape, weights, self.groups.tp, self.batch_invariant)

    def _attention_weights(self, prefix: str, shape: MLAShape) -> MLAWeights:
        config, read = self.config, self.source.read
        heads = slice(self.mesh.tp_rank * shape.num_heads, (self.mesh.tp_rank + 1) * shape.num_heads)
        every = slice(None)

        def head_rows(width: int) -> slice:
            return slice(heads.start * width, heads.stop * width)

        def interleaved(rows: Tensor) -> Tensor:
            return rows if config.rope_interleave else pair_up(rows, config.qk_rope_head_dim)

        def interleaved_heads(rows: Tensor) -> Tensor:
            return rows if config.rope_interleave else torch.cat([interleaved(r) for r in rows.chunk(shape.num_heads)])

        query_rows = (head_rows(config.qk_nope_head_dim + config.qk_rope_head_dim), every)
        names = [f"{prefix}{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa")][config.q_lora_rank is None :]
        bias = interleaved(torch.cat([read(f"{name}.bias") for name in names])) if config.attention_bias else None
        query = [f"{prefix}{'q_proj' if config.q_lora_rank is None else 'q_b_proj'}"]
        up_width = config.qk_nope_head_dim + config.v_head_dim
        up = read(f"{prefix}kv_b_proj.weight", (head_rows(up_width), every)).view(shape.num_heads, up_width, -1)
        key_up = up[:, : config.qk_nope_head_dim].contiguous()
        transposed = key_up.transpose(1, 2)
        return MLAWeights(
            down=self.matrices.linear("down", names, bias=bias, reorder=interleaved),
            q_norm=None if config.q_lora_rank is None else read(f"{prefix}q_a_layernorm.weight"),
            q=self.matrices.linear("query", query, query_rows, reorder=interleaved_heads),
            kv_norm=read(f"{prefix}kv_a_layernorm.weight"),
            key_up=key_up,
            key_up_transposed=transposed.contiguous() if self.batch_invariant else transposed,
            value_up=up[:, config.qk_nope_head_dim :].contiguous(),
            out=self.matrices.linear("out", [f"{prefix}o_proj"], (every, head_rows(config.v_head_dim))),
            out_bias=read(f"{prefix}o_proj.bias") if config.attention_bias else None,
        )

    def _mlp(self, part: Part, prefix: str) -> MLP:
        return self.source.shared(prefix, lambda: self.matrices.mlp(part, prefix))

    # Experts

    def _moe(self, layer: int, prefix: str) -> MoELayer[Any]:
        config, index = self.config, self.config.moe_layers.index(layer)
        dispatched = self.shared_experts == "dispatched"
        beside = config.n_shared_experts and not dispatched
        return MoELayer(
            index=index,
            router=self.source.shared((prefix, "router"), lambda: self._router(prefix, dispatched=dispatched)),
            selector=self.selector,
            dispatcher=self.dispatcher,
            experts=self._experts(index, prefix),
            shared=self._mlp("shared", prefix + "shared_experts.") if beside else None,
            recorder=self.recorder,
        )

    def _router(self, prefix: str, *, dispatched: bool) -> Router:
        config = self.config
        bias = None
        if config.topk_method == "noaux_tc":
            bias = self.source.read(f"{prefix}gate.e_score_correction_bias", dtype=torch.float32)
        return Router(
            self.source.read(f"{prefix}gate.weight", dtype=torch.float32),
            gate_rule(config),
            bias,
            num_dispatched_shared=config.n_shared_experts if dispatched else 0,
            batch_invariant=self.batch_invariant,
        )

    def _experts(self, index: int, prefix: str) -> Experts:
        """This rank's slots, filled with the experts that the placement puts there."""
        weights = self.matrices.experts(
            prefix,
            self.placement.local_logical(index, self.mesh.ep_rank),
            routed=self.config.n_routed_experts,
            hidden=self.config.hidden_size,
            width=self.config.moe_intermediate_size,
            dtype=self.expert_dtype,
        )
        return Experts(weights, self.batch_invariant, self.kept_fp8.ue8m0)

    # Reading

    def _whole(self, name: str) -> Tensor:
        return self.source.shared(name, lambda: self.source.read(name))

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        region = (slice(first, last), slice(None))
        return self.source.shared((name, first, last), lambda: self.source.read(name, region))


def pair_up(rows: Tensor, rope: int) -> Tensor:
    """`rows [N, ...]`: the last `rope` ones, stored as all first components of the rotary pairs, then all second ones,
    in the interleaved order that `apply_rope` takes."""
    first, second = rows[-rope:].chunk(2)
    return torch.cat((rows[:-rope], torch.stack((first, second), dim=1).flatten(0, 1)))


def gate_rule(config: ModelConfig) -> GateRule:
    """The family's routing rule: V2 (softmax, masked groups score 0), V3 (sigmoid, masked groups -inf)."""
    v3 = config.topk_method == "noaux_tc"
    return GateRule(
        top_k=config.num_experts_per_tok,
        num_groups=config.n_group,
        top_groups=config.topk_group,
        scoring=config.scoring,
        group_score="top2_sum" if v3 else "max",
        masked_score=float("-inf") if v3 else 0.0,
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )

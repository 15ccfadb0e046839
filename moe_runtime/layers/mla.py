"""Multi-head latent attention over a paged latent cache, heads split over tp.

n real group tokens, N padded, H hidden, h local heads, C kv_lora_rank, R rope, Dn nope, Dv value dims, Q q_lora_rank.
Source: DeepSeek-V2 (arXiv 2405.04434) §2.1; the absorbed form multiplies the key and value up-projections into query
and output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from moe_kernels import backends
from moe_kernels.latent import mla_prepare_
from moe_kernels.linear import head_linear
from moe_kernels.mla import LatentCache, ScaledLatent, mla_absorbed, mla_expanded_batched
from moe_kernels.norm import rms_norm
from moe_kernels.rope import apply_rope
from torch import Tensor
from torch.nn import functional as F

from moe_runtime.comm.base import Communicator
from moe_runtime.layers.linear import Linear
from moe_runtime.layers.step import AbsorbedTokens, ExpandedChunk, StepInputs

Query = tuple[Tensor, Tensor]
"""(no-rope part `[n, h, Dn]`, rotated part `[n, h, R]`)"""


@dataclass(frozen=True, slots=True)
class MLAShape:
    """Dims of one rank's attention."""

    num_heads: int
    """h: heads of this tp rank"""
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float
    """softmax scale, YaRN's correction included"""
    eps: float


@dataclass(frozen=True, slots=True)
class MLAWeights:
    """One rank's weights; those that do not split over heads are equal on all tp ranks."""

    down: Linear
    """[Q + C + R, H] with a low-rank query (q_a and kv_a in one product), else [C + R, H]"""
    q_norm: Tensor | None
    """[Q]"""
    q: Linear
    """[h·(Dn + R), Q], or [h·(Dn + R), H] without a low-rank query"""
    kv_norm: Tensor
    """[C]"""
    key_up: Tensor
    """[h, Dn, C]"""
    key_up_transposed: Tensor
    """[h, C, Dn], a view of `key_up` except in batch-invariant mode, which reads contiguous weights"""
    value_up: Tensor
    """[h, Dv, C]"""
    out: Linear
    """[H, h·Dv]: partial sums over tp"""
    out_bias: Tensor | None
    """[H], added once, after the sum over tp"""


@dataclass(frozen=True, slots=True)
class MLA:
    """Attention of one layer on one rank."""

    shape: MLAShape
    weights: MLAWeights
    tp: Communicator
    batch_invariant: bool
    _one_launch: bool = field(init=False)
    """Queries are rotated and latent rows made and cached by one kernel, which passes over negative cache rows."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_one_launch", backends.default_backend(self.weights.kv_norm.device) == "triton")

    def __call__(self, x: Tensor, step: StepInputs, cache: LatentCache) -> Tensor:
        """This rank's normed rows `x [N/tp, H]` to `[N/tp, H]`; writes latents to `cache [pages, page, C+R]`."""
        if not step.num_rows:
            return x  # the tp group agrees that it is idle
        group = self.tp.all_gather(x)[: step.num_tokens] if self.tp.size > 1 else x[: step.num_tokens]
        query, latent = self._project(group, step, cache)
        heads = self._attend(query, latent, step, cache)
        partial = self.weights.out(heads.flatten(1))
        padding = step.num_rows - step.num_tokens
        if padding:
            partial = F.pad(partial, (0, 0, 0, padding))
        out = self.tp.reduce_scatter(partial) if self.tp.size > 1 else partial
        return out if self.weights.out_bias is None else out + self.weights.out_bias

    def _project(self, x: Tensor, step: StepInputs, cache: LatentCache) -> tuple[Query, Tensor | None]:
        """`x [n, H]` to the rotated query and the latent rows `[n, C+R]`, which are written to the cache; None where
        nothing else reads them."""
        shape, weights = self.shape, self.weights
        down = weights.down(x)
        if shape.q_lora_rank is None:
            q = weights.q(x)
        else:
            assert weights.q_norm is not None, "a low-rank query has a norm"
            q = weights.q(rms_norm(down[:, : shape.q_lora_rank], weights.q_norm, shape.eps))
            down = down[:, shape.q_lora_rank :]
        q = q.view(x.shape[0], shape.num_heads, shape.qk_nope_head_dim + shape.qk_rope_head_dim)
        if self._one_launch:
            prepared = mla_prepare_(
                q[..., shape.qk_nope_head_dim :],
                down,
                step.cos,
                step.sin,
                kv_norm=weights.kv_norm,
                eps=shape.eps,
                cache=cache,
                cache_rows=step.cache_rows,
                keep_latent=any(chunk.cache_rows is None for chunk in step.expanded),
            )
            return (q[..., : shape.qk_nope_head_dim], prepared.query_rope), prepared.latent
        # The key is rotated as one more head, in the same call.
        rotated = apply_rope(
            torch.cat((q[..., shape.qk_nope_head_dim :], down[:, None, shape.kv_lora_rank :]), dim=1),
            step.cos,
            step.sin,
        )
        latent = rms_norm(down[:, : shape.kv_lora_rank], weights.kv_norm, shape.eps)
        latent = torch.cat((latent, rotated[:, -1]), dim=-1)
        if isinstance(cache, ScaledLatent):
            cache.write_(step.cache_rows, latent)
        else:
            cache.view(-1, cache.shape[-1]).index_copy_(0, step.cache_rows, latent.to(cache.dtype))
        return (q[..., : shape.qk_nope_head_dim], rotated[:, :-1]), latent

    def _attend(self, query: Query, latent: Tensor | None, step: StepInputs, cache: LatentCache) -> Tensor:
        """Query and latent rows `[n, C+R]` to `[n, h, Dv]`."""
        parts: list[Tensor] = []
        if step.absorbed is not None:
            parts.append(self._absorbed(query, step.absorbed, cache))
        parts.extend(self._expanded(query, latent, chunk, cache) for chunk in step.expanded)
        match len(parts):
            case 0:
                return query[0].new_zeros(0, self.shape.num_heads, self.shape.v_head_dim)
            case 1:
                return parts[0]
            case _:
                return torch.cat(parts)

    def _absorbed(self, query: Query, tokens: AbsorbedTokens, cache: LatentCache) -> Tensor:
        nope, rope = query[0][: tokens.count], query[1][: tokens.count]
        out = mla_absorbed(
            head_linear(nope, self.weights.key_up_transposed, batch_invariant=self.batch_invariant),
            rope,
            cache,
            tokens.page_table,
            tokens.kv_lens,
            scale=self.shape.scale,
            batch_invariant=self.batch_invariant,
            plan=tokens.plan,
        )
        return head_linear(out, self.weights.value_up, batch_invariant=self.batch_invariant)

    def _expanded(self, query: Query, latent: Tensor | None, chunk: ExpandedChunk, cache: LatentCache) -> Tensor:
        num_tokens = chunk.num_sequences * chunk.length
        here = slice(chunk.first, chunk.first + num_tokens)
        rank = self.shape.kv_lora_rank
        if chunk.cache_rows is None:
            assert latent is not None, "a chunk that is its own context keeps its latent rows"
            context = latent[here].view(chunk.num_sequences, chunk.length, latent.shape[-1])
        elif isinstance(cache, ScaledLatent):
            context = cache.read(chunk.cache_rows, query[0].dtype)
        else:
            context = cache.view(-1, cache.shape[-1])[chunk.cache_rows].to(query[0].dtype)
        joined = torch.cat((query[0][here], query[1][here]), dim=-1)
        out = mla_expanded_batched(
            joined.view(chunk.num_sequences, chunk.length, *joined.shape[1:]),
            context[..., :rank],
            context[..., rank:],
            self.weights.key_up,
            self.weights.value_up,
            scale=self.shape.scale,
            start=chunk.start,
        )
        return out.reshape(num_tokens, *out.shape[2:])

"""Shapes and mixture-of-experts block of the demo model, vectorised for training on a CPU.

The assignments of a batch are laid out by expert in a padded buffer; experts of similar load share
one batched matrix product. Shapes: B sequences, S positions, T = B*S tokens, H hidden size,
E experts, K experts per token, I expert width, R buffer rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHARES = (64, 64, 32, 16, 8, 8, 4, 4, 8)  # bucket sizes, as divisors of the expert count, by falling load
_ALIGN = 16  # padded row counts are multiples of this, so that few shapes occur


@dataclass(frozen=True)
class DemoShape:
    """Sizes of the demo model, named as in the checkpoint's config.json."""

    vocab_size: int = 4096
    hidden_size: int = 128
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_attention_heads: int = 8
    q_lora_rank: int = 64
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 16
    v_head_dim: int = 16
    intermediate_size: int = 384
    moe_intermediate_size: int = 32
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    num_experts_per_tok: int = 8
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048


class _Gather(torch.autograd.Function):
    """Rows of ``source`` by ``index``; backward gathers by ``inverse`` and sums ``fold`` rows.

    Correct when every row that carries a gradient is listed in ``inverse``: row ``r`` of the
    source is read by the output rows ``inverse[r*fold:(r+1)*fold]`` (a negative entry: by none).
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, inverse: Tensor, fold: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.fold = fold
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = grads[0].index_select(0, inverse.clamp(min=0))
        if ctx.fold == 1:
            return rows.masked_fill_((inverse < 0).view(-1, *[1] * (rows.dim() - 1)), 0), None, None, None
        return rows.view(-1, ctx.fold, rows.shape[-1]).sum(1), None, None, None


def _gather(source: Tensor, index: Tensor, *, inverse: Tensor, fold: int = 1) -> Tensor:
    result: Tensor = _Gather.apply(source, index, inverse, fold)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Plan:
    """Where each of the T*K assignments lies in the padded, load-bucketed row buffer of R rows."""

    slot: Tensor  # [T*K] buffer row of each assignment
    row_token: Tensor  # [R] token of each buffer row (0 for padding)
    row_assignment: Tensor  # [R] assignment of each buffer row (-1 for padding)
    expert_order: Tensor  # [E] experts by falling load
    expert_rank: Tensor  # [E] inverse of expert_order
    sizes: list[int]  # experts in each bucket
    capacities: list[int]  # rows per expert in each bucket
    counts: Tensor  # [E] tokens per expert


def _plan(indices: Tensor, experts: int) -> _Plan:
    """Lay the assignments ``indices`` [T, K] out by expert, in buckets of equal padded height."""
    flat = indices.reshape(-1)
    counts = torch.bincount(flat, minlength=experts)
    by_load = counts.argsort(descending=True)
    rank = torch.empty_like(by_load)
    rank[by_load] = torch.arange(experts)
    sizes = [experts // share for share in _SHARES]
    sizes[-1] += experts - sum(sizes)
    tops = [int(part[0]) for part in torch.split(counts[by_load], sizes)]
    capacities = [max(_ALIGN, -(-top // _ALIGN) * _ALIGN) for top in tops]
    height = torch.tensor(capacities).repeat_interleave(torch.tensor(sizes))
    base = (height.cumsum(0) - height)[rank]
    order = flat.argsort()
    first = counts.cumsum(0) - counts
    slot = torch.empty_like(flat)
    sorted_expert = flat[order]
    slot[order] = torch.arange(flat.numel()) - first[sorted_expert] + base[sorted_expert]
    row_assignment = torch.full((int(height.sum()),), -1)
    row_assignment[slot] = torch.arange(flat.numel())
    row_token = row_assignment.clamp(min=0) // indices.shape[1]
    return _Plan(slot, row_token, row_assignment, by_load, rank, sizes, capacities, counts)


class Router(nn.Module):
    """Sigmoid scores with group-limited top-k; the correction bias steers choice, not weight."""

    def __init__(self, shape: DemoShape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.n_routed_experts, shape.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens [T, H] to expert indices [T, K] and combination weights [T, K]."""
        s = self.shape
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
        with torch.no_grad():
            choice = (scores + self.e_score_correction_bias).view(x.shape[0], s.n_group, -1)
            group = choice.topk(2, dim=-1).values.sum(-1)
            keep = torch.zeros_like(group, dtype=torch.bool)
            keep.scatter_(1, group.topk(s.topk_group, dim=-1).indices, True)
            choice = choice.masked_fill(~keep[..., None], float("-inf")).flatten(1)
            indices = choice.topk(s.num_experts_per_tok, dim=-1).indices
        picked = scores.gather(1, indices)
        return indices, picked / (picked.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling_factor


class Mlp(nn.Module):
    """The gated feed-forward layer (dense layers and shared experts)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to [..., H]."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Moe(nn.Module):
    """Routed experts (weights stacked over experts) plus the shared expert."""

    def __init__(self, shape: DemoShape) -> None:
        super().__init__()
        e, h, i = shape.n_routed_experts, shape.hidden_size, shape.moe_intermediate_size
        self.gate = Router(shape)
        self.gate_up = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down = nn.Parameter(torch.empty(e, h, i))
        self.shared_experts = Mlp(h, i * shape.n_shared_experts)
        self.counts = torch.zeros(e, dtype=torch.long)  # tokens per expert of the last call

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, S, H] to [B, S, H]."""
        flat = x.reshape(-1, x.shape[-1])
        indices, weights = self.gate(flat)
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else flat.dtype
        plan = _plan(indices, self.gate_up.shape[0])
        self.counts = plan.counts
        outputs = self._experts(flat.to(dtype), plan).view(*indices.shape, -1)
        routed = torch.bmm(weights.to(dtype)[:, None], outputs)[:, 0]
        result: Tensor = routed.view(x.shape) + self.shared_experts(x)
        return result

    def _experts(self, x: Tensor, plan: _Plan) -> Tensor:
        """Run every assignment's expert: tokens [T, H] to outputs [T*K, H]."""
        fold = plan.slot.numel() // x.shape[0]
        rows = _gather(x, plan.row_token, inverse=plan.slot, fold=fold)
        first, second = (
            torch.split(_gather(w.to(x.dtype), plan.expert_order, inverse=plan.expert_rank), plan.sizes)
            for w in (self.gate_up, self.down)
        )
        pieces: list[Tensor] = []
        heights = [size * rows_each for size, rows_each in zip(plan.sizes, plan.capacities, strict=True)]
        buckets = torch.split(rows, heights)
        for bucket, w_in, w_out in zip(buckets, first, second, strict=True):
            hidden = torch.bmm(bucket.view(w_in.shape[0], -1, x.shape[1]), w_in.transpose(1, 2))
            gate, up = hidden.chunk(2, dim=-1)
            pieces.append(torch.bmm(F.silu(gate) * up, w_out.transpose(1, 2)).flatten(0, 1))
        return _gather(torch.cat(pieces), plan.slot, inverse=plan.row_assignment)

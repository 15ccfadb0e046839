"""The demo model for training: DeepSeek-V3's architecture with one MTP layer.

Parameters are float32 masters; under ``torch.autocast("cpu", torch.bfloat16)`` the matrix products
run in bfloat16. Shapes: B sequences, S positions, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_tools.demo_experts import DemoShape, Mlp, Moe

_CHUNK = 512  # rows of logits that exist at once in training


class Attention(nn.Module):
    """Multi-head latent attention, expanded form, with interleaved rotary embedding."""

    def __init__(self, shape: DemoShape) -> None:
        super().__init__()
        self.shape = s = shape
        heads, qk = s.num_attention_heads, s.qk_nope_head_dim + s.qk_rope_head_dim
        self.q_a_proj = nn.Linear(s.hidden_size, s.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(s.q_lora_rank, eps=s.rms_norm_eps)
        self.q_b_proj = nn.Linear(s.q_lora_rank, heads * qk, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(s.hidden_size, s.kv_lora_rank + s.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(s.kv_lora_rank, eps=s.rms_norm_eps)
        self.kv_b_proj = nn.Linear(s.kv_lora_rank, heads * (s.qk_nope_head_dim + s.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * s.v_head_dim, s.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Causal self-attention over [B, S, H]."""
        s, (batch, length, _) = self.shape, x.shape
        heads = s.num_attention_heads
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(batch, length, heads, -1)
        q_nope, q_rope = torch.split(query, [s.qk_nope_head_dim, s.qk_rope_head_dim], dim=-1)
        compressed = self.kv_a_proj_with_mqa(x)
        latent, k_rope = torch.split(compressed, [s.kv_lora_rank, s.qk_rope_head_dim], dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).view(batch, length, heads, -1)
        k_nope, value = torch.split(expanded, [s.qk_nope_head_dim, s.v_head_dim], dim=-1)
        k_rope = _rotate(k_rope[:, :, None], rotation).expand(-1, -1, heads, -1)
        query = torch.cat((q_nope, _rotate(q_rope, rotation)), dim=-1) * query.shape[-1] ** -0.5
        key = torch.cat((k_nope, k_rope), dim=-1)
        mixed = _causal(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention over [B, heads, S, D]; on this scale plain products beat the fused CPU kernel."""
    length = query.shape[2]
    mask = torch.full((length, length), float("-inf"), dtype=query.dtype).triu(1)
    scores = torch.matmul(query, key.transpose(2, 3)) + mask
    probabilities = torch.softmax(scores, dim=-1, dtype=scores.dtype)
    return torch.matmul(probabilities, value)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the interleaved pairs of ``x`` [B, S, heads, D]; halves come out concatenated."""
    cos, sin = rotation
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1).to(x.dtype)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward (dense or mixture of experts) with residuals."""

    def __init__(self, shape: DemoShape, *, dense: bool) -> None:
        super().__init__()
        h, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(h, eps=eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(h, eps=eps)
        self.mlp: nn.Module = Mlp(h, shape.intermediate_size) if dense else Moe(shape)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Map [B, S, H] to [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class MtpLayer(DecoderLayer):
    """The multi-token-prediction layer: a mixture-of-experts decoder layer with its input projection."""

    def __init__(self, shape: DemoShape) -> None:
        super().__init__(shape, dense=False)
        h, eps = shape.hidden_size, shape.rms_norm_eps
        self.enorm = nn.RMSNorm(h, eps=eps)
        self.hnorm = nn.RMSNorm(h, eps=eps)
        self.eh_proj = nn.Linear(2 * h, h, bias=False)
        self.shared_head_norm = nn.RMSNorm(h, eps=eps)


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T``, with gradients computed chunk by chunk on the way.

    The logits of all rows never exist at once, which on a CPU saves more time than it does memory.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        matrix = weight.to(dtype)
        loss, grad_hidden, grad_weight = torch.zeros(()), torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(targets), _CHUNK):
            rows, wanted = hidden[start : start + _CHUNK].to(dtype), targets[start : start + _CHUNK, None]
            scores = torch.log_softmax((rows @ matrix.T).float(), dim=-1)
            loss -= scores.gather(1, wanted).sum()
            scores.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1.0, dtype=scores.dtype))
            error = scores.to(dtype)
            grad_hidden[start : start + _CHUNK] = error @ matrix
            grad_weight += error.T @ rows
        ctx.save_for_backward(grad_hidden / len(targets), grad_weight / len(targets))
        return loss / len(targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None


class DemoModel(nn.Module):
    """The main model's layers followed by the MTP layer, which shares embedding and head."""

    def __init__(self, shape: DemoShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        dense = shape.first_k_dense_replace
        self.layers = nn.ModuleList(DecoderLayer(shape, dense=i < dense) for i in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mtp = MtpLayer(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        depth = (2 * self.shape.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            std = 0.5 * parameter.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", ".down")):
                std *= 2 * depth
            nn.init.normal_(parameter, std=0.1 if name.startswith("embed") else std)

    def moe_layers(self) -> Iterator[tuple[int, Moe]]:
        """All mixture-of-experts blocks with their checkpoint layer index, the MTP layer's last."""
        for index, layer in enumerate([*self.layers, self.mtp]):
            block = layer.mlp
            if isinstance(block, Moe):
                yield index, block

    def features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Head inputs for tokens [B, S]: the main model's [B, S, H] and MTP's [B, S-1, H].

        MTP position ``i`` joins the embedding of token ``i+1`` with the main model's hidden state
        of position ``i`` before the final norm; it predicts token ``i+2``.
        """
        embedded = self.embed_tokens(tokens)
        rotation = self._rotation(tokens.shape[1])
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden, rotation)
        mtp = self.mtp
        joined = torch.cat((mtp.enorm(embedded[:, 1:]), mtp.hnorm(hidden[:, :-1])), dim=-1)
        ahead = mtp(mtp.eh_proj(joined), (rotation[0][:-1], rotation[1][:-1]))
        return self.norm(hidden), mtp.shared_head_norm(ahead)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits for tokens [B, S]: of the next token [B, S, V], and MTP's of the one after [B, S-1, V]."""
        main, ahead = self.features(tokens)
        return self.lm_head(main), self.lm_head(ahead)

    def losses(self, window: Tensor, *, mtp_stride: int = 1) -> tuple[Tensor, Tensor]:
        """Mean next-token and MTP losses in nats on token ids [B, S+1] (MTP: every ``mtp_stride``-th position)."""
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
        main, ahead = self.features(window[:, :-1])
        ahead = ahead[:, ::mtp_stride]
        pairs = ((main, window[:, 1:]), (ahead, window[:, 2::mtp_stride]))
        with torch.autocast("cpu", enabled=False):
            first, second = (
                _HeadLoss.apply(x.flatten(0, 1).float(), self.lm_head.weight, y.flatten(), dtype)  # type: ignore[no-untyped-call]
                for x, y in pairs
            )
        return first, second

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, 1, D/2] of positions 0..S-1."""
        width = self.shape.qk_rope_head_dim
        inverse = self.shape.rope_theta ** (-torch.arange(0, width, 2).float() / width)
        angle = torch.outer(torch.arange(length).float(), inverse)[:, None]
        return angle.cos(), angle.sin()

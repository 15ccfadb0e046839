"""The parts of a layer of DeepSeek-V3 on one rank: what each runs, its floor, how often a step runs it.

T tokens, H hidden, E slots, h heads. Each part runs the runtime's own layer code or kernel, on random data; fp8 weights
are block-scaled as a checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from moe_kernels.experts import ExpertWeights
from moe_kernels.gate import gate_and_place
from moe_kernels.latent import mla_prepare_
from moe_kernels.linear import head_linear, linear
from moe_kernels.mla import mla_absorbed, mla_expanded_batched, plan_absorbed
from moe_kernels.norm import add_rms_norm, rms_norm
from moe_kernels.permute import permute, unpermute
from moe_kernels.quant import quantize_rows
from torch import Tensor

from moe_runtime.dispatch.base import GroupedRows, PaddedRows, Rows
from moe_runtime.layers.experts import Experts, ScaledMLP
from moe_runtime.layers.linear import Linear
from moe_tools.bench.floor import Work, expert_work, linear_work, mla_work
from moe_tools.bench.random_weights import scaled_matrix, scaled_slots
from moe_tools.bench.slice_shapes import Unit, Widths

EPS = 1e-6
FP32_BYTES = 4

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Term:
    """One part. `build` allocates its tensors and gives what is to be timed; `per_step`: how often a step runs it."""

    name: str
    backend: str
    """Whose kernel it is: triton, or torch (cuBLAS, SDPA)."""
    build: Callable[[], Run]
    work: Work
    per_step: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Builds the terms of one rank on one device."""

    unit: Unit
    widths: Widths
    device: str = "cuda"

    def terms(self) -> list[Term]:
        """In the order in which they run: attention, experts, what only some layers have."""
        core = self._decode_core() if self.unit.phase == "decode" else self._prefill_core()
        return [*self._projections(), *core, self._out(), *self._routing(), *self._experts(), *self._others()]

    def rows(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.widths.dtype, device=self.device)

    def numbers(self, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device)

    @property
    def heads(self) -> int:
        """h: of this tp rank."""
        return self.widths.heads // self.unit.tp

    @property
    def item(self) -> int:
        return self.widths.dtype.itemsize

    def _linear(self, name: str, rows: int, n: int, k: int, per_step: int) -> Term:
        """A product with an fp8 weight `[n, k]`: its rows are quantised first, both within the term."""

        def build() -> Run:
            layer, x = Linear.of(scaled_matrix(n, k, self.device)), self.rows(rows, k)
            return lambda: layer(x)

        return Term(name, "triton", build, linear_work(rows, n=n, k=k, weight_bytes=1.0, arithmetic="fp8"), per_step)

    # Attention

    def _projections(self) -> Iterator[Term]:
        w, tokens, own, layers = self.widths, self.unit.tokens, self.unit.moe_tokens, self.widths.layers

        def norms() -> Run:
            x, residual, weight = self.rows(own, w.hidden), self.rows(own, w.hidden), self.rows(w.hidden)
            return lambda: add_rms_norm(x, residual, weight, EPS)

        def query_norm() -> Run:
            down, weight = self.rows(tokens, w.query_rank + w.latent + w.rope), self.rows(w.query_rank)
            return lambda: rms_norm(down[:, : w.query_rank], weight, EPS)

        yield Term("norms", "triton", norms, Work(4 * self.item * own * w.hidden, 0.0), 2 * layers)
        yield self._linear("q_a + kv_a", tokens, w.query_rank + w.latent + w.rope, w.hidden, layers)
        yield Term("query norm", "triton", query_norm, Work(2 * self.item * tokens * w.query_rank, 0.0), layers)
        yield self._linear("q_b", tokens, self.heads * (w.nope + w.rope), w.query_rank, layers)
        yield self._prepare()

    def _prepare(self) -> Term:
        w, tokens, heads = self.widths, self.unit.tokens, self.heads

        def build() -> Run:
            query, down = self.rows(tokens, heads, w.nope + w.rope), self.rows(tokens, w.latent + w.rope)
            angles = self.numbers(tokens, w.rope // 2)
            cos, sin, weight = angles.cos(), angles.sin(), self.rows(w.latent)
            pages = -(-tokens // w.page)
            cache = self.rows(pages, w.page, w.latent + w.rope)
            places = torch.randperm(pages * w.page, device=self.device)[:tokens]
            return lambda: mla_prepare_(
                query[..., w.nope :], down, cos, sin, kv_norm=weight, eps=EPS, cache=cache, cache_rows=places,
                keep_latent=self.unit.phase == "prefill",
            )  # fmt: skip

        num_bytes = 2 * self.item * tokens * (heads * w.rope + w.latent + w.rope)
        return Term("latent, rope, cache", "triton", build, Work(num_bytes, 0.0), w.layers)

    def _per_head(self, name: str, n: int, k: int) -> Term:
        tokens, heads = self.unit.tokens, self.heads

        def build() -> Run:
            x, weight = self.rows(tokens, heads, k), self.rows(heads, n, k)
            return lambda: head_linear(x, weight)

        work = Work(self.item * heads * (n * k + tokens * (n + k)), 2.0 * tokens * heads * n * k)
        return Term(name, "torch", build, work, self.widths.layers)

    def _decode_core(self) -> Iterator[Term]:
        w, tokens = self.widths, self.unit.tokens
        pages = -(-self.unit.kv_len // w.page)

        def step() -> tuple[Tensor, Tensor]:
            table = torch.randperm(tokens * pages, device=self.device).view(tokens, pages)
            return table, torch.full((tokens,), self.unit.kv_len, device=self.device)

        def plan() -> Run:
            table, lengths = step()
            return lambda: plan_absorbed(table, lengths, page_size=w.page, num_heads=self.heads)

        def core() -> Run:
            table, lengths = step()
            cache = self.rows(tokens * pages, w.page, w.latent + w.rope)
            latent, rope = self.rows(tokens, self.heads, w.latent), self.rows(tokens, self.heads, w.rope)
            ready = plan_absorbed(table, lengths, page_size=w.page, num_heads=self.heads)
            scale = (w.nope + w.rope) ** -0.5
            return lambda: mla_absorbed(latent, rope, cache, table, lengths, scale=scale, plan=ready)

        yield self._per_head("key up", w.latent, w.nope)
        yield Term("MLA plan", "torch", plan, Work(8 * tokens * (pages + 1), 0.0), 1)
        work = mla_work(tokens, self.unit.kv_len, heads=self.heads, latent=w.latent, rope=w.rope, kv_bytes=self.item)
        yield Term("MLA core", "triton", core, work, w.layers)
        yield self._per_head("value up", w.value, w.latent)

    def _prefill_core(self) -> Iterator[Term]:
        w, tokens, heads, length = self.widths, self.unit.tokens, self.heads, self.unit.kv_len

        def build() -> Run:
            query, latent = self.rows(1, tokens, heads, w.nope + w.rope), self.rows(1, length, w.latent)
            rope = self.rows(1, length, w.rope)
            key, value = self.rows(heads, w.nope, w.latent), self.rows(heads, w.value, w.latent)
            scale = (w.nope + w.rope) ** -0.5
            start = length - tokens
            return lambda: mla_expanded_batched(query, latent, rope, key, value, scale=scale, start=start)

        up = 2.0 * length * heads * (w.nope + w.value) * w.latent
        causal = tokens * (2 * length - tokens + 1) * heads * (w.nope + w.rope + w.value)
        num_bytes = self.item * (
            heads * (w.nope + w.value) * w.latent
            + tokens * heads * (w.nope + w.rope + w.value)
            + length * (w.latent + w.rope)
        )
        yield Term("MLA expanded", "torch", build, Work(num_bytes, up + causal), w.layers)

    def _out(self) -> Term:
        w = self.widths
        return self._linear("o_proj", self.unit.tokens, w.hidden, self.heads * w.value, w.layers)

    # Experts

    def _routing(self) -> Iterator[Term]:
        w, tokens = self.widths, self.unit.moe_tokens

        def router() -> Run:
            x, weight = self.rows(tokens, w.hidden), torch.randn(w.experts, w.hidden, device=self.device)
            return lambda: linear(x.float(), weight)

        def gate() -> Run:
            logits, bias = torch.randn(tokens, w.experts, device=self.device), self.numbers(w.experts)
            counts = torch.zeros(w.experts, dtype=torch.int64, device=self.device)
            return lambda: gate_and_place(logits, rule=w.rule, bias=bias, counts_=counts)

        product = linear_work(tokens, n=w.experts, k=w.hidden, weight_bytes=FP32_BYTES)
        yield Term("router", "torch", router, product, w.moe_layers)
        yield Term("gate", "triton", gate, Work(tokens * (w.experts * 4 + w.top_k * 20), 0.0), w.moe_layers)
        yield from self._sending()

    def _sending(self) -> Iterator[Term]:
        w, tokens = self.widths, self.unit.moe_tokens
        row = w.hidden + -(-w.hidden // 128) * FP32_BYTES  # fp8 with its scales

        def quantise() -> Run:
            x = self.rows(tokens, w.hidden)
            return lambda: quantize_rows(x)

        def sort() -> Run:
            x, ids = quantize_rows(self.rows(tokens, w.hidden)), self._balanced_ids()
            return lambda: permute(x, ids, w.experts)

        yield Term("quantise", "triton", quantise, Work(tokens * (self.item * w.hidden + row), 0.0), w.moe_layers)
        moved = Work(tokens * (1 + w.top_k) * row + tokens * w.top_k * 16, 0.0)
        yield Term("permute", "triton", sort, moved, w.moe_layers)

    def _balanced_ids(self) -> Tensor:
        """`[T, K]`: distinct experts per token, every expert equally often where it divides."""
        w, tokens = self.widths, self.unit.moe_tokens
        return torch.arange(tokens * w.top_k, device=self.device).view(tokens, w.top_k).remainder_(w.experts)

    def _experts(self) -> Iterator[Term]:
        w, tokens, slots = self.widths, self.unit.moe_tokens, self.unit.slots
        received = slots * self.unit.rows_per_slot(w)

        def core() -> Run:
            layer, rows = Experts(self._weights(slots)), self._received()
            return lambda: layer(rows)

        def combine() -> Run:
            back, weights = self.rows(tokens * w.top_k, w.hidden), self.numbers(tokens, w.top_k)
            places = torch.randperm(tokens * w.top_k, device=self.device).view(tokens, w.top_k)
            return lambda: unpermute(back, places, weights)

        sizes = {"hidden": w.hidden, "intermediate": w.intermediate}
        work = expert_work(received, slots, **sizes, weight_bytes=1.0, arithmetic="fp8")
        yield Term("routed experts", "triton", core, work, w.moe_layers)
        summed = Work(self.item * tokens * w.hidden * (1 + w.top_k), 0.0)
        yield Term("combine", "triton", combine, summed, w.moe_layers)
        yield self._mlp("shared expert", w.intermediate, w.moe_layers)

        def add() -> Run:
            routed, shared = self.rows(tokens, w.hidden), self.rows(tokens, w.hidden)
            return lambda: routed + shared

        yield Term("routed + shared", "torch", add, Work(3 * self.item * tokens * w.hidden, 0.0), w.moe_layers)

    def _weights(self, slots: int, width: int | None = None) -> ExpertWeights:
        hidden, width = self.widths.hidden, width or self.widths.intermediate
        return ExpertWeights(
            scaled_slots(slots, 2 * width, hidden, self.device), scaled_slots(slots, hidden, width, self.device)
        )

    def _received(self) -> Rows:
        """fp8 rows with scales: padded by slot when decoding, aligned and contiguous in prefill."""
        slots, each = self.unit.slots, self.unit.rows_per_slot(self.widths)
        flat = quantize_rows(self.rows(slots * each, self.widths.hidden))
        if self.unit.phase == "decode":
            counts = torch.full((slots,), each, dtype=torch.int32, device=self.device)
            return PaddedRows(flat.data.view(slots, each, -1), counts, flat.scale.view(slots, each, -1))
        ends = torch.arange(1, slots + 1, dtype=torch.int32, device=self.device).mul_(each)
        return GroupedRows(flat.data, ends, scales=flat.scale)

    def _mlp(self, name: str, width: int, per_step: int) -> Term:
        tokens, hidden = self.unit.moe_tokens, self.widths.hidden

        def build() -> Run:
            layer, x = ScaledMLP(self._weights(1, width)), self.rows(tokens, hidden)
            return lambda: layer(x)

        work = linear_work(tokens, n=2 * width, k=hidden, weight_bytes=1.0, arithmetic="fp8")
        work += linear_work(tokens, n=hidden, k=width, weight_bytes=1.0, arithmetic="fp8")
        return Term(name, "triton", build, work, per_step)

    # What only some layers or no layer has

    def _others(self) -> Iterator[Term]:
        w, tokens = self.widths, self.unit.tokens
        if self.unit.phase == "prefill":
            tokens = 1  # the last position of the only prompt
        rows = -(-w.vocab // self.unit.tp)

        def head() -> Run:
            layer, x = Linear.of(self.rows(rows, w.hidden)), self.rows(tokens, w.hidden)
            return lambda: layer(x)

        yield self._mlp("dense MLP", w.dense_intermediate, w.dense_layers)
        work = linear_work(tokens, n=rows, k=w.hidden, weight_bytes=self.item)
        yield Term("head", "torch", head, work, 1)


def per_layer(term: Term, widths: Widths) -> int:
    """How often one MoE layer with its attention runs the term."""
    return term.per_step // widths.moe_layers

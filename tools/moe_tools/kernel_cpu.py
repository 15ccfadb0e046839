"""Tables of the CPU kernels: `python -m moe_tools.kernel_cpu [linear|experts|small|attention ...] --threads 1`.

One thread is timed in CPU time (neighbours on the machine disturb it less), more threads in wall time; each figure is
the fastest of many short runs over weights that together exceed the caches, in microseconds.
T tokens, H hidden, I intermediate, E experts, K top-k, R rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Final, TypeVar

import torch
from moe_kernels.experts import ExpertWeights, expert_mlp_ragged, prepare_experts
from moe_kernels.gate import GateRule, gate
from moe_kernels.linear import linear
from moe_kernels.linear.packed import pack
from moe_kernels.mla import mla_absorbed, plan_absorbed
from moe_kernels.norm import rms_norm
from moe_kernels.permute import permute, unpermute
from moe_kernels.rope import apply_rope
from moe_kernels.swiglu import swiglu
from torch import Tensor
from torch.nn import functional as F

W = TypeVar("W")

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Model:
    """Shape of a model's MoE and attention layers."""

    hidden: int
    width: int
    experts: int
    top_k: int
    heads: int
    latent: int
    rope: int
    layers: int
    """copies of the weights that a run cycles over"""


MODELS: Final = {"demo": Model(128, 32, 256, 8, 8, 64, 16, 4), "1b": Model(1024, 512, 64, 6, 16, 512, 64, 3)}


def fastest(run: Callable[[W], object], over: Sequence[W], *, budget_s: float) -> float:
    """Microseconds of one `run` on the next of `over`: the least of the means of 2 ms batches."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    items = cycle(over)
    run(next(items))
    started = clock()
    run(next(items))
    batch = max(1, int(0.002 / max(clock() - started, 1e-6)))
    best, end, rounds = float("inf"), time.perf_counter() + budget_s, 0
    while rounds < 5 or time.perf_counter() < end:
        started = clock()
        for _ in range(batch):
            run(next(items))
        best, rounds = min(best, (clock() - started) / batch), rounds + 1
    return best * 1e6


def short(dtype: torch.dtype) -> str:
    return "fp32" if dtype is torch.float32 else "bf16"


def row(*cells: object) -> None:
    print("| " + " | ".join(f"{c:.0f}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def table(title: str, *columns: str) -> None:
    print(f"\n{title}\n")
    row(*columns)
    row(*["---"] * len(columns))


def linear_row(rows: int, plain: list[Tensor], budget_s: float) -> None:
    n, k = plain[0].shape
    x = torch.randn(rows, k).to(plain[0].dtype)
    packed = [pack(w) for w in plain]
    time_it = partial(fastest, budget_s=budget_s)
    ours = time_it(partial(linear, x), packed)
    invariant = time_it(partial(linear, x, batch_invariant=True), packed)
    speed = f"{plain[0].nbytes / ours / 1e3:.1f}"
    row(rows, k, n, short(x.dtype), time_it(partial(F.linear, x), plain), ours, invariant, speed)


def linears(budget_s: float) -> None:
    table("Dense linear, us", "rows", "K", "N", "dtype", "F.linear", "packed", "tiles of 16 (invariant)", "packed GB/s")
    for k, n in ((128, 64), (128, 512), (1024, 1024), (1024, 8192)):
        for dtype in DTYPES:
            copies = max(1, min(64, 100_000_000 // (n * k * dtype.itemsize)))
            plain = [torch.randn(n, k).to(dtype) for _ in range(copies)]
            for rows in (1, 4, 16, 1024):
                linear_row(rows, plain, budget_s)


def rule_of(model: Model) -> GateRule:
    """DeepSeek-V3's."""
    return GateRule(model.top_k, 8, 4, "sigmoid", "top2_sum", float("-inf"), True, 2.5)


def routed(model: Model, tokens: int) -> tuple[Tensor, Tensor]:
    """Skewed routing: `(ids [T, K], weights [T, K])`."""
    logits = torch.randn(tokens, model.experts) + 0.7 * torch.randn(model.experts)
    return gate(logits, rule=rule_of(model))


def loop_over_experts(x: Tensor, psum: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """One product per expert that has rows, as transformers' eager experts do."""
    w13, w2 = weights
    out, start = x.new_empty(x.shape), 0
    for slot, end in enumerate(psum.tolist()):
        if end > start:
            hidden = swiglu(torch.mm(x[start:end], w13[slot].t()), fast=True)
            torch.mm(hidden, w2[slot].t(), out=out[start:end])
            start = end
    return out


def grouped_mm(x: Tensor, psum: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    w13, w2 = weights
    hidden = swiglu(F.grouped_mm(x, w13.transpose(1, 2), offs=psum), fast=True)
    return F.grouped_mm(hidden, w2.transpose(1, 2), offs=psum)


def batched_mm(x: Tensor, psum: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """One gathered weight per row, as transformers' batched_mm does."""
    w13, w2 = weights
    slots = torch.searchsorted(psum, torch.arange(x.shape[0]), right=True)
    hidden = swiglu(torch.bmm(w13[slots], x.unsqueeze(-1)).squeeze(-1), fast=True)
    return torch.bmm(w2[slots], hidden.unsqueeze(-1)).squeeze(-1)


def ours(x: Tensor, psum: Tensor, weights: ExpertWeights) -> Tensor:
    return expert_mlp_ragged(x, weights, psum=psum)


def ours_invariant(x: Tensor, psum: Tensor, weights: ExpertWeights) -> Tensor:
    return expert_mlp_ragged(x, weights, psum=psum, batch_invariant=True)


def experts_row(
    name: str, tokens: int, plain: list[tuple[Tensor, Tensor]], held: list[ExpertWeights], budget_s: float
) -> None:
    model, dtype = MODELS[name], held[0].dtype
    ids, _ = routed(model, tokens)
    moved = permute(torch.randn(tokens, model.hidden).to(dtype), ids, model.experts)
    x, psum = moved.data, moved.psum
    active = torch.bincount(ids.view(-1)).count_nonzero().item()
    slot_bytes = held[0].num_bytes / model.experts
    time_it = partial(fastest, budget_s=budget_s)
    us: list[object] = [time_it(partial(f, x, psum), plain) for f in (loop_over_experts, grouped_mm)]
    fits = x.shape[0] * slot_bytes < 1e9  # one copy of the weights per row
    us.append(time_it(partial(batched_mm, x, psum), plain) if fits else "-")
    fast = time_it(partial(ours, x, psum), held)
    speed = f"{active * slot_bytes / fast / 1e3:.1f}"
    size = f"{active * slot_bytes / 1e6:.1f}"
    exact = time_it(partial(ours_invariant, x, psum), held)
    row(name, tokens, short(dtype), x.shape[0], active, size, *us, fast, speed, exact)


def experts(budget_s: float) -> None:
    columns = ("model", "tokens", "dtype", "rows", "active", "weights MB", "loop", "grouped_mm", "batched_mm")
    table("Experts (GEMM, SwiGLU, GEMM), us", *columns, "ours", "ours GB/s", "ours, invariant")
    for name, model in MODELS.items():
        for dtype in DTYPES:
            plain = []
            for _ in range(model.layers):
                w13 = torch.randn(model.experts, 2 * model.width, model.hidden).mul_(0.03).to(dtype)
                w2 = torch.randn(model.experts, model.hidden, model.width).mul_(0.03).to(dtype)
                plain.append((w13, w2))
            held = [prepare_experts(w13, w2) for w13, w2 in plain]
            for tokens in (1, 16, 1024):
                experts_row(name, tokens, plain, held, budget_s)


def small_row(name: str, tokens: int, dtype: torch.dtype, budget_s: float) -> None:
    model = MODELS[name]
    rule, (ids, weights) = rule_of(model), routed(model, tokens)
    logits, bias = torch.randn(tokens, model.experts), torch.randn(model.experts) * 0.01
    cos = torch.rand(tokens, model.rope // 2)
    x = torch.randn(tokens, model.hidden).to(dtype)
    moved = permute(x, ids, model.experts)
    q = torch.randn(tokens, model.heads, model.rope).to(dtype)
    gate_up = torch.randn(tokens * model.top_k, 2 * model.width).to(dtype)
    runs: list[Callable[[None], object]] = [
        lambda _: gate(logits, rule=rule, bias=bias),
        lambda _: permute(x, ids, model.experts),
        lambda _: unpermute(moved.data, moved.row_of, weights),
        lambda _: rms_norm(x, x[0], 1e-6),
        lambda _: apply_rope(q, cos, cos),
        lambda _: swiglu(gate_up),
        lambda _: swiglu(gate_up, fast=True),
    ]
    row(name, tokens, short(dtype), *[fastest(run, [None], budget_s=budget_s) for run in runs])


def small(budget_s: float) -> None:
    columns = ("gate", "permute", "unpermute", "rms_norm", "apply_rope", "swiglu", "swiglu fast")
    table("Small operations, us", "model", "tokens", "dtype", *columns)
    for name in MODELS:
        for tokens in (1, 16, 1024):
            for dtype in DTYPES:
                small_row(name, tokens, dtype, budget_s)


def attention_row(name: str, tokens: int, length: int, dtype: torch.dtype, budget_s: float) -> None:
    model, pages = MODELS[name], -(-length // 16)
    cache = torch.randn(tokens * pages, 16, model.latent + model.rope).to(dtype)
    page_table = torch.randperm(tokens * pages).view(tokens, pages)
    lens = torch.randint(length // 2, length + 1, (tokens,))
    q_latent = torch.randn(tokens, model.heads, model.latent).to(dtype)
    q_rope = torch.randn(tokens, model.heads, model.rope).to(dtype)
    core = partial(mla_absorbed, q_latent, q_rope, cache, page_table, lens, scale=0.1)
    plans = {mode: plan_absorbed(page_table, lens, page_size=16, batch_invariant=mode) for mode in (False, True)}
    runs: list[Callable[[None], object]] = [
        lambda _: plan_absorbed(page_table, lens, page_size=16),
        lambda _: core(plan=plans[False]),
        lambda _: core(batch_invariant=True, plan=plans[True]),
    ]
    row(name, tokens, length, short(dtype), *[fastest(run, [None], budget_s=budget_s) for run in runs])


def attention(budget_s: float) -> None:
    table("mla_absorbed, us", "model", "tokens", "cached rows", "dtype", "plan", "core", "core, invariant")
    for name in MODELS:
        for tokens, length in ((1, 100), (16, 100), (16, 1000)):
            for dtype in DTYPES:
                attention_row(name, tokens, length, dtype, budget_s)


def processor() -> str:
    """The CPU's name and what torch makes of it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else "unknown CPU"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    tables = {"linear": linears, "experts": experts, "small": small, "attention": attention}
    parser = argparse.ArgumentParser(description="time the CPU kernels")
    parser.add_argument("tables", nargs="*", help=f"which of {', '.join(tables)} (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=0.1, help="seconds per figure")
    args = parser.parse_args()
    for name in args.tables:
        if name not in tables:
            parser.error(f"no table {name!r}; choose from {', '.join(tables)}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    big = torch.zeros(1 << 25)
    with torch.inference_mode():
        speed = big.nbytes / fastest(torch.sum, [big], budget_s=args.budget_s) / 1e3
        print(f"{processor()}; torch {torch.__version__}, {args.threads} threads, reads {speed:.1f} GB/s")
        for name in args.tables or tables:
            tables[name](args.budget_s)


if __name__ == "__main__":
    main()

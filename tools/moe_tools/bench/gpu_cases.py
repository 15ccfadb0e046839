"""What `bench kernels` times: DeepSeek-V3's shapes, each with its floor, its baselines and published marks.

E slots, R rows, C rows per slot, H hidden, I intermediate, T tokens, K top-k, h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from moe_kernels.errors import KernelError
from moe_kernels.experts import expert_mlp_padded, expert_mlp_ragged
from moe_kernels.gate import GateRule, gate
from moe_kernels.grouped_gemm import deep_gemm
from moe_kernels.mla import LatentCache, ScaledLatent, mla_absorbed, plan_absorbed
from moe_kernels.norm import add_rms_norm
from moe_kernels.permute import permute, unpermute
from moe_kernels.quant import quantize_rows
from moe_kernels.scaled import BlockScaled
from torch import Tensor
from torch.nn import functional as F

from moe_tools.bench.floor import Work, expert_work, mla_work
from moe_tools.bench.random_weights import HIDDEN, INTERMEDIATE, bf16_weights, fp8_weights

EXPERTS, TOP_K = 256, 8
HEADS, LATENT, ROPE, PAGE = 128, 512, 64, 64
V3_RULE = GateRule(
    top_k=TOP_K, num_groups=8, top_groups=4, scoring="sigmoid", group_score="top2_sum",
    masked_score=float("-inf"), normalise=True, scale=2.5,
)  # fmt: skip

Contenders = dict[str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. `ours` names the contender that is the project's own; the others are baselines.

    `published_us`: figures of others for the same work on an H200, with their source's name. `target_us`: the mark.
    """

    op: str
    shape: Mapping[str, int | str]
    work: Work
    contenders: Contenders
    ours: str = "triton"
    published_us: Mapping[str, float] = field(default_factory=dict)
    target_us: float | None = None


def cases(device: str = "cuda") -> Iterator[Callable[[], Case]]:
    """Builders, so that the tensors of one case are freed before the next."""
    for slots, rows, target, published in (
        (32, 32, 382.0, 385.0),
        (8, 128, 117.0, 124.0),
        (2, 512, 87.0, 90.0),
        (1, 1024, None, 88.0),
        (2, 32, None, 45.0),
        (1, 64, None, 31.0),
    ):
        yield partial(masked_core, slots, rows, device, target_us=target, deep_gemm_us=published)
        yield partial(masked_core_bf16, slots, rows, device)
    yield partial(fused_op, 32, 128, device, target_us=365.0, published_us={"SGLang Triton": 421.0})
    yield partial(fused_op, 8, 32, device, target_us=116.0, published_us={"SGLang Triton": 163.0})
    yield partial(prefill_core, EXPERTS, 131_072, device)
    for tokens in (1, 32, 128):
        yield partial(mla_decode, tokens, 4096, device)
    yield partial(mla_decode, 128, 4096, device, fp8=True)
    for tokens in (128, 4096):
        for build in (gate_case, permute_case, unpermute_case, norm_case):
            yield partial(build, tokens, device)


def _fp8_backends() -> tuple[str, ...]:
    """Ours, and DeepSeek's library where a usable one is importable."""
    try:
        deep_gemm.library()
    except KernelError:
        return ("triton",)
    return ("triton", "deep_gemm")


def _rows(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def masked_core(slots: int, rows: int, device: str, *, target_us: float | None, deep_gemm_us: float) -> Case:
    """GEMM1 + SwiGLU + quantisation + GEMM2 on fp8 rows that have arrived: `[E, C, H]`, all counts = C."""
    weights = fp8_weights(slots, device)
    flat = quantize_rows(_rows(slots * rows, HIDDEN, device=device))
    x = BlockScaled(flat.data.view(slots, rows, HIDDEN), flat.scale.view(slots, rows, -1))
    counts = torch.full((slots,), rows, dtype=torch.int32, device=device)
    work = expert_work(
        slots * rows, slots, hidden=HIDDEN, intermediate=INTERMEDIATE, weight_bytes=1.0, arithmetic="fp8"
    )
    return Case(
        "masked MoE core fp8",
        {"slots": slots, "rows": rows},
        work,
        {name: partial(expert_mlp_padded, x, weights, counts=counts, backend=name) for name in _fp8_backends()},
        published_us={"DeepGEMM": deep_gemm_us},
        target_us=target_us,
    )


def masked_core_bf16(slots: int, rows: int, device: str) -> Case:
    """The same in bf16, beside torch's batched products and a loop of cuBLAS calls."""
    weights = bf16_weights(slots, device)
    x = _rows(slots, rows, HIDDEN, device=device)
    counts = torch.full((slots,), rows, dtype=torch.int32, device=device)
    w13, w2 = weights.w13, weights.w2
    assert isinstance(w13, Tensor) and isinstance(w2, Tensor), "bf16 weights are plain"

    def batched() -> Tensor:
        return torch.bmm(_act(torch.bmm(x, w13.mT)), w2.mT)

    def loop() -> list[Tensor]:
        return [_act(part @ up.T) @ down.T for part, up, down in zip(x, w13, w2, strict=True)]

    ends = torch.arange(1, slots + 1, dtype=torch.int32, device=device) * rows
    flat = x.flatten(0, 1)

    def grouped() -> Tensor:
        return F.grouped_mm(_act(F.grouped_mm(flat, w13.mT, offs=ends)), w2.mT, offs=ends)

    return Case(
        "masked MoE core bf16",
        {"slots": slots, "rows": rows},
        expert_work(slots * rows, slots, hidden=HIDDEN, intermediate=INTERMEDIATE, weight_bytes=2.0, arithmetic="bf16"),
        {
            "triton": lambda: expert_mlp_padded(x, weights, counts=counts, backend="triton"),
            "torch bmm": batched,
            "cuBLAS loop": loop,
            "torch grouped_mm": grouped,
        },
    )


def _act(gate_up: Tensor) -> Tensor:
    gate_half, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate_half) * up


def _balanced_ids(tokens: int, slots: int, device: str) -> Tensor:
    """`[T, K]` distinct slots per token, every slot equally often where it divides."""
    ids = torch.arange(tokens * TOP_K, device=device).view(tokens, TOP_K)
    return ids.remainder(slots)


def fused_op(slots: int, routed_rows: int, device: str, *, target_us: float, published_us: Mapping[str, float]) -> Case:
    """Permute, quantise, both products, top-k sum: what a serving engine calls its fused MoE op."""
    tokens = routed_rows // TOP_K
    weights = fp8_weights(slots, device)
    x = _rows(tokens, HIDDEN, device=device)
    ids = _balanced_ids(tokens, slots, device)
    router_weights = torch.rand(tokens, TOP_K, device=device)

    def ours() -> Tensor:
        moved = permute(x, ids, slots, backend="triton")
        rows = expert_mlp_ragged(quantize_rows(moved.data), weights, psum=moved.psum, backend="triton")
        return unpermute(rows, moved.row_of, router_weights, backend="triton")

    touched = min(slots, routed_rows)
    work = expert_work(
        routed_rows, touched, hidden=HIDDEN, intermediate=INTERMEDIATE, weight_bytes=1.0, arithmetic="fp8"
    )
    shape: dict[str, int | str] = {"slots": slots, "routed rows": routed_rows}
    return Case("fused MoE op fp8", shape, work, {"triton": ours}, published_us=published_us, target_us=target_us)


def prefill_core(slots: int, rows: int, device: str) -> Case:
    """All experts on one GPU, many rows: GEMM1 + SwiGLU + quantisation + GEMM2 on aligned ragged rows."""
    weights = fp8_weights(slots, device)
    per_slot = rows // slots
    psum = torch.arange(1, slots + 1, dtype=torch.int32, device=device) * per_slot
    x = quantize_rows(_rows(rows, HIDDEN, device=device))
    work = expert_work(rows, slots, hidden=HIDDEN, intermediate=INTERMEDIATE, weight_bytes=1.0, arithmetic="fp8")
    return Case(
        "prefill MoE core fp8",
        {"slots": slots, "rows": rows},
        work,
        {
            name: partial(expert_mlp_ragged, x, weights, psum=psum, alignment=128, backend=name)
            for name in _fp8_backends()
        },
        published_us={"SGLang Triton": 15_300.0},
        target_us=1e6 * work.flops / 760e12,
    )


def mla_decode(tokens: int, kv_len: int, device: str, *, fp8: bool = False) -> Case:
    """The attention core of a decode step: every token has `kv_len` cached rows, in bf16 or with an fp8 latent."""
    pages = -(-kv_len // PAGE)
    rows = _rows(tokens * pages, PAGE, LATENT + ROPE, device=device)
    cache: LatentCache = rows
    if fp8:
        cache = ScaledLatent.zeros(tokens * pages, PAGE, latent=LATENT, rope=ROPE, device=device)
        cache.write_(torch.arange(tokens * pages * PAGE, device=device), rows.flatten(0, 1))
        del rows
    table = torch.randperm(tokens * pages, device=device).view(tokens, pages).to(torch.int32)
    lengths = torch.full((tokens,), kv_len, dtype=torch.int32, device=device)
    q_latent, q_rope = _rows(tokens, HEADS, LATENT, device=device), _rows(tokens, HEADS, ROPE, device=device)
    scale = (128 + ROPE) ** -0.5
    contenders: Contenders = {}
    for name, invariant in (("triton", False), ("triton batch-invariant", True)):
        plan = plan_absorbed(
            table, lengths, lengths=[kv_len] * tokens, page_size=PAGE, batch_invariant=invariant, backend="triton"
        )
        contenders[name] = partial(
            mla_absorbed, q_latent, q_rope, cache, table, lengths, scale=scale, batch_invariant=invariant, plan=plan
        )
    return Case(
        "MLA decode",
        {"tokens": tokens, "kv": kv_len, "heads": HEADS} | ({"cache": "fp8"} if fp8 else {}),
        mla_work(tokens, kv_len, heads=HEADS, latent=LATENT, rope=ROPE, kv_bytes=656 / 576 if fp8 else 2.0),
        contenders,
        published_us={} if fp8 else {"FA3 (TRT-LLM)": {1: 21.0, 32: 85.0, 128: 261.0}[tokens]},
        target_us=300.0 if tokens == 128 and not fp8 else None,
    )


def gate_case(tokens: int, device: str) -> Case:
    """Sigmoid, group-limited top-8 of 256, normalised."""
    logits = torch.randn(tokens, EXPERTS, device=device)
    bias = torch.randn(EXPERTS, device=device) * 0.1
    return Case(
        "gate",
        {"tokens": tokens},
        Work(tokens * (EXPERTS * 4 + TOP_K * 12), 0.0),
        {
            "triton": lambda: gate(logits, rule=V3_RULE, bias=bias, backend="triton"),
            "torch": lambda: gate(logits, rule=V3_RULE, bias=bias, backend="torch"),
        },
    )


def permute_case(tokens: int, device: str) -> Case:
    """Rows of 256 experts, sorted."""
    x = _rows(tokens, HIDDEN, device=device)
    ids = torch.rand(tokens, EXPERTS, device=device).topk(TOP_K, dim=1).indices
    return Case(
        "permute",
        {"tokens": tokens},
        Work(2 * tokens * HIDDEN * (1 + TOP_K), 0.0),
        {
            "triton": lambda: permute(x, ids, EXPERTS, backend="triton"),
            "torch": lambda: permute(x, ids, EXPERTS, backend="torch"),
        },
    )


def unpermute_case(tokens: int, device: str) -> Case:
    """The weighted sum back at home."""
    y = _rows(tokens * TOP_K, HIDDEN, device=device)
    row_of = torch.randperm(tokens * TOP_K, device=device).view(tokens, TOP_K)
    weights = torch.rand(tokens, TOP_K, device=device)
    return Case(
        "unpermute",
        {"tokens": tokens},
        Work(2 * tokens * HIDDEN * (1 + TOP_K), 0.0),
        {
            "triton": lambda: unpermute(y, row_of, weights, backend="triton"),
            "torch": lambda: unpermute(y, row_of, weights, backend="torch"),
        },
    )


def norm_case(tokens: int, device: str) -> Case:
    """Residual add and RMS norm."""
    x, residual = _rows(tokens, HIDDEN, device=device), _rows(tokens, HIDDEN, device=device)
    weight = _rows(HIDDEN, device=device)
    return Case(
        "add_rms_norm",
        {"tokens": tokens},
        Work(4 * 2 * tokens * HIDDEN, 0.0),
        {
            "triton": lambda: add_rms_norm(x, residual, weight, 1e-6, backend="triton"),
            "torch": lambda: add_rms_norm(x, residual, weight, 1e-6, backend="torch"),
        },
    )

"""The gate in Triton: one warp per token. E experts, G groups, K top-k, S shared experts, R replicas.

A score and its expert's id make one int64 key, in the order of the scores and, where they tie, of descending ids; so
the best of a set is one maximum, keys are unique, and a choice repeated K times is a sort.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.aot import AotCase
from moe_kernels.backends import require

if TYPE_CHECKING:
    from moe_kernels.gate import GateRule, Placed, Replicas

MAX_EXPERTS = 1024
MAX_COLUMNS = 32
_NOTHING = tl.constexpr(-(2**63))
"""The key of no expert: below that of every score."""


@triton.jit
def keys_of(scores, ids, present):
    """int64 keys of `scores fp32`: NaN greatest, -0 as 0, ties to the lowest id."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    # Negative floats have their magnitude bits flipped, so that integers are in the order of the floats.
    ordered = tl.where(scores == scores, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return tl.where(present, (ordered.to(tl.int64) << 32) - ids, _NOTHING)


@triton.jit
def id_of(key):
    """The id in a key."""
    return (-key) & 0xFFFFFFFF


@triton.jit
def score_of(key):
    """The score in a key."""
    ordered = ((key + id_of(key)) >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def scores_of(logits, largest, total, SIGMOID: tl.constexpr):
    """Sigmoid, or softmax with the row's largest logit and its sum of exponentials."""
    one = tl.full(logits.shape, 1.0, tl.float32)
    if SIGMOID:
        return tl.div_rn(one, 1.0 + tl.exp(-logits))
    return tl.div_rn(tl.exp(logits - largest), one * total)


@triton.jit
def group_keys(keys, groups, G: tl.constexpr, TOP2: tl.constexpr):
    """`keys [G, E/G]` -> one key per group, by its largest score or the sum of its two largest."""
    best = tl.max(keys, axis=1)
    score = score_of(best)
    if TOP2:
        score += score_of(tl.max(tl.where(keys == best[:, None], _NOTHING, keys), axis=1))
    return keys_of(score, groups, groups < G)


@triton.jit
def within_best_groups(keys, masked, groups, G: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr):
    """`keys [G, E/G]`, those of other groups than the best replaced by `masked`."""
    left = group_keys(keys, groups, G, TOP2)
    kept = groups < 0
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.max(left)
        kept = kept | (left == best)
        left = tl.where(left == best, _NOTHING, left)
    return tl.where(kept[:, None], keys, masked)


@triton.jit
def best_of(keys, k, K: tl.constexpr):
    """The K greatest keys, descending, in the first lanes of `k`."""
    chosen = tl.full(k.shape, _NOTHING, tl.int64)
    for i in tl.static_range(K):
        best = tl.max(keys)
        chosen = tl.where(k == i, best, chosen)
        keys = tl.where(keys == best, _NOTHING, keys)
    return chosen


@triton.jit
def slots_of(expert, turn, table_ptr, replicas_ptr, inside, R: tl.constexpr, TURNS: tl.constexpr):
    """The slot of each expert: its first replica, or the one whose turn it is."""
    replica = tl.zeros_like(expert)
    if TURNS:
        replica = turn % tl.load(replicas_ptr + expert, mask=inside, other=1)
    return tl.load(table_ptr + expert * R + replica, mask=inside, other=-1)


@triton.jit(do_not_specialize=["num_real", "turn"])
def gate_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    slots_ptr,
    table_ptr,
    replicas_ptr,
    counts_ptr,
    num_real,
    turn,
    logits_stride,
    masked_score,
    scale,
    E: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOP2: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALISE: tl.constexpr,
    TURNS: tl.constexpr,
    COUNT: tl.constexpr,
    REAL_ON_DEVICE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    real = token < (tl.load(num_real) if REAL_ON_DEVICE else num_real)
    # Padding runs through with nothing present: all programs are one wave, so leaving early would gain nothing.
    groups = tl.arange(0, GROUPS)
    member = tl.arange(0, SIZE)
    ids = groups[:, None] * (E // G) + member[None, :]
    present = (groups < G)[:, None] & (member < E // G)[None, :] & real
    logits_ptr += token * logits_stride
    logits = tl.load(logits_ptr + ids, mask=present, other=float("-inf"))
    largest = tl.max(logits)
    total = tl.sum(tl.exp(logits - largest))
    choice = scores_of(logits, largest, total, SIGMOID)
    if BIASED:
        choice += tl.load(bias_ptr + ids, mask=present, other=0.0)
    keys = keys_of(choice, ids, present)
    if TOP_GROUPS < G:
        masked = keys_of(tl.zeros_like(choice) + masked_score, ids, present)
        keys = within_best_groups(keys, masked, groups, G, TOP_GROUPS, TOP2)
    k = tl.arange(0, COLUMNS)
    routed, inside = (k < K) & real, (k < K + S) & real
    chosen = best_of(keys, k, K)
    expert = tl.where(k < K, id_of(chosen), E + k - K)
    if BIASED:
        weights = scores_of(tl.load(logits_ptr + expert, mask=routed, other=0.0), largest, total, SIGMOID)
    else:
        weights = score_of(chosen)
    if NORMALISE:
        weights = tl.div_rn(weights, tl.zeros_like(weights) + (tl.sum(tl.where(routed, weights, 0.0)) + 1e-20))
    out = token * (K + S) + k
    tl.store(ids_ptr + out, tl.where(real, expert, -1), mask=k < K + S)
    tl.store(weights_ptr + out, tl.where(real, tl.where(routed, weights * scale, 1.0), 0.0), mask=k < K + S)
    if R > 0:
        slots = slots_of(expert, turn + token + k, table_ptr, replicas_ptr, inside, R, TURNS)
        tl.store(slots_ptr + out, slots, mask=k < K + S)
    if COUNT:
        # Sums of integers: the order of the additions does not show.
        tl.atomic_add(counts_ptr + expert, tl.full([COLUMNS], 1, tl.int64), mask=inside, sem="relaxed")


def _constants(
    experts: int, rule: GateRule, *, biased: bool, shared: int, replicas: int, turns: bool, count: bool, on_device: bool
) -> dict[str, object]:
    grouped = rule.top_groups < rule.num_groups
    groups = rule.num_groups if grouped else 1
    return {
        "E": experts,
        "G": groups,
        "GROUPS": triton.next_power_of_2(groups),
        "SIZE": triton.next_power_of_2(experts // groups),
        "K": rule.top_k,
        "S": shared,
        "COLUMNS": triton.next_power_of_2(rule.top_k + shared),
        "R": replicas,
        "TOP_GROUPS": rule.top_groups if grouped else 1,
        "SIGMOID": str(rule.scoring) == "sigmoid",
        "TOP2": str(rule.group_score) == "top2_sum" and experts > groups,
        "BIASED": biased,
        "NORMALISE": rule.normalise,
        "TURNS": turns,
        "COUNT": count,
        "REAL_ON_DEVICE": on_device,
    }


def gate(
    logits: Tensor,
    rule: GateRule,
    bias: Tensor | None,
    num_shared: int = 0,
    num_real: int | Tensor | None = None,
    replicas: Replicas | None = None,
    counts: Tensor | None = None,
) -> Placed:
    """As `gate_and_place` defines it."""
    from moe_kernels.gate import Placed

    tokens, experts = logits.shape
    columns = rule.top_k + num_shared
    require(
        logits.dtype == torch.float32 and logits.stride(1) == 1 and experts <= MAX_EXPERTS and columns <= MAX_COLUMNS,
        f"gate: logits are {tuple(logits.shape)} {logits.dtype} with strides {logits.stride()} for {columns} columns; "
        f"they must be fp32 with contiguous rows, at most {MAX_EXPERTS} experts and {MAX_COLUMNS} columns",
    )
    require(
        bias is None or (bias.dtype == torch.float32 and bias.shape == (experts,) and bias.is_contiguous()),
        f"gate: bias is {None if bias is None else (tuple(bias.shape), bias.dtype)}; it must be ({experts},) fp32",
    )
    ids = torch.empty(tokens, columns, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, columns, dtype=torch.float32, device=logits.device)
    slots = ids if replicas is None else torch.empty_like(ids)
    turns = None if replicas is None else replicas.counts
    on_device = isinstance(num_real, Tensor)
    if tokens:
        gate_kernel[(tokens,)](
            logits,
            logits if bias is None else bias,
            ids,
            weights,
            slots,
            ids if replicas is None else replicas.slots,
            ids if turns is None else turns,
            ids if counts is None else counts,
            tokens if num_real is None else num_real,
            0 if replicas is None else replicas.turn,
            logits.stride(0),
            rule.masked_score,
            rule.scale,
            **_constants(
                experts,
                rule,
                biased=bias is not None,
                shared=num_shared,
                replicas=0 if replicas is None else replicas.slots.shape[1],
                turns=turns is not None,
                count=counts is not None,
                on_device=on_device,
            ),
            num_warps=1,
        )
    return Placed(ids, slots, weights)


def aot_cases() -> Iterator[AotCase]:
    """DeepSeek-V3 (also the demo model: 256 experts, 8 groups), with and without placement; DeepSeek-V2 (160 experts).

    One warp per token, by reasoning, not yet measured on hardware: a block of one warp needs no barrier, 32 of them fit
    on an SM, and 4096 tokens are one wave of 132 SMs.
    """
    from moe_kernels.gate import GateRule

    v3 = GateRule(8, 8, 4, "sigmoid", "top2_sum", float("-inf"), normalise=True, scale=2.5)
    v2 = GateRule(6, 8, 3, scale=16.0)
    signature = {"logits_ptr": "*fp32", "bias_ptr": "*fp32", "ids_ptr": "*i64", "weights_ptr": "*fp32"}
    signature |= dict.fromkeys(("slots_ptr", "table_ptr", "replicas_ptr", "counts_ptr"), "*i64")
    signature |= {"turn": "i32", "logits_stride": "i32", "masked_score": "fp32", "scale": "fp32"}
    plain: dict[str, Any] = {"shared": 0, "replicas": 0, "turns": False, "count": False, "on_device": False}
    cases: tuple[tuple[str, int, GateRule, dict[str, Any]], ...] = (
        ("v3", 256, v3, {"biased": True} | plain),
        ("v3 placed", 256, v3, {"biased": True, "shared": 1, "replicas": 1, "turns": False, "count": True}),
        ("v3 turns", 256, v3, {"biased": True, "shared": 0, "replicas": 4, "turns": True, "count": True}),
        ("v2", 160, v2, {"biased": False} | plain),
    )
    for name, experts, rule, options in cases:
        on_device = bool(options.setdefault("on_device", True))
        yield AotCase(
            op="gate",
            name=f"gate {name}",
            kernel=gate_kernel,
            signature=signature | {"num_real": "*i64" if on_device else "i32"},
            constants=_constants(experts, rule, **options),
            num_warps=1,
            aligned=("logits_ptr", "bias_ptr", "ids_ptr", "weights_ptr", "slots_ptr", "table_ptr", "logits_stride"),
            quick=name == "v3 turns",
        )

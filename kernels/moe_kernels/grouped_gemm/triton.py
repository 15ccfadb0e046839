"""Launch of the grouped GEMM in Triton. E slots, R rows, C rows per slot, K input width, N output width."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Final

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.aot import AotCase
from moe_kernels.backends import require
from moe_kernels.grouped_gemm.configs import Config, columns, configure, shipped
from moe_kernels.grouped_gemm.layout import RowMarks
from moe_kernels.grouped_gemm.triton_kernel import grouped_gemm_kernel
from moe_kernels.scaled import BlockScaled

Operand = Tensor | BlockScaled

GROUP: Final = 128
"""Values along K that share a scale."""

INTERPRETED_PROGRAMS: Final = 3
"""Programs under the interpreter: fewer than tiles, so that a program takes several."""

TYPES: Final = {
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}


def data_of(x: Operand) -> Tensor:
    """The values of an operand."""
    return x.data if isinstance(x, BlockScaled) else x


def grouped_gemm(
    x: Operand,
    w: Operand,
    rows: RowMarks,
    *,
    out_dtype: torch.dtype,
    rows_per_slot: int | None = None,
    row_weights: Tensor | None = None,
    swiglu: bool = False,
    quantize: bool = False,
    ue8m0: bool = False,
    batch_invariant: bool = False,
) -> Operand:
    """`x [R, K]`, `w [E, N, K]` -> `[R, N]`; with `swiglu` `[R, N/2]`, and with `quantize` that as fp8 with scales.

    `row_weights [R] fp32` multiply the rows of the result. Both operands are plain of one dtype, or both BlockScaled;
    the scales of padded rows may come as `[E, C, G]`. Rows that no slot owns are left as they are allocated.
    """
    data, weight = data_of(x), data_of(w)
    slots, n = weight.shape[:2]
    n = n // 2 if swiglu else n
    total = data.shape[0]
    out = torch.empty(total, n, dtype=torch.float8_e4m3fn if quantize else out_dtype, device=data.device)
    out_scale = torch.empty(-(-n // GROUP), -(-total // 4) * 4, device=data.device)[:, :total].t() if quantize else None
    if total and slots:
        config = configure(
            rows_per_slot=rows.mean(total) if rows_per_slot is None else rows_per_slot,
            slots=slots,
            n=n,
            k=weight.shape[2],
            dtype=data.dtype,
            swiglu=swiglu,
            batch_invariant=batch_invariant,
        ).config
        _check_operand("x", data)
        _check_operand("w", weight)
        require(
            rows.marks.dtype == torch.int32 and rows.marks.is_contiguous(),
            f"grouped GEMM: row marks are {rows.marks.dtype} with strides {rows.marks.stride()}; they must be "
            "contiguous int32; use .to(torch.int32)",
        )
        _launch(x, w, out, out_scale, rows, row_weights, config, swiglu=swiglu, ue8m0=ue8m0)
    return out if out_scale is None else BlockScaled(out, out_scale)


def _check_operand(name: str, t: Tensor) -> None:
    """TMA loads tiles from addresses and over strides of whole 16 bytes."""
    unit = 16 // t.dtype.itemsize
    require(t.dtype in TYPES, f"grouped GEMM: {name} is {t.dtype}; choose one of {', '.join(map(str, TYPES))}")
    dense = t.dim() == 2 or t.stride(0) == t.shape[1] * t.stride(1)
    require(
        t.stride(-1) == 1 and dense and t.stride(-2) % unit == 0 and t.data_ptr() % 16 == 0,
        f"grouped GEMM: {name} is {tuple(t.shape)} {t.dtype} with strides {t.stride()} at address "
        f"{t.data_ptr() % 16} mod 16; rows must be contiguous, start at multiples of 16 bytes ({unit} values) and "
        f"follow each other evenly; call .contiguous(), and pad K to a multiple of {unit}",
    )


def _scale_strides(x: Operand, rows: RowMarks) -> tuple[int, int, int]:
    """Strides of x's scales over slots, rows and groups."""
    if not isinstance(x, BlockScaled):
        return 0, 0, 0
    scale = x.scale
    if scale.dim() == 3:
        return scale.stride(0), scale.stride(1), scale.stride(2)
    return scale.stride(0) * (rows.capacity or 0), scale.stride(0), scale.stride(1)


def _launch(
    x: Operand,
    w: Operand,
    out: Tensor,
    out_scale: Tensor | None,
    rows: RowMarks,
    row_weights: Tensor | None,
    config: Config,
    *,
    swiglu: bool,
    ue8m0: bool,
) -> None:
    data, weight = data_of(x), data_of(w)
    slots, total, n = weight.shape[0], data.shape[0], out.shape[1]
    per_slot = rows.capacity
    row_tiles = min(total, -(-total // config.block_m) + slots)
    if per_slot is not None:
        row_tiles = slots * -(-per_slot // config.block_m)
    programs = min(_programs(data.device) * config.programs_per_sm, row_tiles * -(-n // columns(config, swiglu=swiglu)))
    quantize = out_scale is not None
    grouped_gemm_kernel[(programs,)](
        TensorDescriptor.from_tensor(data, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight.flatten(0, 1), [config.block_n, config.block_k]),
        out,
        # What a variant does not use is given some pointer of the right type.
        x.scale if isinstance(x, BlockScaled) else rows.marks,
        w.scale if isinstance(w, BlockScaled) else rows.marks,
        out_scale if out_scale is not None else rows.marks,
        rows.marks,
        row_weights if row_weights is not None else rows.marks,
        total if per_slot is None else per_slot,
        *_scale_strides(x, rows),
        out_scale.stride(0) if out_scale is not None else 0,
        out_scale.stride(1) if out_scale is not None else 0,
        **_constants(
            config,
            slots=slots,
            n=n,
            k=weight.shape[2],
            padded=per_slot is not None,
            alignment=rows.alignment,
            swiglu=swiglu,
            scaled=isinstance(w, BlockScaled),
            quantize=quantize,
            ue8m0=ue8m0,
            weighted=row_weights is not None,
        ),
        num_warps=config.warps,
        num_stages=config.stages,
    )


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _constants(
    config: Config,
    *,
    slots: int,
    n: int,
    k: int,
    padded: bool,
    alignment: int,
    swiglu: bool,
    scaled: bool,
    quantize: bool,
    ue8m0: bool,
    weighted: bool,
) -> dict[str, int | bool]:
    return {
        "E": slots,
        # At least a warp: the compiler spills where several threads hold the same slots.
        "SLOTS": max(32, triton.next_power_of_2(slots + 1)),
        "N": n,
        "K": k,
        "PADDED": padded,
        "ALIGN": alignment,
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "TILES": config.tiles,
        "GROUP": config.group,
        "SWAP": config.swap,
        "SWIGLU": swiglu,
        "SCALED": scaled,
        "QUANT": quantize,
        "UE8M0": ue8m0,
        "WEIGHTED": weighted,
    }


def aot_case(
    config: Config,
    *,
    op: str,
    dtype: torch.dtype,
    slots: int,
    n: int,
    k: int,
    padded: bool,
    swiglu: bool = False,
    weighted: bool = False,
    ue8m0: bool = False,
    out_dtype: torch.dtype | None = None,
    quick: bool = False,
) -> AotCase:
    """One configuration at one shape; `n`: columns of the output; `out_dtype`: x's, or bf16 where x is fp8."""
    scaled = dtype is torch.float8_e4m3fn
    quantize = scaled and swiglu
    kind, result = TYPES[dtype], TYPES[out_dtype or (torch.bfloat16 if scaled else dtype)]
    unused = "*i32"
    layout = "padded" if padded else "ragged"
    extras = "".join(f" {name}" for name, on in (("weighted", weighted), ("ue8m0", ue8m0)) if on)
    tile = f"M{config.block_m}x{columns(config, swiglu=swiglu)}"
    extras += "" if out_dtype is None else f" to {result}"
    return AotCase(
        op=op,
        name=f"{kind} {layout} {tile} E{slots} N{n} K{k}{extras}",
        kernel=grouped_gemm_kernel,
        signature={
            "x_desc": f"tensordesc<{kind}[{config.block_m},{config.block_k}]>",
            "w_desc": f"tensordesc<{kind}[{config.block_n},{config.block_k}]>",
            "out_ptr": "*" + ("fp8e4nv" if quantize else result),
            "x_scale_ptr": "*fp32" if scaled else unused,
            "w_scale_ptr": "*fp32" if scaled else unused,
            "out_scale_ptr": "*fp32" if quantize else unused,
            "marks_ptr": "*i32",
            "row_weights_ptr": "*fp32" if weighted else unused,
            **dict.fromkeys(("rows", "x_scale_slot", "x_scale_row", "x_scale_k"), "i32"),
            **dict.fromkeys(("out_scale_row", "out_scale_n"), "i32"),
        },
        constants=_constants(
            config,
            slots=slots,
            n=n,
            k=k,
            padded=padded,
            alignment=1 if padded else 128,
            swiglu=swiglu,
            scaled=scaled,
            quantize=quantize,
            ue8m0=ue8m0,
            weighted=weighted,
        ),
        num_warps=config.warps,
        num_stages=config.stages,
        aligned=("out_ptr", "x_scale_ptr", "w_scale_ptr", "out_scale_ptr", "marks_ptr", "row_weights_ptr"),
        quick=quick,
        max_spill_bytes=512 if dtype is torch.float32 else 0,  # products without tensor cores: for comparisons only
    )


def aot_cases(op: str = "grouped_gemm", *, swiglu: bool = False) -> Iterator[AotCase]:
    """DeepSeek-V3's products at every tile (w2, or with `swiglu` w13), the demo model's, weighted rows; for narrow
    tiles one or two slots."""
    v3, demo = ((2048, 7168), (32, 128)) if swiglu else ((7168, 2048), (128, 32))
    kinds = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}
    widest: set[tuple[int, int]] = set()
    for size, fused, entry in shipped():
        config = entry.config
        if fused is not swiglu:
            continue
        case = partial(aot_case, config, op=op, dtype=kinds[size], swiglu=swiglu)
        if size == 4:
            yield case(slots=8, n=demo[0], k=demo[1], padded=True)
            continue
        if (size, config.block_m) in widest:
            yield case(slots=1, n=v3[0], k=v3[1], padded=True)
            yield case(slots=2, n=v3[0], k=v3[1], padded=False)
            if size == 1:  # the first product where SwiGLU is apart, and a linear layer's
                yield case(slots=1, n=4096, k=7168, padded=False, out_dtype=torch.float32)
                yield case(slots=1, n=2112, k=7168, padded=False)
            continue
        widest.add((size, config.block_m))
        quick = (size, config.block_m) in ((1, 16), (1, 128), (2, 128))
        yield case(slots=8, n=v3[0], k=v3[1], padded=True, quick=quick)
        yield case(slots=256, n=v3[0], k=v3[1], padded=False)
        yield case(slots=2, n=demo[0], k=demo[1], padded=False)
        if size == 1:
            yield case(slots=32, n=v3[0], k=v3[1], padded=True, ue8m0=swiglu, weighted=not swiglu)

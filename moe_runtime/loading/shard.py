"""What a model needs from a checkpoint, whether it is there, and one rank's region of it in the compute dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import torch
from moe_kernels.scaled import BlockScaled
from torch import Tensor

from moe_runtime.errors import CheckpointError
from moe_runtime.loading.checkpoint import Checkpoint, Region
from moe_runtime.loading.fp8 import Block, block_region, dequantize, scale_name, scale_shape
from moe_runtime.loading.header import AGAIN, TensorInfo, similar_name

_SHOWN: Final = 3
_SCALE_DTYPES: Final = frozenset({torch.float32, torch.bfloat16})
_FP8: Final = torch.float8_e4m3fn
_ROWS_CHECKED: Final = 1024


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a model needs: its name, shape and the dtypes that it may be stored in.

    `block` is the block of an FP8 scale where `dtypes` allows FP8; `optional` tensors may be missing.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: frozenset[torch.dtype]
    optional: bool = False
    block: Block | None = None


def check_tensors(checkpoint: Checkpoint, specs: Iterable[TensorSpec], *, skipped: Callable[[str], bool]) -> str | None:
    """Compare the checkpoint with what the model needs, from headers alone.

    Tensors for which `skipped(name)` holds are passed over; the result is one line of notice about them, or None.
    Raises CheckpointError for missing, unexpected, mis-shaped, mis-typed tensors, naming file, tensor, expected, got.
    """
    known: set[str] = set()
    missing: list[TensorSpec] = []
    for spec in specs:
        info = checkpoint.tensors.get(spec.name)
        known.add(spec.name)
        if info is not None:
            _check_one(checkpoint, spec, info)
            if info.dtype == torch.float8_e4m3fn:
                known.add(scale_name(spec.name))
        elif not spec.optional:
            missing.append(spec)
    if missing:
        raise CheckpointError(_missing_text(checkpoint, missing, known))
    rest = [name for name in checkpoint.tensors if name not in known]
    passed_over = [name for name in rest if skipped(name)]
    unexpected = sorted(set(rest).difference(passed_over))
    if unexpected:
        raise CheckpointError(_unexpected_text(checkpoint, unexpected, known))
    return _skip_notice(checkpoint, passed_over) if passed_over else None


def load_region(
    checkpoint: Checkpoint, spec: TensorSpec, region: Region | None = None, *, dtype: torch.dtype, verify: bool = True
) -> Tensor:
    """The region of one tensor, contiguous, in `dtype`; FP8 weights are multiplied by their block scales.

    Reads only the region (and the scales that it touches); host memory peaks at the stored region plus the result.
    With `verify`, raises CheckpointError for NaN or infinite weights.
    """
    info = checkpoint.info(spec.name)
    stored = checkpoint.read(spec.name, region)
    if info.dtype == torch.float8_e4m3fn and spec.block is not None:
        loaded = _dequantized(checkpoint, spec, info, stored, region, dtype)
    else:
        loaded = stored.to(dtype)
    if verify:
        _check_finite(info, loaded, region)
    return loaded


def load_blocks(
    checkpoint: Checkpoint, spec: TensorSpec, region: Region | None = None, *, verify: bool = True
) -> BlockScaled:
    """The region of one FP8 matrix as it is stored: `data [n, k]` and the fp32 scales of its blocks, contiguous.

    The region must start on borders of blocks; its last blocks may be short. Host memory peaks at the result.
    With `verify`, raises CheckpointError for NaN weights or scales that are not finite.
    """
    info = checkpoint.info(spec.name)
    assert info.dtype == _FP8 and spec.block is not None, f"{spec.name!r} is stored as {info.dtype}, not in blocks"
    (first_row, _), (first_column, _) = _matrix_bounds(info, region)
    if first_row % spec.block[0] or first_column % spec.block[1]:
        raise ValueError(f"region {region} of {spec.name!r} starts inside a block of {spec.block}: dequantise it")
    stored = checkpoint.read(spec.name, region)
    scales = _scales(checkpoint, spec, info, region)
    if verify and any(
        bool((rows & 0x7F == 0x7F).any()) for rows in torch.split(stored.view(torch.uint8), _ROWS_CHECKED)
    ):
        _check_finite(info, stored.float(), region)
    return BlockScaled(stored, scales.float())


def _dequantized(
    checkpoint: Checkpoint,
    spec: TensorSpec,
    info: TensorInfo,
    stored: Tensor,
    region: Region | None,
    dtype: torch.dtype,
) -> Tensor:
    assert spec.block is not None
    (first_row, _), (first_column, _) = _matrix_bounds(info, region)
    return dequantize(
        stored,
        _scales(checkpoint, spec, info, region),
        block=spec.block,
        row_offset=first_row % spec.block[0],
        column_offset=first_column % spec.block[1],
        dtype=dtype,
    )


def _matrix_bounds(info: TensorInfo, region: Region | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last row, first and last column of a region."""
    cuts = (*(region or ()), slice(None), slice(None))[:2]
    rows, columns = (cut.indices(size)[:2] for cut, size in zip(cuts, info.shape, strict=True))
    return rows, columns


def _scales(checkpoint: Checkpoint, spec: TensorSpec, info: TensorInfo, region: Region | None) -> Tensor:
    """The stored scales of the blocks that a region touches; CheckpointError where one is not finite."""
    assert spec.block is not None
    scales = checkpoint.read(scale_name(spec.name), block_region(_matrix_bounds(info, region), spec.block))
    if not torch.isfinite(scales).all():
        raise CheckpointError(
            f"{checkpoint.info(scale_name(spec.name)).file}: tensor {scale_name(spec.name)!r}: expected finite scales, "
            f"got NaN or infinity. {AGAIN}."
        )
    return scales


def _check_finite(info: TensorInfo, loaded: Tensor, region: Region | None) -> None:
    # aminmax makes no temporary the size of its input, and carries NaN and infinity through.
    if loaded.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(loaded)):
        return
    bad = ~torch.isfinite(loaded)
    first = [int(i) for i in bad.nonzero()[0]]
    starts = [cut.indices(size)[0] for cut, size in zip(region or (), info.shape, strict=False)]
    position = [i + (starts[dim] if dim < len(starts) else 0) for dim, i in enumerate(first)]
    raise CheckpointError(
        f"{info.file}: tensor {info.name!r}: expected finite weights, got {float(loaded[tuple(first)])} at {position} "
        f"({int(bad.sum())} such values in the region read). {AGAIN}, or repair the conversion that wrote it."
    )


def _check_one(checkpoint: Checkpoint, spec: TensorSpec, info: TensorInfo) -> None:
    where = f"{info.file}: tensor {spec.name!r}"
    if info.shape != spec.shape:
        raise CheckpointError(
            f"{where}: expected shape {list(spec.shape)} by config.json, got {list(info.shape)}. Use the config.json "
            f"and the weights of one checkpoint."
        )
    if info.dtype not in spec.dtypes:
        fp8 = info.dtype == torch.float8_e4m3fn and spec.block is None
        hint = " config.json has no quantization_config for FP8 weights; restore it." if fp8 else " Convert the tensor."
        raise CheckpointError(f"{where}: expected dtype {_dtype_names(spec.dtypes)}, got {_dtype(info.dtype)}.{hint}")
    if info.dtype != torch.float8_e4m3fn or spec.block is None:
        return
    name, expected = scale_name(spec.name), scale_shape(spec.shape, spec.block)
    scales = checkpoint.tensors.get(name)
    if scales is None:
        raise CheckpointError(
            f"{where}: FP8 weights need {name!r} of shape {list(expected)}: expected it, got no such tensor. {AGAIN}."
        )
    if scales.shape != expected or scales.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{scales.file}: tensor {name!r}: expected {_dtype_names(_SCALE_DTYPES)} of shape {list(expected)}, one "
            f"per {spec.block[0]}x{spec.block[1]} weights, got {_dtype(scales.dtype)} {list(scales.shape)}. {AGAIN}."
        )


def _missing_text(checkpoint: Checkpoint, missing: list[TensorSpec], known: set[str]) -> str:
    first = missing[0]
    free = [name for name in checkpoint.tensors if name not in known]
    return (
        f"{checkpoint.folder}: {_names([spec.name for spec in missing])} missing: expected tensor "
        f"{first.name!r} of shape {list(first.shape)} by config.json, got {len(checkpoint.tensors)} tensors without it."
        f"{similar_name(first.name, free)} Download the whole checkpoint, or use its own config.json."
    )


def _unexpected_text(checkpoint: Checkpoint, unexpected: list[str], known: set[str]) -> str:
    info = checkpoint.tensors[unexpected[0]]
    return (
        f"{info.file}: {_names(unexpected)} unexpected: expected only tensors that config.json calls for, got "
        f"{_dtype(info.dtype)} {list(info.shape)}.{similar_name(info.name, known)} Use the weights' own config.json."
    )


def _skip_notice(checkpoint: Checkpoint, names: list[str]) -> str:
    layers = sorted({int(n.split(".")[2]) for n in names if n.startswith("model.layers.")})
    size = sum(checkpoint.tensors[name].num_bytes for name in names)
    which = f" of layer {', '.join(map(str, layers))}" if layers else ""
    return f"skipped {len(names)} multi-token-prediction tensors{which} ({size / 2**20:.1f} MiB)"


def _names(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return f"tensor{'s' if len(names) > 1 else ''} {shown}" + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(sorted(map(_dtype, dtypes)))

"""Types of the planners' arrays, and loads as the planners take them."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_runtime.errors import ConfigError

Floats: TypeAlias = NDArray[np.floating]
Grid: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Loads: TypeAlias = Tensor | NDArray[np.generic]


def numbers(loads: Loads, name: str = "loads") -> NDArray[np.float64]:
    """`[L, E']` or `[W, L, E']`, int or float, as float64; ConfigError for other shapes, NaN, inf and negatives."""
    array = loads.detach().cpu().to(torch.float64).numpy() if isinstance(loads, Tensor) else np.asarray(loads)
    if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "iuf":
        raise ConfigError(
            f"{name}: {array.dtype} {list(array.shape)}; must be numbers [layers, experts] or "
            f"[windows, layers, experts], none of them 0."
        )
    values: Grid = array.astype(np.float64)
    wrong: Bools = ~np.isfinite(values) | (values < 0)
    if wrong.any():
        where = [int(i) for i in np.argwhere(wrong)[0]]
        raise ConfigError(
            f"{name}{where} is {values[tuple(where)]}; loads are token counts, finite and at least 0 "
            f"({int(wrong.sum())} such values). Record the load again or leave that window out."
        )
    return values


def windows(loads: Loads) -> NDArray[np.float64]:
    """`numbers` as `[W, L, E']`, windows without any token left out; ConfigError where a layer has no token at all."""
    values = numbers(loads)
    values = values if values.ndim == 3 else values[None]
    empty = values.sum(axis=(0, 2)) == 0
    if empty.any():
        raise ConfigError(
            f"loads: layer {int(empty.argmax())} has no tokens at all ({int(empty.sum())} such layers); nothing can be "
            f"planned from that. Record at least one step, or use ExpertPlacement.uniform."
        )
    some: Grid = values[values.sum(axis=(1, 2)) > 0]
    return some

"""Too little memory on the device while a run starts, told in the words of the settings that take it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from moe_runtime.errors import ConfigError

_SIGNS = ("out of memory", "alloc_failed")
"""Of CUDA's runtime and Triton, and of cuBLAS, which raise plain RuntimeErrors."""


@contextmanager
def enough_memory(device: torch.device, what: str, *, remedy: str) -> Iterator[None]:
    """ConfigError in place of an out-of-memory error of the block, also where that is the cause of another error.

    `what` did not fit: "setting=value: the thing". `remedy`: a sentence.
    """
    try:
        yield
    except Exception as error:
        shortage = _shortage(error)
        if shortage is None:
            raise
        seen = str(shortage).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"{what} does not fit into the memory of {device}{_free(device)} ({seen}). {remedy}"
        ) from error


def _shortage(error: BaseException | None) -> BaseException | None:
    """The out-of-memory error among `error` and its causes."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError):
            return error
        if type(error) in (RuntimeError, torch.AcceleratorError) and any(sign in text for sign in _SIGNS):
            return error
        error = error.__cause__ or error.__context__
    return None


def _free(device: torch.device) -> str:
    if device.type == "cuda":
        with suppress(RuntimeError, AssertionError):  # a device that has failed cannot say
            free, total = torch.cuda.mem_get_info(device)
            return f", {free / 2**30:.2f} of {total / 2**30:.2f} GiB free"
    return ""

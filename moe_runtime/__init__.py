"""Expert-parallel inference for DeepSeek-style models: the same code on 1 rank, 320 virtual ranks and 320 GPUs.

Importing this package loads no torch; the public names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from moe_runtime.api import LLM, AsyncLLM
    from moe_runtime.engine.request import CompletionOutput, RequestOutput, SamplingParams
    from moe_runtime.engine.snapshot import EngineSnapshot
    from moe_runtime.errors import (
        CheckpointError,
        CommunicationError,
        ConfigError,
        EngineClosedError,
        MoeRuntimeError,
        RequestError,
        TraceError,
    )

__all__ = [
    "LLM",
    "AsyncLLM",
    "SamplingParams",
    "RequestOutput",
    "CompletionOutput",
    "EngineSnapshot",
    "MoeRuntimeError",
    "ConfigError",
    "CheckpointError",
    "RequestError",
    "TraceError",
    "CommunicationError",
    "EngineClosedError",
]

_HOME: Final = {
    "LLM": "moe_runtime.api",
    "AsyncLLM": "moe_runtime.api",
    "SamplingParams": "moe_runtime.engine.request",
    "RequestOutput": "moe_runtime.engine.request",
    "CompletionOutput": "moe_runtime.engine.request",
    "EngineSnapshot": "moe_runtime.engine.snapshot",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("moe-runtime")
    if name not in __all__:
        raise AttributeError(f"module 'moe_runtime' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "moe_runtime.errors")), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

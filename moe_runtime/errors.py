"""The errors that users meet. Every text gives the value seen, the rule, the remedy and the nearest valid value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoeRuntimeError(Exception):
    """Base of every error that moe_runtime raises on purpose."""


class ConfigError(MoeRuntimeError, ValueError):
    """A setting, or a combination of settings, that cannot run."""


class CheckpointError(MoeRuntimeError, ValueError):
    """A checkpoint folder, file or tensor that is not what the model needs."""


class TraceError(MoeRuntimeError, ValueError):
    """A trace of expert loads that cannot be read, or that is not of the model at hand."""


class RequestError(MoeRuntimeError, ValueError):
    """A prompt or sampling parameter that cannot be served; it ends that request only."""


class CommunicationError(MoeRuntimeError, RuntimeError):
    """Ranks that did not meet in a collective: names ranks, op, layer and step."""


class EngineClosedError(MoeRuntimeError, RuntimeError):
    """A call on an engine that was closed or that failed before."""


def nearest(value: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the choice closest to `value`, or an empty string."""
    match = difflib.get_close_matches(value, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def nearest_divisor(value: int, of: int) -> int:
    """The divisor of `of` closest to `value` (the larger one on a tie)."""
    divisors = [d for d in range(1, of + 1) if of % d == 0]
    return min(divisors, key=lambda d: (abs(d - value), -d))

"""Which DeepEP is installed: V2's `ElasticBuffer`, V1's `Buffer`, both, or something else of that name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from typing import Any, Final

from moe_runtime.dispatch.missing import Missing

HOW_TO_BUILD: Final = "Build DeepEP from its repository (docs/dispatch.md#deepep), or set dispatch=all_to_all"
NOT_THE_REAL_ONE: Final = "1.0.0"
"""What the package index has under the name deep_ep: old sources without their headers, which cannot be built. A build
of the repository has a commit behind its version (1.2.1+73b6ea4) or a newer one."""

_V2_CALLS: Final = ("capture", "combine", "destroy", "dispatch", "get_buffer_size_hint")
_V1_CALLS: Final = ("combine", "dispatch", "get_dispatch_layout", "low_latency_combine", "low_latency_dispatch")


@dataclass(frozen=True, slots=True)
class Library:
    """DeepEP as it was found."""

    module: Any
    version: str
    generations: tuple[int, ...]
    """2 where `ElasticBuffer` is there, 1 where `Buffer` is; the newer first."""

    def __str__(self) -> str:
        return f"deep_ep {self.version} (" + ", ".join(f"V{generation}" for generation in self.generations) + ")"


def find() -> Library | Missing:
    """Import deep_ep and look at what it is.

    Its import needs torch's NCCL, a CUDA toolkit and its own extension, and fails where one of them is not there.
    """
    try:
        module = import_module("deep_ep")
    except ModuleNotFoundError as error:
        if error.name == "deep_ep":
            return Missing("deep_ep is not installed", HOW_TO_BUILD)
        return Missing(f"deep_ep is installed, but its import needs {error.name}, which is not", HOW_TO_BUILD)
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return Missing(
            f"deep_ep is installed, but its import fails: {str(error).rstrip('.') or repr(error)}", HOW_TO_BUILD
        )
    return recognize(module)


def recognize(module: Any) -> Library | Missing:
    """The generations that an imported `deep_ep` really has."""
    version = _version(module)
    if version == NOT_THE_REAL_ONE:
        return Missing(f"deep_ep {version} is the package index's upload of that name, not DeepEP", HOW_TO_BUILD)
    lacks = {
        2: _lacks(module, "ElasticBuffer", _V2_CALLS, "get_physical_domain_size"),
        1: _lacks(module, "Buffer", _V1_CALLS),
    }
    generations = tuple(generation for generation, missing in lacks.items() if not missing)
    if not generations:
        missing = ", ".join(lacks[2] + lacks[1])
        return Missing(f"deep_ep {version} is not a DeepEP that we know: it lacks {missing}", HOW_TO_BUILD)
    if not hasattr(module, "topk_idx_t"):
        return Missing(f"deep_ep {version} is too old: it lacks topk_idx_t (DeepEP 1.2)", HOW_TO_BUILD)
    return Library(module, version, generations)


def _version(module: Any) -> str:
    """V2 states its own; V1 has only that of its package."""
    if stated := getattr(module, "__version__", None):
        return str(stated)
    try:
        return installed_version("deep_ep")
    except PackageNotFoundError:
        return "of unknown version"


def _lacks(module: Any, name: str, calls: tuple[str, ...], *functions: str) -> list[str]:
    owner = getattr(module, name, None)
    if owner is None:
        return [name]
    lacking = [f"{name}.{call}" for call in calls if not hasattr(owner, call)]
    return lacking + [function for function in functions if not hasattr(module, function)]

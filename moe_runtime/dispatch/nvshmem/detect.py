"""Which NVSHMEM for Python is installed, and whether its device library is."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Final

from moe_kernels.put_rows import find_bitcode

from moe_runtime.dispatch.missing import Missing

INSTALL: Final = "pip install nvshmem4py-cu13==0.4.1 nvidia-nvshmem-cu13==3.4.5, or set dispatch=all_to_all"
DISTRIBUTIONS: Final = ("nvshmem4py-cu13", "nvshmem4py-cu12")
OLDEST: Final = (0, 1, 2)
NEWEST: Final = (0, 4)
"""Read, not run on hardware: 0.1.2 and 0.4.1. A later 0.x may have changed what we call."""
_CALLS: Final = (
    *(
        "get_version",
        "init",
        "finalize",
        "init_status",
        "get_unique_id",
        "my_pe",
        "n_pes",
        "barrier_all",
        "NvshmemStream",
    ),
    *("tensor", "free_tensor", "tensor_get_buffer", "get_peer_tensor", "put_signal", "signal_wait"),
    *("module_init", "NvshmemKernelObject", "NvshmemError", "InitStatus", "SignalOp", "ComparisonType"),
)


@dataclass(frozen=True, slots=True)
class Library:
    """NVSHMEM for Python as it was found."""

    module: Any
    """`nvshmem.core`."""
    version: str
    native: str
    """Version of NVSHMEM itself, as loaded."""
    bitcode: Path | None
    """The device library that kernels link against to reach ranks that are not mapped; not needed within NVLink."""

    def __str__(self) -> str:
        device = "its device library" if self.bitcode else "without a device library"
        return f"nvshmem4py {self.version}, NVSHMEM {self.native}, {device}"


def find() -> Library | Missing:
    """Import nvshmem.core, check its version and what it offers. It imports without a GPU."""
    version = _version()
    if version is None:
        return Missing("nvshmem4py is not installed", INSTALL)
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST or numbers[:2] > NEWEST:
        oldest, newest = ".".join(map(str, OLDEST)), ".".join(map(str, NEWEST))
        return Missing(f"nvshmem4py {version} is installed; it must be {oldest} to {newest}", INSTALL)
    try:
        module = import_module("nvshmem.core")
    except ModuleNotFoundError as error:
        return Missing(f"nvshmem4py {version} is installed, but its import needs {error.name}", INSTALL)
    except (ImportError, OSError, RuntimeError) as error:
        text = str(error).rstrip(".") or repr(error)
        return Missing(f"nvshmem4py {version} is installed, but its import fails: {text}", INSTALL)
    return recognize(module, version)


def recognize(module: Any, version: str) -> Library | Missing:
    """An imported `nvshmem.core`, if it offers what we call and NVSHMEM itself loads."""
    if lacks := [name for name in _CALLS if not hasattr(module, name)]:
        return Missing(f"nvshmem4py {version} lacks {', '.join(lacks)} (torch must be installed beside it)", INSTALL)
    try:
        native = str(module.get_version().libnvshmem_version)
    except (ImportError, OSError, RuntimeError) as error:
        text = str(error).partition("\n")[0].rstrip(".") or repr(error)
        return Missing(f"nvshmem4py {version} is installed, but NVSHMEM itself does not load: {text}", INSTALL)
    return Library(module, version, native, find_bitcode())


def _version() -> str | None:
    for name in DISTRIBUTIONS:
        try:
            return installed_version(name)
        except PackageNotFoundError:
            continue
    return None

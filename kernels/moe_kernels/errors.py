"""The one error of the kernels."""

from __future__ import annotations


class KernelError(ValueError):
    """A kernel called with shapes, dtypes or options that it cannot serve."""

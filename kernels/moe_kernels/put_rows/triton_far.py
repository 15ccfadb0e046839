"""NVSHMEM's device functions, for ranks whose memory is not mapped here. A kernel that calls them is linked with
`libnvshmem_device.bc`, and its module made known to NVSHMEM before it is launched.

Addresses are those of this rank's own block: the same place in the other's is meant. All threads of a program call the
`_block` functions together; a signal is set, never added to.
"""

from __future__ import annotations

import triton.language as tl
from triton.language import core

SET = tl.constexpr(9)
"""NVSHMEM_SIGNAL_SET, as the library's headers have it."""
AT_LEAST = tl.constexpr(5)
"""NVSHMEM_CMP_GE, likewise."""


@core.extern
def put_block(to, source, num_bytes, rank, _semantic=None):
    """Under way when it returns; `quiet` waits for it."""
    return _call("nvshmemx_putmem_nbi_block", "long long long int", [to, source, num_bytes, rank], _semantic)


@core.extern
def put_signal_block(to, source, num_bytes, signal, number, operation, rank, _semantic=None):
    arguments = [to, source, num_bytes, signal, number, operation, rank]
    return _call("nvshmemx_putmem_signal_block", "long long long long long int int", arguments, _semantic)


@core.extern
def get_block(to, source, num_bytes, rank, _semantic=None):
    return _call("nvshmemx_getmem_block", "long long long int", [to, source, num_bytes, rank], _semantic)


@core.extern
def signal_op(signal, number, operation, rank, _semantic=None):
    return _call("nvshmemx_signal_op", "long long int int", [signal, number, operation, rank], _semantic)


@core.extern
def signal_wait_until(signal, comparison, number, _semantic=None):
    return _call("nvshmem_signal_wait_until", "long int long", [signal, comparison, number], _semantic)


@core.extern
def quiet(_semantic=None):
    return _call("nvshmem_quiet", "", [], _semantic)


def _call(name, types, arguments, semantic):
    names = tuple([core.dtype("int64" if kind == "long" else "int32") for kind in types.split()])
    result = core.dtype("int64" if name == "nvshmem_signal_wait_until" else "int32")
    return core.extern_elementwise("", "", arguments, {names: (name, result)}, is_pure=False, _semantic=semantic)

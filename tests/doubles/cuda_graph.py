"""A double of CUDA graphs for CPU tensors: what the real ones would do with the operations of this thread.

Between `begin` and `end` every aten operation and every interpreted Triton launch of the thread is written down with
the tensors that it got. A replay does what was written down, on the same memory, and nothing else: Python does not run
again, and its numbers are those of the capture. As on a device,

* a capture computes nothing that stays: memory from outside is put back at `end`, the pool's own is made unusable;
* what waits for the device, copies from pageable host memory, draws random numbers, changes the stream or begins
  another capture is an error that names the operation;
* memory from outside that was freed after the capture is an error of the replay that reads it.

Not modelled: graphs of one pool share no memory here, and no operation is refused for its kernel alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor
from triton.tools.tensor_descriptor import TensorDescriptor

_COUNTS = ("nonzero", "nonzero_numpy", "argwhere", "masked_select", "bincount", "histc")
_UNIQUE = ("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive")
_WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", *_COUNTS, *_UNIQUE)
_ALLOCATES = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
_READS = ("cpu", "tolist", "numpy", "item", "__array__")


class CaptureError(RuntimeError):
    """What CUDA would refuse."""


@dataclasses.dataclass(frozen=True)
class _Pooled:
    """A tensor that the capture allocated; the graph keeps it."""

    tensor: Tensor

    def resolve(self, label: str) -> Tensor:
        return self.tensor


@dataclasses.dataclass(frozen=True)
class _Outside:
    """A tensor from before the capture, which a graph knows by its address alone."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def resolve(self, label: str) -> Tensor:
        storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            shape = tuple(self.shape)
            raise CaptureError(f"{label} reads memory {shape} {self.dtype} that was freed after the capture")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.stride)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One operation: called with `args` (tensors as `_Pooled` or `_Outside`), its new results go to `outputs`."""

    label: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[tuple[int, Tensor], ...] = ()

    def run(self) -> None:
        def resolve(value: Any) -> Any:
            return value.resolve(self.label) if isinstance(value, _Pooled | _Outside) else value

        found = self.call(*_map(self.args, resolve), **_map(self.kwargs, resolve))
        results = found if isinstance(found, tuple | list) else (found,)
        for index, output in self.outputs:
            output.copy_(results[index])


class RecordedGraph:
    """`Graph`."""

    def __init__(self, steps: list[_Step]) -> None:
        self.steps = steps
        self.released = False

    def replay(self) -> None:
        assert not self.released, "replay of a released graph"
        for step in self.steps:
            step.run()

    def release(self) -> None:
        self.released = True
        self.steps = []


class RecordedGraphs:
    """`GraphApi`."""

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []
        self._recorder: _Recorder | None = None
        self._patches = ExitStack()

    def warm(self) -> None:
        if self._recorder is not None:
            raise CaptureError("warm-up inside a capture")

    def begin(self) -> None:
        if self._recorder is not None:
            raise CaptureError("a capture begins inside a capture")
        self._recorder = _Recorder()
        self._patches = ExitStack()
        for owner, name in [(torch.Tensor, name) for name in _READS] + [
            (torch.cuda, name) for name in ("synchronize", "stream", "set_stream", "empty_cache")
        ]:
            self._patches.enter_context(mock.patch.object(owner, name, self._recorder.refused(owner, name)))
        self._patches.enter_context(mock.patch.object(GridExecutor, "__call__", self._recorder.launch()))
        self._patches.enter_context(self._recorder)

    def end(self) -> RecordedGraph:
        assert self._recorder is not None, "no capture has begun"
        recorder = self._recorder
        self.abandon()
        recorder.poison()
        self.graphs.append(RecordedGraph(recorder.steps))
        return self.graphs[-1]

    def abandon(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            self._patches.close()
            recorder.restore()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
        self._pool: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._launching = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, label = kwargs or {}, str(func)
        self._check(func, label, args, kwargs)
        inputs = list(_tensors((args, kwargs)))
        known = {_address(x) for x in inputs}
        writes = func._schema.is_mutable
        if writes:
            self._remember(inputs)
        held = _map(args, self._hold), _map(kwargs, self._hold)
        found = func(*args, **kwargs)
        results = found if isinstance(found, tuple | list) else (found,)
        fresh = [(i, x) for i, x in enumerate(results) if isinstance(x, Tensor) and _address(x) not in known]
        for _, x in fresh:
            self._pool[_address(x)] = x.untyped_storage()
        allocates = func.overloadpacket.__name__ in _ALLOCATES
        if writes or (fresh and not allocates):
            outputs = () if allocates else tuple((i, x.detach()) for i, x in fresh)
            self.steps.append(_Step(label, func, held[0], held[1], outputs))
        return found

    def launch(self) -> Callable[..., Any]:
        """In place of `GridExecutor.__call__`."""
        original = GridExecutor.__call__

        def record(executor: GridExecutor, *args: Any, **kwargs: Any) -> Any:
            if self._launching:
                return original(executor, *args, **kwargs)
            label = f"the launch of {getattr(executor.fn, '__name__', executor.fn)}"
            self._remember(list(_tensors((args, kwargs))))
            held = _map(args, self._hold), _map(kwargs, self._hold)
            self.steps.append(_Step(label, lambda *a, **k: original(executor, *a, **k), held[0], held[1]))
            self._launching = True
            try:
                with _disable_current_modes():
                    return original(executor, *args, **kwargs)
            finally:
                self._launching = False

        return record

    def refused(self, owner: Any, name: str) -> Callable[..., Any]:
        """In place of a method that reads from the device, or that changes streams."""
        original = getattr(owner, name)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            if self._launching:
                return original(*args, **kwargs)
            raise CaptureError(f"{owner.__name__}.{name} inside a capture")

        return refuse

    def poison(self) -> None:
        """What the capture computed is not there: only replays compute."""
        for storage in self._pool.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)

    def restore(self) -> None:
        """Memory from outside, as it was."""
        for storage, before in self._before.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).copy_(before)
        self._before.clear()

    def _check(self, func: Any, label: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func.overloadpacket.__name__
        if name in _WAITS or (name == "repeat_interleave" and "output_size" not in kwargs and len(args) < 4):
            raise CaptureError(f"{label} waits for the device, inside a capture")
        if name.startswith(("index", "_index_put")) and any(x.dtype is torch.bool for x in _tensors(args[1:2])):
            raise CaptureError(f"{label} with a mask waits for the device, inside a capture")
        if name == "lift_fresh":
            raise CaptureError(f"{label} copies numbers of the host, inside a capture")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CaptureError(f"{label} draws random numbers, inside a capture")

    def _hold(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if _address(value) in self._pool:
            return _Pooled(value)
        storage = StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
        return _Outside(storage, value.dtype, int(value.storage_offset()), value.shape, value.stride())

    def _remember(self, tensors: list[Tensor]) -> None:
        for x in tensors:
            if _address(x) not in self._pool and _address(x) not in self._before:
                storage = x.untyped_storage()
                with _disable_current_modes():
                    before = torch.empty(0, dtype=torch.uint8).set_(storage).clone()
                self._before[_address(x)] = storage, before


def _address(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with every leaf changed; through containers and Triton's tensor descriptors."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[_map(part, change) for part in value])
    if isinstance(value, tuple | list):
        return type(value)([_map(part, change) for part in value])
    if isinstance(value, dict):
        return {key: _map(part, change) for key, part in value.items()}
    if isinstance(value, TensorDescriptor):
        described = copy.copy(value)  # its constructor wants a tensor
        described.base = _map(value.base, change)
        return described
    return change(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    found: list[Any] = []
    _map(value, found.append)
    yield from (leaf for leaf in found if isinstance(leaf, Tensor))

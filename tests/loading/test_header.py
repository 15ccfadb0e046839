"""safetensors headers: what is refused, by which words, and that damage never becomes another kind of exception."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_runtime.errors import CheckpointError
from moe_runtime.loading.header import read_header


def write(path: Path, header: str | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, *, shape: list[Any] | None = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.zeros(3, dtype=torch.bfloat16),
        "fp8": torch.zeros(5, 7, dtype=torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    infos = read_header(file)
    assert {n: (i.dtype, i.shape, i.num_bytes) for n, i in infos.items()} == {
        n: (t.dtype, tuple(t.shape), t.nbytes) for n, t in tensors.items()
    }
    raw = file.read_bytes()
    at = infos["a"].offset
    assert raw[at : at + 24] == tensors["a"].numpy().tobytes()


FAULTS: list[tuple[str, str | dict[str, Any], bytes, list[str]]] = [
    (
        "truncated body",
        {"w": entry(0, 8)},
        b"1234567",
        ["tensor 'w'", "truncated", "expected a file of at least", "got"],
    ),
    ("extra tail", {"w": entry(0, 8)}, b"123456789", ["expected", "'w'", "got", "Download the file again"]),
    (
        "overlap",
        {"w": entry(0, 8), "v": entry(4, 12)},
        b"x" * 12,
        ["tensor 'v'", "overlaps 'w'", "expected it to start at byte 8", "got 4"],
    ),
    (
        "hole",
        {"w": entry(0, 8), "v": entry(12, 16)},
        b"x" * 16,
        ["tensor 'v'", "leaves a hole after 'w'", "expected it to start at byte 8", "got 12"],
    ),
    ("hole at the start", {"w": entry(4, 8)}, b"x" * 8, ["tensor 'w'", "hole after the header", "expected", "got 4"]),
    ("two tensors on one place", {"w": entry(0, 8), "v": entry(0, 8)}, b"x" * 8, ["overlaps", "expected", "got 0"]),
    ("shape against bytes", {"w": entry(0, 8, shape=[3])}, b"x" * 8, ["'w'", "expected 12 bytes", "[3]", "got 8"]),
    ("shape that overflows", {"w": entry(0, 8, shape=[2**62, 2**62])}, b"x" * 8, ["tensor 'w'", "expected", "got 8"]),
    ("negative dim", {"w": entry(0, 8, shape=[-2])}, b"x" * 8, ["tensor 'w'", "expected", "got shape [-2]"]),
    ("bool as dim", {"w": entry(0, 4, shape=[True])}, b"x" * 4, ["tensor 'w'", "expected", "got shape [True]"]),
    ("float as dim", {"w": entry(0, 8, shape=[2.0])}, b"x" * 8, ["tensor 'w'", "expected", "got shape [2.0]"]),
    ("shape is no list", {"w": entry(0, 8, shape="2")}, b"x" * 8, ["tensor 'w'", "expected", "got shape '2'"]),  # type: ignore[arg-type]
    (
        "descending offsets",
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        b"x" * 8,
        ["tensor 'w'", "expected", "got", "[8, 0]"],
    ),
    ("unknown dtype", {"w": entry(0, 8, dtype="BF61")}, b"x" * 8, ["tensor 'w'", "got 'BF61'", "mean 'BF16'"]),
    ("dtype is no text", {"w": entry(0, 8, dtype=16)}, b"x" * 8, ["tensor 'w'", "expected a dtype", "got 16"]),
    (
        "missing field",
        {"w": {"dtype": "F32", "shape": [2]}},
        b"x" * 8,
        ["tensor 'w'", "expected", "data_offsets", "got"],
    ),
    ("extra field", {"w": entry(0, 8) | {"shard": 1}}, b"x" * 8, ["tensor 'w'", "expected", "got", "'shard'"]),
    ("entry is no object", {"w": 5}, b"", ["tensor 'w'", "expected", "got 5"]),
    ("top is a list", "[]", b"", ["expected a JSON object", "list"]),
    ("not JSON", '{"w": ', b"", ["not JSON", "Download the file again"]),
    ("deep nesting", "[" * 200_000, b"", ["not JSON", "Download the file again"]),
    (
        "duplicate tensor",
        '{"w": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}, '
        '"w": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"x" * 8,
        ["tensor 'w'", "expected one entry", "got", "[0, 8]", "[0, 4]"],
    ),
]


@pytest.mark.parametrize(("header", "data", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_faults_name_file_tensor_expected_got(
    tmp_path: Path, header: str | dict[str, Any], data: bytes, words: list[str]
) -> None:
    file = write(tmp_path / "model-00002-of-00003.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert [w for w in [str(file), *words] if w not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", ["expected at least 8 bytes", "got 0"]),
        (b"1234567", ["expected at least 8 bytes", "got 7"]),
        ((2**63).to_bytes(8, "little"), ["expected a header of at most", f"got {2**63}"]),
        ((200 * 2**20).to_bytes(8, "little") + b"{}", ["expected a header of at most", f"got {200 * 2**20}"]),
        ((100).to_bytes(8, "little") + b"{}", ["truncated inside its header", "expected 100", "got 2"]),
        ((4).to_bytes(8, "little") + b'{"\xff"', ["not JSON", "Download the file again"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer", "git lfs pull"]),
    ],
)
def test_damaged_prefix(tmp_path: Path, raw: bytes, words: list[str]) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert [w for w in [str(file), *words] if w not in str(caught.value)] == []


def test_unreadable_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def test_library_accepts_the_duplicate_that_we_refuse(tmp_path: Path) -> None:
    """The reason why headers are parsed here: remove this parser when the library refuses it too."""
    from safetensors import safe_open

    fault = next(f for f in FAULTS if f[0] == "duplicate tensor")
    text = str(fault[1]).replace("[0,8]", "[0,4]").replace('"shape":[2]', '"shape":[1]')
    file = write(tmp_path / "model.safetensors", text, b"x" * 4)
    with safe_open(file, "pt") as stream:
        assert list(stream.keys()) == ["w"]
    with pytest.raises(CheckpointError, match="expected one entry"):
        read_header(file)


@settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4), cut=st.integers(0, 60))
def test_any_damage_is_a_checkpoint_error_or_a_consistent_file(
    tmp_path: Path, flips: list[tuple[int, int]], cut: int
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}, file)
    raw = bytearray(file.read_bytes())
    for position, value in flips:
        raw[position % len(raw)] = value
    file.write_bytes(bytes(raw[: len(raw) - cut // 10]))
    try:
        infos = read_header(file)
    except CheckpointError:
        return
    spans = sorted((i.offset, i.offset + i.num_bytes) for i in infos.values())
    assert spans[-1][1] == file.stat().st_size
    assert all(one[1] == two[0] for one, two in itertools.pairwise(spans))

"""Checkpoint: index against shards, and regions that cost exactly their own bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from moe_runtime.errors import CheckpointError
from moe_runtime.loading.checkpoint import Checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(6, 5, generator=generator) for i in range(4)}


def sharded(folder: Path) -> Path:
    """Layers 0 and 1 in the first shard, 2 and 3 in the second."""
    named = list(tensors().items())
    save_file(dict(named[:2]), folder / SHARDS[0])
    save_file(dict(named[2:]), folder / SHARDS[1])
    write_index(folder, {name: SHARDS[i // 2] for i, (name, _) in enumerate(named)})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 480}, "weight_map": weight_map}))


def weight_map(folder: Path) -> dict[str, str]:
    loaded: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return loaded


def test_sharded_and_single_read_the_same(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    single = tmp_path / "single"
    single.mkdir()
    save_file(tensors(), single / "model.safetensors")
    for name, expected in tensors().items():
        assert torch.equal(checkpoint.read(name), expected)
        assert torch.equal(Checkpoint.open(str(single)).read(name), expected)


def index_misses_a_tensor(folder: Path) -> None:
    write_index(folder, {n: f for n, f in weight_map(folder).items() if n != "layers.3.weight"})


def shard_misses_a_tensor(folder: Path) -> None:
    save_file({"layers.2.weight": torch.zeros(6, 5)}, folder / SHARDS[1])


def index_names_the_wrong_shard(folder: Path) -> None:
    write_index(folder, weight_map(folder) | {"layers.3.weight": SHARDS[0]})


def shard_is_missing(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()


def tensor_is_in_two_shards(folder: Path) -> None:
    named = tensors()
    save_file({n: named[n] for n in sorted(named)[1:]}, folder / SHARDS[1])


def stray_shard(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model-00003-of-00002.safetensors")


def shard_is_truncated(folder: Path) -> None:
    file = folder / SHARDS[1]
    file.write_bytes(file.read_bytes()[:-40])


def index_says_a_tensor_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"layers.1.weight"', '"layers.0.weight"'))


def index_leads_out_of_the_folder(folder: Path) -> None:
    write_index(folder, weight_map(folder) | {"layers.3.weight": "../secret.safetensors"})


def index_is_not_json(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {')


def index_is_nested_too_deep(folder: Path) -> None:
    (folder / INDEX).write_text("[" * 200_000)


def index_has_no_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"metadata": {}}')


def index_is_missing(folder: Path) -> None:
    (folder / INDEX).unlink()


def only_pickles(folder: Path) -> None:
    for file in (*SHARDS, INDEX):
        (folder / file).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def nothing_at_all(folder: Path) -> None:
    for file in (*SHARDS, INDEX):
        (folder / file).unlink()


FOLDER_FAULTS: list[tuple[Callable[[Path], None], list[str]]] = [
    (index_misses_a_tensor, [SHARDS[1], "'layers.3.weight'", "expected only what", "got it", "does not name it"]),
    (shard_misses_a_tensor, [SHARDS[1], "'layers.3.weight'", "expected in this shard", "got 1 tensors without it"]),
    (index_names_the_wrong_shard, [SHARDS[0], "'layers.3.weight'", "expected in this shard", "got 2 tensors without"]),
    (shard_is_missing, [SHARDS[1], "expects it with 2 tensors such as 'layers.2.weight'", "got no such file"]),
    (tensor_is_in_two_shards, [SHARDS[1], "'layers.1.weight'", "expected in one shard only", "got", SHARDS[0]]),
    (stray_shard, ["model-00003-of-00002.safetensors", "expected every shard", "got one that is not named"]),
    (shard_is_truncated, [SHARDS[1], "truncated inside tensor 'layers.3.weight'", "expected", "got"]),
    (index_says_a_tensor_twice, [INDEX, "'layers.0.weight'", "expected one shard", "got", SHARDS[0]]),
    (index_leads_out_of_the_folder, [INDEX, "'layers.3.weight'", "expected the name", "got '../secret.safetensors'"]),
    (index_is_not_json, [INDEX, "not JSON", "Download the file again"]),
    (index_is_nested_too_deep, [INDEX, "not JSON"]),
    (index_has_no_map, [INDEX, "expected an object 'weight_map'"]),
    (index_is_missing, ["expected model.safetensors", "got model-00001", "without an index", "Download"]),
    (only_pickles, ["expected model.safetensors", "got pytorch_model.bin", "can run code"]),
    (nothing_at_all, ["expected model.safetensors", "got neither", "Download"]),
]


@pytest.mark.parametrize(("damage", "words"), FOLDER_FAULTS, ids=[f.__name__ for f, _ in FOLDER_FAULTS])
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], None], words: list[str]) -> None:
    damage(sharded(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert [w for w in [str(tmp_path), *words] if w not in str(caught.value)] == []


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="got no such folder"):
        Checkpoint.open(tmp_path / "gone")


def test_no_such_tensor_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(sharded(tmp_path)).read("layers.2.wieght")
    assert "'layers.2.wieght'" in str(caught.value)
    assert "mean 'layers.2.weight'" in str(caught.value)


def test_file_that_shrinks_after_opening_is_an_error_and_no_crash(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    shard_is_truncated(tmp_path)
    assert torch.equal(checkpoint.read("layers.2.weight"), tensors()["layers.2.weight"])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read("layers.3.weight")
    words = [SHARDS[1], "'layers.3.weight'", "expected 120 bytes", "got 80", "shrunk"]
    assert [w for w in words if w not in str(caught.value)] == []


def test_file_that_vanishes_after_opening(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    shard_is_missing(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.2.*cannot be read"):
        checkpoint.read("layers.2.weight")


BOUND = st.one_of(st.none(), st.integers(-9, 9))
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("mixed")
    generator = torch.Generator().manual_seed(1)
    named: dict[str, Tensor] = {}
    for dtype in DTYPES:
        for shape in [(7, 6), (8,), (1, 5), (0, 3), (4, 3, 2), ()]:
            drawn = torch.randint(0, 100, shape, generator=generator)
            named[f"{dtype}{list(shape)}"] = drawn.to(dtype)
    save_file(named, folder / "model.safetensors")
    return Checkpoint.open(folder), named


@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=st.data())
def test_a_region_equals_the_slice_of_the_whole(
    mixed: tuple[Checkpoint, dict[str, Tensor]], data: st.DataObject
) -> None:
    checkpoint, named = mixed
    name = data.draw(st.sampled_from(sorted(named)))
    whole = named[name]
    dims = data.draw(st.integers(0, min(2, whole.ndim)))
    region = tuple(slice(data.draw(BOUND), data.draw(BOUND)) for _ in range(dims))
    got = checkpoint.read(name, region)
    # Compared as bytes: fp8 has no equality of its own.
    expected = whole[region].contiguous() if region else whole
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.is_contiguous()
    assert bytes(got.flatten().view(torch.uint8).tolist()) == bytes(expected.flatten().view(torch.uint8).tolist())


@pytest.mark.parametrize("region", [(slice(0, 6, 2),), (slice(None), slice(None), slice(0, 1)), (slice(None),) * 4])
def test_regions_that_cannot_be_read_in_runs_are_refused(
    mixed: tuple[Checkpoint, dict[str, Tensor]], region: tuple[slice, ...]
) -> None:
    with pytest.raises(ValueError, match="region"):
        mixed[0].read("torch.float32[4, 3, 2]", region)


ROWS, COLUMNS = 8192, 16384
MIB = 2**20


def sparse(folder: Path) -> Checkpoint:
    """A 256 MiB bf16 matrix of zeros that occupies no disk."""
    num_bytes = ROWS * COLUMNS * 2
    header = json.dumps({"w": {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [0, num_bytes]}}).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + num_bytes)
    return Checkpoint.open(folder)


def process_number(file: str, key: str) -> int:
    """One number of /proc/self/<file>: bytes, or KiB where the file says kB."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(key + ":"):
            value = line.split()[1:]
            return int(value[0]) * (1024 if value[1:] == ["kB"] else 1)
    raise LookupError(key)


@pytest.mark.parametrize(
    ("region", "region_bytes"),
    [
        ((slice(1024, 1536),), 16 * MIB),
        ((slice(None), slice(2048, 3072)), 16 * MIB),
        ((slice(ROWS - 512, ROWS + 1),), 16 * MIB),
    ],
    ids=["rows", "columns", "last rows, clipped"],
)
def test_only_the_region_is_read_and_held(tmp_path: Path, region: tuple[slice, ...], region_bytes: int) -> None:
    checkpoint = sparse(tmp_path)
    checkpoint.read("w", (slice(0, 1),))  # whatever the first read loads
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, held = process_number("io", "rchar"), process_number("status", "VmRSS")
    except OSError as error:
        pytest.skip(f"this kernel shows no memory peaks: {error}")
    tensor = checkpoint.read("w", region)
    read, peak = process_number("io", "rchar") - before, process_number("status", "VmHWM") - held
    assert tensor.nbytes == region_bytes
    assert region_bytes <= read < region_bytes + 64 * 1024
    assert peak < region_bytes + 2 * MIB

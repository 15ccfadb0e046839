"""What a model needs against what a checkpoint holds, and one rank's region in the compute dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moe_tools.fp8 import quantize
from safetensors.torch import save_file
from torch import Tensor

from moe_runtime.errors import CheckpointError
from moe_runtime.loading.checkpoint import Checkpoint
from moe_runtime.loading.fp8 import dequantize
from moe_runtime.loading.shard import TensorSpec, check_tensors, load_blocks, load_region
from moe_runtime.loading.source import CheckpointSource

PLAIN = frozenset({torch.float32, torch.bfloat16})
FP8 = torch.float8_e4m3fn
PROJ, SCALES, NORM, MTP = (
    "model.layers.0.o_proj.weight",
    "model.layers.0.o_proj.weight_scale_inv",
    "norm.weight",
    "mtp.x",
)

SPECS = (
    TensorSpec(PROJ, (300, 200), PLAIN | {FP8}, block=(128, 128)),
    TensorSpec(NORM, (200,), PLAIN),
    TensorSpec("lm_head.weight", (64, 200), PLAIN, optional=True),
)

Tensors = dict[str, Tensor]


def good() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    data, scales = quantize(torch.randn(300, 200, generator=generator), block=(128, 128))
    return {PROJ: data, SCALES: scales, NORM: torch.ones(200, dtype=torch.bfloat16)}


def saved(folder: Path, tensors: Tensors) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def check(checkpoint: Checkpoint, specs: tuple[TensorSpec, ...] = SPECS) -> str | None:
    return check_tensors(checkpoint, specs, skipped=lambda name: name.startswith("mtp."))


def test_a_complete_checkpoint_passes_without_notice(tmp_path: Path) -> None:
    assert check(saved(tmp_path, good())) is None


def test_optional_tensors_may_be_there(tmp_path: Path) -> None:
    assert check(saved(tmp_path, good() | {"lm_head.weight": torch.zeros(64, 200)})) is None


def test_skipped_tensors_give_one_line_of_notice(tmp_path: Path) -> None:
    extra = {MTP: torch.zeros(2**18), "mtp.y": torch.zeros(2**18)}
    notice = check(saved(tmp_path, good() | extra))
    assert notice == "skipped 2 multi-token-prediction tensors (2.0 MiB)"


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def replaced(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensor}


FAULTS: list[tuple[str, Callable[[Tensors], Tensors], list[str]]] = [
    ("missing", without(NORM), ["tensor 'norm.weight' missing", "expected", "[200]", "got 2 tensors without it"]),
    (
        "renamed",
        lambda t: {("norm.wieght" if n == NORM else n): v for n, v in t.items()},
        ["'norm.weight' missing", "expected", "got", "mean 'norm.wieght'"],
    ),
    (
        "unexpected",
        replaced("norm.bias", torch.zeros(7)),
        ["model.safetensors", "'norm.bias' unexpected", "expected only", "got float32 [7]", "mean 'norm.weight'"],
    ),
    (
        "mis-shaped",
        replaced(NORM, torch.ones(201)),
        ["model.safetensors", "'norm.weight'", "expected shape [200]", "got [201]", "config.json"],
    ),
    (
        "transposed",
        replaced(PROJ, torch.zeros(200, 300)),
        ["model.safetensors", f"'{PROJ}'", "expected shape [300, 200]", "got [200, 300]"],
    ),
    (
        "mis-typed",
        replaced(NORM, torch.ones(200, dtype=torch.int32)),
        ["model.safetensors", "'norm.weight'", "expected dtype bfloat16 or float32", "got int32", "Convert"],
    ),
    (
        "fp8 where no scales belong",
        replaced(NORM, torch.ones(200).to(FP8)),
        ["'norm.weight'", "expected dtype bfloat16 or float32", "got float8_e4m3fn", "quantization_config"],
    ),
    ("scales missing", without(SCALES), [f"'{PROJ}'", f"'{SCALES}'", "[3, 2]", "expected it", "got no such tensor"]),
    (
        "scales mis-shaped",
        replaced(SCALES, torch.ones(2, 3)),
        [f"'{SCALES}'", "expected", "[3, 2]", "got float32 [2, 3]", "128x128"],
    ),
    (
        "scales mis-typed",
        replaced(SCALES, torch.ones(3, 2, dtype=torch.int64)),
        [f"'{SCALES}'", "expected bfloat16 or float32", "got int64 [3, 2]"],
    ),
    (
        "scales without fp8 weights",
        replaced(PROJ, torch.zeros(300, 200)),
        [f"'{SCALES}' unexpected", "expected only", "got float32 [3, 2]"],
    ),
]


@pytest.mark.parametrize(("damage", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_faults_name_file_tensor_expected_got(
    tmp_path: Path, damage: Callable[[Tensors], Tensors], words: list[str]
) -> None:
    checkpoint = saved(tmp_path, damage(good()))
    with pytest.raises(CheckpointError) as caught:
        check(checkpoint)
    assert [w for w in [str(tmp_path), *words] if w not in str(caught.value)] == []


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    specs = tuple(TensorSpec(f"experts.{i}.weight", (2,), PLAIN) for i in range(9))
    with pytest.raises(CheckpointError, match=r"'experts\.1\.weight', 'experts\.2\.weight' and 6 more missing"):
        check(saved(tmp_path, good()), (*SPECS, *specs))


def test_the_texts_stay_quick_on_a_large_checkpoint(tmp_path: Path) -> None:
    """40,000 names: comparing the missing name with all of them took seconds."""
    names = [f"model.layers.{i // 700}.mlp.experts.{i % 700}.up_proj.weight" for i in range(40_000)]
    header = {n: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in names}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    checkpoint = Checkpoint.open(tmp_path)
    specs = tuple(TensorSpec(n, (0,), PLAIN) for n in names[1:])
    with pytest.raises(CheckpointError, match="unexpected"):
        check(checkpoint, specs)
    with pytest.raises(CheckpointError, match="missing"):
        check(checkpoint, (*specs, TensorSpec("model.layers.3.mlp.experts.5.up_prog.weight", (0,), PLAIN)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "region",
    [
        None,
        (slice(100, 170),),
        (slice(256, 300),),
        (slice(None), slice(50, 130)),
        (slice(127, 129), slice(127, 129)),
        (slice(5, 5),),
        (slice(290, 400),),
    ],
)
def test_fp8_regions(tmp_path: Path, region: tuple[slice, ...] | None, dtype: torch.dtype) -> None:
    tensors = good()
    whole = dequantize(tensors[PROJ], tensors[SCALES], block=(128, 128), dtype=torch.float32)
    got = load_region(saved(tmp_path, tensors), SPECS[0], region, dtype=dtype)
    expected = whole[region or ()].to(dtype)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "region",
    [None, (slice(128, 256),), (slice(256, 300),), (slice(None), slice(128, 200)), (slice(0, 200), slice(0, 70))],
)
def test_fp8_regions_as_they_are_stored(
    tmp_path: Path, region: tuple[slice, ...] | None, scale_dtype: torch.dtype
) -> None:
    """The last blocks may be short: at the end of the matrix, or of the region."""
    tensors = good()
    tensors[SCALES] = tensors[SCALES].to(scale_dtype)
    checkpoint = saved(tmp_path, tensors)
    got = load_blocks(checkpoint, SPECS[0], region)
    assert got.data.is_contiguous()
    assert got.scale.is_contiguous()
    assert (got.data.dtype, got.scale.dtype) == (FP8, torch.float32)
    want = load_region(checkpoint, SPECS[0], region, dtype=torch.float32)
    assert torch.equal(dequantize(got.data, got.scale, block=(128, 128), dtype=torch.float32), want)


@pytest.mark.parametrize("region", [(slice(64, 256),), (slice(None), slice(1, 200))])
def test_a_region_that_starts_inside_a_block_has_no_blocks_of_its_own(
    tmp_path: Path, region: tuple[slice, ...]
) -> None:
    with pytest.raises(ValueError, match="starts inside a block"):
        load_blocks(saved(tmp_path, good()), SPECS[0], region)


def test_a_source_tells_fp8_from_the_files_and_moves_it_as_it_is(tmp_path: Path) -> None:
    counts: list[int] = []
    source = CheckpointSource(
        saved(tmp_path, good()),
        {spec.name: spec for spec in SPECS},
        dtype=torch.bfloat16,
        device=torch.device("meta"),
        on_read=counts.append,
    )
    assert [source.is_fp8(name) for name in (PROJ, NORM)] == [True, False]
    blocks = source.read_blocks(PROJ, (slice(0, 128),))
    assert (blocks.data.dtype, blocks.data.device.type, blocks.scale.device.type) == (FP8, "meta", "meta")
    assert counts == [128 * 200]


def test_plain_regions_are_cast(tmp_path: Path) -> None:
    weights = torch.arange(200.0)
    checkpoint = saved(tmp_path, good() | {NORM: weights.bfloat16()})
    got = load_region(checkpoint, SPECS[1], (slice(3, 9),), dtype=torch.float32)
    assert torch.equal(got, weights[3:9].bfloat16().float())


def test_bytes_read_are_those_of_the_stored_dtype(tmp_path: Path) -> None:
    counts: list[int] = []
    source = CheckpointSource(
        saved(tmp_path, good()),
        {spec.name: spec for spec in SPECS},
        dtype=torch.float32,
        device=torch.device("cpu"),
        on_read=counts.append,
    )
    source.read(NORM)
    source.read(PROJ, (slice(0, 10), slice(5, 25)), dtype=torch.bfloat16)
    assert counts == [200 * 2, 10 * 20]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    weights = torch.zeros(300, 200, dtype=dtype)
    weights[150, 17] = bad
    checkpoint = saved(tmp_path, {PROJ: weights, NORM: torch.ones(200)})
    check(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        load_region(checkpoint, SPECS[0], (slice(100, 200), slice(10, 20)), dtype=torch.float32)
    words = ["model.safetensors", f"'{PROJ}'", "expected finite", f"got {bad}", "[150, 17]", "1 such"]
    assert [w for w in words if w not in str(caught.value)] == []
    assert load_region(checkpoint, SPECS[0], (slice(0, 150),), dtype=dtype).shape == (150, 200)
    assert load_region(checkpoint, SPECS[0], dtype=dtype, verify=False).shape == (300, 200)


def test_nan_in_fp8_weights_and_scales(tmp_path: Path) -> None:
    tensors = good()
    tensors[PROJ].view(torch.uint8)[299, 199] = 0x7F  # the NaN of e4m3
    with pytest.raises(CheckpointError, match=r"expected finite weights, got nan at \[299, 199\]"):
        load_region(saved(tmp_path, tensors), SPECS[0], dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"expected finite weights, got nan at \[299, 199\]"):
        load_blocks(saved(tmp_path, tensors), SPECS[0], (slice(256, 300),))
    tensors = good()
    tensors[SCALES][2, 1] = float("nan")
    checkpoint = saved(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=f"{SCALES}.*expected finite scales, got NaN"):
        load_region(checkpoint, SPECS[0], (slice(256, 300),), dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=f"{SCALES}.*expected finite scales, got NaN"):
        load_blocks(checkpoint, SPECS[0], (slice(256, 300),))
    assert load_region(checkpoint, SPECS[0], (slice(0, 256),), dtype=torch.bfloat16).shape == (256, 200)


MIB = 2**20


def peak_growth(work: Callable[[], Tensor]) -> int:
    """Bytes by which the process's largest resident size exceeds what it holds before `work`."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"this kernel shows no memory peaks: {error}")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


@pytest.mark.parametrize(("stored", "scales"), [("F8_E4M3", True), ("BF16", False)])
def test_host_memory_peaks_at_the_stored_region_plus_the_result(tmp_path: Path, stored: str, scales: bool) -> None:
    """A region of 1/8 of a 128 M-weight matrix, wanted in fp32."""
    rows, columns, size = 8192, 16384, 1 if scales else 2
    entries = {"w.weight": {"dtype": stored, "shape": [rows, columns], "data_offsets": [0, rows * columns * size]}}
    end = rows * columns * size
    if scales:
        shape = [rows // 128, columns // 128]
        entries["w.weight_scale_inv"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * 64 * 128]}
        end += 4 * 64 * 128
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    checkpoint = Checkpoint.open(tmp_path)
    spec = TensorSpec("w.weight", (rows, columns), PLAIN | {FP8}, block=(128, 128))
    load_region(checkpoint, spec, (slice(0, 200),), dtype=torch.float32)
    num = rows // 8 * columns
    growth = peak_growth(lambda: load_region(checkpoint, spec, (slice(1000, 1000 + rows // 8),), dtype=torch.float32))
    bound = num * (size + 4) + 8 * MIB
    assert growth < bound
    # The measure sees what it should refuse: the whole matrix, of which the region is 1/8.
    whole = max(peak_growth(lambda: checkpoint.read("w.weight")) for _ in range(3))
    if whole < num * size:
        pytest.skip("memory that earlier tests left resident hides the peaks of this process")
    assert whole > bound

"""What a rank holds of an FP8 checkpoint that stays so: exactly the stated bytes, as they are stored, nothing twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from moe_kernels.linear import PackedWeight
from moe_kernels.scaled import BlockScaled
from moe_models.base import ModelConfig
from moe_models.deepseek_v3.assembly import Assembly, SharedExpertsMode
from moe_models.deepseek_v3.model import DeepseekModel
from moe_models.kept_fp8 import KeptFp8, kept_fp8
from moe_models.registry import load_config, parse_config, tensor_specs
from moe_models.schema import Json
from moe_tools.checkpoint_presets import preset_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_runtime.balance.load import LoadRecorder
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.dispatch.factory import make_dispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.launch.compose import compose
from moe_runtime.launch.sizing import kept_weights, weight_bytes
from moe_runtime.layers.experts import DenseMLP, ScaledMLP
from moe_runtime.layers.moe import MoELayer
from moe_runtime.loading.checkpoint import Checkpoint
from moe_runtime.loading.source import CheckpointSource
from moe_runtime.parallel.mesh import ProcessMesh
from moe_runtime.parallel.placement import ExpertPlacement
from tests.dispatch.contract import spec_of
from tests.models.fp8_checkpoint import SIZES, write_fp8

NOT_WEIGHTS = {"rotary", "dispatcher", "selector", "recorder", "tp", "location"}
PARTS = {"down", "query", "out", "dense", "shared", "experts"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fp8(tmp_path_factory.mktemp("fp8"))


def assembled(
    folder: Path, *, tp: int = 1, rank: int = 0, shared: SharedExpertsMode = "replicated", batch_invariant: bool = False
) -> tuple[DeepseekModel, int]:
    """The model of one of ep = tp ranks, and its slots per layer."""
    config = load_config(folder)
    specs = {spec.name: spec for spec in tensor_specs(config)}
    logical = config.n_routed_experts + (config.n_shared_experts if shared == "dispatched" else 0)
    placement = ExpertPlacement.uniform(len(config.moe_layers), logical, ep=tp)
    with VirtualCluster(tp, num_threads=1) as cluster:
        groups = virtual_groups(cluster, tp=tp)[rank]
        model = Assembly(
            config=config,
            mesh=ProcessMesh(tp=tp, rank=rank),
            groups=groups,
            source=CheckpointSource(Checkpoint.open(folder), specs, dtype=torch.bfloat16, device=torch.device("cpu")),
            placement=placement,
            selector=placement.selector(rank),
            dispatcher=make_dispatcher("all_to_all", groups.ep, spec_of(RowLayout(placement.num_local))),
            recorder=LoadRecorder(len(config.moe_layers), logical),
            shared_experts=shared,
            batch_invariant=batch_invariant,
            expert_dtype=torch.bfloat16,
            max_model_len=64,
            kept_fp8=kept_fp8(config, keep=True, tp=tp, shared_dispatched=shared == "dispatched"),
        ).build()
    return model, placement.num_local


def weights_of(part: object) -> Iterator[Tensor]:
    """Every weight that can be reached."""
    match part:
        case Tensor():
            if part.is_floating_point():  # ids are no weights
                yield part
        case PackedWeight():
            raise AssertionError("weights this small stay plain")
        case tuple():
            for one in part:
                yield from weights_of(one)
        case _ if is_dataclass(part):
            for field in fields(part):
                if field.name not in NOT_WEIGHTS:
                    yield from weights_of(getattr(part, field.name))
        case _:
            return


def held_bytes(model: DeepseekModel) -> int:
    """Bytes of the storages of all weights, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights_of(model)}
    return sum(storages.values())


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("tp", "rank", "shared"), [(1, 0, "replicated"), (2, 1, "replicated"), (1, 0, "dispatched"), (4, 3, "replicated")]
)
def test_a_rank_holds_the_stated_bytes(
    folder: Path, tp: int, rank: int, shared: SharedExpertsMode, batch_invariant: bool
) -> None:
    """With tp=4 a head's 64 columns of o_proj share blocks: that matrix, and no other, is dequantised."""
    config = load_config(folder)
    model, slots = assembled(folder, tp=tp, rank=rank, shared=shared, batch_invariant=batch_invariant)
    kept = kept_fp8(config, keep=True, tp=tp, shared_dispatched=shared == "dispatched")
    assert PARTS - kept.parts == ({"out"} if tp == 4 else set())

    def stated(kept: KeptFp8 | None) -> int:
        mesh = ProcessMesh(tp=tp, rank=rank)
        return weight_bytes(
            config, mesh, num_local_slots=slots, shared=shared, itemsize=2, batch_invariant=batch_invariant, kept=kept
        ).total

    assert held_bytes(model) == stated(kept) < 0.7 * stated(None)
    dtypes = [t.dtype for t in weights_of(model) if t.dim() > 1 and t.numel() >= 128 * 96]
    assert dtypes.count(torch.float8_e4m3fn) > len(dtypes) // 2


def test_what_is_kept_is_what_is_stored(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    model, _ = assembled(folder, tp=2, rank=1)

    def stored(name: str) -> BlockScaled:
        return BlockScaled(checkpoint.read(f"{name}.weight"), checkpoint.read(f"{name}.weight_scale_inv"))

    def same(got: object, want: BlockScaled) -> None:
        assert isinstance(got, BlockScaled)
        assert got.scale.is_contiguous(), "kernels walk over scales as they lie"
        assert torch.equal(got.data.float(), want.data.float())
        assert torch.equal(got.scale, want.scale)

    prefix = "model.layers.1.self_attn."
    attention = model.blocks[1].attention.weights
    q_a, kv_a = stored(prefix + "q_a_proj"), stored(prefix + "kv_a_proj_with_mqa")
    down = BlockScaled(torch.cat((q_a.data, kv_a.data)), torch.cat((q_a.scale, kv_a.scale)))
    same(attention.down.weight, down)
    q_b, out = stored(prefix + "q_b_proj"), stored(prefix + "o_proj")
    same(attention.q.weight, BlockScaled(q_b.data[256:], q_b.scale[2:]))  # heads 2 and 3
    same(attention.out.weight, BlockScaled(out.data[:, 128:], out.scale[:, 1:]))
    layer = model.blocks[1].ffn
    assert isinstance(layer, MoELayer)
    stem = "model.layers.1.mlp.experts.4."  # slot 0 of rank 1
    gate, up, second = (stored(f"{stem}{name}_proj") for name in ("gate", "up", "down"))
    w13, scale13, w2, scale2 = layer.experts.weights.slot_tensors(0)
    same(BlockScaled(w13, scale13), BlockScaled(torch.cat((gate.data, up.data)), torch.cat((gate.scale, up.scale))))
    same(BlockScaled(w2, scale2), second)
    assert isinstance(layer.shared, ScaledMLP)
    assert isinstance(model.blocks[0].ffn, ScaledMLP)


def test_matrices_that_the_checkpoint_has_in_another_dtype_are_read_as_before(folder: Path, tmp_path: Path) -> None:
    """Which modules are quantised is seen from the files: here layer 1's experts and shared expert are not."""
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    stem = "model.layers.1.mlp."
    for name in [name for name in tensors if name.startswith(stem) and name + "_scale_inv" in tensors]:
        del tensors[name + "_scale_inv"]
        tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = assembled(tmp_path)
    plain, scaled = model.blocks[1].ffn, model.blocks[2].ffn
    assert isinstance(plain, MoELayer)
    assert isinstance(scaled, MoELayer)
    assert isinstance(plain.shared, DenseMLP)
    assert not isinstance(plain.experts.weights.w13, BlockScaled)
    assert isinstance(scaled.shared, ScaledMLP)
    assert isinstance(scaled.experts.weights.w13, BlockScaled)


@pytest.mark.parametrize(
    ("changes", "tp", "dispatched", "parts", "reason"),
    [
        ({}, 1, False, set(), None),
        ({}, 2, True, set(), None),
        ({}, 4, False, {"out"}, r"o_proj \(tp=4 cuts it every 64 columns"),
        ({"q_lora_rank": 96}, 1, False, {"down"}, r"q_a_proj \(96 rows"),
        ({"q_lora_rank": None}, 1, False, set(), None),
        ({"n_shared_experts": 2}, 1, True, {"experts"}, r"cut every 192 rows"),
        ({"n_shared_experts": 2}, 1, False, set(), None),
        ({"rope_interleave": False}, 1, False, {"down", "query"}, r"q_b_proj \(its rotary rows"),
        ({"moe_intermediate_size": 40}, 1, False, {"shared", "experts"}, r"experts \(rows of 40 bytes"),
    ],
)
def test_what_cannot_stay_is_named(
    changes: dict[str, Json], tp: int, dispatched: bool, parts: set[str], reason: str | None
) -> None:
    config = _config(**changes)
    kept = kept_fp8(config, keep=True, tp=tp, shared_dispatched=dispatched)
    assert PARTS - kept.parts == parts
    assert (kept.notice is None) == (reason is None)
    assert reason is None or re.search(reason, kept.notice or "")
    assert kept_fp8(config, keep=False, tp=tp, shared_dispatched=dispatched) == KeptFp8()


def _config(**changes: Json) -> ModelConfig:
    blocks: Json = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128] * 2,
    }
    values = preset_config("deepseek_v3", "tiny") | SIZES | {"quantization_config": blocks, **changes}
    return parse_config({**values, "torch_dtype": "bfloat16"}, source="config.json")


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["device=cuda"], True),
        ([], False),
        (["fp8_weights=keep"], True),
        (["device=cuda", "fp8_weights=dequantize"], False),
        (["device=cuda", "model=deepseek_v2_lite"], False),
    ],
)
def test_fp8_stays_on_a_gpu_if_not_told_otherwise(words: list[str], kept: bool) -> None:
    run = compose(["model=deepseek_v3", *words] if "model=deepseek_v2_lite" not in words else words)
    assert bool(kept_weights(run.config, run.model).parts) == kept


def test_deepseek_v3_in_fp8_takes_half_the_bytes_of_bf16() -> None:
    """671e9 numbers: all but embedding, head, kv_b, norms and router in a byte and 4/128² of one."""
    run = compose(["model=deepseek_v3", "device=cuda"])
    kept = kept_weights(run.config, run.model)
    assert kept.notice is None
    total = weight_bytes(
        run.model, ProcessMesh(), num_local_slots=256, shared="replicated", itemsize=2, kept=kept
    ).total
    assert total == pytest.approx(676e9, rel=2e-2)

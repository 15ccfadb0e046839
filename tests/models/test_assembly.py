"""What one rank reads from its checkpoint, what it holds of it and where. I expert width, S shared experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from moe_kernels.linear import PackedWeight
from moe_kernels.scaled import BlockScaled
from moe_models.deepseek_v3.assembly import Assembly, SharedExpertsMode
from moe_models.deepseek_v3.model import DeepseekModel
from moe_models.registry import load_config, tensor_specs
from moe_tools.checkpoint_presets import preset_config
from moe_tools.make_checkpoint import make_checkpoint
from torch import Tensor

from moe_runtime.balance.load import LoadRecorder
from moe_runtime.comm.virtual import VirtualCluster, virtual_groups
from moe_runtime.dispatch.factory import make_dispatcher
from moe_runtime.dispatch.rows import RowLayout
from moe_runtime.launch.sizing import weight_bytes
from moe_runtime.layers.linear import Linear
from moe_runtime.layers.mla import MLAWeights
from moe_runtime.layers.moe import MoELayer
from moe_runtime.loading.checkpoint import Checkpoint, Region
from moe_runtime.loading.source import CheckpointSource
from moe_runtime.parallel.mesh import ProcessMesh
from moe_runtime.parallel.placement import ExpertPlacement
from tests.dispatch.contract import spec_of

NUM_SHARED, WIDTH, ROUTED = 2, 32, 16


class Recorded(CheckpointSource):
    """Notes what is read, in fp32."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        specs = {spec.name: spec for spec in tensor_specs(load_config(folder))}
        super().__init__(Checkpoint.open(folder), specs, dtype=torch.float32, device=torch.device(device))
        self.reads: list[tuple[str, Region | None]] = []

    def read(self, name: str, region: Region | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        self.reads.append((name, region))
        return super().read(name, region, dtype=dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("assembly")
    make_checkpoint(written, preset_config("deepseek_v3", "tiny") | {"n_shared_experts": NUM_SHARED}, dtype="float32")
    return written


def assembled(
    folder: Path,
    source: Recorded,
    *,
    tp: int = 1,
    shared: SharedExpertsMode = "replicated",
    batch_invariant: bool = False,
) -> DeepseekModel:
    """The model of rank 0 of tp ranks."""
    config = load_config(folder)
    logical = config.n_routed_experts + (config.n_shared_experts if shared == "dispatched" else 0)
    placement = ExpertPlacement.uniform(len(config.moe_layers), logical, ep=tp)
    with VirtualCluster(tp, num_threads=1) as cluster:
        groups = virtual_groups(cluster, tp=tp)[0]
        return Assembly(
            config=config,
            mesh=ProcessMesh(tp=tp),
            groups=groups,
            source=source,
            placement=placement,
            selector=placement.selector(0),
            dispatcher=make_dispatcher("all_to_all", groups.ep, spec_of(RowLayout(placement.num_local))),
            recorder=LoadRecorder(len(config.moe_layers), logical),
            shared_experts=shared,
            batch_invariant=batch_invariant,
            expert_dtype=torch.float32,
            max_model_len=64,
        ).build()


def test_dispatched_shared_experts_are_read_slice_by_slice(folder: Path) -> None:
    source = Recorded(folder)
    model = assembled(folder, source, shared="dispatched")
    cuts = [slice(shared * WIDTH, (shared + 1) * WIDTH) for shared in range(NUM_SHARED)]
    regions = [region for name, region in source.reads if name.startswith("model.layers.1.mlp.shared_experts.")]
    rows, columns = ([(cut, slice(None)) for cut in cuts], [(slice(None), cut) for cut in cuts])
    assert regions == [rows[0], rows[0], columns[0], rows[1], rows[1], columns[1]]
    checkpoint, layer = Checkpoint.open(folder), model.blocks[1].ffn
    assert isinstance(layer, MoELayer)
    stem = "model.layers.1.mlp.shared_experts."
    gate, up, down = (checkpoint.read(f"{stem}{name}_proj.weight") for name in ("gate", "up", "down"))
    for shared, cut in enumerate(cuts):
        w13, w2 = layer.experts.weights.slot_tensors(ROUTED + shared)
        assert torch.equal(w13, torch.cat((gate[cut], up[cut])))
        assert torch.equal(w2, down[:, cut])


def test_everything_is_on_the_device_of_the_source(folder: Path) -> None:
    model = assembled(folder, Recorded(folder, device="meta"))
    assert model.rotary.cos_sin.device.type == "meta"
    assert model.norm.device.type == "meta"


def held(weights: MLAWeights) -> Iterator[tuple[int, int]]:
    """Address and bytes of each storage."""
    for field in fields(weights):
        value = getattr(weights, field.name)
        for part in (value.weight, value.bias) if isinstance(value, Linear) else (value,):
            assert not isinstance(part, PackedWeight | BlockScaled), "weights this small stay plain"
            if part is not None:
                yield part.untyped_storage().data_ptr(), part.untyped_storage().nbytes()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_attention_holds_the_bytes_that_are_stated(folder: Path, tp: int, batch_invariant: bool) -> None:
    model = assembled(folder, Recorded(folder), tp=tp, batch_invariant=batch_invariant)
    stated = weight_bytes(
        load_config(folder),
        ProcessMesh(tp=tp),
        num_local_slots=1,
        shared="replicated",
        itemsize=4,
        batch_invariant=batch_invariant,
    )
    assert sum(sum(dict(held(block.attention.weights)).values()) for block in model.blocks) == stated.attention

"""Write a random DeepSeek-V2 or V3 checkpoint in Hugging Face layout, for tests and benchmarks.

    python -m moe_tools.make_checkpoint --family deepseek_v3 --preset small-1b --output small-1b
    python -m moe_tools.make_checkpoint --output tiny-v2 --family deepseek_v2 --hidden-size 128 --num-hidden-layers 3

Any key of config.json can be given as an option (`--rope-theta 50000`, `--rope-scaling '{"type": "yarn", ...}'`).
Weights are normal(0, 0.02), norms 1, correction biases normal(0, 0.01) in fp32. A tensor depends on seed,
name, shape and dtype only, so the size of the shards changes nothing. Host memory: one shard.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from moe_models.base import ModelConfig
from moe_models.deepseek_v3.weights import mtp_tensor_specs
from moe_models.registry import parse_config, tensor_specs
from moe_models.schema import Json
from safetensors.torch import save_file
from torch import Tensor

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.loading.fp8 import scale_name, scale_shape
from moe_runtime.loading.shard import TensorSpec
from moe_tools.checkpoint_presets import PRESETS, preset_config
from moe_tools.fp8 import quantize

_DTYPES = ("bfloat16", "float32", "float16")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


@dataclass(frozen=True, slots=True)
class Written:
    """What `make_checkpoint` wrote; `num_parameters` counts weights (no FP8 scales), MTP layers included."""

    folder: Path
    num_parameters: int
    num_bytes: int
    num_shards: int


@dataclass(frozen=True, slots=True)
class _Planned:
    spec: TensorSpec
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        size = math.prod(self.spec.shape) * self.dtype.itemsize
        if self.dtype == torch.float8_e4m3fn and self.spec.block is not None:
            size += math.prod(scale_shape(self.spec.shape, self.spec.block)) * 4
        return size


def make_checkpoint(
    folder: Path, values: dict[str, Json], *, dtype: str = "bfloat16", fp8: bool = False, shard_bytes: int = 2**30,
    seed: int = 0, tokenizer: Path | None = None,
) -> Written:  # fmt: skip
    """Write config.json (last), shards, index and generation_config.json into `folder`, which must be new or empty.

    Raises ConfigError where `values` describe no model or the folder is in use.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"output={str(folder)!r} is not empty. Give a new folder, or empty it.")
    values = {**values, "torch_dtype": dtype}
    if fp8:
        values["quantization_config"] = _fp8_config()
    config = parse_config(values, source="config.json")
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, folder)
    planned = _plan(config, fp8=fp8)
    shards = list(_into_shards(planned, shard_bytes))
    num_bytes = _write_shards(folder, shards, seed)
    generation = {"bos_token_id": values.get("bos_token_id"), "eos_token_id": values.get("eos_token_id")}
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "config.json", values)
    num_parameters = sum(math.prod(p.spec.shape) for p in planned)
    return Written(folder, num_parameters, num_bytes, len(shards))


def _fp8_config() -> dict[str, Json]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def _plan(config: ModelConfig, *, fp8: bool) -> list[_Planned]:
    mtp = mtp_tensor_specs(config) if config.family == "deepseek_v3" else ()
    specs = [spec for spec in (*tensor_specs(config), *mtp) if not spec.optional]
    return [_Planned(spec, _stored_dtype(spec, config.torch_dtype, fp8=fp8)) for spec in specs]


def _stored_dtype(spec: TensorSpec, dtype: torch.dtype, *, fp8: bool) -> torch.dtype:
    if spec.name.endswith("e_score_correction_bias"):
        return torch.float32
    return torch.float8_e4m3fn if fp8 and spec.block is not None else dtype


def _into_shards(planned: list[_Planned], shard_bytes: int) -> Iterator[list[_Planned]]:
    """Consecutive tensors, at most `shard_bytes` a shard unless one tensor alone is larger."""
    shard: list[_Planned] = []
    size = 0
    for item in planned:
        if shard and size + item.num_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += item.num_bytes
    yield shard


def _write_shards(folder: Path, shards: list[list[_Planned]], seed: int) -> int:
    weight_map: dict[str, Json] = {}
    num_bytes = 0
    for i, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        num_bytes += _write_shard(folder / file, shard, seed, weight_map)
    if len(shards) > 1:
        index: dict[str, Json] = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return num_bytes


def _write_shard(path: Path, shard: list[_Planned], seed: int, weight_map: dict[str, Json]) -> int:
    """Draw, write and forget one shard, noting its tensors in `weight_map`; the bytes of its tensors."""
    tensors = {name: tensor for item in shard for name, tensor in _tensors_of(item, seed)}
    save_file(tensors, path, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(tensors, path.name))
    return sum(t.nbytes for t in tensors.values())


def _tensors_of(item: _Planned, seed: int) -> Iterator[tuple[str, Tensor]]:
    name, dtype = item.spec.name, item.dtype
    if dtype == torch.float8_e4m3fn and item.spec.block is not None:
        data, scales = quantize(_random(name, item.spec.shape, torch.float32, seed), block=item.spec.block)
        yield name, data
        yield scale_name(name), scales
    else:
        yield name, _random(name, item.spec.shape, dtype, seed)


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    if "norm.weight" in name:
        return torch.ones(shape, dtype=dtype)
    # An MTP layer repeats the embedding and the head of the main model.
    drawn_as = name
    for ending, original in ((".embed_tokens.weight", "model.embed_tokens.weight"), (".head.weight", "lm_head.weight")):
        drawn_as = original if name.endswith(ending) else drawn_as
    # torch's CPU generator looks at the low 32 bits of its seed only.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {drawn_as}".encode()))
    std = 0.01 if name.endswith("e_score_correction_bias") else 0.02
    return torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    found = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise ConfigError(f"tokenizer={str(source)!r}: no tokenizer files there. Give a folder with tokenizer.json.")
    for file in found:
        shutil.copyfile(file, folder / file.name)


def _write_json(path: Path, values: dict[str, Json]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config_overrides(words: Sequence[str]) -> dict[str, Json]:
    """`--hidden-size 128 --rope-theta=1e4` → {"hidden_size": 128, "rope_theta": 10000.0}."""
    overrides: dict[str, Json] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is not an option. Give config.json keys as --key-name VALUE.")
        key, has_value, text = word[2:].partition("=")
        if not has_value:
            if not rest:
                raise ConfigError(f"{word} needs a value: {word} VALUE.")
            text = rest.pop(0)
        try:
            overrides[key.replace("-", "_")] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key.replace("-", "_")] = text
    return overrides


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe_tools.make_checkpoint", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="new or empty folder to write into")
    parser.add_argument("--family", choices=["deepseek_v2", "deepseek_v3"], default="deepseek_v3")
    parser.add_argument("--preset", default="tiny", help=", ".join(PRESETS))
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--fp8", action="store_true", help="store projections in FP8 with 128x128 block scales")
    parser.add_argument("--shard-bytes", type=int, default=2**30, help="largest shard; also the host memory needed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are copied")
    options, words = parser.parse_known_args(arguments)
    start = time.perf_counter()
    try:
        values = preset_config(options.family, options.preset) | _config_overrides(words)
        written = make_checkpoint(
            options.output, values, dtype=options.dtype, fp8=options.fp8, shard_bytes=options.shard_bytes,
            seed=options.seed, tokenizer=options.tokenizer,
        )  # fmt: skip
    except MoeRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"wrote {written.num_parameters / 1e6:.1f}M parameters, {written.num_bytes / 1e6:.1f} MB, "
        f"{written.num_shards} shard(s), to {written.folder} in {time.perf_counter() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

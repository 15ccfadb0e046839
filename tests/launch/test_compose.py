"""Command line and presets to one configuration; every wrong one with its message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_runtime.errors import ConfigError
from moe_runtime.launch.compose import compose
from moe_runtime.launch.data import data_path, preset_names
from moe_runtime.launch.placing import expert_placement, num_local_slots
from moe_runtime.launch.sizing import cache_size, max_num_seqs

AWKWARD = [
    "my prompts,v2.txt",
    "a=b.txt",
    "out(1).jsonl",
    "[x].txt",
    "${y}.txt",
    "it's {a: 1}",
    "ü—'\"\\.txt",
    "null.txt",
]


def test_defaults() -> None:
    run = compose([])
    assert (run.config.job, run.config.model, run.config.ep) == ("generate", "demo", 1)
    assert run.has_weights
    assert run.model_path == data_path("models", "demo")


@pytest.mark.parametrize(
    ("words", "dispatch"),
    [
        ([], "local"),
        (["ep=8"], "all_to_all"),
        (["dispatch=all_to_all"], "all_to_all"),
        (["ep=8", "dispatch=all_gather"], "all_gather"),
    ],
)
def test_dispatch_follows_the_mesh_unless_given(words: list[str], dispatch: str) -> None:
    assert compose(words).config.dispatch == dispatch


def test_preset_wins_over_defaults_and_loses_to_the_command_line() -> None:
    preset = compose(["preset=v3_prefill_ep32"]).config
    assert (preset.ep, preset.tp, preset.dp, preset.placement.num_redundant_experts) == (32, 4, 8, 32)
    assert preset.preset == "v3_prefill_ep32"
    for words in (["preset=v3_prefill_ep32", "dp=16", "ep=64"], ["ep=64", "dp=16", "preset=v3_prefill_ep32"]):
        mine = compose(words).config
        assert (mine.ep, mine.dp, mine.placement.num_redundant_experts) == (64, 16, 32)
    assert compose(["preset=v3_prefill_ep32", "model=deepseek_v3"]).config.model == "deepseek_v3"


@pytest.mark.parametrize(
    ("name", "mesh", "slots", "physical"),
    [
        ("v3_prefill_ep32", (32, 4, 8), 9, 288),
        ("v3_decode_ep320", (320, 4, 80), 1, 320),
        ("ep144", (144, 1, 144), 2, 288),
        ("ep128", (128, 1, 128), 2, 256),
    ],
)
@pytest.mark.parametrize("model", ["demo", "deepseek_v3"])
def test_presets_are_the_published_deployments(
    name: str, mesh: tuple[int, int, int], slots: int, physical: int, model: str
) -> None:
    run = compose([f"preset={name}", f"model={model}"])
    placement = expert_placement(run.config, run.model)
    assert (run.config.ep, run.config.tp, run.config.dp) == mesh
    assert (placement.num_local, placement.num_physical) == (slots, physical)
    assert num_local_slots(run.config, run.model) == slots


def test_every_preset_composes() -> None:
    assert set(preset_names()) >= {"none", "v3_prefill_ep32", "v3_decode_ep320", "ep144", "ep128"}
    for name in preset_names():
        assert compose([f"preset={name}"]).config.preset == name


@pytest.mark.parametrize("name", AWKWARD)
def test_paths_are_taken_as_they_stand(name: str) -> None:
    config = compose([f"prompts={name}", f"output=/tmp/{name}", "ep=2"]).config
    assert (config.prompts, config.output, config.ep) == (name, f"/tmp/{name}", 2)


@pytest.mark.parametrize("name", AWKWARD)
def test_model_folders_are_taken_as_they_stand(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_bytes((data_path("models", "demo") / "config.json").read_bytes())
    assert compose([f"model={folder}"]).model_path == folder


def test_last_word_wins_and_null_unsets() -> None:
    config = compose(["ep=4", "prompts=a", "ep=2", "prompts=null", "tp=2"]).config
    assert (config.ep, config.tp, config.dp, config.prompts) == (2, 2, 1, None)


def test_lists() -> None:
    assert compose(["sampling.stop=def x, y"]).config.sampling.stop == ("def x, y",)
    assert compose(['sampling.stop=["a,b", "c"]', "sampling.stop_token_ids=[1,7]"]).config.sampling.stop == ("a,b", "c")
    for word, stop in (
        ('sampling.stop=["\\n\\n"]', ("\n\n",)),  # as in --help
        ('sampling.stop=["[INST]", "${x}", "ü"]', ("[INST]", "${x}", "ü")),
        ("sampling.stop=['a', 'b']", ("a", "b")),
        ("sampling.stop=null", ()),
        ("sampling.stop=[]", ()),
        ("sampling.stop=INST]", ("INST]",)),
    ):
        assert compose([word]).config.sampling.stop == stop
    assert compose(["sampling.stop_token_ids=[1,7]"]).config.sampling.stop_token_ids == (1, 7)
    assert compose(["sampling.stop_token_ids=null"]).config.sampling.stop_token_ids == ()


def test_other_floats_and_sizes() -> None:
    config = compose(["sampling.temperature=1", "engine.kv_cache_bytes=1.5GiB", "comm_timeout_s=1e1"]).config
    assert (config.sampling.temperature, config.engine.kv_cache_bytes, config.comm_timeout_s) == (1.0, 3 * 2**29, 10.0)


BAD = [
    (["--ep 320"], "--ep 320: settings are written as key=value, without dashes: ep=320"),
    (["--ep", "320"], "--ep 320: settings are written as key=value, without dashes: ep=320"),
    (["--ep=320"], "--ep=320: settings are written as key=value, without dashes: ep=320"),
    (["--num-threads", "2"], "num_threads=2"),
    (["--hlep"], "--hlep: unknown option. Did you mean 'help'?"),
    (["ep", "=", "320"], "ep: has no value. Write ep=VALUE, without blanks around the =."),
    (["ep = 320"], "'ep = 320': keys and values are written as key=value without blanks, e.g. ep=320."),
    (["ep="], "keys and values are written as key=value without blanks, e.g. ep=VALUE."),
    (["doctor"], "doctor: write job=doctor."),
    (["320"], "'320': is no key=value."),
    (["epp=3"], "epp: unknown key. Did you mean 'ep'?"),
    (["max_tokens=3"], "max_tokens: unknown key. Did you mean 'sampling.max_tokens'?"),
    (["engine.kv_cache=3"], "Did you mean 'engine.kv_cache_bytes'?"),
    (["+x=3"], "keys cannot be added or deleted"),
    (["hydra.run.dir=x"], "Hydra's own settings have no effect here"),
    (["engine=fast"], "engine is a group of keys. Set one of them: engine.batch_invariant"),
    (["ep=abc"], "ep=abc: must be a whole number, at least 1. Example: ep=8"),
    (["ep=1,2"], "ep=1,2: one run takes one value"),
    (["ep=[1"], "ep=[1: the value cannot be read; ep must be a whole number"),
    (["ep=${tp}"], "ep=${tp}: values are not looked up by ${…}. Write the value itself."),
    (["sampling.stop=['${tp}']"], "values are not looked up by ${…}"),
    (
        ["sampling.stop=[INST]"],
        """For a list: 'sampling.stop=["INST"]'; for this text itself: 'sampling.stop=["[INST]"]'.""",
    ),
    (["sampling.stop=[1]"], "sampling.stop=[1]: must be a list of texts"),
    (["job='doctor'"], "job='doctor': must be one of generate, doctor. Did you mean 'doctor'?"),
    (["num_threads=1025"], "must be between 1 and 1024. Nearest: num_threads=1024."),
    (["comm_timeout_s=1e9"], "Nearest: comm_timeout_s=86400."),
    (["device=null"], "device=null: must be one of cpu, cuda."),
    (["ep=-1"], "ep=-1: must be at least 1. Nearest: ep=1."),
    (["dtype=fp32"], "dtype=fp32: must be one of auto, float32, bfloat16. Did you mean 'float32'?"),
    (["dispatch=all2all"], "all_to_all, all_gather, deep_ep, nvshmem, symm_mem. Did you mean 'all_to_all'?"),
    (["engine.prefix_caching=yes"], "engine.prefix_caching=yes: must be true or false."),
    (["engine.kv_cache_bytes=much"], "or a size such as 512MiB"),
    (["prompts="], "prompts=(nothing): must be a text"),
    (["preset=v3_decode"], "preset=v3_decode: no such preset. There are ep128,"),
    (["preset=v3_decode"], "Did you mean 'v3_decode_ep320'?"),
    (["model=deepseek-ai/DeepSeek-V3"], "hf download deepseek-ai/DeepSeek-V3"),
    (["model=deepsek_v3"], "no such folder, nor a known name"),
    (["model=deepsek_v3"], "Did you mean 'deepseek_v3'?"),
    (["tp=3"], "tp=3: must divide the model's 8 attention heads. Nearest: tp=4."),
    (["ep=8", "tp=2", "dp=2"], "ep must equal dp·tp = 4. Nearest: tp=4, or dp=4, or ep=4."),
    (["pp=2"], "pp=2: pipeline stages are not yet built."),
    (["launcher=torchrun"], "launcher=torchrun: this process was not started by torchrun."),
    (["ep=8", "dispatch=local"], "dispatch=local: reaches the experts of one rank, and ep=8. Set dispatch=all_to_all."),
    (["engine.max_model_len=9999"], "at most 2048 positions. Nearest: engine.max_model_len=2048."),
    (["engine.max_model_len=1"], "must be at least 2"),
    (["sampling.min_tokens=33"], "sampling.min_tokens is 33 but max_tokens is 32"),
    (["sampling.top_p=0"], "sampling.top_p is 0"),
    (["engine.kv_cache_bytes=100"], "engine.kv_cache_bytes=100: one page of 16 tokens takes 20480 bytes"),
    (["ep=8", "engine.dispatch_buffer_bytes=3"], "Nearest: engine.dispatch_buffer_bytes="),
    (["placement.num_redundant_experts=257"], "Nearest: placement.num_redundant_experts=256."),
    (["placement.file=nowhere.json"], "placement.file='nowhere.json' cannot be read"),
    (["ep=1024", "engine.kv_cache_bytes=64GiB"], "Lower ep, placement.num_redundant_experts or engine.kv_cache_bytes."),
    (["launcher=process", "ep=1024", "engine.kv_cache_bytes=64GiB"], "launcher=process: 1024 processes need 64"),
]


@pytest.mark.parametrize(
    ("words", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_told_what_to_do(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words)
    assert message in str(caught.value)


def test_nearest_values_are_valid() -> None:
    for words in (
        ["placement.num_redundant_experts=256"],
        ["engine.kv_cache_bytes=20480"],
        ["engine.max_model_len=2048"],
    ):
        compose(words)


def test_collects_every_problem() -> None:
    problems: list[ConfigError] = []
    words = ["ep=8", "tp=3", "epp=1", "--x", "dtype=fp32", "ep=1,2", "engine.max_model_len=9999"]
    compose(words, report=problems.append)
    assert len(problems) == 6
    assert [str(p).split(":")[0] for p in problems] == [
        "epp", "--x", "ep=1,2", "dtype=fp32", "tp=3", "engine.max_model_len=9999",
    ]  # fmt: skip


def test_a_bad_placement_file_is_one_problem_and_hides_none(tmp_path: Path) -> None:
    problems: list[ConfigError] = []
    words = ["ep=2", f"placement.file={tmp_path / 'none.json'}", "engine.kv_cache_bytes=1", "--seed", "7"]
    compose(words, report=problems.append)
    assert [str(p)[:14] for p in problems] == ["--seed 7: sett", "placement.file", "engine.kv_cach"]


@pytest.mark.parametrize(
    ("words", "mesh"),
    [
        (["preset=v3_decode_ep320", "ep=32"], (32, 4, 8)),
        (["preset=ep144", "tp=2"], (144, 2, 72)),
        (["preset=ep128", "dp=2"], (2, 1, 2)),
        (["preset=ep128", "ep=16", "tp=2"], (16, 2, 8)),
        (["preset=ep128", "ep=16", "dp=4"], (16, 4, 4)),
        (["preset=v3_prefill_ep32", "tp=2", "dp=3"], (6, 2, 3)),
        (["preset=ep128", "ep=null"], (128, 1, 128)),
    ],
)
def test_one_mesh_key_moves_a_preset(words: list[str], mesh: tuple[int, int, int]) -> None:
    config = compose(words).config
    assert (config.ep, config.tp, config.dp) == mesh


def test_a_program_of_hydras_own_may_compose() -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(config_dir=str(data_path("configs")), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert outer is not None
        assert compose(["ep=2"]).config.ep == 2
        assert GlobalHydra.instance().hydra is outer


def test_limits_that_are_no_conflict() -> None:
    run = compose(["engine.max_num_batched_tokens=8", "engine.max_model_len=20"])
    assert max_num_seqs(run.config.engine) == 8
    assert cache_size(run.config.engine, run.model, itemsize=2).num_tokens == 8 * 32  # whole pages for 20 tokens


def test_a_gpu_is_asked_for_where_weights_would_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compose(["device=cuda", "model=deepseek_v3"])
    with pytest.raises(ConfigError, match=r"device=cuda: this machine .* has no CUDA device\. Set device=cpu\."):
        compose(["device=cuda"])


def test_a_folder_that_is_called_like_a_known_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("demo", "deepseek_v3", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((data_path("models", "demo") / "config.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert compose([]).model_path == data_path("models", "demo")
    assert compose(["model=deepseek_v3"]).model_path == data_path("configs", "shapes", "deepseek_v3.json")
    for name in ("./demo", "mine"):
        assert compose([f"model={name}"]).model_path.resolve() == tmp_path / name


@pytest.mark.parametrize("model", ["x" * 5000, "/" + "x" * 5000, "~nobody-of-this-name/model"])
def test_model_paths_that_cannot_be_looked_at(model: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read .*Give a checkpoint folder"):
        compose([f"model={model}"])


def test_placement_file(tmp_path: Path) -> None:
    run = compose(["ep=4"])
    file = tmp_path / "my, placement=1.json"
    file.write_text(expert_placement(run.config, run.model).to_json(), encoding="utf-8")
    assert expert_placement(compose(["ep=4", f"placement.file={file}"]).config, run.model).num_physical == 256
    with pytest.raises(ConfigError, match="ep=4, but this run has ep=8"):
        compose(["ep=8", f"placement.file={file}"])
    with pytest.raises(ConfigError, match=r"placement\.file decides the copies"):
        compose(["ep=4", f"placement.file={file}", "placement.num_redundant_experts=4"])


def test_a_model_without_shared_experts(tmp_path: Path) -> None:
    config = json.loads((data_path("models", "demo") / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_shared_experts": None}), encoding="utf-8")
    compose([f"model={tmp_path}"])
    with pytest.raises(ConfigError, match="has no shared experts. Set shared_experts=replicated"):
        compose([f"model={tmp_path}", "shared_experts=dispatched"])


def test_edits_to_the_checkouts_configs_are_seen() -> None:
    """An editable install leaves a copy of configs/ in site-packages; the checkout's own must win."""
    root = Path(__file__).resolve().parents[2]
    assert data_path("configs") == root / "configs"
    assert data_path("models", "demo") == root / "models" / "demo"


def test_composing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose(["ep=2", "preset=ep128", "dp=null", "tp=1"])
    assert list(tmp_path.iterdir()) == []

"""Which backend serves what: stated before a run, for a GPU that is not there too; never a silent change of mind."""

from __future__ import annotations

import io

import pytest
from moe_kernels import backends

from moe_runtime.cli.console import PlainConsole
from moe_runtime.cli.doctor import doctor
from moe_runtime.launch.compose import Composed, compose
from moe_runtime.launch.kernels import Served, kernel_line, kernel_report, triton_state


def composed(*words: str) -> Composed:
    return compose(["job=doctor", *words])


def report(*words: str) -> dict[str, Served]:
    made = composed(*words)
    return {served.op: served for served in kernel_report(made.config, made.model)}


DECODE = ("model=deepseek_v3", "device=cuda", "ep=256", "tp=1", "dispatch=all_to_all")


def test_a_cpu_runs_torch() -> None:
    found = report("model=demo")
    assert [served.backend for served in found.values()] == ["torch"]
    assert "device=cpu" in found["all operations"].why


def test_fp8_on_a_gpu() -> None:
    found = report("model=deepseek_v3", "device=cuda", "ep=32", "tp=4", "engine.max_num_seqs=128")
    assert found["linear (fp8)"].backend == found["experts"].backend == found["quantise"].backend == "triton"
    assert "q_a + kv_a, q, o, dense MLP, shared experts" in found["linear (fp8)"].why
    # 128 sequences over tp=4, top-8: 32 tokens, 256 rows to 8 slots.
    assert "fp8, 8 slots; decode (32 rows a slot): tiles of 32 rows × 128 columns with SwiGLU" in found["experts"].why
    assert "deep_gemm" in found["experts"].why and "counted, not measured" in found["experts"].why
    assert "32 heads, pages of 64 rows" in found["MLA decode"].why
    assert found["MLA prefill"].backend == "torch"


def test_few_rows_of_one_slot_take_swiglu_apart() -> None:
    why = report(*DECODE, "engine.max_num_seqs=2")["experts"].why
    assert "1 slot; decode (16 rows a slot): tiles of 16 rows × 64 columns then SwiGLU" in why
    assert "prefill (16384 rows a slot): tiles of 128 rows × 128 columns with SwiGLU" in why
    invariant = report(*DECODE, "engine.max_num_seqs=2", "engine.batch_invariant=true")
    assert "tiles of 64 rows × 128 columns with SwiGLU" in invariant["experts"].why
    assert invariant["MLA prefill"].backend == "triton"
    # Rows in room for the worst case: SwiGLU apart would walk over all of it.
    wide = report(*DECODE[:-1], "dispatch=all_gather", "engine.max_num_seqs=64")
    assert "then SwiGLU" not in wide["experts"].why
    assert wide["permute"].backend == "triton" and report(*DECODE)["permute"].backend == "torch"


def test_who_sorts_rows_follows_the_dispatch() -> None:
    def shuffle(*words: str) -> dict[str, tuple[str, str]]:
        found = report("model=deepseek_v3", "device=cuda", "ep=8", *words)
        return {op: (served.backend, served.why) for op, served in found.items() if "permute" in op}

    counts, equal = ("torch", "by counts that the host knows"), "equal blocks, sorted on the device"
    alone = shuffle("dispatch=all_to_all", "engine.max_num_seqs=16")
    assert alone["permute"] == counts and alone["permute, decode"][1].startswith(equal)
    assert "permute, decode" not in shuffle("dispatch=all_to_all"), "117 MB a layer"
    beside = shuffle("dispatch=all_to_all", "decode_dispatch=all_gather")
    assert beside["permute"] == counts and beside["permute, decode"][1].startswith("sorted on the device, in room")
    assert shuffle("dispatch=deep_ep")["permute, unpermute"][0] == "deep_ep"
    assert shuffle("dispatch=nvshmem")["permute, unpermute"][1].startswith("rows put into their destination's slots")
    assert shuffle("dispatch=all_gather")["permute"][0] == "triton"


def test_dequantised_and_plain_weights() -> None:
    found = report(*DECODE, "fp8_weights=dequantize")
    assert "linear (fp8)" not in found and "quantise" not in found
    assert found["linear"].why == "cuBLAS in bfloat16" and found["experts"].why.startswith("bfloat16, 1 slot;")


def test_the_report_follows_the_kernels_own_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "default_backend", lambda _: "torch")
    assert set(report(*DECODE)) == {"all operations"}


def test_one_line_names_every_operation() -> None:
    made = composed(*DECODE)
    line = kernel_line(made.config, made.model)
    assert all(served.op in line for served in kernel_report(made.config, made.model))
    assert "triton: " in line and "torch: " in line


def test_a_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr("moe_runtime.launch.kernels.version", missing)
    assert "not installed: the run is refused" in triton_state(composed(*DECODE).config)


def test_doctor_prints_it() -> None:
    stream = io.StringIO()
    doctor(["job=doctor", *DECODE], console=PlainConsole(stream))
    text = stream.getvalue()
    assert "\nkernels\n" in text and "experts" in text and "decode (512 rows a slot)" in text


def test_doctor_says_that_a_shape_names_any_fabric() -> None:
    """Without weights nothing of this machine is asked: the report does not read as if it were."""
    stream = io.StringIO()
    assert doctor(["job=doctor", *DECODE[:-1], "dispatch=deep_ep"], console=PlainConsole(stream)) == 0
    text = stream.getvalue()
    assert "deep_ep, top-8, rows of 14 KiB, in fp8 on their way out" in text
    assert "by its limits alone: a shape without weights asks nothing of this machine" in text
    software = text[text.index("\nsoftware\n") :]
    assert (
        "deep_ep       deep_ep is not installed: Build DeepEP from its repository (docs/dispatch.md#deepep)\n"
        in software
    )
    assert "symm_mem " in software and "nvshmem " in software, "as found, whatever this run asks for"


def test_a_latent_cache_in_fp8_is_stated() -> None:
    plain, fp8 = report(*DECODE), report(*DECODE, "engine.kv_cache_dtype=fp8")
    for op in ("MLA decode", "latent rows"):
        assert "latents in fp8" in fp8[op].why and "fp8" not in plain[op].why
    said = io.StringIO()
    doctor([*DECODE, "engine.kv_cache_dtype=fp8"], console=PlainConsole(said))
    assert "39.08 KiB over 61 layers, latents in FP8 with scales" in said.getvalue()  # 61 layers of 656 bytes

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


def test_a_latent_cache_in_fp8_is_stated() -> None:
    plain, fp8 = report(*DECODE), report(*DECODE, "engine.kv_cache_dtype=fp8")
    for op in ("MLA decode", "latent rows"):
        assert "latents in fp8" in fp8[op].why and "fp8" not in plain[op].why
    said = io.StringIO()
    doctor([*DECODE, "engine.kv_cache_dtype=fp8"], console=PlainConsole(said))
    assert "39.08 KiB over 61 layers, latents in FP8 with scales" in said.getvalue()  # 61 layers of 656 bytes

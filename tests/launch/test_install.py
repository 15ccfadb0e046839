"""The built wheel, installed beside the dependencies into an empty environment, runs from any folder."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds the wheel; its dependencies are borrowed from this one."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # A path file's lines are searched last and their own path files are not followed: the checkout stays invisible.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    python = folder / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return python


def test_the_wheel_holds_code_configs_and_demo_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"moe_runtime", "moe_kernels", "moe_models", "moe_tools", "moe_runtime_data"}
    assert {"moe_runtime_data/configs/config.yaml", "moe_runtime_data/configs/preset/v3_decode_ep320.yaml"} <= set(
        names
    )
    assert {"moe_runtime_data/models/demo/model.safetensors", "moe_runtime_data/models/demo/tokenizer.json"} <= set(
        names
    )
    assert not [name for name in names if name.endswith((".pyc", ".pt"))]
    assert wheel.stat().st_size < 40 * 2**20


def test_it_runs_from_any_folder(python: Path, tmp_path: Path) -> None:
    where = _run(
        python, "-c", "import moe_runtime, moe_kernels; print(moe_runtime.__file__, moe_kernels.__file__)", cwd=tmp_path
    )
    assert str(ROOT) not in where
    text = _run(python, "-m", "moe_runtime", "ep=8", "sampling.max_tokens=2", "output=o.jsonl", cwd=tmp_path)
    assert "ep=8 = dp=8 × tp=1" in text
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 80
    assert all(row["token_ids"] for row in rows)
    assert [file.name for file in tmp_path.iterdir()] == ["o.jsonl"]


def test_the_console_script(python: Path, tmp_path: Path) -> None:
    script = python.parent / "moe-runtime"
    assert "moe_runtime 0." in _run(script, "--version", cwd=tmp_path)
    assert "no conflicts" in _run(script, "job=doctor", "model=deepseek_v3", "preset=ep144", cwd=tmp_path)
    load = python.parent / "moe-expert-load"
    _run(load, "report", "ep=2", "sampling.max_tokens=1", "output=page.html", cwd=tmp_path)
    assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")[:200]

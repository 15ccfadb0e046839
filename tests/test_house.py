"""The house's rules, with teeth: import floors, environment reads, module state, sizes, paths, what may be executed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = {"moe_runtime": "", "moe_kernels": "kernels", "moe_models": "models", "moe_tools": "tools"}

FLOORS = {
    "moe_runtime.cli": 8,
    "moe_tools": 8,
    "moe_runtime.api": 7,
    "moe_runtime.serve": 7,
    "moe_runtime.launch": 6,
    "moe_runtime.engine": 5,
    "moe_models": 4,
    "moe_runtime.layers": 3,
    "moe_runtime.dispatch": 2,
    "moe_runtime.cache": 2,
    "moe_runtime.loading": 2,
    "moe_runtime.balance": 2,
    "moe_runtime.errors": 1,
    "moe_runtime.types": 1,
    "moe_runtime.config": 1,
    "moe_runtime.schema": 1,
    "moe_runtime.parallel": 1,
    "moe_runtime.comm": 1,
    "moe_kernels": 0,
}
"""A module belongs to the longest name here that it starts with; the roof (`moe_runtime`, its `__main__`) sees all."""
ROOF = 9

ONLY_HERE = {
    "hydra": {"moe_runtime.launch.compose"},
    "omegaconf": {"moe_runtime.launch.compose"},
    "rich": {"moe_runtime.cli.rich_console", "moe_tools.expert_load.rich_top"},
    "greenlet": {"moe_runtime.comm"},
    "triton": {"moe_kernels"},
}
"""Third-party packages and the modules that may import them."""

MAX_LINES = 300
LONGER: dict[str, str] = {}
"""File → why it may be longer."""

STATE: dict[str, str] = {
    "kernels/moe_kernels/grouped_gemm/deep_gemm.py:library": "an import with its checks, done once",
    "kernels/moe_kernels/grouped_gemm/layout.py:every_row": "a constant tensor: a launch less per product",
    "kernels/moe_kernels/grouped_gemm/triton.py:_programs": "a device's number of multiprocessors, looked up once",
    "kernels/moe_kernels/backends.py:_problem": "what a device lacks, looked up once: a look takes milliseconds",
    "moe_runtime/launch/compose.py:_HYDRA": "a lock beside Hydra's own process-wide state",
}
"""file:name of module-level objects that change → why there is no other way."""

_MUTABLE_CALLS = {"list", "dict", "set", "defaultdict", "deque", "Counter", "bytearray", "OrderedDict"}
_MUTABLE_CALLS |= {"Lock", "RLock", "local", "Queue", "SimpleQueue", "ContextVar", "count", "Generator"}
_MUTATORS = {
    "append",
    "add",
    "update",
    "extend",
    "insert",
    "pop",
    "popitem",
    "clear",
    "remove",
    "setdefault",
    "discard",
}


def sources() -> list[Path]:
    files = [
        file for package, folder in SOURCE_ROOTS.items() for file in sorted((ROOT / folder / package).rglob("*.py"))
    ]
    assert len(files) > 30, "the scan must see the sources"
    return files


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] in ("kernels", "models", "tools") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def floor_of(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (floor := FLOORS.get(".".join(parts[:length]))) is not None:
            return floor
    return ROOF


def target_floor(module: str) -> int:
    """`from moe_runtime import LLM` reaches what the package re-exports: the API."""
    return FLOORS["moe_runtime.api"] if module == "moe_runtime" else floor_of(module)


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, also inside functions and under TYPE_CHECKING."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                # `from moe_runtime import api` names a module, `from moe_runtime.errors import ConfigError` does not.
                yield node.lineno, f"{module}.{alias.name}" if f"{module}.{alias.name}" in FLOORS else module


def found(file: Path, line: int, text: str) -> str:
    return f"{file.relative_to(ROOT)}:{line}: {text}"


def test_every_module_has_a_floor() -> None:
    roof = {module_name(file) for file in sources() if floor_of(module_name(file)) == ROOF}
    assert roof <= {"moe_runtime", "moe_runtime.__main__"}


def test_imports_go_down_only() -> None:
    wrong = [
        found(file, line, f"floor {floor_of(module_name(file))} imports {target} of floor {target_floor(target)}")
        for file in sources()
        for line, target in imports_of(file)
        if target.split(".")[0] in SOURCE_ROOTS and target_floor(target) > floor_of(module_name(file))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_floor_scan_sees_imports_in_functions() -> None:
    seen = {target for _, target in imports_of(ROOT / "moe_runtime" / "cli" / "app.py")}
    assert "moe_runtime.launch.env" in seen


def test_kernels_know_torch_and_triton_only() -> None:
    """Beside them, an optional library in the one module that adapts it."""
    adapters = {"deep_gemm": "moe_kernels.grouped_gemm.deep_gemm"}
    allowed = {"torch", "triton", "moe_kernels", *sys.stdlib_module_names}
    wrong = [
        found(file, line, f"imports {target}")
        for file in sources()
        if module_name(file).startswith("moe_kernels")
        for line, target in imports_of(file)
        if target.split(".")[0] not in allowed and adapters.get(target) != module_name(file)
    ]
    assert not wrong, "\n".join(wrong)


def test_third_party_packages_stay_in_their_place() -> None:
    wrong = [
        found(file, line, f"imports {target}")
        for file in sources()
        for line, target in imports_of(file)
        if (homes := ONLY_HERE.get(target.split(".")[0])) is not None
        and not any(module_name(file) == home or module_name(file).startswith(home + ".") for home in homes)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_one_module_reads_the_environment() -> None:
    wrong = []
    for file in sources():
        if module_name(file) == "moe_runtime.launch.env":
            continue
        for node in ast.walk(tree_of(file)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in ("environ", "environb", "getenv", "putenv", "unsetenv"):
                wrong.append(found(file, getattr(node, "lineno", 0), name))
        wrong += [found(file, line, module) for line, module in imports_of(file) if module == "os.environ"]
    assert not wrong, "\n".join(wrong)


def _is_mutable(value: ast.expr | None) -> bool:
    match value:
        case ast.List() | ast.Dict() | ast.Set() | ast.ListComp() | ast.DictComp() | ast.SetComp():
            return True
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name in _MUTABLE_CALLS
        case _:
            return False


def _assigned(node: ast.stmt) -> tuple[list[ast.expr], ast.expr | None, bool]:
    """(targets, value, marked Final) of an assignment, else nothing."""
    match node:
        case ast.Assign(targets=targets, value=value):
            return targets, value, False
        case ast.AnnAssign(target=target, value=value, annotation=annotation):
            return [target], value, "Final" in ast.unparse(annotation)
        case _:
            return [], None, False


def _state_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of module- and class-level objects that change, or that could and are not marked Final."""
    tree = tree_of(file)
    changed = _changed_names(tree)
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    for statement in (statement for body in bodies for statement in body):
        targets, value, final = _assigned(statement)
        for target in targets:
            if not isinstance(target, ast.Name) or target.id == "__all__" or not _is_mutable(value):
                continue
            if target.id in changed or not final or isinstance(value, ast.Call):
                yield statement.lineno, target.id
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield from ((node.lineno, f"global {name}") for name in node.names)
        if isinstance(node, ast.FunctionDef):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if re.search(r"\b(lru_cache|cache)\b", decorators):
                yield node.lineno, node.name


def _changed_names(tree: ast.Module) -> set[str]:
    changed = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr)) if attr in _MUTATORS:
                changed.add(name)
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                changed.add(name)
            case ast.AugAssign(target=ast.Name(id=name)):
                changed.add(name)
    return changed


def test_modules_hold_no_state() -> None:
    wrong = [
        found(file, line, f"{name} is module-level state: pass it in, or mark a constant table Final")
        for file in sources()
        for line, name in _state_of(file)
        if f"{file.relative_to(ROOT)}:{name}" not in STATE
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "guilty"),
    [
        ("TABLE: Final = {'a': 1}", False),
        ("TABLE = {'a': 1}", True),
        ("TABLE: Final = []\ndef f():\n    TABLE.append(1)", True),
        ("TABLE: Final = {}\ndef f():\n    TABLE['a'] = 1", True),
        ("PAIR = (1, 2)", False),
        ("LOCK = threading.Lock()", True),
        ("class A:\n    seen = {}", True),
        ("@cache\ndef f(): ...", True),
        ("def f():\n    global x\n    x = 1", True),
    ],
)
def test_the_state_scan_finds_state(text: str, guilty: bool, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(text, encoding="utf-8")
    assert bool(list(_state_of(file))) is guilty


def test_files_are_short() -> None:
    wrong = []
    for file in [*sources(), *sorted((ROOT / "tests").rglob("*.py"))]:
        name, lines = str(file.relative_to(ROOT)), len(file.read_text(encoding="utf-8").splitlines())
        limit = MAX_LINES if not name.startswith("tests/") else 2 * MAX_LINES
        if lines > limit and name not in LONGER:
            wrong.append(f"{name}: {lines} lines, at most {limit}. Cut it along its seams.")
    assert not wrong, "\n".join(wrong)


def is_kernel(node: ast.FunctionDef) -> bool:
    """A Triton kernel: its arguments take a line each, and what it holds in registers cannot be handed to a helper."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def test_functions_are_short() -> None:
    wrong = [
        found(file, node.lineno, f"{node.name} has {length} lines, at most {limit}")
        for file in sources()
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef) and node.end_lineno
        for limit in [120 if is_kernel(node) else 70]
        if (length := node.end_lineno - node.lineno + 1) > limit
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_foreign_is_executed() -> None:
    wrong = []
    for file in sources():
        wrong += [
            found(file, line, f"imports {module}")
            for line, module in imports_of(file)
            if module.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "cloudpickle")
        ]
        for node in ast.walk(tree_of(file)):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if call in ("eval", "exec") or (call == "torch.load" and keywords.get("weights_only") != "True"):
                wrong.append(found(file, node.lineno, call))
            if keywords.get("trust_remote_code") == "True":
                wrong.append(found(file, node.lineno, "trust_remote_code=True"))
    assert not wrong, "\n".join(wrong)


def _texts() -> list[Path]:
    names = [*SOURCE_ROOTS, "kernels", "models", "tools", "configs", "docs", "tests"]
    suffixes = {".py", ".md", ".yaml", ".json", ".toml", ".txt", ".jsonl"}
    files = {
        f for name in names for f in (ROOT / name).rglob("*") if f.suffix in suffixes and "__pycache__" not in f.parts
    }
    files |= {ROOT / name for name in ("README.md", "pyproject.toml", "constraints.txt", "Makefile", ".ci/run")}
    # The demo model's vocabulary and prompts are texts of others.
    return sorted(f for f in files if f.parent != ROOT / "models" / "demo" or f.suffix == ".md")


def test_no_machine_paths() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:root|home|work|opt|mnt|Users)/\w+")
    wrong = [
        found(file, number, line.strip()[:120])
        for file in _texts()
        if file != Path(__file__).resolve()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "import moe_runtime, moe_runtime.errors, moe_runtime.config; dir(moe_runtime)",
        "import moe_runtime.cli.app as app; assert app.main(['--help']) == 0",
        "import moe_runtime.cli.app as app; assert app.main(['--version']) == 0",
    ],
)
def test_light_paths_import_nothing_heavy(code: str) -> None:
    """`import moe_runtime` and --help stay fast because torch and its like are not loaded."""
    check = "; import sys; heavy = {'torch', 'hydra', 'numpy', 'rich'} & set(sys.modules); assert not heavy, heavy"
    result = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_public_names_resolve() -> None:
    import moe_runtime

    for name in moe_runtime.__all__:
        assert getattr(moe_runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = moe_runtime.nonsense

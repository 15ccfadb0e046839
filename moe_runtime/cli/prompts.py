"""Prompt files in, result files out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.errors import ConfigError, RequestError, nearest

OWN_PROMPTS = "prompts.jsonl"
"""The file of prompts that a model's folder may hold."""
_EXAMPLES = (
    "def fibonacci(n):\n",
    "import os\nimport sys\n\n\ndef main():\n",
    "class Stack:\n    def push(self, item):\n",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, or token ids where `text` is None. `line`: where it stands in its file, from 1."""

    text: str | None
    token_ids: tuple[int, ...] = ()
    line: int = 0

    @property
    def value(self) -> str | Sequence[int]:
        return self.token_ids if self.text is None else self.text


def own_prompts(model_folder: Path) -> tuple[Prompt, ...]:
    """The prompts.jsonl of the model's folder, or a few examples."""
    file = model_folder / OWN_PROMPTS
    return read_prompts(file) if file.is_file() else tuple(map(Prompt, _EXAMPLES))


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """One prompt per line, or JSON lines where the name ends in .jsonl or the first line is an object with "prompt".

    "prompt" is a text or a list of token ids; other keys are ignored; empty lines are passed over. Raises ConfigError
    for the file and RequestError for a line.
    """
    text = _read(path)
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ConfigError(f"prompts={path}: holds no prompt. Write one per line.")
    if path.suffix == ".jsonl" or _looks_like_json(lines[0][1]):
        return tuple(_parse_line(path, number, line) for number, line in lines)
    return tuple(Prompt(line.removesuffix("\r"), line=number) for number, line in lines)


def check_output(path: Path, *, prompts: Path) -> None:
    """Raises ConfigError where the result file could not or should not be written: better now than after the run.

    `prompts`: the file that is being read, if it exists.
    """
    try:
        _check_output(path, path.resolve(), prompts)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ConfigError(f"output={path}: cannot be written ({_reason(error)}).") from None


def _check_output(path: Path, target: Path, prompts: Path) -> None:
    if target.is_dir():
        raise ConfigError(f"output={path}: is a folder. Name a file in it: output={path / 'results.jsonl'}.")
    if target.exists() and not target.is_file():
        raise ConfigError(f"output={path}: is no regular file. Name a .jsonl file.")
    if target.exists() and prompts.exists() and target.samefile(prompts):
        raise ConfigError(f"output={path}: is the file of prompts, which would be lost. Name another file.")
    folder = target.parent
    if not folder.is_dir():
        raise ConfigError(f"output={path}: there is no folder {folder}. Make it first: mkdir -p '{folder}'.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output={path}: {folder} cannot be written to ({error.strerror}).") from None


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """JSON lines, all or nothing: readers see the old file or the whole new one. Where `path` is a link, its target."""
    path = path.resolve()
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp", encoding="utf-8", delete=False
    ) as file:
        part = Path(file.name)
        try:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            part.chmod(0o644)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _read(path: Path) -> str:
    try:
        if not path.exists():
            near = nearest(path.name, _siblings(path))
            raise ConfigError(f"prompts={path}: no such file.{near} The name is taken as it stands, quotes included.")
        if path.is_dir():
            raise ConfigError(f"prompts={path}: is a folder. Name a file of prompts in it.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts={path}: is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"prompts={path}: cannot be read ({_reason(error)}).") from None


def _reason(error: OSError | RuntimeError) -> str:
    return str(error.strerror if isinstance(error, OSError) else error)


def _siblings(path: Path) -> Iterator[str]:
    return (other.name for other in path.parent.iterdir()) if path.parent.is_dir() else iter(())


def _looks_like_json(line: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and "prompt" in row


def _parse_line(path: Path, number: int, line: str) -> Prompt:
    where = f"prompts={path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where}: is not JSON ({error}). Each line is an object such as {_EXAMPLE}.") from None
    if not isinstance(row, dict) or "prompt" not in row:
        has = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise RequestError(f'{where}: has {has} but no "prompt". Each line is an object such as {_EXAMPLE}.')
    match row["prompt"]:
        case str() as text if text:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise RequestError(
                    f"{where}: the text holds half of a surrogate pair, which is no character."
                ) from None
            return Prompt(text, line=number)
        case [*ids] if ids and all(type(token) is int and token >= 0 for token in ids):
            return Prompt(None, tuple(ids), line=number)
        case [] | "":
            raise RequestError(f"{where}: the prompt is empty. Give a text or at least one token id.")
        case other:
            raise RequestError(
                f"{where}: the prompt is {other!r}; must be a text or a list of token ids, e.g. [1, 17, 4]."
            )


_EXAMPLE = '{"prompt": "def main():"}'

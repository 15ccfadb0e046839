"""Prompt files in, result files out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.errors import ConfigError, RequestError, nearest

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
    file = model_folder / "prompts.jsonl"
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


def check_output(path: Path) -> None:
    """Raises ConfigError where the result file could not be written in the end: better now than after the run."""
    if path.is_dir():
        raise ConfigError(f"output={path}: is a folder. Name a file in it: output={path / 'results.jsonl'}.")
    if not path.parent.is_dir():
        raise ConfigError(f"output={path}: there is no folder {path.parent}. Make it first: mkdir -p '{path.parent}'.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"output={path}: {path.parent} cannot be written to ({error.strerror}).") from None


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """JSON lines, all or nothing: readers see the old file or the whole new one."""
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
    if not path.exists():
        near = nearest(path.name, _siblings(path))
        raise ConfigError(f"prompts={path}: no such file.{near} The name is taken as it stands, quotes included.")
    if path.is_dir():
        raise ConfigError(f"prompts={path}: is a folder. Name a file of prompts in it.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"prompts={path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts={path}: is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None


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

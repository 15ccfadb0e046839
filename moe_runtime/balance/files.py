"""Files that are written whole or not at all: a draft beside the place, then a new name."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_atomic(file: Path, data: bytes, *, fsync: bool = False) -> None:
    """All of `data` in `file`, or `file` as it was: readers see one of both. `fsync`: it is on disk, name and all,
    when this returns. OSError as of any write; no draft is left then."""
    draft = _draft(file)
    try:
        with draft.open("wb") as out:
            out.write(data)
            if fsync:
                out.flush()
                os.fsync(out.fileno())
        draft.replace(file)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            draft.unlink(missing_ok=True)
        raise
    if fsync:
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name
        finally:
            os.close(folder)


def not_writable(path: str | Path) -> str | None:
    """Why `write_atomic` could not write this file, with the remedy; None where it could, by trying a draft."""
    file = Path(path)
    folder = file.absolute().parent
    try:
        if file.is_dir():
            return f"must be a file, not a folder. Nearest: {str(file / 'FILE.json')!r}."
        if not folder.is_dir():
            return f"there is no folder {str(folder)!r}. Make it first."
        _draft(file).write_bytes(b"")
        _draft(file).unlink()
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        return f"cannot be written: {error}. Give a file in a folder of your own."
    return None


def _draft(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}.tmp")

"""One tiny checkpoint for all tests of the API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_runtime import LLM
from tests.api.tiny import write_tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """Four virtual ranks, dp=2 × tp=2; tests leave it idle."""
    with LLM(str(folder), ep=4, tp=2, overrides=["num_threads=1"]) as shared:
        yield shared

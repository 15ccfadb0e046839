"""docs/dispatch_clauses.md: every clause that the doubles hold adapters to; run this module to write it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.doubles.clauses import Clauses
from tests.doubles.deep_ep import elastic_clauses, legacy_clauses
from tests.doubles.nvshmem.clauses import nvshmem_clauses
from tests.doubles.symm_mem.clauses import symm_mem_clauses

DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "dispatch_clauses.md"

_HEAD: Final = """# Clauses of the fabrics' libraries

What each library enforces, states or leaves to its callers, with file and line in its own sources. The doubles in
`tests/doubles/` hold the adapters to every one; each has a switch, and a test with an adapter that breaks it.
`python -m tests.doubles.clause_document` writes this; a test compares.
"""


def render() -> str:
    """The document."""
    parts = (
        ("DeepEP V2, `ElasticBuffer` (deepseek-ai/DeepEP at dd758ca, 2.1.0)", elastic_clauses.clauses()),
        ("DeepEP V1, `Buffer` (deepseek-ai/DeepEP at dd758ca, 2.1.0)", legacy_clauses.clauses()),
        ("NVSHMEM for Python (NVIDIA/nvshmem at 2d7d25f; `core/` is nvshmem4py/nvshmem/core/)", nvshmem_clauses()),
        (
            "Torch's symmetric memory (pytorch/pytorch, torch/csrc/distributed/c10d/symm_mem, as torch 2.13 has it; "
            "`ext` is nvshmem_extension.cu, `mem` NVSHMEMSymmetricMemory.cpp)",
            symm_mem_clauses(),
        ),
    )
    return _HEAD + "".join(f"\n## {title}\n\n{_table(clauses)}" for title, clauses in parts)


def _table(clauses: Clauses) -> str:
    rows = [f"| {clause.name} | {_cell(clause.rule)} | {_cell(clause.source)} |" for clause in clauses]
    return "\n".join(["| clause | what holds | source |", "|---|---|---|", *rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    DOCUMENT.write_text(render())

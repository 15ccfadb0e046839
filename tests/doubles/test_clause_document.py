"""The clauses as documented are those that the doubles enforce."""

from __future__ import annotations

from tests.doubles.clause_document import DOCUMENT, render


def test_document_is_current() -> None:
    assert DOCUMENT.read_text() == render(), "run python -m tests.doubles.clause_document"

"""Clauses of a library's contract, each with its source and a switch, for doubles that hold adapters to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Clause:
    """One rule that a library states or enforces, or a hazard that it leaves to its callers."""

    name: str
    rule: str
    source: str
    """File and line in the library's own sources."""


class ContractError(RuntimeError):
    """What the library would refuse, or answer with garbage. Names its clause."""

    def __init__(self, clause: Clause, seen: str) -> None:
        super().__init__(f"{clause.name}: {seen}; {clause.rule} ({clause.source})")
        self.clause = clause


class Clauses:
    """The clauses of one library, all on unless switched off."""

    def __init__(self, *clauses: Clause) -> None:
        self._clauses = {clause.name: clause for clause in clauses}
        assert len(self._clauses) == len(clauses), "two clauses of one name"
        self._off: set[str] = set()

    def __iter__(self) -> Iterator[Clause]:
        return iter(self._clauses.values())

    def on(self, name: str) -> bool:
        """Whether the hazard `name` is reproduced, the rule `name` enforced."""
        return self._clauses[name].name not in self._off

    def require(self, name: str, holds: bool, seen: object) -> None:
        """ContractError where the rule `name` is on and does not hold."""
        if not holds and self.on(name):
            raise ContractError(self._clauses[name], str(seen))

    @contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Within the block these clauses are off."""
        assert all(name in self._clauses for name in names), f"no such clause among {names}"
        before, self._off = self._off, self._off | set(names)
        try:
            yield
        finally:
            self._off = before

"""Few rows of a product of factors in which every pair of values of two factors occurs that can occur."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product

Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]

_TRIES = 80


def pairs_of(row: Row) -> Iterator[Pair]:
    """Every two (factor, value) of a row."""
    return combinations(row.items(), 2)


def possible_pairs(factors: Mapping[str, Sequence[str]], valid: Callable[[Row], bool]) -> set[Pair]:
    """The pairs that some valid row of the full product holds."""
    names = list(factors)
    rows = (dict(zip(names, values, strict=True)) for values in product(*factors.values()))
    return {pair for row in rows if valid(row) for pair in pairs_of(row)}


def pairwise(factors: Mapping[str, Sequence[str]], valid: Callable[[Row], bool], *, seed: int = 0) -> list[Row]:
    """Greedy cover: each row is the best of some random valid rows that hold the first missing pair."""
    draw = random.Random(seed)
    missing = dict.fromkeys(sorted(possible_pairs(factors, valid)))
    rows: list[Row] = []
    while missing:
        best = max(_candidates(factors, valid, next(iter(missing)), draw), key=lambda row: _gain(row, missing))
        rows.append(best)
        for pair in pairs_of(best):
            missing.pop(pair, None)
    return rows


def _gain(row: Row, missing: Mapping[Pair, None]) -> int:
    return sum(pair in missing for pair in pairs_of(row))


def _candidates(
    factors: Mapping[str, Sequence[str]], valid: Callable[[Row], bool], pair: Pair, draw: random.Random
) -> Iterator[Row]:
    found = 0
    while found < _TRIES:
        row = {name: draw.choice(values) for name, values in factors.items()} | dict(pair)
        if valid(row):
            found += 1
            yield row

"""Experts that tokens choose together. N tokens, L MoE layers, K top-k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

MOST_TOKENS: Final = 20_000
"""Tokens that the pairs are counted over; of more, an even sample."""
LEAST_TOGETHER: Final = 10
"""Pairs that fewer tokens chose are no finding."""

LEAST_SURPRISE: Final = 5.0
"""Standard deviations: of the 32,640 pairs of 256 experts that are chosen independently, hardly one gets there."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Experts of one layer that tokens chose together."""

    experts: tuple[int, ...]
    """The busiest ones, in order of their load"""
    together: Ints
    """[n, n] tokens that chose both; the diagonal holds each one's own tokens"""
    top: tuple[tuple[int, int, int, float], ...]
    """(expert, other, tokens, lift): tokens over what independent choices would give"""
    num_tokens: int


def pairs(routes: NDArray[np.int16], layer: int, num_logical: int, *, shown: int, top: int) -> Pairs:
    """Of `routes [N, L, K]`: the `shown` busiest of the first `num_logical` experts against each other, and the `top`
    pairs that chance explains least: by √together − √expected in standard deviations of independent choices (a count's
    root has nearly the same one for rare and frequent pairs), where that is LEAST_SURPRISE or more and at least
    LEAST_TOGETHER tokens chose both."""
    sample = routes[:: max(1, -(-len(routes) // MOST_TOKENS)), layer].astype(np.int64)
    sample = np.where((sample >= 0) & (sample < num_logical), sample, num_logical)
    chosen = np.zeros((len(sample), num_logical + 1), dtype=np.float32)  # the last column is no expert's
    np.put_along_axis(chosen, sample, 1.0, axis=1)
    chosen = chosen[:, :-1]
    both = np.rint(chosen.T @ chosen).astype(np.int64)
    own = np.diag(both)
    expected = np.maximum(own[:, None] * own[None, :], 1) / max(1, len(sample))
    lift = both / expected
    part = own / max(1, len(sample))
    spread = np.sqrt(np.maximum(np.outer(1 - part, 1 - part), 1e-9)) / 2
    surprise = np.where(np.triu(both >= LEAST_TOGETHER, 1), (np.sqrt(both) - np.sqrt(expected)) / spread, 0.0)
    best = np.argsort(-surprise, axis=None, kind="stable")[:top]
    found = [divmod(int(place), num_logical) for place in best]
    busiest = np.argsort(-own, kind="stable")[: min(shown, num_logical)]
    return Pairs(
        experts=tuple(busiest.tolist()),
        together=both[np.ix_(busiest, busiest)],
        top=tuple((a, b, int(both[a, b]), float(lift[a, b])) for a, b in found if surprise[a, b] >= LEAST_SURPRISE),
        num_tokens=len(sample),
    )

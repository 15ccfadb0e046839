"""Sampler: agreement with transformers' processors, statistics, independence of batch-mates, failures. V vocab."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from moe_runtime.engine.request import Logprob, SamplingParams
from moe_runtime.engine.sampler import Sampled, Sampler, prompt_logprobs, token_logprobs
from moe_runtime.engine.sequence import SampleRow

V = 300


def logits_of(rows: int, seed: int = 0, vocab: int = V) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def row(key: int = 0, prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), **params: Any) -> SampleRow:
    return SampleRow(key, SamplingParams(**params), [*prompt, *output], len(prompt))


def token(sampler: Sampler, logits: Tensor, of: SampleRow) -> int | None:
    return sampler.sample(logits[None], [of])[0].token_id


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 7}, [hf.TopKLogitsWarper(7)]),
        ({"top_k": 10**6}, []),
        ({"top_p": 0.6}, [hf.TopPLogitsWarper(0.6)]),
        ({"top_p": 0.999999}, [hf.TopPLogitsWarper(0.999999)]),
        ({"top_p": 1e-9}, [hf.TopPLogitsWarper(1e-9)]),
        ({"min_p": 0.05}, [hf.MinPLogitsWarper(0.05)]),
        (
            {"temperature": 1.5, "top_k": 40, "top_p": 0.8},
            [hf.TemperatureLogitsWarper(1.5), hf.TopKLogitsWarper(40), hf.TopPLogitsWarper(0.8)],
        ),
        (
            {"repetition_penalty": 1.3, "temperature": 2.0},
            [hf.RepetitionPenaltyLogitsProcessor(1.3), hf.TemperatureLogitsWarper(2.0)],
        ),
        ({"repetition_penalty": 0.5}, [hf.RepetitionPenaltyLogitsProcessor(0.5)]),
    ],
)
def test_filters_agree_with_transformers(params: dict[str, Any], processors: list[hf.LogitsProcessor]) -> None:
    of = row(prompt=(1, 2, 3, 250), output=(2, 7, 7), **params)
    for seed in range(5):
        logits = logits_of(1, seed)
        expected = logits.double()
        for processor in processors:
            expected = processor(torch.tensor([of.tokens]), expected)
        weights = Sampler().weights(logits[0], of)
        torch.testing.assert_close(weights / weights.sum(), expected.softmax(-1)[0], rtol=1e-5, atol=1e-9)
        assert torch.equal(weights > 0, expected[0] > -math.inf)


def test_a_flat_nucleus_needs_more_than_the_head() -> None:
    logits = torch.linspace(0, 1e-3, 5000)
    weights = Sampler().weights(logits, row(top_p=0.5))
    assert int((weights > 0).sum()) in range(2499, 2502)
    assert bool((weights[2600:] > 0).all()), "the likelier half"


def test_equals_at_the_nucleus_border_stay_by_lowest_id() -> None:
    weights = Sampler().weights(torch.zeros(10), row(top_p=0.35))
    assert weights.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert Sampler().weights(torch.zeros(10), row(top_k=3)).nonzero().numel() == 10, "top-k keeps equals, as others do"


def test_penalties_over_the_output() -> None:
    of = row(prompt=(4, 5), output=(7, 7, 9), presence_penalty=0.5, frequency_penalty=0.25)
    logits = logits_of(1)[0]
    expected = logits.clone()
    expected[7] -= 0.5 + 2 * 0.25
    expected[9] -= 0.5 + 0.25
    assert torch.equal(Sampler().adjusted(logits, of), expected)
    assert torch.equal(Sampler().adjusted(logits, row(prompt=(7,), presence_penalty=1.0)), logits)


def test_min_tokens_masks_what_would_stop() -> None:
    logits = torch.zeros(6)
    logits[[2, 4]] = 9.0
    sampler = Sampler(eos_token_ids=(2,))
    assert token(sampler, logits, row(temperature=0, min_tokens=1)) == 4
    assert token(sampler, logits, row(temperature=0, min_tokens=1, stop_token_ids=[4])) == 0
    assert token(sampler, logits, row(temperature=0, min_tokens=1, ignore_eos=True)) == 2
    assert token(sampler, logits, row(temperature=0, min_tokens=1, output=(3,))) == 2
    for temperature in (0.0, 1.0):
        of = row(temperature=temperature, min_tokens=1, stop_token_ids=[0], ignore_eos=True)
        (none,) = sampler.sample(logits[None, :1], [of])
        assert none == Sampled(None, error="min_tokens=1: every token of the vocabulary would stop before")
    (none,) = sampler.sample(logits[None], [row(prompt=(2,), temperature=0, repetition_penalty=1e-300)])
    assert none == Sampled(None, error="penalties or temperature took the logits out of range")


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, V)
    logits[1, [17, 40]] = 1.0
    rows = [row(temperature=0), row(temperature=0)]
    assert Sampler().sample(logits, rows) == [Sampled(0), Sampled(17)]


@pytest.mark.parametrize(
    "params", [{}, {"seed": 3}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.5}]
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 4000 draws; 24.3 is exceeded once in 1000 with 7 degrees of freedom (the seeds are fixed)."""
    draws, logits = 4000, logits_of(1, 5, 8)[0] / 2
    sampler = Sampler(seed=11)
    rows = [row(key=i, output=(0,) * (i if "seed" in params else 0), **params) for i in range(draws)]
    counts = Counter(sampled.token_id for sampled in sampler.sample(logits.expand(draws, -1), rows))
    weights = sampler.weights(logits, rows[0])
    expected = (weights / weights.sum() * draws).tolist()
    assert set(counts) <= {token_id for token_id, count in enumerate(expected) if count}
    assert sum((counts[token_id] - count) ** 2 / count for token_id, count in enumerate(expected) if count) < 24.3
    flat = draws / len(expected)
    assert sum((counts[token_id] - flat) ** 2 / flat for token_id in range(len(expected))) > 100, "the test can fail"


class Fixed(Sampler):
    """Draws one given number instead."""

    number = 0.0

    def _uniform(self, row: SampleRow) -> float:
        return self.number


@pytest.mark.parametrize(("number", "expected"), [(0.0, 2), (0.499999, 2), (0.5, 5), (1 - 2**-53, 5), (1.0, 5)])
def test_only_tokens_of_nonzero_weight_are_drawn(number: float, expected: int) -> None:
    sampler = Fixed()
    sampler.number = number
    logits = torch.zeros(9)
    logits[[2, 5]] = 50.0
    assert token(sampler, logits, row(top_k=2)) == expected


def test_seeds() -> None:
    logits = torch.zeros(1000)
    first, second = Sampler(seed=1), Sampler(seed=2)
    assert token(first, logits, row(key=1, seed=5)) == token(second, logits, row(key=2, seed=5))
    assert token(first, logits, row(key=1)) == token(first, logits, row(key=1))
    different = [
        token(first, logits, row(key=1)),
        token(first, logits, row(key=2)),
        token(second, logits, row(key=1)),
        token(first, logits, row(key=1, output=(4,))),
        token(first, logits, row(key=1, seed=5)),
        token(first, logits, row(key=1, seed=-5)),
    ]
    assert len(set(different)) == len(different)


def test_a_row_does_not_know_its_batch_mates() -> None:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 3},
        {"temperature": 0.8},
        {"top_k": 9, "logprobs": 0},
        {"top_p": 0.7, "min_p": 0.01},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "seed": 4},
        {"min_tokens": 3, "stop_token_ids": [8]},
    ]
    logits = logits_of(21, 9, 1003)
    rows = [row(key=i, output=(5, 6)[: i % 3], **kinds[i % len(kinds)]) for i in range(21)]
    sampler = Sampler(seed=3, eos_token_ids=(0,))
    together = sampler.sample(logits, rows)
    assert [sampler.sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(21)] == together
    order = list(reversed(range(21)))
    padded = torch.cat([torch.full((1, 1003), 7.0), logits[order]])
    assert sampler.sample(padded, [row(), *[rows[i] for i in order]])[1:] == [together[i] for i in order]


def test_logits_stay_as_they_were() -> None:
    logits = logits_of(2)
    before = logits.clone()
    Sampler().sample(logits, [row(repetition_penalty=2.0, min_tokens=2, stop_token_ids=[1], top_p=0.5), row(top_k=3)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(bad: float, temperature: float) -> None:
    logits = logits_of(4)
    rows = [row(i, logprobs=1, temperature=temperature) for i in range(4)]
    healthy = Sampler().sample(logits, rows)
    logits[1, 200] = bad
    logits[2] = -math.inf
    mixed = Sampler().sample(logits, rows)
    none = Sampled(None, error="the model's logits were not finite")
    assert mixed == [healthy[0], none, none, healthy[3]]
    assert prompt_logprobs(logits, [1, 2, 3, 4], 1) is None
    assert prompt_logprobs(logits[3:], [4], 1) is not None


def test_logprobs_are_of_the_raw_logits_with_ranks() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 2.0])
    raw = logits.log_softmax(-1).tolist()
    sampled = Sampler().sample(logits[None], [row(temperature=0, logprobs=2, repetition_penalty=9.0)])[0]
    assert sampled.token_id == 4, "1 and 3 are in the prompt"
    assert sampled.logprobs is not None
    assert sampled.logprobs.named({4: "d"}) == {
        4: Logprob(raw[4], 3, "d"),
        1: Logprob(raw[1], 1),
        3: Logprob(raw[3], 2),
    }
    assert token_logprobs(logits, 3, 0).ranks == (2,)
    assert token_logprobs(logits, 3, 1).token_ids == (3, 1), "equals rank by id"
    assert token_logprobs(logits, 3, 99).token_ids == (3, 1, 4, 2, 0)


def test_prompt_logprobs_are_of_the_next_token() -> None:
    logits = logits_of(3)
    found = prompt_logprobs(logits, [5, 6, 7], 2)
    assert found is not None
    assert [entry.token_ids[0] for entry in found] == [5, 6, 7]
    assert [entry.logprobs[0] for entry in found] == [float(logits[i].log_softmax(-1)[5 + i]) for i in range(3)]
    assert len(found[0].token_ids) == 3


def test_no_rows() -> None:
    assert Sampler().sample(torch.empty(0, V), []) == []

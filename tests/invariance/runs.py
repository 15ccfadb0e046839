"""One run with the logits that its tokens were chosen from, and their comparison to the bit. T new tokens, V vocab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_runtime import LLM, SamplingParams
from moe_runtime.engine.request import RequestOutput
from moe_runtime.engine.sampler import Sampled, Sampler
from moe_runtime.engine.sequence import SampleRow

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Answer:
    """To one prompt: `logits [T, V] fp32` as the sampler saw them; `scores`: log probability of each prompt token."""

    token_ids: tuple[int, ...]
    logits: Tensor
    scores: tuple[float, ...]
    num_cached_tokens: int
    num_preemptions: int


def run(
    folder: Path,
    batches: Sequence[Prompts],
    words: Sequence[str],
    *,
    new_tokens: int,
    score_prompts: bool = True,
) -> list[Answer]:
    """Greedy answers to all prompts, batch after batch, by one engine; in fp32, the checkpoint's dtype, if not told."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=new_tokens,
        ignore_eos=True,
        prompt_logprobs=0 if score_prompts else None,
    )
    seen: dict[tuple[int, int], Tensor] = {}
    choose = Sampler.sample

    def sample(self: Sampler, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        for row, values in zip(rows, logits, strict=True):
            seen[row.request_id, len(row.tokens)] = values.clone()
        return choose(self, logits, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", sample)
        with LLM(str(folder), overrides=["num_threads=1", *words]) as llm:
            outputs = [output for batch in batches for output in llm.generate([list(p) for p in batch], params)]
    return [_answer(output, seen) for output in outputs]


def _answer(output: RequestOutput, seen: dict[tuple[int, int], Tensor]) -> Answer:
    (completion,) = output.outputs
    length = len(output.prompt_token_ids)
    scores = zip(output.prompt_logprobs or (), output.prompt_token_ids, strict=False)
    return Answer(
        token_ids=completion.token_ids,
        logits=torch.stack([seen[output.request_id, length + i] for i in range(len(completion.token_ids))]),
        scores=tuple(row[token].logprob for row, token in scores if row is not None),
        num_cached_tokens=output.metrics.num_cached_tokens,
        num_preemptions=output.metrics.num_preemptions,
    )


def alone(
    folder: Path, prompts: Prompts, words: Sequence[str], *, new_tokens: int, score_prompts: bool = True
) -> list[Answer]:
    """What all others are measured by: every prompt for itself, in one piece."""
    words = ["engine.prefix_caching=false", "dispatch=all_to_all", *words]
    return run(folder, [[prompt] for prompt in prompts], words, new_tokens=new_tokens, score_prompts=score_prompts)


def assert_same_bits(got: Sequence[Answer], want: Sequence[Answer]) -> None:
    """Logits equal to the bit; else how many differ, the first and both values."""
    assert len(got) == len(want)
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        differ = ours.logits.view(torch.int32) != theirs.logits.view(torch.int32)
        if bool(differ.any()):
            token, entry = differ.nonzero()[0].tolist()
            pytest.fail(
                f"prompt {index}: {int(differ.sum())} of {differ.numel()} logits differ, first for new token {token} "
                f"at id {entry}: {float(ours.logits[token, entry])!r} != {float(theirs.logits[token, entry])!r}"
            )
        assert ours.token_ids == theirs.token_ids
        assert not ours.scores or ours.scores == theirs.scores, f"prompt {index}: scores of its own tokens differ"


def assert_close(got: Sequence[Answer], want: Sequence[Answer], *, tolerance: float) -> None:
    """Equal tokens, logits within `tolerance`."""
    assert len(got) == len(want)
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        away = float((ours.logits - theirs.logits).abs().max())
        assert away <= tolerance, f"prompt {index}: |Δlogit| = {away:.3g} > {tolerance:g}"
        assert ours.token_ids == theirs.token_ids, f"prompt {index}: {ours.token_ids} != {theirs.token_ids}"

"""What a run answers and with which logits, on any device, and its comparison to another run. T new tokens, V vocab.

A bare GPU machine may lack what the runtime needs beside torch and triton: it is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_runtime.engine.sampler import Sampled, Sampler
    from moe_runtime.engine.sequence import SampleRow

WHEELS = ("greenlet", "hydra", "omegaconf", "safetensors", "tokenizers")


def _is_missing(name: str) -> bool:
    try:
        return find_spec(name) is None
    except ModuleNotFoundError:
        return True


MISSING = [name for name in WHEELS if _is_missing(name)]

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here")
NEEDS_WHEELS = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: `make gpu-wheels` fetches them where there is a package index"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """To one prompt: `logits [T, V] fp32` on the CPU, as the sampler saw them."""

    token_ids: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """All answers, and how many graphs were captured and replayed."""

    answers: tuple[Answer, ...]
    captures: int
    replays: int


def run(folder: Path, prompts: Sequence[Sequence[int]], words: Sequence[str], *, new_tokens: int) -> Run:
    """Greedy answers to all prompts at once, under the command line's `words`."""
    from moe_runtime import LLM, SamplingParams
    from moe_runtime.engine.sampler import Sampler

    seen: dict[tuple[int, int], Tensor] = {}
    choose = Sampler.sample

    def sample(self: Sampler, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        for row, values in zip(rows, logits.float().cpu(), strict=True):
            seen[row.request_id, len(row.tokens)] = values.clone()
        return choose(self, logits, rows)

    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", sample)
        with LLM(str(folder), overrides=list(words)) as llm:
            outputs = llm.generate([list(prompt) for prompt in prompts], params)
            graphs = llm.snapshot().graphs
    found = []
    for output in outputs:
        (completion,), length = output.outputs, len(output.prompt_token_ids)
        rows = [seen[output.request_id, length + i] for i in range(len(completion.token_ids))]
        found.append(Answer(completion.token_ids, torch.stack(rows)))
    return Run(tuple(found), graphs.captures, graphs.replays)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Root mean square over the vocabulary of a position's logit errors: the median position and the worst.

    Tokens part only where the oracle's best leads by no more than `margin`; `least_prefix` tokens agree in the mean.
    """

    median: float
    worst: float
    margin: float
    least_prefix: int


def assert_follows(got: Run, oracle: Run, bounds: Bounds) -> None:
    """`got` stays within `bounds` of `oracle` as long as its tokens do; what comes after other tokens is no error."""
    errors, prefixes = [], []
    for index, (ours, theirs) in enumerate(zip(got.answers, oracle.answers, strict=True)):
        pairs = enumerate(zip(ours.token_ids, theirs.token_ids, strict=True))
        first = next((place for place, (a, b) in pairs if a != b), len(theirs.token_ids))
        prefixes.append(first)
        seen = min(first + 1, len(theirs.token_ids))  # logits of the place where tokens part still have equal prefixes
        errors.append((ours.logits[:seen] - theirs.logits[:seen]).pow(2).mean(dim=1).sqrt())
        if first < len(theirs.token_ids):
            best = theirs.logits[first].topk(2).values
            lead = float(best[0] - best[1])
            assert lead <= bounds.margin, (
                f"prompt {index}: another token at {first}, where the best leads by {lead:.4g}"
            )
    away = torch.cat(errors)
    median, worst, mean = float(away.median()), float(away.max()), sum(prefixes) / len(prefixes)
    assert worst <= bounds.worst and median <= bounds.median, (
        f"logits off by {median:.3g} (median), {worst:.3g} (worst)"
    )
    assert mean >= bounds.least_prefix, f"{mean:.1f} tokens agree in the mean ({prefixes})"


def assert_same_bits(got: Run, want: Run) -> None:
    """Tokens and logits equal to the bit; else how many differ, the first and both values."""
    for index, (ours, theirs) in enumerate(zip(got.answers, want.answers, strict=True)):
        differ = ours.logits.view(torch.int32) != theirs.logits.view(torch.int32)
        if bool(differ.any()):
            token, entry = differ.nonzero()[0].tolist()
            a, b = float(ours.logits[token, entry]), float(theirs.logits[token, entry])
            where = f"prompt {index}: {int(differ.sum())} logits differ, first at new token {token}, id {entry}"
            pytest.fail(f"{where}: {a!r} != {b!r}")
        assert ours.token_ids == theirs.token_ids, f"prompt {index}"

"""What transformers makes of a checkpoint, and what we make of it, in one form. n prompt, T new tokens, V vocab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_runtime import LLM, SamplingParams
from moe_runtime.engine.request import PositionLogprobs

NEW_TOKENS = 32
TOLERANCE = 1e-4
"""Of log probabilities in fp32; those here are of size 1..20, so it is 50 to 100 roundings."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Greedy tokens `[T]` and `logprobs [n-1+T, V] fp32` of every position that has a successor."""

    token_ids: tuple[int, ...]
    logprobs: Tensor


def by_transformers(
    folder: Path, prompts: Sequence[Sequence[int]], *, new_tokens: int = NEW_TOKENS
) -> list[Continuation]:
    """Each prompt alone: prefill, then a token at a time, with transformers' plainest implementations."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small are slower on several, and much slower where cores are busy
    try:
        with torch.inference_mode():
            return [_continue(model, list(prompt), new_tokens) for prompt in prompts]
    finally:
        torch.set_num_threads(threads)


def _continue(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> Continuation:
    out = model(torch.tensor([prompt]), use_cache=True)
    rows, tokens = [out.logits[0]], [int(out.logits[0, -1].argmax())]
    while len(tokens) < new_tokens:
        out = model(torch.tensor([tokens[-1:]]), use_cache=True, past_key_values=out.past_key_values)
        rows.append(out.logits[0])
        tokens.append(int(out.logits[0, -1].argmax()))
    return Continuation(tuple(tokens), torch.log_softmax(torch.cat(rows).float(), dim=-1))


def by_runtime(
    folder: Path, prompts: Sequence[Sequence[int]], words: Sequence[str], *, new_tokens: int = NEW_TOKENS
) -> list[Continuation]:
    """All prompts at once, through the public API, under the command line's `words`."""
    params = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, logprobs=1024, prompt_logprobs=1024
    )
    with LLM(str(folder), overrides=["num_threads=1", "dtype=float32", *words]) as llm:
        outputs = llm.generate([list(prompt) for prompt in prompts], params)
    found = []
    for output in outputs:
        (completion,) = output.outputs
        assert output.prompt_logprobs is not None and completion.logprobs is not None, "both were asked for"
        rows = [row for row in (*output.prompt_logprobs, *completion.logprobs) if row is not None]
        found.append(Continuation(completion.token_ids, torch.stack([_dense(row) for row in rows])))
    return found


def _dense(row: PositionLogprobs) -> Tensor:
    return torch.tensor([row[token].logprob for token in range(len(row))])


def assert_parity(got: Sequence[Continuation], want: Sequence[Continuation]) -> None:
    """Equal tokens and log probabilities within TOLERANCE; says which prompt and position differ most."""
    assert len(got) == len(want)
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours.logprobs.shape == theirs.logprobs.shape, f"prompt {index}"
        away = (ours.logprobs - theirs.logprobs).abs().amax(dim=-1)
        worst = int(away.argmax())
        first = int((away > TOLERANCE).nonzero()[0]) if float(away.max()) > TOLERANCE else None
        assert first is None, (
            f"prompt {index}: |Δ| > {TOLERANCE:g} from position {first} on, largest {float(away[worst]):.3g} at "
            f"{worst} of {len(away)}, {len(away) - len(ours.token_ids) + 1} of them prompt"
        )
        assert ours.token_ids == theirs.token_ids, f"prompt {index}: tokens {ours.token_ids} != {theirs.token_ids}"

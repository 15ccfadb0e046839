"""What LLM.generate gives back."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest

from moe_runtime import LLM, EngineClosedError, RequestOutput, SamplingParams
from tests.api.tiny import (
    EOS,
    FIRST_BYTE,
    NUM_EXPERTS,
    NUM_MOE_LAYERS,
    VOCAB,
    alone,
    greedy,
    tokens,
    wait_until_idle,
)

PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45, 46], [3, 3], [200, 100, 50], [77] * 20]


def test_results_in_input_order_and_as_if_alone(llm: LLM, folder: Path) -> None:
    outputs = llm.generate(PROMPTS, greedy(12))
    assert [list(output.prompt_token_ids) for output in outputs] == PROMPTS
    assert tokens(outputs) == alone(folder, PROMPTS, greedy(12))
    assert len(set(tokens(outputs))) == len(PROMPTS), "the model must tell prompts apart"
    for output in outputs:
        (completion,) = output.outputs
        assert output.finished
        assert completion.finish_reason == "length"
        assert completion.logprobs is None
        assert output.prompt_logprobs is None
        metrics = output.metrics
        assert metrics.num_output_tokens == 12
        assert 0 <= metrics.queue_time_s <= metrics.ttft_s <= metrics.latency_s  # type: ignore[operator]
        assert metrics.tpot_s is not None and metrics.tpot_s > 0


def test_text_in_and_out(llm: LLM) -> None:
    assert llm.tokenizer is not None
    (output,) = llm.generate("def f(x):\n", greedy(8))
    assert output.prompt == "def f(x):\n"
    assert list(output.prompt_token_ids) == llm.tokenizer.encode("def f(x):\n")
    (completion,) = output.outputs
    whole = llm.tokenizer.decode([*output.prompt_token_ids, *completion.token_ids])
    assert output.prompt + completion.text == whole


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    prompt = [5, 6, 7, 8]
    (output,) = llm.generate([prompt], params)
    (completion,) = output.outputs
    assert completion.logprobs is not None
    assert output.prompt_logprobs is not None
    assert len(completion.logprobs) == 4
    assert len(output.prompt_logprobs) == 4
    assert output.prompt_logprobs[0] is None
    for token, row in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(row) == 3
        assert row[token].rank == 1
        assert sorted(entry.rank for entry in row.values()) == [1, 2, 3]
        assert all(entry.decoded_token is not None for entry in row.values())
    total = sum(row[token].logprob for token, row in zip(completion.token_ids, completion.logprobs, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)
    # What the model says of a token is the same whether it was generated or is part of a prompt.
    (again,) = llm.generate([[*prompt, *completion.token_ids]], params)
    assert again.prompt_logprobs is not None
    for position, (token, row) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        seen = again.prompt_logprobs[len(prompt) + position]
        assert seen is not None
        assert seen[token].logprob == pytest.approx(row[token].logprob, abs=1e-4)
    for position, first in enumerate(output.prompt_logprobs):
        later = again.prompt_logprobs[position]
        assert (first is None) == (later is None)
        if first is not None and later is not None:
            assert prompt[position] in first
            assert 2 <= len(first) <= 3
            assert first.keys() == later.keys()


def test_all_logprobs_sum_to_one(llm: LLM) -> None:
    (output,) = llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=1, logprobs=VOCAB))
    (row,) = output.outputs[0].logprobs or []
    assert len(row) == VOCAB
    assert sum(math.exp(entry.logprob) for entry in row.values()) == pytest.approx(1.0, abs=1e-4)


def test_several_completions(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=6, ignore_eos=True, prompt_logprobs=0)
    (output,) = llm.generate([[5, 6, 7]], params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({completion.token_ids for completion in output.outputs}) == 3
    assert output.metrics.num_output_tokens == 18
    assert output.metrics.num_longest_output_tokens == 6
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 3
    (again,) = llm.generate([[5, 6, 7]], params)
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in output.outputs]


def test_a_seeded_request_does_not_depend_on_its_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)
    (by_itself,) = tokens(llm.generate([[5, 6, 7]], params))
    beside = tokens(llm.generate([[9, 9], [5, 6, 7], [1, 2]], params))
    assert beside[1] == by_itself


def _stop_case(llm: LLM) -> tuple[list[int], tuple[int, ...], str]:
    """A prompt whose greedy output holds some plain letters, those tokens, and their text."""
    for first in range(FIRST_BYTE, VOCAB):
        (output,) = llm.generate([[first, 60]], greedy(12))
        completion = output.outputs[0]
        if completion.text[3:6].isascii() and len(set(completion.text[:6])) > 4 and "\ufffd" not in completion.text[:6]:
            return [first, 60], completion.token_ids, completion.text
    raise AssertionError("no prompt gives plain text")


def test_stop_texts_ids_and_least_lengths(llm: LLM) -> None:
    prompt, ids, text = _stop_case(llm)
    stop = text[3:5]

    def run(**changes: object) -> tuple[RequestOutput, str]:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **changes)  # type: ignore[arg-type]
        (output,) = llm.generate([prompt], params)
        (streamed,) = [*llm.stream(prompt, params)][-1:]
        assert streamed.outputs == output.outputs
        return output, output.outputs[0].text

    output, got = run(stop=[stop])
    assert got == text[: text.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    output, got = run(stop=stop, include_stop_str_in_output=True)
    assert got == text[: text.index(stop) + len(stop)]
    output, got = run(stop_token_ids=[ids[2]])
    end = ids.index(ids[2]) + 1
    assert output.outputs[0].token_ids == ids[:end]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", ids[2])
    output, _ = run(stop_token_ids=[ids[2]], min_tokens=5)
    assert len(output.outputs[0].token_ids) >= 5
    output, _ = run(stop=[stop], min_tokens=12)
    assert len(output.outputs[0].token_ids) == 12
    wait_until_idle(llm)


def test_end_of_text(llm: LLM) -> None:
    """A request that ends the text by itself; ignore_eos and min_tokens go on."""

    def params(seed: int, max_tokens: int = 12, **changes: object) -> SamplingParams:
        return SamplingParams(temperature=1.5, seed=seed, max_tokens=max_tokens, **changes)  # type: ignore[arg-type]

    outputs = llm.generate([[5, 6]] * 96, [params(seed) for seed in range(96)])
    completions = [output.outputs[0] for output in outputs]
    for completion in completions:
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == EOS)
        assert completion.stop_reason is None
    seed, ended = next((seed, c) for seed, c in enumerate(completions) if c.finish_reason == "stop")
    assert "</s>" not in ended.text
    (shown,) = llm.generate([[5, 6]], params(seed, skip_special_tokens=False))
    assert "</s>" not in shown.outputs[0].text
    (kept,) = llm.generate([[5, 6]], params(seed, skip_special_tokens=False, include_stop_str_in_output=True))
    assert kept.outputs[0].text == shown.outputs[0].text + "</s>"
    length = len(ended.token_ids)
    (longer,) = tokens(llm.generate([[5, 6]], params(seed, length + 3, ignore_eos=True)))
    assert longer[:length] == ended.token_ids
    assert len(longer) == length + 3
    (longer,) = tokens(llm.generate([[5, 6]], params(seed, length + 3, min_tokens=length + 1)))
    assert len(longer) > length


def test_several_threads(llm: LLM, folder: Path) -> None:
    expected = alone(folder, PROMPTS, greedy(8))
    found: dict[int, tuple[int, ...]] = {}
    load = []

    def work(index: int) -> None:
        for _ in range(3):
            (found[index],) = tokens(llm.generate([PROMPTS[index]], greedy(8)))
            load.append(int(llm.expert_load().sum()))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found[index] for index in range(len(PROMPTS))] == expected
    assert all(load)


def test_the_example_of_the_documentation(folder: Path) -> None:
    overrides = ["dispatch=all_gather", "placement.num_redundant_experts=8"]
    with LLM(str(folder), ep=8, tp=2, overrides=overrides) as llm:
        params = SamplingParams(temperature=0, max_tokens=32, logprobs=5, prompt_logprobs=5)
        prompts: list[str | list[int]] = ["def main():", [5, 6, 7]]
        outs = llm.generate(prompts, params)
        assert [len(out.outputs) for out in outs] == [1, 1]
        assert outs[1].prompt_token_ids == (5, 6, 7)
        assert outs[1].outputs[0].token_ids == alone(folder, [[5, 6, 7]], params)[0]
        assert len(outs[1].outputs[0].logprobs or []) == len(outs[1].outputs[0].token_ids)
        assert llm.expert_load().shape == (NUM_MOE_LAYERS, NUM_EXPERTS)


def test_use_after_close(folder: Path) -> None:
    llm = LLM(str(folder), ep=1, overrides=["num_threads=1"])
    llm.close()
    llm.close()
    for use in (lambda: llm.generate([[5]]), lambda: llm.stream([5]), llm.expert_load):
        with pytest.raises(EngineClosedError, match="closed"):
            use()
    assert llm.snapshot().state == "closed"
    assert llm.topology.ep == 1

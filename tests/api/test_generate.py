"""What LLM.generate and LLM.stream give back."""

from __future__ import annotations

import math
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_runtime import LLM, EngineClosedError, RequestError, RequestOutput, SamplingParams
from tests.api.tiny import EOS, FIRST_BYTE, NUM_EXPERTS, NUM_MOE_LAYERS, TOP_K, VOCAB, alone, greedy, tokens, write_tiny

PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45, 46], [3, 3], [200, 100, 50], [77] * 20]


def wait_until_idle(llm: LLM, *, within_s: float = 10.0) -> None:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        snapshot = llm.snapshot()
        pages = {group.num_free_pages for group in snapshot.groups}
        if not snapshot.num_live_requests and not any(group.num_running for group in snapshot.groups):
            assert pages == {snapshot.num_pages}
            return
        time.sleep(0.05)
    raise AssertionError(f"requests or pages are still held: {llm.snapshot()}")


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


def test_one_prompt_many_prompts_and_kinds_of_numbers(llm: LLM) -> None:
    expected = tokens(llm.generate([[5, 6, 7]], greedy(3)))
    assert tokens(llm.generate([5, 6, 7], greedy(3))) == expected
    assert tokens(llm.generate((5, 6, 7), greedy(3))) == expected
    assert tokens(llm.generate([np.array([5, 6, 7])], greedy(3))) == expected  # type: ignore[arg-type]
    assert tokens(llm.generate(torch.tensor([5, 6, 7]), greedy(3))) == expected  # type: ignore[arg-type]
    assert llm.generate([], greedy(3)) == []
    per_prompt = llm.generate([[5], [6]], [greedy(2), greedy(4)])
    assert [len(ids) for ids in tokens(per_prompt)] == [2, 4]


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
    length = len(ended.token_ids)
    (longer,) = tokens(llm.generate([[5, 6]], params(seed, length + 3, ignore_eos=True)))
    assert longer[:length] == ended.token_ids
    assert len(longer) == length + 3
    (longer,) = tokens(llm.generate([[5, 6]], params(seed, length + 3, min_tokens=length + 1)))
    assert len(longer) > length


def test_stream_grows_token_by_token(llm: LLM) -> None:
    (whole,) = llm.generate([[5, 6, 7]], greedy(6))
    updates = list(llm.stream([5, 6, 7], greedy(6)))
    assert [len(update.outputs[0].token_ids) for update in updates] == [1, 2, 3, 4, 5, 6]
    assert [update.finished for update in updates] == [False] * 5 + [True]
    assert updates[-1].outputs == whole.outputs
    texts = [update.outputs[0].text for update in updates]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_streams_of_several_completions(llm: LLM) -> None:
    params = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=4, ignore_eos=True)
    updates = list(llm.stream([5, 6, 7], params))
    assert updates[-1].finished
    assert not any(update.finished for update in updates[:-1])
    assert updates[-1].outputs == llm.generate([[5, 6, 7]], params)[0].outputs


def test_a_dropped_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream([5, 6, 7], greedy(200))
    next(stream)
    assert llm.snapshot().num_live_requests == 1
    del stream
    wait_until_idle(llm)
    unread = llm.stream([5, 6, 7], greedy(200))
    unread.close()
    unread.close()
    assert list(unread) == []
    wait_until_idle(llm)


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


BAD_REQUESTS = [
    ([], "the prompt is empty"),
    ("", "the prompt is empty"),
    ([VOCAB], f"ids must be in 0..{VOCAB - 1}"),
    ([-1], "ids must be in"),
    ([5] * 256, "it must have at most 255"),
    ([5] * 254, "set max_tokens=2 or less"),
    ([5.5], "is no prompt"),
    ([None], "is no prompt"),
    (["a", 3], "is no prompt"),
    ([True, False], "is no prompt"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_REQUESTS)
def test_bad_requests_end_alone(llm: LLM, prompt: object, message: str) -> None:
    steps = llm.snapshot().num_output_tokens
    stream = llm.stream([5, 6, 7], greedy(5))
    with pytest.raises(RequestError, match=message):
        llm.generate([[5], prompt, [6]], greedy(4))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=message):
        llm.stream(prompt, greedy(4))  # type: ignore[arg-type]
    assert list(stream)[-1].outputs[0].token_ids == tokens(llm.generate([[5, 6, 7]], greedy(5)))[0]
    assert llm.snapshot().num_output_tokens == steps + 10, "nothing of the bad request has run"


def test_bad_parameters(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        llm.generate([[5]], [greedy(1), greedy(1)])
    with pytest.raises(RequestError, match="stop_token_ids holds 999"):
        llm.generate([[5]], SamplingParams(stop_token_ids=[999]))
    with pytest.raises(RequestError, match="prompt 1: "):
        llm.generate([[5], [999]])


def test_a_request_that_can_never_fit(folder: Path) -> None:
    pages = ["engine.kv_cache_bytes=6KiB", "engine.page_size=4", "num_threads=1"]
    with LLM(str(folder), ep=1, overrides=pages) as llm:
        assert llm.snapshot().num_pages == 5
        with pytest.raises(RequestError, match="raise engine.kv_cache_bytes"):
            llm.generate([[5] * 10], greedy(30))
        (output,) = llm.generate([[5] * 10], greedy(11))
        assert len(output.outputs[0].token_ids) == 11
        many = llm.generate([[5, index] for index in range(2, 9)], greedy(12))
        assert sum(output.metrics.num_preemptions for output in many) > 0
        assert tokens(many) == alone(folder, [[5, index] for index in range(2, 9)], greedy(12))


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    with LLM(str(write_tiny(tmp_path / "model", text=False)), ep=1, overrides=["num_threads=1"]) as llm:
        assert llm.tokenizer is None
        with pytest.raises(RequestError, match="needs a tokenizer.json"):
            llm.generate(["hello"])
        with pytest.raises(RequestError, match="needs a tokenizer.json"):
            llm.chat([{"role": "user", "content": "hello"}])
        (output,) = llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=3, logprobs=1))
        assert output.prompt is None
        assert output.outputs[0].text == ""
        assert all(entry.decoded_token is None for row in output.outputs[0].logprobs or [] for entry in row.values())


@pytest.mark.parametrize(("ep", "tp", "shared"), [(1, 1, "replicated"), (8, 4, "replicated"), (4, 1, "dispatched")])
def test_expert_load_counts_real_tokens_only(folder: Path, ep: int, tp: int, shared: str) -> None:
    overrides = [f"shared_experts={shared}", "num_threads=1", "engine.prefix_caching=false"]
    with LLM(str(folder), ep=ep, tp=tp, overrides=overrides) as llm:
        extra = shared == "dispatched"
        assert llm.expert_load().tolist() == [[0] * (NUM_EXPERTS + extra)] * NUM_MOE_LAYERS
        llm.generate([[5, 6, 7], [9]], greedy(4))
        load = llm.expert_load()
        assert load.shape == (NUM_MOE_LAYERS, NUM_EXPERTS + extra)
        # The last token of each output is never run.
        ran = 3 + 1 + 2 * (4 - 1)
        assert load.sum(dim=1).tolist() == [ran * (TOP_K + extra)] * NUM_MOE_LAYERS
        if extra:
            assert load[:, NUM_EXPERTS].tolist() == [ran] * NUM_MOE_LAYERS
        received = llm.load_report().rank_load
        assert received.shape == (NUM_MOE_LAYERS, ep)
        assert received.sum(dim=1).tolist() == load.sum(dim=1).tolist()


def test_what_it_is(llm: LLM) -> None:
    topology = llm.topology
    assert (topology.ep, topology.dp, topology.tp, topology.launcher) == (4, 2, 2, "virtual")
    snapshot = llm.snapshot()
    assert snapshot.mesh == topology.mesh()
    assert snapshot.state == "running"
    assert len(snapshot.groups) == 2
    before = snapshot.num_output_tokens
    llm.generate([[5, 6, 7], [9], [8]], greedy(6))
    after = llm.snapshot()
    assert after.num_output_tokens - before == 18
    assert after.num_prompt_tokens - snapshot.num_prompt_tokens == 5
    assert after.num_finished_requests - snapshot.num_finished_requests == 3
    assert 0 < after.last_step_s <= after.busy_s <= after.uptime_s
    assert after.output_tokens_per_s > 0
    assert after.step > snapshot.step
    assert llm.num_steps >= after.step


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

"""What may be asked: the forms of prompts and parameters, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_runtime import LLM, RequestError, SamplingParams
from tests.api.tiny import VOCAB, alone, greedy, tokens, write_tiny


def test_one_prompt_many_prompts_and_kinds_of_numbers(llm: LLM) -> None:
    expected = tokens(llm.generate([[5, 6, 7]], greedy(3)))
    assert tokens(llm.generate([5, 6, 7], greedy(3))) == expected
    assert tokens(llm.generate((5, 6, 7), greedy(3))) == expected
    assert tokens(llm.generate([np.array([5, 6, 7])], greedy(3))) == expected  # type: ignore[arg-type]
    assert tokens(llm.generate(torch.tensor([5, 6, 7]), greedy(3))) == expected  # type: ignore[arg-type]
    assert tokens(llm.generate({"prompt_token_ids": [5, 6, 7]}, greedy(3))) == expected
    assert tokens(llm.generate([{"prompt_token_ids": range(5, 8)}], greedy(3))) == expected
    assert list(llm.stream({"prompt_token_ids": (5, 6, 7)}, greedy(3)))[-1].outputs[0].token_ids == expected[0]
    column = torch.tensor([[5], [6]])  # two prompts of one token, not one of two
    assert len(llm.generate(column, greedy(3))) == 2  # type: ignore[arg-type]
    assert llm.generate([], greedy(3)) == []
    per_prompt = llm.generate([[5], [6]], [greedy(2), greedy(4)])
    assert [len(ids) for ids in tokens(per_prompt)] == [2, 4]


BAD_REQUESTS = [
    ([], "the prompt is empty"),
    ("", "the prompt is empty"),
    ([VOCAB], f"ids must be in 0..{VOCAB - 1}"),
    ([-1], "ids must be in"),
    ([5] * 256, "it must have at most 255"),
    ([5.5], "is no prompt"),
    ([None], "is no prompt"),
    (["a", 3], "is no prompt"),
    ([True, False], "is no prompt"),
    (5, "5 is no prompt: each must be a text, a list of token ids"),
    (b"ab", "is no prompt"),
    (bytearray(b"ab"), "is no prompt"),
    ({5, 6}, "is no prompt"),
    (torch.tensor(5), "is no prompt"),
    ({"promt": "ab"}, "'promt'.* is no prompt"),
    ({"prompt": "ab", "prompt_token_ids": [5]}, "is no prompt"),
    ({"prompt": [5]}, "is no prompt"),
    ({"prompt_token_ids": "ab"}, "is no prompt"),
    ({"prompt": ""}, "the prompt is empty"),
    ("a\ud800b", "half of a surrogate pair, which is no character: .* at character 1"),
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
    for wrong in ({"max_tokens": 3}, [{"max_tokens": 3}], 3, "greedy"):
        with pytest.raises(RequestError, match="give one SamplingParams"):
            llm.generate([[5]], wrong)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="give one SamplingParams"):
            llm.stream([5], wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="cache_salt is 7"):
        llm.generate([[5]], cache_salt=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [b"ab", 5, {"prompt_token_ids": 5}, {"promt": "ab"}])
def test_a_prompt_by_itself_is_checked_as_one_of_many(llm: LLM, prompt: object) -> None:
    with pytest.raises(RequestError, match="is no prompt"):
        llm.generate(prompt)  # type: ignore[arg-type]


def test_text_in_a_mapping(llm: LLM) -> None:
    (output,) = llm.generate({"prompt": "def f"}, greedy(3))
    assert output.prompt == "def f"
    assert output.outputs == llm.generate("def f", greedy(3))[0].outputs


@pytest.mark.parametrize("max_tokens", [3, 1000, None, 2**63 - 1])
def test_the_models_length_ends_the_output(llm: LLM, max_tokens: int | None) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    (output,) = llm.generate([[5] * 254], params)
    assert len(output.outputs[0].token_ids) == 2
    assert output.outputs[0].finish_reason == "length"


def test_salts_keep_the_cache_apart(folder: Path) -> None:
    with LLM(str(folder), ep=1, overrides=["engine.page_size=4", "num_threads=1"]) as llm:

        def cached(salt: str) -> int:
            (output,) = llm.generate([[5] * 20], greedy(2), cache_salt=salt)
            return output.metrics.num_cached_tokens

        assert [cached(salt) for salt in ("", "", "mine", "yours", "mine")] == [0, 16, 0, 0, 16]
        (*_, streamed) = llm.stream([5] * 20, greedy(2), cache_salt="theirs")
        assert streamed.metrics.num_cached_tokens == 0


def test_a_request_that_can_never_fit(folder: Path) -> None:
    pages = ["engine.kv_cache_bytes=6KiB", "engine.page_size=4", "num_threads=1"]
    with LLM(str(folder), ep=1, overrides=pages) as llm:
        assert llm.snapshot().num_pages == 5
        with pytest.raises(RequestError, match="raise engine.kv_cache_bytes"):
            llm.generate([[5] * 10], greedy(30))
        (output,) = llm.generate([[5] * 10], greedy(11))
        assert len(output.outputs[0].token_ids) == 11
        (output,) = llm.generate([[5] * 10], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 11, "as many as fit the cache"
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
        with pytest.raises(RequestError, match="stop needs a tokenizer.json.*Use stop_token_ids"):
            llm.generate([[5]], SamplingParams(stop="a"))
        (output,) = llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=3, logprobs=1))
        assert output.prompt is None
        assert output.outputs[0].text == ""
        assert all(entry.decoded_token is None for row in output.outputs[0].logprobs or [] for entry in row.values())

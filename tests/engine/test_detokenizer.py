"""Incremental text equals decoding at once; stop texts are found however the tokens cut them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from moe_runtime.engine.detokenizer import Detokenizer, IncrementalDecoder, StopMatcher
from moe_runtime.engine.request import SamplingParams


class Bytes:
    """Token = one byte; 256 and 257 are a special token and the text "ab€"."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        parts = [
            bytes([token])
            if token < 256
            else "ab€".encode()
            if token == 257
            else b""
            if skip_special_tokens
            else b"<eos>"
            for token in ids
        ]
        return b"".join(parts).decode(errors="replace")


def metaspace() -> Tokenizer:
    """A tokenizer whose first word loses its leading space, as with Llama's."""
    vocab = {"▁": 0, "▁a": 1, "▁bc": 2, "d": 3, "e": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="e"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def pieces(ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    decoder = IncrementalDecoder(Bytes(), context)
    return [*[decoder.append(token) for token in ids], decoder.finish()]


def test_characters_come_whole() -> None:
    assert pieces("é€😀".encode()) == ["", "é", "", "", "€", "", "", "", "😀", ""]
    assert pieces("a€".encode()[:-1]) == ["a", "", "", "\ufffd"]


def test_bytes_that_are_no_text_do_not_hold_everything_back() -> None:
    ids = [0xFF] * 500 + list(b"ok")
    decoder = IncrementalDecoder(Bytes())
    given = [decoder.append(token) for token in ids]
    assert sum(map(len, given[:100])) >= 60
    assert "".join(given) + decoder.finish() == Bytes().decode(ids)


class Counting(Bytes):
    """Remembers the longest list of tokens that it was asked to decode."""

    longest = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(ids))
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize(
    ("ids", "longest"), [([*"aé€".encode()] * 99, 8), ([0xFF] * 500, 65), ([97, *[256] * 500, 98], 65)]
)
def test_the_window_stays_short(ids: list[int], longest: int) -> None:
    counting = Counting()
    decoder = IncrementalDecoder(counting)
    for token in ids:
        decoder.append(token)
    assert counting.longest <= longest


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    ids=st.lists(st.sampled_from([97, 256, 257, *"é€😀".encode(), 0xFF]), max_size=40), context=st.binary(max_size=8)
)
def test_pieces_make_the_text_decoded_at_once(ids: list[int], context: bytes) -> None:
    assert "".join(pieces(ids)) == Bytes().decode(ids)
    text = context.decode(errors="ignore").encode()
    assert "".join(pieces(ids, text)) == Bytes().decode(ids)


def byte_fallback() -> Tokenizer:
    """Tokens <0x00>…<0xFF>, then "x". An incomplete run of bytes turns into one replacement character per byte, the
    whole characters at its beginning included (as with sentencepiece's models)."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"x": 256}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="x"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@settings(deadline=None, derandomize=True, max_examples=100)
@given(text=st.text("xé€😀", max_size=12), whole=st.booleans())
def test_byte_fallback_runs_come_whole(text: str, whole: bool) -> None:
    tokenizer = byte_fallback()
    ids = [256 if byte == ord("x") else byte for byte in text.encode()]
    ids = ids if whole else ids[:-1]
    decoder = IncrementalDecoder(tokenizer)
    given = "".join([decoder.append(token) for token in ids])
    assert text.startswith(given), "nothing given out was a guess"
    if whole:
        assert given + decoder.finish() == text


@settings(deadline=None, derandomize=True, max_examples=100)
@given(noise=st.integers(50, 80), text=st.text("aé€😀", max_size=9))
def test_text_behind_a_long_run_of_noise(noise: int, text: str) -> None:
    ids = [0xFF] * noise + list(text.encode())
    assert "".join(pieces(ids)) == Bytes().decode(ids)


def test_leading_space_survives_behind_a_prompt() -> None:
    tokenizer = metaspace()
    decoder = IncrementalDecoder(tokenizer, [1, 3])
    assert [decoder.append(token) for token in (2, 3, 1)] == [" bc", "d", " a"]
    assert tokenizer.decode([2, 3, 1]) == "bcd a"


def test_leading_space_survives_many_special_tokens() -> None:
    tokenizer = metaspace()
    tokenizer.add_special_tokens(["<s>"])
    special = len(tokenizer.get_vocab()) - 1
    decoder = IncrementalDecoder(tokenizer, [1])
    pieces = [decoder.append(token) for token in (3, *[special] * 200, 1, 2)]
    assert [piece for piece in pieces if piece] == ["d", " a", " bc"]


def stop_oracle(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Character by character: the first end of any stop text, the earliest beginning among those."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    cut=st.lists(st.text("ab", max_size=4), max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3, unique=True),
)
def test_stop_texts_are_found_however_the_text_is_cut(cut: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out, found = "", None
    for piece in cut:
        text, found = matcher.feed(piece)
        out += text
        assert stop_oracle("".join(cut), stops)[0].startswith(out), "given out too early"
        if found:
            break
    else:
        out += matcher.finish()
    assert (out, found) == stop_oracle("".join(cut), stops)


def feed(params: SamplingParams, text: str) -> tuple[Detokenizer, list[str]]:
    """The detokenizer, and its text after each token and in the end."""
    detokenizer = Detokenizer(Bytes(), params)
    given = []
    for token in text.encode():
        detokenizer.append(token)
        given.append(detokenizer.text)
    detokenizer.finish()
    return detokenizer, [*given, detokenizer.text]


def test_stop_text_across_tokens_is_cut() -> None:
    detokenizer, given = feed(SamplingParams(stop=["STOP", "TOY"]), "a STO STOP more")
    assert detokenizer.text == "a STO "
    assert detokenizer.stop_reason == "STOP"
    assert detokenizer.num_tokens == len("a STO STOP"), "later tokens are not part of the completion"
    assert given[1:6] == ["a ", "a ", "a ", "a ", "a STO "], "held back while it could begin a stop text"


def test_without_a_stop_everything_comes() -> None:
    detokenizer, given = feed(SamplingParams(stop="STOP"), "a STO")
    assert given[-2:] == ["a ", "a STO"]
    assert not detokenizer.stopped


def test_stop_text_can_be_kept() -> None:
    assert feed(SamplingParams(stop="b", include_stop_str_in_output=True), "abc")[0].text == "ab"


@pytest.mark.parametrize("min_tokens", [2, 3])
def test_min_tokens_come_before_any_stop_text(min_tokens: int) -> None:
    detokenizer, _ = feed(SamplingParams(stop="ab", min_tokens=min_tokens), "ababab")
    assert (detokenizer.text, detokenizer.num_tokens) == ("ab", 4)


def test_a_stop_token_is_counted_but_has_no_text() -> None:
    for keep, expected in ((False, "a"), (True, "ab")):
        detokenizer = Detokenizer(Bytes(), SamplingParams(stop_token_ids=[98], include_stop_str_in_output=keep))
        detokenizer.append(97)
        detokenizer.append(98, is_stop_token=True)
        assert (detokenizer.text, detokenizer.num_tokens) == (expected, 2)


@pytest.mark.parametrize(("skip", "expected"), [(True, "a"), (False, "a<eos>")])
def test_special_tokens(skip: bool, expected: str) -> None:
    detokenizer = Detokenizer(Bytes(), SamplingParams(skip_special_tokens=skip))
    detokenizer.append(97)
    detokenizer.append(256)
    assert detokenizer.text == expected

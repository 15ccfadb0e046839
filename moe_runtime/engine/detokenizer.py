"""Incremental text of one completion at the owner of the requests: UTF-8 safe, with stop texts across token borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from moe_runtime.engine.request import SamplingParams

_REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 5
"""Prompt tokens decoded along, so that decoders that treat the first token apart see a middle."""
_LONGEST_INCOMPLETE = 3
"""Bytes of a UTF-8 character that can be there while the character is incomplete."""
_LONGEST_WINDOW = 64
"""Tokens after which a text that never ends on a whole character (bytes that are no text) is given out but for the
last few bytes."""
_TRIMMED_WINDOW = 8


class TokenDecoder(Protocol):
    """`tokenizers.Tokenizer`, or anything else that decodes."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class IncrementalDecoder:
    """Turns tokens into text piece by piece; what was given out is never taken back.

    Decoding a token alone is wrong (it may hold part of a character, or depend on its left neighbour), decoding all
    tokens again is quadratic: a window from the last whole character but one piece is decoded each time.
    """

    __slots__ = ("_decoder", "_given", "_ids", "_keep", "_skip_special")

    def __init__(self, decoder: TokenDecoder, context: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skip_special = skip_special_tokens
        self._ids = list(context[-CONTEXT_TOKENS:])
        self._keep = len(self._ids)  # window tokens before the last piece
        self._given = len(self._decode())  # characters of the window given out, or of the prompt

    def append(self, token: int) -> str:
        """The text that this token makes certain, possibly empty."""
        self._ids.append(token)
        text = self._decode()
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        overlong = len(self._ids) > _LONGEST_WINDOW
        if overlong:
            held = min(held, _LONGEST_INCOMPLETE)
        piece = text[self._given : len(text) - held]
        self._given += len(piece)
        if held and overlong:
            self._restart(_TRIMMED_WINDOW, held)
        elif piece and not held:
            self._restart(len(self._ids) - self._keep, 0)
        elif overlong and not held:
            del self._ids[self._keep :]  # skipped special tokens: they add no text to any window
        return piece

    def _restart(self, num_tokens: int, held: int) -> None:
        """Continue from the last `num_tokens` tokens, of whose text all but `held` characters were given out."""
        self._ids = self._ids[-num_tokens:]
        self._keep = len(self._ids)
        self._given = max(len(self._decode()) - held, 0)

    def finish(self) -> str:
        """The rest: an incomplete character at the very end, as its replacement character."""
        piece = self._decode()[self._given :]
        self._given += len(piece)
        return piece

    def _decode(self) -> str:
        return self._decoder.decode(self._ids, skip_special_tokens=self._skip_special)


class StopMatcher:
    """Finds the stop text that ends first (of those, the one that begins first), however the text comes in pieces."""

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, piece: str, *, armed: bool = True) -> tuple[str, str | None]:
        """The text that can no longer belong to a stop text, and the stop text found (its own text not included).

        Where not `armed`, stop texts that end within this piece are ordinary text.
        """
        text = self._held + piece
        if armed and (found := self._first(text, len(self._held))) is not None:
            begin, stop = found
            self._held = ""
            return text[:begin], stop
        held = self._possible_beginning(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str, seen: int) -> tuple[int, str] | None:
        """Begin and text of the match with the earliest end beyond `seen` characters."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            begin = text.find(stop, max(0, seen + 1 - len(stop)))
            if begin >= 0 and (best is None or (begin + len(stop), begin) < best[:2]):
                best = (begin + len(stop), begin, stop)
        return None if best is None else (best[1], best[2])

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop text may begin with (and go on after)."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class Detokenizer:
    """One completion's text. Feed the tokens in order; after `stopped`, further tokens are ignored.

    `num_tokens` counts the tokens that belong to the completion: tokens that the engine generated before it heard of a
    stop text are not among them.
    """

    __slots__ = ("_decoder", "_matcher", "_params", "_text", "num_tokens", "stop_reason")

    def __init__(self, decoder: TokenDecoder, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        self._params = params
        self._decoder = IncrementalDecoder(decoder, prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
        self._matcher = StopMatcher(params.stop_strings) if params.stop_strings else None
        self._text: list[str] = []
        self.num_tokens = 0
        self.stop_reason: str | None = None
        """The stop text that was found."""

    @property
    def stopped(self) -> bool:
        """A stop text was found: the request can be aborted and is finished with "stop"."""
        return self.stop_reason is not None

    @property
    def text(self) -> str:
        """All text given out so far."""
        if len(self._text) > 1:
            self._text = ["".join(self._text)]
        return self._text[0] if self._text else ""

    def append(self, token: int, *, is_stop_token: bool = False) -> None:
        """One token more. A stop token or end-of-text that ended the request adds no text."""
        if self.stopped:
            return
        self.num_tokens += 1
        if not is_stop_token or self._params.include_stop_str_in_output:
            self._give(self._decoder.append(token))

    def finish(self) -> None:
        """No more tokens come: give out what was held back."""
        if self.stopped:
            return
        self._give(self._decoder.finish())
        if self._matcher is not None:
            self._text.append(self._matcher.finish())  # empty after a stop text

    def _give(self, piece: str) -> None:
        if self._matcher is not None:
            armed = self.num_tokens > self._params.min_tokens
            piece, self.stop_reason = self._matcher.feed(piece, armed=armed)
            if self.stop_reason is not None and self._params.include_stop_str_in_output:
                piece += self.stop_reason
        if piece:
            self._text.append(piece)

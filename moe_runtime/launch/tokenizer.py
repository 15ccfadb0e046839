"""The checkpoint's tokenizer, loaded by transformers from local files; code that a checkpoint brings is never run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moe_runtime.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer  # transformers' own decode costs several times this one's

    def encode(self, text: str) -> list[int]:
        """The prompt's tokens, with the special tokens that the tokenizer puts around text."""
        return cast("list[int]", self._tokenizer.encode(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return cast(str, self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation by the checkpoint's chat template (transformers renders it in a sandbox)."""
        if self._tokenizer.chat_template is None:
            raise RequestError("this checkpoint has no chat template. Use generate() with a plain prompt.")
        text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return cast("list[int]", self._tokenizer.encode(cast(str, text), add_special_tokens=False))


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder; None where it has none that runs without its own code.

    Raises CheckpointError where its files cannot be read.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        return Tokenizer(PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True))
    except Exception as error:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: cannot be read as a tokenizer: {error}. Download the checkpoint again."
        ) from error

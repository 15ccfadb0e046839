"""Corpus, tokenizer and prompts of the demo model: Python's own standard library sources.

The corpus is every readable ``*.py`` file under the running interpreter's ``stdlib`` directory
(without ``site-packages``). A file belongs to the held-out split when the hash of its contents
says so, which makes the split deterministic and keeps identical copies of a file together.
"""

import hashlib
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
VOCAB_SIZE = 4096
_SKIPPED = frozenset({"site-packages", "__pycache__", "lib2to3", "idlelib", "encodings", "pydoc_data"})
_DATA_LIKE = 0.25  # files with a larger share of digits and non-ASCII characters are tables
_SPLIT = Regex(r" ?[^\W\d]+|\d{1,3}|\r?\n[ \t]*|[ \t]+(?=[ \t])| ?[^\s\w]+|\s+")
_CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + '\\n' }}"
    "{% else %}{{ '# ' + message['content'].replace('\\n', '\\n# ') + '\\n' }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class SourceFile:
    """One source file of the corpus."""

    name: str
    text: str
    held_out: bool


def collect_sources(*, held_out_share: float = 0.03, max_bytes: int = 400_000) -> list[SourceFile]:
    """Read the standard library's sources in a fixed order, each marked train or held-out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources: list[SourceFile] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED & set(relative.parts) or path.stat().st_size > max_bytes:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        odd = sum(char.isdigit() or not char.isascii() for char in text)
        if digest in seen or not text.strip() or odd > _DATA_LIKE * len(text):
            continue
        seen.add(digest)
        held_out = int(digest[:8], 16) < held_out_share * 2**32
        sources.append(SourceFile(relative.as_posix(), text, held_out))
    return sources


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE of ``VOCAB_SIZE`` entries whose decoding restores the input exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_SPLIT, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.int32]:
    """Encode files to one stream ``<|bos|> file <|eos|> <|bos|> file <|eos|> ...``."""
    pieces: list[npt.NDArray[np.int32]] = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        pieces.append(np.array([BOS_ID, *encoding.ids, EOS_ID], dtype=np.int32))
    return np.concatenate(pieces)

"""Evaluate an exported demo model on the held-out files and write its README.

    python -m moe_tools.demo_report --model models/demo --minutes 60 --tokens 20000000

Losses and routing come from the training code's own forward in float32, the sample completions
from transformers, so that both readings of the checkpoint are exercised.
"""

import argparse
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_tools.demo_checkpoint import load_checkpoint
from moe_tools.demo_corpus import collect_sources, encode_stream
from moe_tools.demo_model import DemoModel
from moe_tools.train_demo import balancedness

# Without a final line break: the tokenizer keeps a break and the next line's indentation in one token.
_SAMPLES = (
    "def fibonacci(n):",
    "class Stack:\n    def __init__(self):",
    'def read_lines(path):\n    """Return the lines of a file."""',
    "class TestAdd(unittest.TestCase):\n    def test_add(self):",
    "import os\nimport sys\n\ndef main():",
)


@dataclass(frozen=True)
class Report:
    """Held-out figures of one checkpoint."""

    tokens: int
    loss: float  # nats per token
    bits_per_byte: float
    mtp_loss: float  # nats per token
    acceptance: float  # share of MTP's greedy tokens that equal the main model's greedy next-next token
    accuracy: float  # share of next tokens that the main model's greedy choice hits
    balance: dict[int, float]  # layer to mean/max over 32 ranks
    busiest: dict[int, float]  # layer to max/mean over experts


def evaluate(model: DemoModel, directory: Path, *, context: int, limit: int) -> Report:
    """Run up to ``limit`` windows of ``context`` tokens, spread over the held-out files, through the model."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = [source.text for source in collect_sources() if source.held_out]
    stream = encode_stream(tokenizer, texts)
    bytes_per_token = sum(len(text.encode()) for text in texts) / len(stream)
    whole = len(stream) // (context + 1)
    windows = torch.from_numpy(stream[: whole * (context + 1)].astype(np.int64)).view(whole, -1)
    windows = windows[:: -(-whole // limit)]
    count = len(windows)
    counts = {index: torch.zeros_like(block.counts) for index, block in model.moe_layers()}
    sums = torch.zeros(4, dtype=torch.float64)
    for window in torch.split(windows, 8):
        with torch.no_grad():
            sums += _window_sums(model, window) * len(window)
        for index, block in model.moe_layers():
            counts[index] += block.counts
    loss, mtp_loss, acceptance, accuracy = (sums / count).tolist()
    return Report(
        tokens=count * context,
        loss=loss,
        bits_per_byte=loss / math.log(2) / bytes_per_token,
        mtp_loss=mtp_loss,
        acceptance=acceptance,
        accuracy=accuracy,
        balance={index: balancedness(load) for index, load in counts.items()},
        busiest={index: float(load.max() / load.double().mean()) for index, load in counts.items()},
    )


def _window_sums(model: DemoModel, window: Tensor) -> Tensor:
    """Means over token ids [B, S+1]: loss, MTP loss, MTP/main agreement, accuracy."""
    main, ahead = model(window[:, :-1])
    greedy, drafted = main.argmax(-1), ahead.argmax(-1)
    figures = (
        F.cross_entropy(main.flatten(0, 1), window[:, 1:].flatten()),
        F.cross_entropy(ahead.flatten(0, 1), window[:, 2:].flatten()),
        (drafted == greedy[:, 1:]).double().mean(),
        (greedy == window[:, 1:]).double().mean(),
    )
    return torch.tensor([float(figure) for figure in figures], dtype=torch.float64)


def completions(directory: Path, *, length: int) -> list[str]:
    """Greedy continuations of a few prompts, by transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    texts: list[str] = []
    for prompt in _SAMPLES:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


def readme(report: Report, samples: list[str], *, options: argparse.Namespace) -> str:
    """The model's README."""
    routing = "\n".join(
        f"| {index}{' (MTP)' if index == max(report.balance) else ''} | {level:.2f} | {report.busiest[index]:.1f} |"
        for index, level in report.balance.items()
    )
    shown = "\n\n".join(f"```python\n{sample.rstrip()}\n```" for sample in samples)
    values = {
        "minutes": f"{options.minutes:g}",
        "token_count": str(options.tokens),
        "python": platform.python_version(),
        "tokens": f"{options.tokens / 1e6:.1f}",
        "rate": f"{options.tokens / options.minutes / 60:,.0f}",
        "loss": f"{report.loss:.3f}",
        "bits": f"{report.bits_per_byte:.3f}",
        "accuracy": f"{report.accuracy:.1%}",
        "mtp": f"{report.mtp_loss:.3f}",
        "acceptance": f"{report.acceptance:.1%}",
        "held": f"{report.tokens:,}",
        "context": str(options.context),
        "routing": routing,
        "samples": shown,
    }
    text = Path(__file__).with_name("demo_readme.md").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def main() -> None:
    """Evaluate, print the figures and write README.md beside the checkpoint."""
    parser = argparse.ArgumentParser(description="Evaluate the demo model and write its README.")
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--minutes", type=float, required=True, help="length of the training run, for the README")
    parser.add_argument("--tokens", type=int, required=True, help="tokens trained on, for the README")
    parser.add_argument("--context", type=int, default=256, help="tokens per held-out window")
    parser.add_argument("--limit", type=int, default=1000, help="most held-out windows to use")
    options = parser.parse_args()
    torch.set_num_threads(2)
    report = evaluate(load_checkpoint(options.model), options.model, context=options.context, limit=options.limit)
    print(json.dumps(report.__dict__, indent=2))
    samples = completions(options.model, length=64)
    print("\n-----\n".join(samples))
    (options.model / "README.md").write_text(readme(report, samples, options=options), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Train the demo model on Python's standard library and export a DeepSeek-V3 checkpoint.

    python -m moe_tools.train_demo --minutes 60 --output models/demo

The learning rate follows the wall clock: warm-up, then a cosine that ends with the last minute.
The directory is exported again every few minutes, each file replaced atomically.
"""

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.multiprocessing as mp
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from moe_tools.demo_checkpoint import export, load_checkpoint
from moe_tools.demo_corpus import BOS_ID, collect_sources, encode_stream, train_tokenizer
from moe_tools.demo_experts import DemoShape
from moe_tools.demo_model import DemoModel

_RANKS = 32  # balancedness is reported for experts placed contiguously on this many ranks


@dataclass(frozen=True)
class Options:
    """Training settings; see ``parse_options`` for their meaning."""

    minutes: float
    output: Path
    workers: int
    batch: int
    context: int
    peak_rate: float
    mtp_weight: float
    bias_step: float
    balance_goal: float
    export_minutes: float
    seed: int
    resume: bool


def parse_options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train and export the demo model.")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock length of the run")
    parser.add_argument("--output", type=Path, default=Path("models/demo"))
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes that share each step")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step, over all workers")
    parser.add_argument("--context", type=int, default=256, help="tokens per sequence; doubled in the last quarter")
    parser.add_argument("--peak-rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--mtp-weight", type=float, default=0.2, help="weight of the MTP loss")
    parser.add_argument("--bias-step", type=float, default=1e-3, help="routing-bias step of the load balancing")
    parser.add_argument("--balance-goal", type=float, default=0.5, help="no balancing above this mean/max over ranks")
    parser.add_argument("--export-minutes", type=float, default=8.0, help="time between exports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="start from the weights in --output; use another --seed")
    return Options(**vars(parser.parse_args()))


class Windows:
    """Random training windows: half anywhere, half from a top-level line, opened by ``<|bos|>``."""

    def __init__(self, stream: npt.NDArray[np.int32], tokenizer: Tokenizer, *, seed: int) -> None:
        self._stream = stream
        self._random = np.random.default_rng(seed)
        newline = tokenizer.token_to_id("Ċ")
        blank = [index for text, index in tokenizer.get_vocab().items() if text.startswith(("Ċ", "Ġ", "#"))]
        opens = (stream[:-1] == newline) & ~np.isin(stream[1:], blank)
        self._openings = np.flatnonzero(opens) + 1

    def draw(self, batch: int, *, length: int) -> Tensor:
        """Token ids [batch, length + 1]."""
        rows: list[npt.NDArray[np.int64]] = []
        for index in range(batch):
            if index % 2:
                start = int(self._random.integers(len(self._stream) - length - 1))
                row = self._stream[start : start + length + 1].astype(np.int64)
            else:
                start = min(int(self._random.choice(self._openings)), len(self._stream) - length)
                row = np.concatenate(([BOS_ID], self._stream[start : start + length])).astype(np.int64)
            rows.append(row)
        return torch.from_numpy(np.stack(rows))


def balancedness(counts: Tensor, *, ranks: int = _RANKS) -> float:
    """Mean over max of the tokens that contiguous placement sends to each rank; counts [E]."""
    per_rank = counts.double().view(ranks, -1).sum(1)
    return float(per_rank.mean() / per_rank.max().clamp(min=1e-9))


class Balancer:
    """Auxiliary-loss-free balancing that only prevents collapse: it rests above the goal."""

    def __init__(self, model: DemoModel, *, step: float, goal: float) -> None:
        self._blocks = [block for _, block in model.moe_layers()]
        self._loads = [torch.zeros(block.counts.numel()) for block in self._blocks]
        self._step, self._goal = step, goal

    @torch.no_grad()
    def update(self, counts: Tensor) -> list[float]:
        """Shift the routing biases after a step, given counts [layers * E]; returns the layers' balancedness."""
        levels: list[float] = []
        for block, load, count in zip(self._blocks, self._loads, counts.chunk(len(self._blocks)), strict=True):
            load.mul_(0.95).add_(count, alpha=0.05)
            levels.append(balancedness(load))
            if levels[-1] < self._goal:
                block.gate.e_score_correction_bias += self._step * torch.sign(load.mean() - load)
        return levels


class Exchange:
    """Averages gradients over worker processes through shared memory.

    Processes that meet once a step keep going on a busy machine, where the threads of one
    process would wait for each other at every operation.
    """

    def __init__(self, model: DemoModel, *, workers: int) -> None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        routed = sum(block.counts.numel() for _, block in model.moe_layers())
        self._extra = routed + 1
        self._buffer = torch.zeros(workers, parameters + self._extra)
        self._buffer.share_memory_()  # type: ignore[no-untyped-call]
        self._barrier = mp.get_context("spawn").Barrier(workers)

    def average(self, model: DemoModel, *, rank: int, share: float) -> tuple[Tensor, float]:
        """Replace all gradients by their mean; returns the mean routing counts and rank 0's ``share``."""
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        counts = [block.counts.float() for _, block in model.moe_layers()]
        own = [*(grad.view(-1) for grad in grads), *counts, torch.tensor([share])]
        torch.cat(own, out=self._buffer[rank])
        self._barrier.wait()
        mean, first_share = self._buffer.mean(0), float(self._buffer[0, -1])
        self._barrier.wait()
        pieces = torch.split(mean[: -self._extra], [grad.numel() for grad in grads])
        for grad, piece in zip(grads, pieces, strict=True):
            grad.copy_(piece.view_as(grad))
        return mean[-self._extra : -1], first_share


def held_out_loss(model: DemoModel, stream: npt.NDArray[np.int32], *, context: int) -> tuple[float, float]:
    """Quick held-out estimate (main, MTP) on 64 windows spread over the files."""
    whole = len(stream) // (context + 1)
    windows = torch.from_numpy(stream[: whole * (context + 1)].astype(np.int64)).view(whole, -1)
    windows = windows[:: max(1, whole // 64)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pairs = [[float(x) for x in model.losses(part)] for part in torch.split(windows, 16)]
    main, mtp = np.mean(pairs, axis=0).tolist()
    return main, mtp


def optimiser(model: DemoModel, rate: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices but not on embedding and norms."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (plain if parameter.dim() < 2 or name.startswith("embed") else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def learning_rate(peak: float, *, step: int, share: float) -> float:
    """Warm-up over 100 steps times a cosine over the run's elapsed share, down to 3 % of the peak."""
    return peak * min(1.0, (step + 1) / 100) * (0.03 + 0.97 * (0.5 + 0.5 * math.cos(math.pi * min(share, 1.0))))


class Progress:
    """Rank 0's clock, log lines and periodic exports."""

    def __init__(self, options: Options, tokenizer: Tokenizer, *, held_out: npt.NDArray[np.int32]) -> None:
        self._options, self._tokenizer, self._held_out = options, tokenizer, held_out
        self._start = time.monotonic()
        self._next_export = options.export_minutes

    def seconds(self) -> float:
        """Time since the start of the loop."""
        return time.monotonic() - self._start

    def log(self, step: int, *, tokens: int, figures: str) -> None:
        """One line of the log."""
        seconds = self.seconds()
        print(f"step {step} {seconds:.0f}s tokens {tokens} ({tokens / seconds:.0f}/s) {figures}", flush=True)

    def export(self, model: DemoModel, *, final: bool) -> None:
        """Export when it is time to, and print the held-out losses."""
        if not final and self.seconds() < 60 * self._next_export:
            return
        self._next_export = self.seconds() / 60 + self._options.export_minutes
        export(model, self._tokenizer, directory=self._options.output)
        losses = held_out_loss(model, self._held_out, context=self._options.context)
        print(f"{'final' if final else 'interim'} export at {self.seconds():.0f}s, held-out {losses}", flush=True)


def train(
    rank: int,
    options: Options,
    streams: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]],
    vocabulary: str,
    exchange: Exchange,
) -> None:
    """One worker's training loop; all workers hold the same weights and draw different windows."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    tokenizer = Tokenizer.from_str(vocabulary)
    model = load_checkpoint(options.output) if options.resume else DemoModel(DemoShape())
    windows = Windows(streams[0], tokenizer, seed=options.seed + rank)
    adam = optimiser(model, options.peak_rate)
    balancer = Balancer(model, step=options.bias_step, goal=options.balance_goal)
    progress = Progress(options, tokenizer, held_out=streams[1])
    step, tokens, share = 0, 0, 0.0
    while share < 1:
        rate = learning_rate(options.peak_rate, step=step, share=share)
        for group in adam.param_groups:
            group["lr"] = rate
        longer = 2 if share > 0.75 else 1
        window = windows.draw(options.batch // options.workers // longer, length=options.context * longer)
        with torch.autocast("cpu", torch.bfloat16):
            main_loss, mtp_loss = model.losses(window, mtp_stride=2)
        torch.autograd.backward([main_loss + options.mtp_weight * mtp_loss])
        counts, share = exchange.average(model, rank=rank, share=progress.seconds() / 60 / options.minutes)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        levels = " ".join(f"{level:.2f}" for level in balancer.update(counts))
        tokens += options.batch * options.context
        step += 1
        if rank == 0 and step % 25 == 0:
            figures = f"loss {main_loss:.3f} mtp {mtp_loss:.3f} norm {norm:.2f} rate {rate:.2e} balance {levels}"
            progress.log(step, tokens=tokens, figures=figures)
        if rank == 0:
            progress.export(model, final=share >= 1)


def main() -> None:
    """Train the tokenizer, then the model."""
    options = parse_options()
    sources = collect_sources()
    tokenizer = train_tokenizer([source.text for source in sources if not source.held_out])
    stream, held_out = (
        encode_stream(tokenizer, [source.text for source in sources if source.held_out is kind])
        for kind in (False, True)
    )
    print(f"train tokens {len(stream)}, held-out tokens {len(held_out)}, {vars(options)}", flush=True)
    exchange = Exchange(DemoModel(DemoShape()), workers=options.workers)
    arguments = (options, (stream, held_out), tokenizer.to_str(), exchange)
    spawn(train, args=arguments, nprocs=options.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()

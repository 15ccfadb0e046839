"""One contender of the throughput benchmark, in a process of its own: load, warm up, then a timed batch per line read.

Protocol on standard streams: prints {"ready": …}, then for each line of input one JSON line with the seconds that the
whole batch took (prompts included) and a hash of the tokens. Under torchrun rank 0 speaks and the others follow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Batch = Callable[[], list[list[int]]]
"""Generates for all prompts; their new tokens in order."""


def prompts_of(folder: Path, *, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` random token ids; the same for every contender."""
    vocab = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(10, vocab, (count, length), generator=generator).tolist()
    return ids


def ours(folder: Path, prompts: list[list[int]], args: argparse.Namespace) -> tuple[Batch, Callable[[], None]]:
    """moe_runtime with the given `key=value` overrides."""
    from moe_runtime import LLM, SamplingParams

    words = [
        f"dtype={args.dtype}",
        f"num_threads={args.threads}",
        "engine.prefix_caching=false",
        f"engine.max_num_seqs={len(prompts)}",
        *args.override,
    ]
    llm = LLM(str(folder), overrides=words)
    params = SamplingParams(temperature=0.0, max_tokens=args.new_tokens, ignore_eos=True)

    def batch() -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]

    return batch, llm.close


def transformers(folder: Path, prompts: list[list[int]], args: argparse.Namespace) -> tuple[Batch, Callable[[], None]]:
    """transformers' generate with one of its experts implementations, or with its own expert parallelism."""
    from transformers import AutoModelForCausalLM

    extra: dict[str, Any] = {}
    if args.ep > 1:
        from transformers.distributed import DistributedConfig

        extra["distributed_config"] = DistributedConfig(
            tp_size=args.ep, ep_size=args.ep, ep_implementation="all_to_all"
        )
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, args.dtype),
        experts_implementation=args.experts,
        attn_implementation="sdpa",
        local_files_only=True,
        **extra,
    ).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompts)

    def batch() -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                pad_token_id=0,
            )
        new: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return new

    return batch, lambda: None


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the protocol until standard input ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("engine", choices=["moe_runtime", "transformers"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--experts", default="grouped_mm")
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--override", action="append", default=[])
    args = parser.parse_args(argv)
    prompts = prompts_of(args.model, count=args.prompts, length=args.prompt_tokens, seed=0)
    if args.engine == "moe_runtime":
        batch, close = ours(args.model, prompts, args)
    else:
        batch, close = transformers(args.model, prompts, args)
    batch()
    # moe_runtime's launcher has its own processes; transformers' ranks are torchrun's and must take turns together.
    spmd = args.engine == "transformers" and args.ep > 1
    _serve(batch, spmd=spmd)
    close()


def _serve(batch: Batch, *, spmd: bool) -> None:
    leads = not spmd or torch.distributed.get_rank() == 0
    if leads:
        _say({"ready": True, "torch": torch.__version__})
    while _next_turn(leads=leads, spmd=spmd):
        started, cpu = time.perf_counter(), time.process_time()
        tokens = batch()
        row = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "tokens": sum(map(len, tokens)),
            "hash": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:12],
            "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if leads:
            _say(row)


def _next_turn(*, leads: bool, spmd: bool) -> bool:
    """Whether there is another batch to run: rank 0 reads it, the others hear it from rank 0."""
    more = bool(sys.stdin.readline().strip()) if leads else False
    if spmd:
        flag = torch.tensor([int(more)])
        torch.distributed.broadcast(flag, 0)
        more = bool(flag.item())
    return more


def _say(row: dict[str, object]) -> None:
    print("BENCH " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""job=generate: prompts in, texts out, and how the run went."""

from __future__ import annotations

import math
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from moe_runtime.api import LLM
from moe_runtime.cli.console import Advance, Console, count, open_console
from moe_runtime.cli.next_command import load_command, next_command
from moe_runtime.cli.prompts import OWN_PROMPTS, Prompt, check_output, own_prompts, read_prompts, write_lines
from moe_runtime.engine.rebalance_state import REBALANCE_OFF, Activity, RebalanceState
from moe_runtime.engine.request import CompletionOutput, PositionLogprobs, RequestOutput, SamplingParams
from moe_runtime.launch.build import LoadProgress, OnProgress
from moe_runtime.launch.compose import Composed
from moe_runtime.launch.graphs import graphs_mode
from moe_runtime.launch.kernels import kernel_line
from moe_runtime.launch.meeting import Meeting
from moe_runtime.launch.shuffle import dispatch_names, overlap_line, split_line
from moe_runtime.launch.sizing import format_bytes

_SHOWN = 6
"""Texts printed; all of them go to `output`."""


def generate(composed: Composed, *, meeting: Meeting | None = None, console: Console | None = None) -> int:
    """Run the prompts of `composed.config`; returns the number of requests that failed.

    Under torchrun, ranks other than 0 serve: they read, print and write nothing.
    """
    if meeting is not None and meeting.place.rank:
        with LLM.from_composed(composed, meeting=meeting) as llm:
            llm.generate([])
        return 0
    config = composed.config
    console = open_console() if console is None else console
    file = composed.model_path / OWN_PROMPTS if config.prompts is None else Path(config.prompts)
    prompts = own_prompts(composed.model_path) if config.prompts is None else read_prompts(file)
    if config.output is not None:
        check_output(Path(config.output), prompts=file)
    params = SamplingParams(**asdict(config.sampling))
    began = time.perf_counter()
    with _loading(composed, console) as on_progress:
        llm = LLM.from_composed(composed, meeting=meeting, on_progress=on_progress)
    with llm:
        loaded = time.perf_counter()
        _show_topology(console, composed, llm, loaded - began)
        with _generating(console, llm, len(prompts)):
            outputs = llm.generate([prompt.value for prompt in prompts], params)
        elapsed = time.perf_counter() - loaded
        _show_texts(console, llm, outputs, config.output)
        _show_speed(console, llm, outputs, elapsed)
        _show_balance(console, llm.load_report().rank_load)
    if config.output is not None:
        write_lines(Path(config.output), _rows(prompts, outputs))
        console.line(f"wrote {config.output}")
    console.line(f"next: {next_command(composed)}")
    if command := load_command(composed):
        console.line(f"see its expert load: {command}")
    return sum(any(part.finish_reason == "abort" for part in output.outputs) for output in outputs)


@contextmanager
def _loading(composed: Composed, console: Console) -> Iterator[OnProgress]:
    layers, ranks = composed.model.num_layers, composed.topology.world if composed.topology.launcher == "virtual" else 1
    sizes = graphs_mode(composed.config, composed.model).sizes
    total = ranks * layers + len(sizes)
    with console.progress(f"loading {composed.config.model} on {count(ranks, 'rank')}", total) as advance:
        done = 0

        def on_progress(progress: LoadProgress) -> None:
            nonlocal done
            done += 1
            if progress.captured_rows is None:
                advance(done, f"rank {progress.rank}, {format_bytes(progress.num_bytes)} read")
            else:
                advance(done, f"decode step of {progress.captured_rows} rows captured")

        yield on_progress


@contextmanager
def _generating(console: Console, llm: LLM, num_prompts: int) -> Iterator[None]:
    """Shows the steps while the block runs; a clock thread reads the engine's public counters."""
    over = threading.Event()
    with console.progress(f"generating for {count(num_prompts, 'prompt')}", 0) as advance:
        watcher = threading.Thread(target=_watch, args=(llm, advance, over), name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def _watch(llm: LLM, advance: Advance, over: threading.Event) -> None:
    while not over.wait(0.2):
        advance(llm.num_steps, f"step {llm.num_steps}")


def _show_topology(console: Console, composed: Composed, llm: LLM, load_s: float) -> None:
    config, topology, model = composed.config, composed.topology, composed.model
    shared = f" + {model.n_shared_experts} shared ({config.shared_experts})" if model.n_shared_experts else ""
    copies = config.placement.num_redundant_experts
    rows = [
        ("mesh", str(topology)),
        *(("", reason) for reason in topology.reasons),
        ("model", f"{config.model}: {model.num_layers} layers, {model.n_routed_experts} routed experts{shared}"),
        ("dispatch", f"{' and '.join(dispatch_names(config))}, {count(copies, 'redundant expert')}"),
        ("overlap", overlap_line(config)),
        ("", split_line(config)),
        ("loaded", f"in {load_s:.1f} s"),
    ]
    if config.engine.kv_cache_dtype == "fp8":
        rows.append(("KV cache", "latents in FP8 with scales"))
    if config.device == "cuda":
        rows.append(("kernels", kernel_line(config, model)))
    if llm.notice:
        rows.append(("notice", llm.notice))
    console.pairs("moe_runtime", rows)


def _show_texts(console: Console, llm: LLM, outputs: Sequence[RequestOutput], file: str | None) -> None:
    for output in outputs[:_SHOWN]:
        prompt = output.prompt if output.prompt is not None else str(list(output.prompt_token_ids))
        for part in output.outputs:
            console.text(prompt, part.text if llm.tokenizer is not None else str(list(part.token_ids)))
    if (more := len(outputs) - _SHOWN) > 0:
        where = f"in {file}" if file else "not shown; output=FILE.jsonl writes all"
        console.line(f"… and {more} more, {where}")


def _show_speed(console: Console, llm: LLM, outputs: Sequence[RequestOutput], elapsed_s: float) -> None:
    written = sum(len(part.token_ids) for output in outputs for part in output.outputs)
    read = sum(len(output.prompt_token_ids) for output in outputs)
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    first = sorted(t for output in outputs if (t := output.metrics.ttft_s) is not None)
    each = sorted(t for output in outputs if (t := output.metrics.tpot_s) is not None)
    rows = [
        (
            "tokens",
            f"{written} written after {read} of {len(outputs)} prompts, in {elapsed_s:.1f} s and {llm.num_steps} steps",
        ),
        ("speed", f"{written / elapsed_s:.1f} tokens/s written, {(written + read) / elapsed_s:.1f} in all"),
    ]
    if first:
        rows.append(("first token", f"median {first[len(first) // 2] * 1000:.0f} ms, last {first[-1] * 1000:.0f} ms"))
    if each:
        rows.append(("each further", f"median {each[len(each) // 2] * 1000:.1f} ms"))
    snapshot = llm.snapshot()
    if (graphs := snapshot.graphs).captures:
        eager = count(snapshot.num_eager_decode_steps, "decode step")
        rows.append(("graphs", f"{graphs.captures} captured, replayed {graphs.replays} times; {eager} without"))
    if cut := snapshot.num_two_batch_steps:
        rows.append(("overlap", f"{cut} of {count(llm.num_steps, 'step')} ran as two micro-batches"))
    if split := snapshot.num_split_steps:
        rows.append(("overlap", f"{split} of {count(llm.num_steps, 'step')} combined in two parts"))
    rows += _moves_rows(snapshot.rebalance)
    rows.append(("memory", f"{format_bytes(peak)} at most in this process"))
    console.pairs("speed", rows)


def _moves_rows(state: RebalanceState) -> list[tuple[str, str]]:
    """What became of live rebalancing; nothing where it is off."""
    if state == REBALANCE_OFF:
        return []
    if state.num_decisions:
        slots = f"{count(state.num_slots_moved, 'slot')} of {count(state.num_layers_committed, 'layer')} moved"
        text = f"{slots}, {format_bytes(state.moved_bytes)}; last decision: {state.decision}"
    elif state.activity is Activity.PLANNING:
        text = "nothing moved: the first decision was still being made"
    elif state.last_failure is None:
        steps = count(state.window_steps, "step")
        text = f"nothing moved: no decision was due after {steps} with tokens (balance.interval_steps)"
    else:
        text = "nothing moved: no decision was made"
    rows = [("experts", text)]
    if state.last_failure is not None:
        rows.append(("", str(state.last_failure)))
    return rows


def _show_balance(console: Console, rank_load: Tensor) -> None:
    """`rank_load [L, ep]`: rows that each rank's experts received, per MoE layer."""
    if rank_load.shape[1] == 1:
        return
    rows = []
    for layer, load in enumerate(rank_load.double()):
        most, mean = float(load.max()), float(load.mean())
        hottest = load.argsort(descending=True, stable=True)[:4].tolist()
        rows.append(
            (
                str(layer),
                f"{mean / most:.3f}" if most else "–",
                f"{mean:.1f}",
                ", ".join(f"{rank} ({int(load[rank])})" for rank in hottest),
            )
        )
    console.table(
        "rows received by the ranks' experts (balancedness: mean / max, 1 is best)",
        ("layer", "balancedness", "mean rows", "hottest ranks (rows)"),
        rows,
    )


def _extras(output: RequestOutput, part: CompletionOutput) -> dict[str, object]:
    """What only some rows have."""
    found = {
        "stop_reason": part.stop_reason,
        "error": part.error,
        "cumulative_logprob": part.cumulative_logprob,
        "logprobs": None if part.logprobs is None else [_logprobs(position) for position in part.logprobs],
        "prompt_logprobs": None
        if output.prompt_logprobs is None
        else [None if position is None else _logprobs(position) for position in output.prompt_logprobs],
    }
    return {name: value for name, value in found.items() if value is not None}


def _logprobs(position: PositionLogprobs) -> dict[str, dict[str, object]]:
    """By token id. A probability of 0 has a null for its logarithm, which JSON cannot write."""
    return {
        str(token): {
            "logprob": entry.logprob if math.isfinite(entry.logprob) else None,
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
        }
        for token, entry in position.items()
    }


def _rows(prompts: Sequence[Prompt], outputs: Sequence[RequestOutput]) -> Iterator[dict[str, object]]:
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        metrics = output.metrics
        for part in output.outputs:
            yield {
                "index": index,
                "completion": part.index,
                "prompt": prompt.text if prompt.text is not None else list(prompt.token_ids),
                "prompt_token_ids": list(output.prompt_token_ids),
                "token_ids": list(part.token_ids),
                "text": part.text,
                "finish_reason": part.finish_reason,
                **_extras(output, part),
                "queue_s": metrics.queue_time_s,
                "ttft_s": metrics.ttft_s,
                "tpot_s": metrics.tpot_s,
                "total_s": None if metrics.finish_time is None else metrics.finish_time - metrics.arrival_time,
                "num_cached_tokens": metrics.num_cached_tokens,
            }

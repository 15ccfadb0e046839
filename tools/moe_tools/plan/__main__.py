"""Which layout, before there is a cluster.

python -m moe_tools.plan model=deepseek_v3 hardware=h200 prompt_tokens=2048 output_tokens=1024 tpot_ms=50
python -m moe_tools.plan trace=DIR hardware=gb200 json=plan.json html=plan.html
python -m moe_tools.plan validate=true
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_tools.plan.settings import PlanConfig, help_text, parse_words


def main(words: Sequence[str] | None = None) -> int:
    """0: answered, 2: a wrong question (the error's text says how to put it right), 3: nothing fits."""
    given = list(sys.argv[1:] if words is None else words)
    if {"help", "--help", "-h"} & set(given):
        print(help_text())
        return 0
    try:
        plan = parse_words(given)
        with _one_thread():
            return _validate(plan) if plan.validate else _plan(plan)
    except MoeRuntimeError as error:
        print(error, file=sys.stderr)
        return 2


def _plan(plan: PlanConfig) -> int:
    from moe_runtime.cli.console import open_console
    from moe_tools.expert_load.progress import watched
    from moe_tools.plan.document import as_json
    from moe_tools.plan.evaluate import Evaluator, evaluate
    from moe_tools.plan.page import page
    from moe_tools.plan.placed import write_placements
    from moe_tools.plan.report import intro, lines

    _check_outputs(plan)
    console, state = open_console(sys.stderr), [""]
    evaluator = Evaluator(plan)
    print(intro(evaluator), flush=True)
    with watched(console, "layouts", lambda: state[-1]):
        answer = evaluate(evaluator, on_layout=state.append)
    with _written("placement", plan.placement):
        files = write_placements(answer)
    for line in lines(answer, files):
        print(line)
    for (ep, redundant), file in files.items():
        print(f"placement: {file} (ep={ep}, {redundant} redundant)")
    if plan.placement is not None and not files:
        print("placement: nothing fits, so there is none to write")
    for key, target, text in (("json", plan.json, as_json), ("html", plan.html, page)):
        if target is not None:
            with _written(key, target):
                Path(target).write_text(text(answer, files), encoding="utf-8")
            print(f"{key}: {target}")
    return 0 if answer.apart or answer.together else 3


def _check_outputs(plan: PlanConfig) -> None:
    """Better now than after the work. ConfigError where a file cannot be written, or is one that is read."""
    from moe_tools.outputs import check_output

    files = [(key, Path(file)) for key in ("json", "html", "placement") if (file := getattr(plan, key)) is not None]
    for number, (key, file) in enumerate(files):
        check_output(key, file, reads=(plan.trace, plan.hardware, plan.model))
        if other := next((name for name, path in files[:number] if path.absolute() == file.absolute()), None):
            raise ConfigError(f"{key}={file}: is also {other}=. Give each its own file.")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small operations: torch's threads would only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _written(key: str, file: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{key}={file}: cannot be written ({error.strerror}). Give another file.") from error


def _validate(plan: PlanConfig) -> int:
    from moe_runtime.cli.console import open_console
    from moe_tools.expert_load.progress import watched
    from moe_tools.plan.published import Predictor, held_out, leave_one_out
    from moe_tools.plan.published_report import published_text
    from moe_tools.plan.sensitivity import sensitivities

    began = time.monotonic()
    with watched(open_console(sys.stderr), "published runs", lambda: f"{time.monotonic() - began:.0f} s"):
        predictor = Predictor(seed=plan.seed)
        text = published_text(leave_one_out(predictor), held_out(predictor), sensitivities(seed=plan.seed))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

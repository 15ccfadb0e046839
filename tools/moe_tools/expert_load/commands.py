"""The six commands."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from moe_runtime.balance.trace import TraceHeader, has_trace, read_header, read_trace
from moe_runtime.cli.console import Console
from moe_runtime.errors import ConfigError
from moe_runtime.launch.sizing import format_bytes
from moe_runtime.parallel.placement import ExpertPlacement
from moe_tools.expert_load.analysis import check_fits
from moe_tools.expert_load.document import Document, make_document
from moe_tools.expert_load.page import page_html
from moe_tools.expert_load.pictures import write_pictures
from moe_tools.expert_load.planning import compare, make_plan, read_plan
from moe_tools.expert_load.progress import watched
from moe_tools.expert_load.recording import free_folder, record
from moe_tools.expert_load.run_file import read_run, repeated
from moe_tools.expert_load.source import Source, check_same, open_source, recorded_source
from moe_tools.expert_load.summary import show_comparison, show_plan, show_summary
from moe_tools.expert_load.words import PROGRAM, WORKLOAD_KEYS, Words, asked
from moe_tools.outputs import check_output

_DEFAULT_FOLDER: Final = "runs/expert_load"
_SPARE: Final = "placement.num_redundant_experts"


def run_command(words: Words, console: Console) -> None:
    """Run one. Raises what `__main__` tells the user."""
    match words.command:
        case "record":
            _record(words, console)
        case "report":
            _report(words, console)
        case "plan":
            _plan(words, console)
        case "apply":
            _apply(words, console)
        case "compare":
            _compare(words, console)
        case "top":
            from moe_tools.expert_load.top import top

            top(words, console)


def _record(words: Words, console: Console) -> None:
    folder = _folder(words, _DEFAULT_FOLDER)
    trace = record(words, folder, console)
    if trace is not None:
        show_summary(console, _document(console, recorded_source(words, trace, folder), None, ""))
        _next(console, "report", f"trace={folder}", f"output={folder / 'report.html'}")


def _report(words: Words, console: Console) -> None:
    file, plan = words.own.get("plan"), None
    if "output" in words.own:
        check_output("output", Path(words.own["output"]), reads=_read(words))
    if file is not None:
        plan = read_plan(file)
    if "trace" in words.own:
        _check_nothing_runs(words)
        source = open_source(words)
    else:
        if unused := next((key for key in ("fine_tune", "num_routed") if key in words.own), None):
            raise ConfigError(f"{unused}={words.own[unused]}: is about a trace. Add trace=…, or leave it out.")
        folder = free_folder(Path(_DEFAULT_FOLDER))

        def check(header: TraceHeader) -> None:
            if file is not None and plan is not None:
                check_fits(plan, header, name=f"plan={file}")

        trace = record(words, folder, console, check=check)
        if trace is None:
            return
        source = recorded_source(words, trace, folder)
    page = Path(words.own.get("output", str(source.folder / "report.html")))
    check_output("output", page, reads=_read(words))
    header = source.trace.header
    if file is not None and plan is not None:
        check_fits(plan, header, name=f"plan={file}")
        name = f"The plan of {Path(file).name}"
    else:
        plan = None if header.ep == 1 else make_plan(source.trace, num_groups=source.num_groups)
        name = "" if plan is None else f"A plan with {plan.num_physical - plan.num_logical} spare slots"
    document = _document(console, source, plan, name)
    page.write_text(page_html(document.data), encoding="utf-8")
    pictures = write_pictures(document.data, page)
    show_summary(console, document)
    console.line(f"wrote {page} ({format_bytes(page.stat().st_size)}), and {', '.join(str(p) for p in pictures)}")
    if file is None:
        wider = ["ep=8"] if header.ep == 1 else []
        output = source.folder / "plan.json"
        _next(console, "plan", f"trace={source.place}", *_about(words, source), *wider, f"output={output}")


def _check_nothing_runs(words: Words) -> None:
    """ConfigError for words of a run beside trace=…"""
    place = Path(words.own["trace"])
    about = {"model"} if has_trace(place) else {"model", "ep", "ranks_per_node", "placement.file", _SPARE}
    running = [word for word in words.launch if word.partition("=")[0] not in about]
    running += [f"{key}={words.own[key]}" for key in WORKLOAD_KEYS if key in words.own]
    if running:
        raise ConfigError(
            f"{running[0]}: report trace=… shows what was recorded, and runs nothing. Leave it out, or leave trace= "
            "out to record first."
        )


def _plan(words: Words, console: Console) -> None:
    output = Path(words.need("output"))
    check_output("output", output, reads=_read(words))
    budget, grouped = words.whole("move_budget", None, least=0), words.one_of("groups", ("true", "false")) == "true"
    source, given = open_source(words), asked(words.launch)
    header = source.trace.header
    if source.ours and words.gives("placement.file"):
        raise ConfigError(
            f"placement.file={given['placement.file']}: this recording knows its own placement. Leave it out."
        )
    if (given["ep"] or header.ep) == 1:
        raise ConfigError("plan: ep=1: one rank holds every expert, so there is nothing to plan. Add ep=8.")
    plan = make_plan(
        source.trace,
        ep=given["ep"],
        ranks_per_node=given["ranks_per_node"],
        num_redundant=given[_SPARE] if words.gives(_SPARE) else None,
        num_groups=source.num_groups if grouped else None,
        policy=given["balance.policy"],
        move_budget=budget,
    )
    output.write_text(plan.to_json(), encoding="utf-8")
    document = _document(console, source, plan, f"The plan of {output.name}")
    show_summary(console, document)
    show_plan(console, document)
    nodes = plan.ep // (given["ranks_per_node"] or header.ranks_per_node)
    if source.model is None and grouped:
        console.line(
            f"{header.model or 'the model'} is not on this machine: its groups of experts (n_group), if it has some, "
            "are not kept together. To keep them add model=FOLDER."
        )
    elif grouped and nodes > 1 and (groups := source.num_groups) and groups % nodes == 0:
        console.line(f"experts of each of {groups} groups stay on one node; groups=false plans without that")
    console.line(f"wrote {output}")
    _after_plan(words, source, plan, output, console)


def _after_plan(words: Words, source: Source, plan: ExpertPlacement, output: Path, console: Console) -> None:
    """The next command: the same run under the plan, else any run of this model, else a page."""
    applied = _applied(str(output))
    elsewhere = [f"output={free_folder(applied)}"] if has_trace(applied) else []
    mesh = [word for word in words.launch if word.startswith("ranks_per_node=")]
    other = _about(words, source) if source.ours else []
    if source.ours and source.can_run and read_run(source.place) is not None:
        _next(console, "apply", f"trace={source.place}", f"plan={output}", *mesh, *other, *elsewhere)
    elif source.ours and source.can_run:
        _next(console, "apply", f"plan={output}", f"model={source.name}", f"ep={plan.ep}", *mesh, *elsewhere)
    else:
        _next(console, "report", f"trace={source.place}", f"plan={output}", *_about(words, source))


def _apply(words: Words, console: Console) -> None:
    file = words.need("plan")
    plan = read_plan(file)
    folder = _folder(words, str(_applied(file)))
    before = None
    if "trace" in words.own:
        _check_recording(words, "trace")
        before = read_header(words.own["trace"])
        words = repeated(words, Path(words.own["trace"]), before, plan)
    if given := words.value("placement.file"):
        raise ConfigError(f"placement.file={given}: the run's placement is plan={file}. Leave placement.file= out.")
    ep = () if words.gives("ep") else (f"ep={plan.ep}",)
    words = Words(words.command, words.own, (*words.launch, *ep, f"placement.file={file}"))

    def check(header: TraceHeader) -> None:
        if before is not None:
            check_same(before, header, name=f"trace={words.own['trace']}", fine_tune=words.flag("fine_tune"))

    trace = record(words, folder, console, check=check)
    if trace is None:
        return
    show_summary(console, _document(console, recorded_source(words, trace, folder), None, ""))
    if "trace" in words.own:
        about = [f"fine_tune={words.own['fine_tune']}"] if "fine_tune" in words.own else []
        _next(console, "compare", f"trace={words.own['trace']}", f"plan={file}", f"measured={folder}", *about)
    else:
        _next(console, "report", f"trace={folder}", f"output={folder / 'report.html'}")


def _compare(words: Words, console: Console) -> None:
    for key in ("trace", "measured"):
        _check_recording(words, key)
    before, file = read_trace(words.need("trace")), words.need("plan")
    plan = read_plan(file)
    check_fits(plan, before.header, name=f"plan={file}")
    folder = Path(words.own["measured"]) if "measured" in words.own else _measured(words.own["trace"], file, plan)
    measured = read_trace(folder)
    check_same(before.header, measured.header, name=f"measured={folder}", fine_tune=words.flag("fine_tune"))
    show_comparison(console, compare(before, plan, measured))
    if run := read_run(folder):
        launch = [word for word in run.launch if not word.startswith("balance.")]
        console.line(f"use it: python -m moe_runtime {shlex.join(launch)}")


def _check_recording(words: Words, key: str) -> None:
    """ConfigError where `key` names something else, like another program's record."""
    place = words.own.get(key)
    if place is not None and Path(place).exists() and not has_trace(place):
        raise ConfigError(
            f"{key}={place}: is no recording of this tool, and {words.command} needs one. Give a folder that record or "
            "apply has written."
        )


def _measured(trace: str, file: str, plan: ExpertPlacement) -> Path:
    """The newest recording under the plan, of those that `apply` writes and the plan's own."""
    applied = sorted(_runs(_applied(file)), key=lambda folder: (folder / "trace.json").stat().st_mtime, reverse=True)
    for folder in (*applied, Path(trace)):
        ran = read_header(folder).placement()
        if ran is not None and ran.ep == plan.ep and ran.phy2log.equal(plan.phy2log):
            return folder
    run = shlex.join(["apply", f"trace={trace}", f"plan={file}"])
    raise ConfigError(f"measured: nothing was recorded under {file} yet. Run it first: {PROGRAM} {run}")


def _runs(folder: Path) -> Iterator[Path]:
    """`folder`, folder-2, folder-3, … with traces."""
    number = 2
    place = folder
    while has_trace(place):
        yield place
        place = folder.with_name(f"{folder.name}-{number}")
        number += 1


def _read(words: Words) -> list[str | None]:
    """The files and folders that the command reads, as the words name them."""
    return [words.own.get("trace"), words.own.get("plan"), *map(words.value, ("placement.file", "prompts", "model"))]


def _document(console: Console, source: Source, plan: ExpertPlacement | None, name: str) -> Document:
    began = time.monotonic()
    with watched(console, "working out the loads", lambda: f"{time.monotonic() - began:.0f} s"):
        return make_document(source.trace, plan=plan, plan_name=name, facts=source.facts)


def _folder(words: Words, default: str) -> Path:
    """Where a recording goes: output=, else the default or a free name beside it."""
    return Path(words.own["output"]) if "output" in words.own else free_folder(Path(default))


def _applied(plan: str) -> Path:
    """Where `apply` records, unless told otherwise: beside the plan."""
    return Path(plan).with_name(f"{Path(plan).stem}-applied")


def _about(words: Words, source: Source) -> list[str]:
    """The words that say what a trace is of, for the next command on it."""
    names = ("model=",) if source.ours else ("model=", "ep=", "ranks_per_node=", "placement.file=")
    own = [f"{name}={words.own[name]}" for name in ("fine_tune", "num_routed") if name in words.own]
    placed = [word for word in words.launch if word.startswith(names)]
    if source.trace.header.ep == 1:  # the next command spreads experts over more ranks
        placed = [word for word in placed if not word.startswith(("ep=", "placement.file="))]
    return [*placed, *own]


def _next(console: Console, *words: str) -> None:
    console.line(f"next: {PROGRAM} {shlex.join(words)}")

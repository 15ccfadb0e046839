"""The six commands."""

from __future__ import annotations

import shlex
from pathlib import Path

from moe_runtime.balance.trace import Trace, read_trace
from moe_runtime.cli.console import Console
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.placement import ExpertPlacement
from moe_runtime.parallel.replicas import ReplicaChoice
from moe_tools.expert_load.document import Document, make_document
from moe_tools.expert_load.facts import Facts, find_facts
from moe_tools.expert_load.page import page_html
from moe_tools.expert_load.pictures import write_pictures
from moe_tools.expert_load.planning import compare, make_plan, read_plan
from moe_tools.expert_load.recording import DEFAULT_FOLDER, record, repeated, words_of_run
from moe_tools.expert_load.summary import show_comparison, show_plan, show_summary
from moe_tools.expert_load.words import WORKLOAD_KEYS, Words, asked, config_of

_PROGRAM = "python -m moe_tools.expert_load"


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
    folder = Path(words.own.get("output", DEFAULT_FOLDER))
    trace = record(words, folder, console)
    if trace is not None:
        show_summary(console, _document(trace, folder, None, ""))
        _next(console, "report", f"trace={folder}", f"output={folder / 'report.html'}")


def _report(words: Words, console: Console) -> None:
    if "trace" in words.own:
        if running := [*words.launch, *(f"{key}={words.own[key]}" for key in WORKLOAD_KEYS if key in words.own)]:
            raise ConfigError(
                f"{running[0]}: report trace=… shows what was recorded, and runs nothing. Leave it out, or leave "
                "trace= out to record first."
            )
        folder = Path(words.own["trace"])
        trace = read_trace(folder)
    else:
        folder = Path(DEFAULT_FOLDER)
        folder = folder if not (folder / "trace.json").exists() else _free(folder)
        recorded = record(words, folder, console)
        if recorded is None:
            return
        trace = recorded
    page = Path(words.own.get("output", str(folder / "report.html")))
    check_page(page)
    _check_windows(trace, folder)
    document = _document(trace, folder, *_shown_plan(words, trace))
    page.write_text(page_html(document.data), encoding="utf-8")
    pictures = write_pictures(document.data, page)
    show_summary(console, document)
    console.line(f"wrote {page} ({page.stat().st_size / 2**20:.1f} MiB), and {', '.join(str(p) for p in pictures)}")
    _next(console, "plan", f"trace={folder}", f"output={folder / 'plan.json'}")


def _shown_plan(words: Words, trace: Trace) -> tuple[ExpertPlacement | None, str]:
    """The plan file's, or one made here; none where one rank holds everything."""
    if file := words.own.get("plan"):
        return read_plan(file, trace), f"The plan of {Path(file).name}"
    if trace.header.ep == 1:
        return None, ""
    plan = make_plan(trace)
    return plan, f"A plan with {plan.num_physical - plan.num_logical} spare slots"


def _plan(words: Words, console: Console) -> None:
    folder = Path(words.need("trace"))
    output = Path(words.need("output"))
    check_page(output, what="output", example="plan.json")
    trace = read_trace(folder)
    _check_windows(trace, folder)
    given = asked(words.launch)
    if words.gives("model") and given["model"] != trace.header.model:
        raise ConfigError(
            f"model={given['model']}: the trace is of {trace.header.model!r}. Leave model= out, or record that model."
        )
    plan = make_plan(
        trace,
        ep=given["ep"],
        ranks_per_node=given["ranks_per_node"],
        num_redundant=given[spare] if words.gives(spare := "placement.num_redundant_experts") else None,
        policy=given["balance.policy"],
        move_budget=words.whole("move_budget", None, least=0),
    )
    output.write_text(plan.to_json(), encoding="utf-8")
    document = _document(trace, folder, plan, f"The plan of {output.name}")
    show_summary(console, document)
    show_plan(console, document)
    console.line(f"wrote {output}")
    _next(console, "apply", f"trace={folder}", f"plan={output}")


def _apply(words: Words, console: Console) -> None:
    file = words.need("plan")
    folder = Path(words.own.get("output", str(_applied(file))))
    plan = ExpertPlacement.from_json(_text(file), name=f"plan={file}")
    if "trace" in words.own:
        words = repeated(words, Path(words.own["trace"]))
    if not words.gives("ep"):
        words = Words(words.command, words.own, (*words.launch, f"ep={plan.ep}"))
    words = Words(words.command, words.own, (*words.launch, f"placement.file={file}"))
    trace = record(words, folder, console)
    if trace is None:
        return
    show_summary(console, _document(trace, folder, None, ""))
    if "trace" in words.own:
        _next(console, "compare", f"trace={words.own['trace']}", f"plan={file}", f"measured={folder}")


def _compare(words: Words, console: Console) -> None:
    before, file = read_trace(words.need("trace")), words.need("plan")
    plan = read_plan(file, before)
    own = before.header.placement()
    if "measured" in words.own:
        folder = Path(words.own["measured"])
    elif own is not None and own.ep == plan.ep and own.phy2log.equal(plan.phy2log):
        folder = Path(words.own["trace"])
    elif (_applied(file) / "trace.json").exists():
        folder = _applied(file)
    else:
        line = " ".join([_PROGRAM, "apply", f"trace={words.own['trace']}", f"plan={file}"])
        raise ConfigError(f"measured: nothing was recorded under {file} yet. Run it first: {line}")
    found = compare(before, plan, read_trace(folder), choice=replica_choice(folder))
    show_comparison(console, found)


def replica_choice(folder: Path) -> ReplicaChoice:
    """That of the recording in `folder`, as far as this tool ran it; else the default."""
    words = [word for word in words_of_run(folder) if word.startswith("placement.replica_choice=")]
    return ReplicaChoice(asked(words)["placement.replica_choice"]) if words else ReplicaChoice.STATIC


def check_page(file: Path, *, what: str = "output", example: str = "report.html") -> None:
    """ConfigError where `file` cannot be written: better now than after the work."""
    if file.is_dir():
        raise ConfigError(f"{what}={file}: is a folder. Name a file in it: {what}={file / example}.")
    if not file.parent.is_dir():
        raise ConfigError(f"{what}={file}: there is no folder {file.parent}. Make it first: mkdir -p '{file.parent}'.")


def _document(trace: Trace, folder: Path, plan: ExpertPlacement | None, name: str) -> Document:
    return make_document(trace, plan=plan, plan_name=name, facts=_facts(trace, folder), choice=replica_choice(folder))


def _facts(trace: Trace, folder: Path) -> Facts | None:
    """Bytes, where the model is here; in the dtypes of the run where this tool ran it."""
    header = trace.header
    shared = "dispatched" if header.num_logical > header.num_routed else "replicated"
    kept = [word for word in words_of_run(folder) if word.startswith(("model=", "dtype=", "device=", "fp8_weights="))]
    words = [*([] if any(word.startswith("model=") for word in kept) else [f"model={header.model}"]), *kept]
    config = config_of(
        [*words, f"shared_experts={shared}"],
        ep=header.ep,
        tp=header.tp,
        dp=header.dp,
        ranks_per_node=header.ranks_per_node,
    )
    return find_facts(config)


def _check_windows(trace: Trace, folder: Path) -> None:
    if not trace.num_windows:
        raise ConfigError(
            f"trace={folder}: holds no window of steps yet. Wait until balance.window_steps steps have run, or record "
            "again with a smaller balance.window_steps."
        )


def _applied(plan: str) -> Path:
    """Where `apply` records, unless told otherwise: beside the plan."""
    return Path(plan).with_name(f"{Path(plan).stem}-applied")


def _free(folder: Path) -> Path:
    return next(name for n in range(2, 10_000) if not (name := Path(f"{folder}-{n}")).exists())


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"plan={file}: cannot be read: {error}. Make one: plan trace=… output=plan.json.") from None


def _next(console: Console, *words: str) -> None:
    console.line(f"next: {_PROGRAM} {' '.join(map(shlex.quote, words))}")

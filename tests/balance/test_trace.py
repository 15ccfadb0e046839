"""The trace's format: what is written is read, under a byte cap, while a run writes; and what is no trace is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_runtime.balance.trace import Change, Trace, TraceHeader, TraceWriter, Window, read_trace, routed_loads
from moe_runtime.balance.trace_parts import part_bytes
from moe_runtime.errors import TraceError
from moe_runtime.parallel.placement import ExpertPlacement

L, E, EP, K = 2, 4, 2, 2
HEADER = TraceHeader(
    model="small",
    num_layers=L,
    num_logical=E,
    num_routed=E,
    top_k=K,
    ep=EP,
    dp=EP,
    phy2log=((0, 1, 2, 3), (3, 2, 1, 0)),
)
TOKEN_HEADER = TraceHeader(
    model="s", num_layers=L, num_logical=E, num_routed=E, top_k=K, ep=EP, dp=EP, mode="per_token"
)


def window(step: int, phase: str = "mixed", *, tokens: int = 3) -> Window:
    loads = torch.arange(L * E).view(L, E) + step
    return Window(
        phase=phase,
        first_step=step,
        last_step=step,
        num_steps=1,
        num_tokens=tokens,
        loads=loads,
        rank_loads=loads.view(L, EP, 2).sum(2),
    )


def tokens(ids: list[list[list[int]]], windows: list[int]) -> dict[str, torch.Tensor]:
    count = len(ids)
    return {
        "routes": torch.tensor(ids, dtype=torch.int16).view(count, L, K),
        "request": torch.arange(count),
        "position": torch.arange(count),
        "step": torch.tensor(windows),
        "home": torch.zeros(count, dtype=torch.int64),
        "is_prompt": torch.ones(count, dtype=torch.bool),
        "window": torch.tensor(windows),
    }


def written(folder: Path, header: TraceHeader = HEADER) -> Path:
    writer = TraceWriter(folder, header)
    writer.add([window(0), window(1, "decode")])
    writer.close()
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path / "new" / "folder"))
    assert trace.num_windows == 2
    assert trace.phases == ("mixed", "decode")
    assert trace.loads.dtype == torch.int64
    assert torch.equal(trace.loads[1], window(1).loads)
    assert torch.equal(trace.rank_loads[1], window(1).rank_loads)
    assert [trace.window_steps.tolist(), trace.num_tokens.tolist()] == [[1, 1], [3, 3]]
    assert [trace.first_step.tolist(), trace.last_step.tolist()] == [[0, 1], [0, 1]]
    assert trace.routes.shape == (0, L, K)
    assert trace.header.complete and trace.header.created.endswith("Z")
    placement = trace.header.placement()
    assert isinstance(placement, ExpertPlacement) and placement.phy2log.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    decode = trace.of_phase("decode")
    assert decode.phases == ("decode",) and torch.equal(decode.loads, trace.loads[1:])


def test_the_folder_holds_json_and_safetensors_alone(tmp_path: Path) -> None:
    assert sorted(file.name for file in written(tmp_path / "t").iterdir()) == ["part-00000.safetensors", "trace.json"]


def test_tokens_stay_with_their_windows_over_parts(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, TOKEN_HEADER)
    writer.add([window(0), window(1, "decode")], tokens([[[0, 1], [2, -1]], [[3, 1], [2, 0]]], [1, 0]))
    writer.add([window(2, "decode")], tokens([[[1, 2], [1, 2]]], [0]))
    writer.flush()
    writer.add([window(3)], tokens([[[0, 2], [0, 2]]], [0]))
    writer.close()
    trace = read_trace(tmp_path)
    assert trace.window.tolist() == [1, 0, 2, 3]
    loads = routed_loads(trace)
    assert loads.shape == (4, L, E)
    assert loads[1].tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]
    assert loads[3].tolist() == [[1, 0, 1, 0], [1, 0, 1, 0]]
    decode = trace.of_phase("decode")
    assert decode.window.tolist() == [0, 1] and torch.equal(routed_loads(decode), loads[1:3])


def test_the_oldest_parts_make_room(tmp_path: Path) -> None:
    """At any time the parts are under the cap, and the folder is readable."""
    writer = TraceWriter(tmp_path, HEADER, cap_bytes=3000)
    for step in range(12):
        writer.add([window(step)])
        writer.flush()
        parts = sorted(tmp_path.glob("part-*"))
        assert sum(part.stat().st_size for part in parts) <= 3000
        trace = read_trace(tmp_path)
        assert trace.last_step[-1] == step
        assert trace.header.dropped_windows == step + 1 - trace.num_windows
    assert trace.num_windows == len(parts) > 2
    assert trace.header.first_part == 12 - len(parts)


MOVED = (Change(1, 0, (1, 0, 3, 2)), Change(3, 1, (0, 1, 2, 3)), Change(3, 0, (3, 2, 1, 0)))


def test_a_trace_knows_where_experts_were_at_every_step(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, HEADER)
    writer.add([window(0)])
    writer.add([window(1)], None, MOVED[:1])
    writer.flush()
    writer.add([window(3)], None, MOVED[1:])
    writer.close()
    trace = read_trace(tmp_path)
    assert [placed(trace, step) for step in (0, 1, 2)] == [
        [[0, 1, 2, 3], [3, 2, 1, 0]],
        [[1, 0, 3, 2], [3, 2, 1, 0]],
        [[1, 0, 3, 2], [3, 2, 1, 0]],
    ]
    assert placed(trace, 3) == placed(trace.of_phase("mixed"), 99) == [[3, 2, 1, 0], [0, 1, 2, 3]]
    assert read_trace(written(tmp_path / "still")).change_phy2log.shape == (0, 4)


def placed(trace: Trace, step: int) -> list[list[int]]:
    placement = trace.placement_at(step)
    assert placement is not None
    found: list[list[int]] = placement.phy2log.tolist()
    return found


def test_dropped_parts_take_their_changes_to_the_header(tmp_path: Path) -> None:
    """So the placement at each step that is left is the same, and the header's is that of the first one."""
    whole, capped = TraceWriter(tmp_path / "whole", HEADER), TraceWriter(tmp_path / "capped", HEADER, cap_bytes=3000)
    for step in range(8):
        row = tuple([(expert + step) % E for expert in range(E)])
        for writer in (whole, capped):
            writer.add([window(step)], None, [Change(step, step % L, row)] if step else [])
            writer.flush()
    kept, all_of_it = read_trace(tmp_path / "capped"), read_trace(tmp_path / "whole")
    first = int(kept.first_step[0])
    assert first > 2
    for step in range(first, 8):
        assert placed(kept, step) == placed(all_of_it, step)
    start = kept.header.placement()
    assert start is not None and start.phy2log.tolist() == placed(all_of_it, first - 1)


def test_a_part_that_is_not_written_leaves_its_changes_to_the_next(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, HEADER, cap_bytes=2000)
    writer.add([window(0)])
    writer.flush()
    writer.add([window(1)] * 40, None, MOVED)
    writer.flush()
    writer.add([window(4)])
    writer.close()
    trace = read_trace(tmp_path)
    assert trace.header.dropped_windows == 40 and trace.first_step.tolist() == [0, 4]
    assert placed(trace, 0) == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert placed(trace, 4) == [[3, 2, 1, 0], [0, 1, 2, 3]]


def test_bytes_of_changes_are_counted(tmp_path: Path) -> None:
    assert part_bytes(HEADER, windows=0, tokens=0, changes=3) == 3 * (8 + 8 + 4 * 2)
    writer = TraceWriter(tmp_path, HEADER, cap_bytes=4 * 1000)
    writer.add([window(0)], None, [Change(step, 0, (0, 1, 2, 3)) for step in range(60)])
    assert read_trace(tmp_path).num_windows == 1, "a part is written once it holds a quarter of the cap"


def test_a_part_beyond_the_cap_is_counted_not_written(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, HEADER, cap_bytes=100)
    writer.add([window(0)])
    writer.close()
    assert read_trace(tmp_path).num_windows == 0
    assert read_trace(tmp_path).header.dropped_windows == 1


def test_waiting_windows_are_written_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("moe_runtime.balance.trace_writer.time.monotonic", lambda: now[0])
    writer = TraceWriter(tmp_path, HEADER)
    writer.add([window(0)])
    assert read_trace(tmp_path).num_windows == 0
    assert not read_trace(tmp_path).header.complete
    now[0] = 6.0
    writer.add([window(1)])
    assert read_trace(tmp_path).num_windows == 2


def test_a_part_that_goes_while_it_is_read_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header was read before the run dropped the part: read again."""
    from moe_runtime.balance import trace as module

    writer = TraceWriter(tmp_path, HEADER, cap_bytes=1700)
    for step in range(2):
        writer.add([window(step)])
        writer.flush()
    read = module.read_header
    seen: list[int] = []

    def late(folder: str | Path) -> TraceHeader:
        header = read(folder)
        seen.append(header.first_part)
        if len(seen) == 1:
            writer.add([window(2)])
            writer.flush()
        return header

    monkeypatch.setattr(module, "read_header", late)
    assert read_trace(tmp_path).first_step.tolist() == [1, 2]
    assert seen == [0, 1]


def test_an_existing_trace_is_kept(tmp_path: Path) -> None:
    written(tmp_path / "t")
    with pytest.raises(TraceError, match="holds a trace already: one folder, one trace. Give another folder"):
        TraceWriter(tmp_path / "t", HEADER)
    (tmp_path / "t" / "trace.json").unlink()
    with pytest.raises(TraceError, match=r"part-00000.safetensors' is of another trace"):
        TraceWriter(tmp_path / "t", HEADER)
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=r"cannot be written: .*Give a folder of your own"):
        TraceWriter(tmp_path / "file" / "t", HEADER)


def header_with(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / "trace.json").read_text())
        (folder / "trace.json").write_text(json.dumps(document | values))

    return change


def part_with(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "part-00000.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def moved(layer: int, row: list[int], steps: Sequence[int] = (1,)) -> dict[str, torch.Tensor]:
    count = len(steps)
    return {
        "change_step": torch.tensor(steps),
        "change_layer": torch.tensor([layer] * count),
        "change_phy2log": torch.tensor([row] * count, dtype=torch.int16),
    }


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) - 20])

    return damage


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "trace.json").unlink(), r"cannot be read: .* Give the folder of a trace"),
    (header_with(version=2), r"version=2: this program reads version 1\. Record again"),
    (header_with(format="other"), r'no trace: must be a JSON object with "format": "moe_runtime.trace"'),
    (header_with(num_layers=0), r"num_layers=0: must be at least 1"),
    (header_with(ep="two"), r"ep='two': must be of type int"),
    (header_with(mode="all"), r"mode='all': must be one of stat, per_pass, per_token"),
    (header_with(num_logical=40000), r"num_logical=40000: must be .* below 32768"),
    (header_with(num_layers=3), r"loads is \(2, 2, 4\), the header says \(2, 3, 4\)\. It is of another trace"),
    (header_with(replica_choice="any"), r"replica_choice='any': must be null or one of static, round_robin"),
    (header_with(phy2log=3), r"phy2log: must be null or a list of a list"),
    (cut("trace.json"), r"not JSON: .*It was cut short or edited"),
    (cut("part-00000.safetensors"), r"part-00000.safetensors' cannot be read: .*It was cut short"),
    (
        lambda folder: (folder / "part-00000.safetensors").unlink(),
        r"part-00000.safetensors is missing .*Copy the whole",
    ),
    (part_with(lambda t: t.pop("num_tokens")), r"the tensor num_tokens is missing"),
    (part_with(lambda t: t["loads"].__setitem__((1, 0, 2), -5)), r"loads\[1, 0, 2\] is -5: must be at least 0"),
    (part_with(lambda t: t.update(loads=t["loads"] * float("nan"))), r"loads\[0, 0, 0\] is nan: counts must be whole"),
    (part_with(lambda t: t.update(loads=t["loads"].float())), r"loads is torch.float32: must be torch.int64"),
    (part_with(lambda t: t["phases"].fill_(7)), r"phases\[0\] is 7: must be below 2"),
    (part_with(lambda t: t["window_steps"].fill_(0)), r"window_steps\[0\] is 0: must be at least 1"),
    (part_with(lambda t: t.update(routes=torch.zeros(1, L, K))), r"the tensor request is missing"),
    (part_with(lambda t: t.update(change_layer=torch.zeros(1))), r"the tensor change_step is missing"),
    (part_with(lambda t: t.update(moved(9, [0, 1, 2, 3]))), r"change_layer\[0\] is 9: must be below 2"),
    (part_with(lambda t: t.update(moved(0, [0, 1, 2, 4]))), r"change_phy2log\[0, 3\] is 4: must be below 4"),
    (part_with(lambda t: t.update(moved(0, [0, 1, 2]))), r"change_phy2log is \(1, 3\), the header says \(1, 4\)"),
    (part_with(lambda t: t.update(moved(0, [0, 1, 2, 3], [3, 1]))), r"change_step: must not fall"),
    (part_with(lambda t: t["rank_loads"].zero_()), r"rank_loads\[0, 0\] adds up to 0 rows, loads\[0, 0\] to 6 assign"),
    (part_with(lambda t: t["num_tokens"].zero_()), r"num_tokens\[0\] is 0, and loads\[0\] are not: tokens choose"),
    (part_with(lambda t: t["loads"].fill_(2**62)), r"loads\[0, 0, 0\] is 4611686018427387904: must be below 90071992"),
    (
        part_with(lambda t: t["loads"].fill_(2**52)),
        r"loads adds up to 7.206e\+16: must be below 2\^53\. .* record again",
    ),
    (header_with(next_part=10**12), r"part-00001.safetensors is missing \(999999999999 parts are\), 0 to 999999999999"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[:28] for _, message in DAMAGES])
def test_what_is_wrong_is_told(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    damage(written(tmp_path / "t"))
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("routes", E, r"routes\[0, 0, 0\] is 4: must be below 4"),
        ("routes", -2, r"routes\[0, 0, 0\] is -2: must be at least -1"),
        ("window", 1, r"window\[0\] is 1: must be below 1"),
        ("home", EP, r"home\[0\] is 2: must be below 2"),
    ],
)
def test_routes_are_checked(name: str, value: int, message: str, tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, TOKEN_HEADER)
    columns = tokens([[[0, 1], [2, 3]]], [0])
    columns[name].view(-1)[0] = value
    writer.add([window(0)], columns)
    writer.close()
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path)


def test_routes_give_the_loads(tmp_path: Path) -> None:
    """Where those of all tokens of a window are there."""
    loads = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    honest = replace(window(0, tokens=1), loads=loads, rank_loads=loads.view(L, EP, 2).sum(2))
    columns = tokens([[[0, 1], [2, 3]]], [0])
    wrong = {**columns, "routes": torch.tensor([[[0, 1], [2, 2]]], dtype=torch.int16)}
    cases = [
        (honest, columns, ""),
        (replace(honest, num_tokens=2), wrong, ""),
        (honest, wrong, r"loads\[0, 1, 2\] is 1: the routes of all its tokens give 2\. .* record again"),
        (honest, tokens([[[0, 1], [2, 3]]] * 2, [0, 0]), r"num_tokens\[0\] is 1: 2 tokens of that window have routes"),
    ]
    for number, (own, routes, message) in enumerate(cases):
        folder = tmp_path / str(number)
        writer = TraceWriter(folder, TOKEN_HEADER)
        writer.add([own], routes)
        writer.close()
        with pytest.raises(TraceError, match=message) if message else nullcontext():
            assert read_trace(folder).num_windows == 1


def test_older_traces_are_read(tmp_path: Path) -> None:
    """The first ones had neither the choice of replicas nor micro-batches."""
    writer = TraceWriter(tmp_path, TOKEN_HEADER)
    writer.add([window(0)], tokens([[[0, 1], [2, 3]]], [0]))
    writer.close()
    document = json.loads((tmp_path / "trace.json").read_text())
    del document["replica_choice"]
    (tmp_path / "trace.json").write_text(json.dumps(document))
    trace = read_trace(tmp_path)
    assert trace.header.replica_choice is None and trace.micro_batch.tolist() == [0]
    assert trace.placement_at(0) is None


def test_a_change_that_is_no_placement_is_told(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, HEADER)
    writer.add([window(0)], None, [Change(0, 0, (0, 1, 2, 2))])
    writer.close()
    with pytest.raises(TraceError, match=r"phy2log: placement: logical expert 3 has no slot"):
        read_trace(tmp_path).placement_at(0)


def test_a_trace_of_another_model_is_told(tmp_path: Path) -> None:
    trace: Trace = read_trace(written(tmp_path))
    trace.check_model(num_layers=L, num_logical=E, top_k=K)
    with pytest.raises(TraceError, match=r"a trace of 'small' with num_logical=4, .* num_logical=8: .*shared_experts"):
        trace.check_model(num_layers=L, num_logical=8)
    with pytest.raises(TraceError, match=r"this model has top_k=3: they must be equal. Record a trace of this model"):
        trace.check_model(num_layers=L, num_logical=E, top_k=3)
    with pytest.raises(TraceError, match=r"phase='prefill': must be one of decode, mixed"):
        trace.of_phase("prefill")


def test_a_header_contradicts_itself() -> None:
    with pytest.raises(TraceError, match=r"top_k=5: a token has at most num_logical=4"):
        TraceHeader(model="m", num_layers=1, num_logical=4, num_routed=4, top_k=5)
    with pytest.raises(TraceError, match=r"ep=4: must be dp·tp = 2"):
        TraceHeader(model="m", num_layers=1, num_logical=4, num_routed=4, top_k=1, ep=4, dp=2)
    missing = TraceHeader(model="m", num_layers=1, num_logical=4, num_routed=4, top_k=1, phy2log=((0, 1, 2, 2),))
    with pytest.raises(TraceError, match=r"phy2log: placement: logical expert 3 has no slot"):
        missing.placement()

"""A timeline as text: one rank's two lanes, some of its layers."""

from __future__ import annotations

from moe_runtime.dispatch.overlap import Stage
from moe_runtime.dispatch.timeline import Lane, Span, Timeline

LEGEND = (
    "A attention and gate, S shared expert, E experts, Z the end; D dispatch, C combine; then the micro-batch; . idle"
)
LEAST_WIDTH = 40
_TITLE = 8


def render(timeline: Timeline, *, layers: range, rank: int = 0, width: int = 100) -> str:
    """Three lines of at most `width` characters, and a line above that gives the scale.

    The window opens where the first of `layers` (MoE layers from 0) begins to compute and closes where the last of them
    ends; what else is there is drawn too. Parts shorter than a column are left out. ValueError where `width` is below
    LEAST_WIDTH or the rank or a layer is not there.
    """
    if width < LEAST_WIDTH:
        raise ValueError(f"width={width}: a picture takes at least {LEAST_WIDTH} columns")
    lanes = {lane: timeline.lane(rank, lane) for lane in Lane}
    window = [span for spans in lanes.values() for span in spans if span.layer in layers]
    if not window or not set(layers) <= {span.layer for span in window}:
        last = max([span.layer for span in timeline.spans])
        raise ValueError(
            f"rank {rank}, layers {layers}: there are ranks 0..{len(timeline.costs) - 1}, layers 0..{last}"
        )
    start, end = min(span.start_us for span in window), max(span.end_us for span in window)
    columns = width - _TITLE - 1
    per_us = columns / (end - start) if end > start else 0.0

    def column(us: float) -> int:
        return min(max(int((us - start) * per_us + 1e-9), 0), columns)

    marks = [" "] * columns
    opened = set()
    for span in lanes[Lane.COMPUTE]:
        at = column(span.start_us)
        if span.layer in layers and span.layer not in opened and at < columns:
            opened.add(span.layer)
            marks[at : at + len(str(span.layer))] = str(span.layer)
    texts = [f"{'layer':<{_TITLE}} {''.join(marks[:columns]).rstrip()}".rstrip()]
    for lane, spans in lanes.items():
        drawn = ["."] * columns
        for span in spans:
            first, last = column(span.start_us), column(span.end_us)
            label = f"{_letter(span)}{span.micro_batch}"
            drawn[first:last] = label.ljust(last - first, "-" if lane is Lane.COMPUTE else "=")[: last - first]
        texts.append(f"{lane:<{_TITLE}}|{''.join(drawn)}")
    head = (
        f"rank {rank}, {start:.1f}..{end:.1f} µs of {timeline.step_us:.1f}, a column is {(end - start) / columns:.2f}"
    )
    return "\n".join([head[:width], *texts])


def _letter(span: Span) -> str:
    if span.lane is Lane.WIRE:
        return "C" if span.stage is Stage.COMBINE else "D"
    if span.beside:
        return "S"
    return "Z" if span.stage is None else "E" if span.stage is Stage.COMBINE else "A"

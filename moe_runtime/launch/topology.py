"""From the mesh keys that were given to the whole mesh, with the reason for each derived one. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_runtime.errors import ConfigError
from moe_runtime.parallel.mesh import ProcessMesh

ResolvedLauncher = Literal["virtual", "process", "torchrun"]

WIDE_EP = 32
"""From here on tp=4 by default: DeepSeek's prefill (EP32) and decode (EP320) units run attention TP4."""
WIDE_TP = 4


@dataclass(frozen=True, slots=True)
class Topology:
    """A resolved mesh and why it is so: one sentence per decision in `reasons`."""

    pp: int
    dp: int
    tp: int
    ep: int
    ranks_per_node: int
    launcher: ResolvedLauncher
    reasons: tuple[str, ...]

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def num_nodes(self) -> int:
        return -(-self.world // self.ranks_per_node)

    def mesh(self, rank: int = 0) -> ProcessMesh:
        """The mesh as seen from `rank`."""
        return ProcessMesh(pp=self.pp, dp=self.dp, tp=self.tp, rank=rank, ranks_per_node=self.ranks_per_node)

    def __str__(self) -> str:
        return f"ep={self.ep} = dp={self.dp} × tp={self.tp}, {self.world} {self.launcher} ranks"


def resolve(
    *,
    ep: int | None,
    tp: int | None,
    dp: int | None,
    num_heads: int,
    pp: int = 1,
    ranks_per_node: int = 8,
    launcher: Literal["auto", "virtual", "process", "torchrun"] = "auto",
    torchrun_world: int | None = None,
) -> Topology:
    """The mesh that the given keys determine. `torchrun_world`: number of processes torchrun started, if it did.

    Raises ConfigError with the nearest valid value where keys contradict each other, the model or torchrun.
    """
    for name, value in (("ep", ep), ("tp", tp), ("dp", dp), ("pp", pp), ("ranks_per_node", ranks_per_node)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1. Nearest: {name}=1.")
    if pp > 1:
        raise ConfigError(
            f"pp={pp}: pipeline stages are not yet built. Set pp=1 and put the ranks into ep: ep={pp * (ep or 1)}."
        )
    if tp is not None and num_heads % tp:
        raise ConfigError(
            f"tp={tp}: must divide the model's {num_heads} attention heads. Nearest: tp={_nearest(tp, num_heads)}."
        )
    ep, tp, dp, reasons = _sizes(ep, tp, dp, num_heads, torchrun_world)
    chosen, why = _launcher(launcher, torchrun_world)
    if chosen == "torchrun" and torchrun_world != ep:
        raise ConfigError(
            f"ep={ep}: torchrun started {torchrun_world} processes, and each is one rank. "
            f"Set ep={torchrun_world}, or start {ep} processes, or set launcher=virtual with one process."
        )
    return Topology(pp, dp, tp, ep, ranks_per_node, chosen, (*reasons, why))


def _sizes(
    ep: int | None, tp: int | None, dp: int | None, heads: int, torchrun_world: int | None
) -> tuple[int, int, int, tuple[str, ...]]:
    match ep, tp, dp:
        case None, None, None if torchrun_world is None:
            return 1, 1, 1, ("ep=1: no mesh was asked for",)
        case None, None, None:
            assert torchrun_world is not None
            ep, tp, dp, reasons = _sizes(torchrun_world, None, None, heads, None)
            return ep, tp, dp, (f"ep={ep}: torchrun's number of processes", *reasons)
        case None, int(), None if torchrun_world is not None:
            ep, tp, dp, reasons = _sizes(torchrun_world, tp, None, heads, None)
            return ep, tp, dp, (f"ep={ep}: torchrun's number of processes", *reasons)
        case None, _, _:
            tp, dp = tp or 1, dp or 1
            return tp * dp, tp, dp, (f"ep={tp * dp}: dp·tp",)
        case int(), None, None:
            tp, why = _default_tp(ep, heads)
            return ep, tp, ep // tp, (why, f"dp={ep // tp}: ep/tp")
        case int(), int(), None:
            if ep % tp:
                raise ConfigError(
                    f"ep={ep}, tp={tp}: tp must divide ep. "
                    f"Nearest: tp={_nearest(tp, ep, heads)}, or ep={_round(ep, tp)}."
                )
            return ep, tp, ep // tp, (f"dp={ep // tp}: ep/tp",)
        case int(), None, int():
            if ep % dp:
                raise ConfigError(
                    f"ep={ep}, dp={dp}: dp must divide ep. Nearest: dp={_nearest(dp, ep)}, or ep={_round(ep, dp)}."
                )
            if heads % (ep // dp):
                tp = _nearest(ep // dp, ep, heads)
                raise ConfigError(
                    f"ep={ep}, dp={dp}: tp = ep/dp = {ep // dp} must divide the model's {heads} attention heads. "
                    f"Nearest: dp={ep // tp} (tp={tp})."
                )
            return ep, ep // dp, dp, (f"tp={ep // dp}: ep/dp",)
        case int(), int(), int():
            if dp * tp != ep:
                fitting = f"dp={ep // tp}" if ep % tp == 0 else f"tp={_nearest(tp, ep, heads)}"
                raise ConfigError(
                    f"ep={ep}, dp={dp}, tp={tp}: ep must equal dp·tp = {dp * tp}. Set ep={dp * tp}, or keep ep={ep} "
                    f"with {fitting} and leave the third out."
                )
            return ep, tp, dp, ("ep, dp and tp as given",)
    raise AssertionError(f"unreachable: ep={ep}, tp={tp}, dp={dp}")


def _default_tp(ep: int, heads: int) -> tuple[int, str]:
    if ep < WIDE_EP:
        return 1, f"tp=1: ep < {WIDE_EP}, so attention runs data parallel"
    if ep % WIDE_TP or heads % WIDE_TP:
        what = f"ep={ep}" if ep % WIDE_TP else f"the model's {heads} heads"
        return 1, f"tp=1: {what} cannot be split by {WIDE_TP}"
    return (
        WIDE_TP,
        f"tp={WIDE_TP}: ep ≥ {WIDE_EP}, as in DeepSeek's own units, and {WIDE_TP} divides ep and the {heads} heads",
    )


def _launcher(asked: str, torchrun_world: int | None) -> tuple[ResolvedLauncher, str]:
    match asked:
        case "auto" if torchrun_world is not None:
            return "torchrun", "launcher=torchrun: torchrun started this process"
        case "auto":
            return "virtual", "launcher=virtual: all ranks live in this process"
        case "torchrun" if torchrun_world is None:
            raise ConfigError(
                "launcher=torchrun: this process was not started by torchrun. "
                "Run `torchrun --nproc-per-node N -m moe_runtime …`, or set launcher=process."
            )
        case "virtual" | "process" if torchrun_world is not None and torchrun_world > 1:
            raise ConfigError(
                f"launcher={asked}: torchrun started {torchrun_world} processes, and each would run the whole world. "
                "Leave launcher out, or start without torchrun."
            )
        case "virtual" | "process" | "torchrun":
            return asked, f"launcher={asked}: as given"
    raise AssertionError(f"launcher={asked!r} is checked by the schema")


def _nearest(value: int, *multiples: int) -> int:
    """The common divisor of `multiples` that is closest to `value` (the larger one on a tie)."""
    common = [d for d in range(1, min(multiples) + 1) if all(m % d == 0 for m in multiples)]
    return min(common, key=lambda d: (abs(d - value), -d))


def _round(value: int, multiple: int) -> int:
    """The positive multiple of `multiple` closest to `value`."""
    return max(1, round(value / multiple)) * multiple

"""From the mesh keys that were given to the whole mesh, with the reason for each derived one. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moe_runtime.errors import ConfigError
from moe_runtime.parallel.mesh import ProcessMesh
from moe_runtime.schema import Report, fail

ResolvedLauncher = Literal["virtual", "process", "torchrun"]

WIDE_EP = 32
"""From here on tp=4 by default: DeepSeek's prefill (EP32) and decode (EP320) units run attention TP4."""
WIDE_TP = 4
RANKS_PER_NODE = 8
MAX_RANKS = 65536
"""More than any cluster has, and few enough to be laid out on a laptop within seconds."""


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
        ranks = "rank" if self.world == 1 else "ranks"
        return f"ep={self.ep} = dp={self.dp} × tp={self.tp}, {self.world} {self.launcher} {ranks}"


def resolve(
    *,
    ep: int | None,
    tp: int | None,
    dp: int | None,
    num_heads: int,
    pp: int = 1,
    ranks_per_node: int | None = None,
    launcher: Literal["auto", "virtual", "process", "torchrun"] = "auto",
    torchrun_world: int | None = None,
    torchrun_local_world: int | None = None,
    report: Report = fail,
) -> Topology:
    """The mesh that the given keys determine. `torchrun_world`: number of processes torchrun started, if it did;
    `torchrun_local_world`: how many of them on this machine.

    Where keys contradict each other, the model or torchrun, each contradiction goes to `report` (by default raised as
    ConfigError) with the nearest values that make a mesh; where that returns, the key is taken for not given.
    """
    chosen, why = _launcher(launcher, torchrun_world, report)
    world = torchrun_world if chosen == "torchrun" else None
    if pp > 1:
        report(_no_pipeline(pp, ep, tp, dp, world))
    given = {name: value for name, value in (("ep", ep), ("tp", tp), ("dp", dp)) if value is not None}
    for name, value in list(given.items()):
        if not 1 <= value <= MAX_RANKS:
            near = min(max(value, 1), MAX_RANKS)
            report(ConfigError(f"{name}={value}: must be between 1 and {MAX_RANKS}. Nearest: {name}={near}."))
            del given[name]
    reasons: tuple[str, ...] = ()
    if world is not None:
        reasons = _join_world(given, world, report)
    _fit(given, num_heads, report, fixed="" if world is None else "ep")
    sizes, derived = _sizes(given, num_heads)
    if sizes["ep"] > MAX_RANKS:
        report(
            ConfigError(
                f"dp={sizes['dp']}, tp={sizes['tp']}: dp·tp = {sizes['ep']} ranks are more than {MAX_RANKS}. "
                f"Nearest: dp={MAX_RANKS // sizes['tp']}."
            )
        )
        sizes, derived = _sizes({}, num_heads)
    if torchrun_local_world is not None and world is not None and ranks_per_node is None:
        ranks_per_node = torchrun_local_world
        why += f"; ranks_per_node={ranks_per_node}: its processes on this machine"
    return Topology(
        1, sizes["dp"], sizes["tp"], sizes["ep"], ranks_per_node or RANKS_PER_NODE, chosen, (*reasons, *derived, why)
    )


def _no_pipeline(pp: int, ep: int | None, tp: int | None, dp: int | None, world: int | None) -> ConfigError:
    wider = {name: pp * value for name, value in (("ep", ep), ("dp", dp)) if value} or {"ep": pp * (tp or 1)}
    remedy = "Set pp=1." if world is not None else f"Set pp=1; as many ranks without them: {_show(wider, ' ')}."
    return ConfigError(f"pp={pp}: pipeline stages are not yet built. {remedy}")


def _join_world(given: dict[str, int], world: int, report: Report) -> tuple[str, ...]:
    """Make `ep` torchrun's number of processes."""
    asked = given.get("ep") or (given["tp"] * given["dp"] if {"tp", "dp"} <= given.keys() else world)
    if asked != world:
        name = "ep" if "ep" in given else "dp·tp"
        report(
            ConfigError(
                f"{name}={asked}: torchrun started {world} processes, and each is one rank. Set ep={world} and leave "
                f"tp and dp out, or start {asked} processes, or set launcher=virtual with one process."
            )
        )
        given.clear()
    reasons = () if "ep" in given else (f"ep={world}: torchrun's number of processes",)
    given["ep"] = world
    return reasons


def _fit(given: dict[str, int], heads: int, report: Report, *, fixed: str) -> None:
    """Report what contradicts itself, and take it out of `given`."""
    for names, rule in _RULES:
        if not names <= given.keys():
            continue
        ep, tp, dp = (given.get(name, 0) for name in ("ep", "tp", "dp"))
        if text := rule(ep, tp, dp, heads):
            shown = _show({name: given[name] for name in ("ep", "dp", "tp") if name in names}, ", ")
            report(ConfigError(f"{shown}: {text} {_remedy(given, heads, fixed)}"))
            for name in names - {"ep"}:
                del given[name]


def _divides_heads(ep: int, tp: int, dp: int, heads: int) -> str:
    return f"must divide the model's {heads} attention heads." if heads % tp else ""


def _is_product(ep: int, tp: int, dp: int, heads: int) -> str:
    return f"ep must equal dp·tp = {dp * tp}." if dp * tp != ep else ""


def _tp_divides_ep(ep: int, tp: int, dp: int, heads: int) -> str:
    return "tp must divide ep." if ep % tp else ""


def _dp_leaves_tp(ep: int, tp: int, dp: int, heads: int) -> str:
    if ep % dp:
        return "dp must divide ep."
    return f"tp = ep/dp = {ep // dp} must divide the model's {heads} attention heads." if heads % (ep // dp) else ""


_RULES = (
    (frozenset({"tp"}), _divides_heads),
    (frozenset({"ep", "tp", "dp"}), _is_product),
    (frozenset({"ep", "tp"}), _tp_divides_ep),
    (frozenset({"ep", "dp"}), _dp_leaves_tp),
)


def _remedy(given: Mapping[str, int], heads: int, fixed: str) -> str:
    """Each key but `fixed` that alone could be changed to make a mesh, at its nearest value."""
    found = {}
    for name in ("tp", "dp", "ep"):
        if name in given and name != fixed and (values := _fitting(name, given, heads)):
            found[name] = min(values, key=lambda value: (abs(value - given[name]), -value))
    return f"Nearest: {_show(found, ', or ')}." if found else f"Leave tp and dp out, and keep ep={given['ep']}."


def _fitting(name: str, given: Mapping[str, int], heads: int) -> set[int]:
    """The values of `name` with which the other given keys make a mesh; of endless many, those around the given one."""
    ep, tp, dp = (given.get(other) if other != name else None for other in ("ep", "tp", "dp"))
    meshes = set()
    for own_tp in _divisors(heads):
        if tp not in (None, own_tp):
            continue
        if ep is not None:
            dps = {ep // own_tp} if ep % own_tp == 0 else set()
        elif dp is not None:
            dps = {dp}
        else:
            dps = {max(1, given.get(name, 1) // own_tp), given.get(name, 1) // own_tp + 1}
        fitting = (own for own in dps if dp in (None, own) and own * own_tp <= MAX_RANKS)
        meshes |= {(own_dp * own_tp, own_tp, own_dp) for own_dp in fitting}
    return {mesh[("ep", "tp", "dp").index(name)] for mesh in meshes}


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _sizes(given: Mapping[str, int], heads: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """All three from keys that do not contradict each other."""
    ep, tp, dp = (given.get(name) for name in ("ep", "tp", "dp"))
    reasons: tuple[str, ...]
    if ep is None:
        tp, dp = tp or 1, dp or 1
        ep, reasons = tp * dp, (f"ep={tp * dp}: dp·tp" if given else "ep=1: no mesh was asked for",)
    elif tp is not None and dp is not None:
        reasons = ("ep, dp and tp as given",)
    elif dp is not None:
        tp, reasons = ep // dp, (f"tp={ep // dp}: ep/dp",)
    else:
        reasons = ()
        if tp is None:
            tp, why = _default_tp(ep, heads)
            reasons = (why,)
        dp, reasons = ep // tp, (*reasons, f"dp={ep // tp}: ep/tp")
    return {"ep": ep, "tp": tp, "dp": dp}, reasons


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


def _launcher(asked: str, torchrun_world: int | None, report: Report) -> tuple[ResolvedLauncher, str]:
    match asked:
        case "auto" if torchrun_world is not None:
            return "torchrun", "launcher=torchrun: torchrun started this process"
        case "auto":
            return "virtual", "launcher=virtual: all ranks live in this process"
        case "torchrun" if torchrun_world is None:
            report(
                ConfigError(
                    "launcher=torchrun: this process was not started by torchrun. "
                    "Run `torchrun --nproc-per-node N -m moe_runtime …`, or set launcher=process."
                )
            )
            return _launcher("auto", None, report)
        case "virtual" | "process" if torchrun_world is not None and torchrun_world > 1:
            report(
                ConfigError(
                    f"launcher={asked}: torchrun started {torchrun_world} processes, and each would run the whole "
                    "world. Leave launcher out, or start without torchrun."
                )
            )
            return _launcher("auto", torchrun_world, report)
        case "virtual" | "process" | "torchrun":
            return asked, f"launcher={asked}: as given"
    raise AssertionError(f"launcher={asked!r} is checked by the schema")


def _show(values: Mapping[str, int], between: str) -> str:
    return between.join(f"{name}={value}" for name, value in values.items())

"""DeepSeek's EPLB: experts of a group on one node where groups divide among nodes, else all ranks alike.

Written from the published description (github.com/deepseek-ai/EPLB, README and eplb.py): pack groups to nodes, give
copies within each node, pack replicas to ranks. In fp32, as published: near ties decide by rounding.
L layers, E experts, D ranks, S slots of a rank.
"""

from __future__ import annotations

import numpy as np

from moe_runtime.balance.arrays import Floats, Ints
from moe_runtime.balance.pack import pack, per_item, replicate


def eplb(loads: Floats, *, ep: int, num_slots: int, nodes: int, num_groups: int) -> Ints:
    """`loads [L, E]` -> experts `[L, D, S]`. `nodes` = 1 is the global policy; else it divides groups and ranks."""
    layers = len(loads)
    weight = loads.astype(np.float32)
    ids = node_experts(weight, nodes=nodes, num_groups=num_groups)
    local = np.take_along_axis(weight, ids.reshape(layers, -1), axis=1).reshape(layers * nodes, -1)
    items, counts = replicate(local, ep * num_slots // nodes)
    packed = pack(per_item(local, counts, items), ep // nodes)
    chosen = np.take_along_axis(items, packed.reshape(layers * nodes, -1), axis=1)
    return to_layers(ids, chosen, ep)


def node_experts(loads: Floats, *, nodes: int, num_groups: int) -> Ints:
    """Experts of each node `[L, nodes, E/nodes]`: whole groups of consecutive experts, packed by their load."""
    layers, experts = loads.shape
    if nodes == 1:
        return np.broadcast_to(np.arange(experts), (layers, 1, experts))
    size = experts // num_groups
    groups = pack(loads.reshape(layers, num_groups, size).sum(axis=2), nodes)
    ids: Ints = (groups[..., None] * size + np.arange(size)).reshape(layers, nodes, -1)
    return ids


def to_layers(ids: Ints, chosen: Ints, ep: int) -> Ints:
    """A node's own numbers `chosen [L·nodes, …]` as experts `[L, D, S]`."""
    layers, nodes, _ = ids.shape
    rows = ids.reshape(layers * nodes, -1)
    return np.take_along_axis(rows, chosen.reshape(layers * nodes, -1), axis=1).reshape(layers, ep, -1)

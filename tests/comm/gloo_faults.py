"""Programs that go wrong, for gloo ranks."""

from __future__ import annotations

import os
import signal
import time

import torch

from moe_runtime.comm.base import Groups
from tests.comm.gloo_pool import GlooProgram


def _rows(n: int) -> torch.Tensor:
    return torch.ones(n, 2)


def _at_work(groups: Groups) -> int:
    groups.world.barrier()
    groups.location.step, groups.location.layer = 7, 3
    return groups.world.rank


def is_busy(groups: Groups, seed: int) -> list[str]:
    """Rank 1 computes for longer than the others' patience."""
    if _at_work(groups) == 1:
        time.sleep(2.5)
    groups.ep.all_gather(_rows(1))
    return []


def crosses(groups: Groups, seed: int) -> list[str]:
    """Each waits in another group's collective."""
    if _at_work(groups) == 0:
        groups.ep.all_gather(_rows(1))
    else:
        groups.world.exchange([1])
    return []


def leaves(groups: Groups, seed: int) -> list[str]:
    if _at_work(groups) != 1:
        groups.ep.all_reduce(_rows(1))
    return []


def raises(groups: Groups, seed: int) -> list[str]:
    if _at_work(groups) == 1:
        raise ValueError("a bad weight")
    groups.ep.all_reduce(_rows(1))
    return []


def dies(groups: Groups, seed: int) -> list[str]:
    if _at_work(groups) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    groups.ep.all_reduce(_rows(1))
    return []


def other_call(groups: Groups, seed: int) -> list[str]:
    ones = [1] * groups.ep.size
    if _at_work(groups) == 1:
        groups.ep.reduce_scatter(_rows(len(ones)))
    else:
        groups.ep.all_to_all(_rows(len(ones)), ones, ones)
    return []


def other_shape(groups: Groups, seed: int) -> list[str]:
    groups.ep.all_reduce(_rows(5 if _at_work(groups) == 1 else 4))
    return []


def wrong_recv_counts(groups: Groups, seed: int) -> list[str]:
    ones = [1] * groups.ep.size
    recv = [*ones[:-1], 2] if _at_work(groups) == 1 else ones
    groups.ep.all_to_all(_rows(len(ones)), ones, recv)
    return []


def too_few_rows(groups: Groups, seed: int) -> list[str]:
    ones = [1] * groups.ep.size
    groups.ep.all_to_all(_rows(len(ones) - (_at_work(groups) == 1)), ones, ones)
    return []


def goes_on(groups: Groups, seed: int) -> list[str]:
    """After a fault every further call fails at once with the same words."""
    texts = []
    for _ in range(2):
        started = time.monotonic()
        try:
            if groups.world.rank == 0:
                groups.ep.barrier()
            else:
                groups.tp.recv(_rows(1), 0)
        except RuntimeError as error:
            texts.append(str(error))
        else:
            texts.append("met")
    assert time.monotonic() - started < 0.5
    return texts


def hurries(groups: Groups, seed: int) -> list[str]:
    """A last collective, then leave: nobody may lose the end of it."""
    if groups.world.rank % 2:
        time.sleep(0.002)
    return [str(groups.world.all_gather(_rows(1000)).sum().item())]


FAULTS: dict[str, GlooProgram] = {
    program.__name__: program
    for program in (
        is_busy,
        crosses,
        leaves,
        raises,
        dies,
        other_call,
        other_shape,
        wrong_recv_counts,
        too_few_rows,
        goes_on,
        hurries,
    )
}

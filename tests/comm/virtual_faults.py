"""Programs that go wrong, for four virtual ranks (dp=2, tp=2), and the words of the error that each must give."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_runtime.comm.base import Groups

Fault = Callable[[Groups, int], object]
"""What a rank of four does; the result is ignored."""
ONES = [1] * 4


def rows(n: int = 4) -> torch.Tensor:
    return torch.ones(n, 2)


def leaves_early(mine: Groups, rank: int) -> object:
    return None if rank == 2 else mine.ep.all_reduce(rows())


def leaves_while_others_have_only_begun(mine: Groups, rank: int) -> object:
    return None if rank == 3 else mine.ep.all_reduce_begin(rows())


def leaves_before_others_come(mine: Groups, rank: int) -> object:
    if rank > 1:
        mine.tp.barrier()
    if rank > 0:
        mine.ep.barrier()
    return None


def raises(mine: Groups, rank: int) -> object:
    if rank == 2:
        raise ValueError("a bad weight")
    return mine.ep.all_gather(rows())


def other_call(mine: Groups, rank: int) -> object:
    if rank == 2:
        return mine.ep.reduce_scatter(rows())
    return mine.ep.all_to_all(rows(), ONES, ONES)


def other_shape(mine: Groups, rank: int) -> object:
    return mine.ep.all_reduce(rows(5 if rank == 2 else 4))


def other_dtype(mine: Groups, rank: int) -> object:
    return mine.ep.all_gather(rows().to(torch.bfloat16 if rank == 2 else torch.float32))


def other_source(mine: Groups, rank: int) -> object:
    return mine.ep.broadcast(rows(), 1 if rank == 2 else 0)


def uneven_exchange(mine: Groups, rank: int) -> object:
    return mine.world.exchange([0] * (3 if rank == 2 else 2))


def too_few_rows(mine: Groups, rank: int) -> object:
    return mine.ep.all_to_all(rows(3 if rank == 2 else 4), ONES, ONES)


def wrong_recv_counts(mine: Groups, rank: int) -> object:
    return mine.ep.all_to_all(rows(), ONES, [1, 1, 1, 2] if rank == 2 else ONES)


def negative_count(mine: Groups, rank: int) -> object:
    return mine.ep.all_to_all(rows(), [1, 1, 3, -1] if rank == 2 else ONES, ONES)


def short_counts(mine: Groups, rank: int) -> object:
    return mine.ep.all_to_all(rows(), [2, 2] if rank == 2 else ONES, ONES)


def short_out(mine: Groups, rank: int) -> object:
    return mine.ep.all_to_all(rows(), ONES, ONES, rows(3 if rank == 2 else 4))


def out_on_one_rank(mine: Groups, rank: int) -> object:
    return mine.ep.all_to_all(rows(), ONES, ONES, rows() if rank == 2 else None)


def crossed_groups(mine: Groups, rank: int) -> object:
    comm = mine.ep if rank % 2 else mine.tp
    comm.barrier()
    return None


def no_sender(mine: Groups, rank: int) -> object:
    return mine.world.recv(rows(), 2) if rank == 0 else None


def no_receiver(mine: Groups, rank: int) -> object:
    if rank == 0:
        mine.world.send(rows(), 2)
    return None


def receiver_is_gone(mine: Groups, rank: int) -> object:
    if rank == 2:
        mine.world.send(rows(), 0)
    return None


def other_message(mine: Groups, rank: int) -> object:
    match rank:
        case 0:
            mine.world.send(rows(3), 2)
        case 2:
            mine.world.recv(rows(4), 0)
    return None


def waits_for_each_other(mine: Groups, rank: int) -> object:
    return mine.world.recv(rows(), 3 - rank)


FAULTS: dict[Fault, str] = {
    leaves_early: r"ranks 0-1 wait in all_reduce #1 of ep \(step 7, layer 3\) for ranks 2-3; rank 2 has returned\.",
    leaves_while_others_have_only_begun: r"all_reduce #1 of ep was begun by other ranks; rank 3 has returned\.",
    leaves_before_others_come: r"rank 1 waits in barrier #1 of ep \(step 7, layer 3\) .*; rank 0 has returned\.",
    raises: r"rank 2 raised ValueError \(step 7, layer 3\): a bad weight\n"
    r"The other ranks were stopped: ranks 0-1 wait in all_gather #1 of ep \(step 7, layer 3\) for ranks 2-3\.",
    other_call: r"rank 0 waits in all_to_all #1 of ep \(step 7, layer 3\); "
    r"rank 2 is in reduce_scatter #1 of ep \(step 7, layer 3\)\. All of ranks 0-3 must make the same calls",
    other_shape: r"rank 0 waits in all_reduce #1 of ep with \[4, 2\] torch.float32 \(step 7, layer 3\); "
    r"rank 2 is in all_reduce #1 of ep with \[5, 2\] torch.float32",
    other_dtype: r"rank 0 .* \[4, 2\] torch.float32 .*; rank 2 is in all_gather #1 .* \[4, 2\] torch.bfloat16",
    other_source: r"rank 0 .* src 0 .*; rank 2 is in broadcast #1 of ep .* src 1",
    uneven_exchange: r"rank 0 waits in exchange #1 of world with 2 integers .*; rank 2 is in .* with 3 integers",
    too_few_rows: r"all_to_all #1 of ep \(step 7, layer 3\) of ranks 0-3: "
    r"rank 2 gives all_to_all 3 rows but its send_counts add up to 4",
    wrong_recv_counts: r"rank 2 expects 2 rows from rank 3, which sends it 1: recv_counts must be what the peers send",
    negative_count: r"rank 2 gives a negative send count, -1, for rank 3",
    short_counts: r"rank 2 raised ValueError .* 2 send_counts and 4 recv_counts: .* each of the group's 4 ranks",
    short_out: r"rank 2 raised ValueError .* out \(3, 2\) torch.float32: it must be contiguous \(4, 2\) torch.float32",
    out_on_one_rank: r"rank 0 waits in all_to_all #1 .*; rank 2 is in all_to_all #1 of ep with .* out",
    crossed_groups: r"no rank can go on: rank 0 waits in barrier #1 of tp \(step 7, layer 3\) for rank 1; "
    r"ranks 1, 3 wait in barrier #1 of ep \(step 7, layer 3\) for ranks 0, 2; rank 2 waits in barrier #1 of tp",
    no_sender: r"rank 0 waits in recv #0 of world \(step 7, layer 3\) for rank 2; rank 2 has returned",
    no_receiver: r"send #0 of world from rank 0 was begun by other ranks; rank 2 has returned",
    receiver_is_gone: r"rank 2 is in send #0 of world \(step 7, layer 3\); rank 0 has returned",
    other_message: r"recv #0 of world: rank 0 sends \[3, 2\] torch.float32 \(step 7, layer 3\), "
    r"rank 2 expects \[4, 2\] torch.float32 \(step 7, layer 3\)",
    waits_for_each_other: r"no rank can go on: rank 0 waits in recv #0 of world \(step 7, layer 3\) for rank 3; "
    r"rank 1 waits in recv #0 of world \(step 7, layer 3\) for rank 2",
}

"""One gloo process that runs the contract's programs: `python gloo_rank.py RANK WORLD PORT`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from moe_runtime.comm.process import init_process, join_store
from moe_runtime.comm.torch_dist import torch_dist_groups
from moe_runtime.dispatch.base import Phase
from moe_runtime.parallel.mesh import ProcessMesh
from tests.dispatch import contract
from tests.dispatch.contract import BACKENDS, make_case
from tests.dispatch.elastic_adapters import Elastic, spec_for
from tests.dispatch.legacy_fabric import Fabric
from tests.dispatch.nvshmem_backend import Nvshmem
from tests.dispatch.symm_mem_backend import Symmetric
from tests.doubles.deep_ep.elastic import Library

DEADLINE_S = 60.0


def main(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    store = join_store("127.0.0.1", port, deadline_s=DEADLINE_S)
    process = init_process(rank, world, store=store, backend="gloo", deadline_s=DEADLINE_S)
    try:
        ep = torch_dist_groups(ProcessMesh(dp=world, rank=rank), process).ep
        cases = [
            make_case(ep=world, slots=2, top_k=3, tokens=[3, 0, 5, 1][:world], padding=1),
            make_case(ep=world, slots=1, top_k=2, tokens=[2] * world, dtype=torch.bfloat16),
            make_case(ep=world, slots=2, top_k=1, tokens=[4] * world, only_slot=1),
            make_case(ep=world, slots=2, top_k=2, tokens=[0] * world),
        ]
        with torch.inference_mode():
            for backend in BACKENDS[3:]:
                for case in cases:
                    contract.check_marked_experts(ep, backend, case)
                    contract.check_identity_experts(ep, backend, case)
                    contract.check_origin_of_rows(ep, backend, case)
                    if backend.name == "all_to_all" and case.slots > 1:
                        contract.check_split_combine(ep, backend, case)
                contract.check_two_in_flight(ep, backend, cases[0])
                cap = backend.buffer_bytes(world, 2, tokens=2, top_k=3)
                assert contract.check_receive_cap(ep, backend, cases[0], cap) == 3
            fabric = replace(cases[1], x=[pad(x, (0, 240)) for x in cases[1].x])
            for phase in (Phase.MIXED, Phase.DECODE):
                elastic: Any = Elastic(spec_for(fabric), Library())
                contract.check_marked_experts(ep, elastic, replace(fabric, phase=phase))
                contract.check_origin_of_rows(ep, elastic, replace(fabric, phase=phase))
                legacy = Fabric(case=replace(fabric, phase=phase))
                contract.check_marked_experts(ep, legacy, legacy.case)
                contract.check_origin_of_rows(ep, legacy, legacy.case)
            for case in cases:
                nvshmem: Any = Nvshmem("host", case)
                contract.check_marked_experts(ep, nvshmem, case)
                contract.check_origin_of_rows(ep, nvshmem, case)
            for case in cases:
                symmetric: Any = Symmetric(case)
                contract.check_marked_experts(ep, symmetric, case)
                contract.check_origin_of_rows(ep, symmetric, case)
        ep.barrier()
    except BaseException as error:
        process.close(error)
        raise
    process.close()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))

"""The dense cases of `bench kernels` run, on small shapes and through the interpreter."""

from __future__ import annotations

import pytest
import torch
from moe_tools.bench import dense_cases
from moe_tools.bench.floor import H200, linear_work

from tests.kernels.devices import DEVICE


def test_contenders_agree() -> None:
    case = dense_cases.dense("q_b", 3, 256, 512, DEVICE)
    results = {name: run() for name, run in case.contenders.items()}
    want = results["cuBLAS bf16"]
    assert isinstance(want, torch.Tensor) and case.ours in results
    for name, got in results.items():
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got.float(), want.float(), atol=0.3, rtol=0.1, msg=name)


@pytest.mark.parametrize(("tokens", "bound"), [(128, "bytes"), (4096, "flops")])
def test_what_bounds_them(tokens: int, bound: str) -> None:
    assert H200.bound(linear_work(tokens, n=24_576, k=1536, weight_bytes=1.0, arithmetic="fp8")) == bound
    assert len(list(dense_cases.dense_cases())) == 6

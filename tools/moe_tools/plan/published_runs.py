"""Published runs, and what has to be assumed of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One run of DeepSeek-V3 or R1 in fp8 by others. `value`: ms per decode step, or prompt tokens/s/GPU."""

    name: str
    kind: Kind
    hardware: str
    ep: int
    batch: int
    """Decode: sequences per GPU. Prefill: tokens of a step per GPU"""
    length: int
    """Cached tokens of a sequence at the mean; prefill: of a prompt"""
    value: float
    redundant: int
    balance: Literal["even", "eplb", "none"]
    two_batches: bool
    fp8_cache: bool = False
    experts: str = "masked"
    """Table of the experts' decode kernels"""
    groups: bool = True
    """EPLB keeps groups of experts on one node where it can, as DeepSeek's and SGLang's do"""
    assumptions: str
    source: str


RUNS: Final = (
    Published(
        name="DeepSeek profile EP128", kind="decode", hardware="h800", ep=128, batch=128, length=4096, value=55.0,
        redundant=0, balance="even", two_batches=True,
        assumptions="routing simulated even; bf16 cache; 4096 cached tokens throughout",
        source="https://github.com/deepseek-ai/profile-data, Feb 2025; 18 598 tok/s per node as computed by SGLang",
    ),
    Published(
        name="DeepSeek online EP144", kind="decode", hardware="h800", ep=144, batch=88, length=4989, value=47.6,
        redundant=32, balance="eplb", two_batches=True,
        assumptions="a day's mean: 21 tok/s per user; batch = 1850 tok/s/GPU over that; drawn routes, EPLB, no MTP",
        source="https://github.com/deepseek-ai/open-infra-index, day 6, 27 and 28 Feb 2025",
    ),
    Published(
        name="SGLang EP72", kind="decode", hardware="h100", ep=72, batch=256, length=2050, value=92.0,
        redundant=32, balance="eplb", two_batches=True,
        assumptions="2000 tokens in and few out; drawn routes, EPLB of the same distribution",
        source="https://lmsys.org/blog/2025-05-05-large-scale-ep: 22 282 tok/s per node",
    ),
    Published(
        name="vLLM EP32", kind="decode", hardware="h200", ep=32, batch=512, length=257, value=214.0,
        redundant=32, balance="even", two_batches=True,
        assumptions="as its launch script says: simulated even routing, two micro-batches; 1 in, 512 out: 257 cached "
        "at the mean; all 512 slots always busy, so 214 ms is the most that a step took: HTTP clients were served",
        source="https://github.com/vllm-project/vllm/pull/29284, 23 Nov 2025: 2387 tok/s/GPU",
    ),
    Published(
        name="TRT-LLM EP8", kind="decode", hardware="h200", ep=8, batch=32, length=4608, value=30.4,
        redundant=0, balance="none", two_batches=False,
        fp8_cache=True,
        experts="fused_cutlass",
        assumptions="1K in, 8K out, concurrency 256, lengths from 0.8 to 1 times that: 4608 cached at the mean, fp8 "
        "cache; prompts' share of steps left out; drawn routes, no balancing",
        source="https://github.com/ai-dynamo/aiconfigurator, silicon_sample.csv of 21 Aug 2026",
    ),
    Published(
        name="DeepSeek prefill EP32", kind="prefill", hardware="h800", ep=32, batch=16384, length=4096, value=7839.0,
        redundant=0, balance="even", two_batches=True, assumptions="routing simulated even",
        source="https://github.com/deepseek-ai/profile-data, Feb 2025; 62 713 tok/s per node as computed by SGLang",
    ),
    Published(
        name="SGLang prefill EP32, even", kind="prefill", hardware="h100", ep=32, batch=16384, length=4096,
        value=7417.0, redundant=32, balance="even", two_batches=True,
        assumptions="simulated perfect EPLB; 16384 tokens a step",
        source="https://lmsys.org/blog/2025-05-05-large-scale-ep: 59 337 per node",
    ),
    Published(
        name="SGLang prefill EP32", kind="prefill", hardware="h100", ep=32, batch=16384, length=4096, value=6288.0,
        redundant=32, balance="eplb", two_batches=True,
        assumptions="16384 tokens a step; drawn routes, EPLB of the same distribution",
        source="https://lmsys.org/blog/2025-05-05-large-scale-ep: 50 302 per node",
    ),
)  # fmt: skip

HELD_OUT: Final = (
    Published(
        name="SGLang GB200 EP48", kind="decode", hardware="gb200", ep=48, batch=768, length=2050, value=84.5,
        redundant=32, balance="eplb", two_batches=False,
        assumptions="bf16 attention, fp8 experts, 2000 in; 768 per GPU: the batch is published for another precision",
        source="https://lmsys.org/blog/2025-09-25-gb200-part-2: 9087 tok/s/GPU",
    ),
    Published(
        name="SGLang GB200 prefill EP4", kind="prefill", hardware="gb200", ep=4, batch=16384, length=2000,
        value=18471.0, redundant=0, balance="eplb", two_batches=False,
        assumptions="bf16 attention, fp8 experts; 4 ranks of the 2 to 4 published; 16384 tokens a step",
        source="https://lmsys.org/blog/2025-09-25-gb200-part-2",
    ),
)  # fmt: skip
"""Never in a fit: what the Hopper tables and constants say of Blackwell."""

NETWORK_BOUND_MS: Final = 14.76
"""DeepSeek's own limit (https://arxiv.org/abs/2505.09343): 32 tokens, 9 copies, 1 + 2 bytes for each of 7K values,
50 GB/s, 61 layers, two micro-batches."""

"""Physical floors: what a piece of work must take at least on a GPU, by its bytes and its arithmetic.

Sources: NVIDIA's H100 SXM and H200 datasheets (dense rates, no sparsity).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Arithmetic = Literal["bf16", "fp8"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """Datasheet rates of one GPU and of its links, one way: bytes/s and FLOP/s."""

    name: str
    memory_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float

    def floor_us(self, work: Work) -> float:
        """The larger of the time for the bytes and the time for the arithmetic."""
        rate = self.fp8_flops if work.arithmetic == "fp8" else self.bf16_flops
        return 1e6 * max(work.num_bytes / self.memory_bytes_per_s, work.flops / rate)

    def bound(self, work: Work) -> Literal["bytes", "flops"]:
        """Which of the two the floor is."""
        rate = self.fp8_flops if work.arithmetic == "fp8" else self.bf16_flops
        return "bytes" if work.num_bytes / self.memory_bytes_per_s >= work.flops / rate else "flops"


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that cross device memory at least once, and floating-point operations (a multiply-add is two)."""

    num_bytes: float
    flops: float
    arithmetic: Arithmetic = "bf16"

    def __add__(self, other: Work) -> Work:
        """Work of one kind done one after the other."""
        if self.arithmetic != other.arithmetic:
            raise ValueError(f"cannot add {self.arithmetic} and {other.arithmetic} work: their rates differ")
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops, self.arithmetic)


H200: Final = Hardware("H200", 4.8e12, 989.5e12, 1979e12, 450e9, 50e9)
H100: Final = Hardware("H100", 3.35e12, 989.5e12, 1979e12, 450e9, 50e9)


def hardware_of(device_name: str) -> Hardware | None:
    """The datasheet entry of `torch.cuda.get_device_name()`, None where we have none."""
    for hardware in (H200, H100):
        if hardware.name in device_name:
            return hardware
    return None


def linear_work(rows: int, *, n: int, k: int, weight_bytes: float, arithmetic: Arithmetic = "bf16") -> Work:
    """`x [rows, k] @ w [n, k]^T`: weights once, 16-bit rows in and out."""
    return Work(n * k * weight_bytes + 2 * rows * (n + k), 2.0 * rows * n * k, arithmetic)


def expert_work(
    rows: int, slots: int, *, hidden: int, intermediate: int, weight_bytes: float, arithmetic: Arithmetic
) -> Work:
    """Both products of `rows` rows over `slots` experts, every slot's weights read once: w13 and w2."""
    weights = 3.0 * hidden * intermediate
    return Work(slots * weights * weight_bytes, 2.0 * rows * weights, arithmetic)


def mla_work(tokens: int, kv_len: int, *, heads: int, latent: int, rope: int, kv_bytes: float = 2.0) -> Work:
    """Absorbed attention over the latent cache: each cached row is read once per token, scores and values in bf16."""
    per_pair = 2.0 * heads * (latent + rope + latent)
    return Work(tokens * kv_len * (latent + rope) * kv_bytes, tokens * kv_len * per_pair)

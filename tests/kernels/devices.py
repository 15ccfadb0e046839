"""Where the Triton tests run: on the GPU where there is one, else under Triton's interpreter on tiny shapes.

The interpreter keeps bf16 as raw bits (a product of bf16 is garbage) and truncates where it rounds to bf16 or fp8, so
there kernels are given and return fp32 or fp16, and quantised bytes are not compared.
"""

from __future__ import annotations

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if ON_GPU else (torch.float32, torch.float16)

"""The number format of matrix products on a CPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

# The instructions with which oneDNN, and so PyTorch, multiplies float32 matrices in bfloat16. (It does not
# do so with avx512_bf16.)
_NATIVE = "amx_bf16"


@cache
def native_bf16() -> str | None:
    """The instructions by which this CPU multiplies in bfloat16; ``None`` where it would only emulate that,
    several times slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return None
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "").split()
    return _NATIVE if _NATIVE in flags else None


def use(mixed_precision: str) -> str | None:
    """Have this process multiply float32 matrices in ``mixed_precision`` (``bf16`` or ``no``) if the CPU can.

    With bf16 the factors are rounded to bfloat16 (8 bits of precision) inside each product, sums stay
    float32, and so do all weights, activations and gradients. Returns what there is to say about it.
    """
    native = native_bf16()
    bf16 = mixed_precision == "bf16" and native is not None
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if bf16 else "ieee"  # type: ignore[attr-defined]
    if mixed_precision != "bf16":
        return None
    if native is None:
        return (
            "mixed_precision is bf16, but this CPU has no AMX and would emulate it, "
            "several times slower; training is in float32"
        )
    return f"Matrix products in bf16 ({native}); weights, sums and all else in float32"

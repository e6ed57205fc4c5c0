"""What the machine gives at this moment: its sgemm rate, and how much of it others use."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch


def sgemm(rows: int = 1024, inner: int = 576, columns: int = 1536, seconds: float = 1.0) -> float:
    """GFLOP/s of ``[rows, inner] @ [inner, columns]`` in float32, at SmolLM2's MLP shape by default."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    torch.mm(a, b)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        torch.mm(a, b)
        count += 1
    return 2e-9 * rows * inner * columns * count / (time.perf_counter() - began)


# Frozen products of one of SmolLM2's layers: what goes in and comes out of q, k, v, o; gate, up, down.
LAYER = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))


def layer_sgemm(rows: int = 384, seconds: float = 2.0) -> float:
    """GFLOP/s of a layer's products one after the other, for as many tokens as a packed step has."""
    factors = [(torch.randn(rows, inner), torch.randn(inner, outer)) for inner, outer in LAYER]
    one = sum(2e-9 * rows * inner * outer for inner, outer in LAYER)
    count, began = -3, 0.0
    while count < 1 or time.perf_counter() - began < seconds:
        if count == 0:
            began = time.perf_counter()
        for a, b in factors:
            torch.mm(a, b)
        count += 1
    return one * count / (time.perf_counter() - began)


class Load:
    """Cores that other processes kept busy between two readings of /proc/stat."""

    def __init__(self) -> None:
        self._began = self._reading()

    @staticmethod
    def _reading() -> tuple[float, float]:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, *_ = (int(field) for field in fields)
        return time.monotonic(), (user + nice + system) / os.sysconf("SC_CLK_TCK")

    def others(self, own_cpu_seconds: float) -> float:
        """Mean busy cores since the start, less ``own_cpu_seconds`` of the measured process."""
        now, busy = self._reading()
        return max(0.0, (busy - self._began[1] - own_cpu_seconds) / (now - self._began[0]))


def peak_memory() -> int:
    """Bytes that this process had in memory at most. (``ru_maxrss`` of a child begins at its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def describe() -> str:
    """Machine and versions, for the log."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "ray"))
    return f"{os.cpu_count()} cores, {model}, {torch.backends.cpu.get_cpu_capability()}; {packages}"

"""What a run states about itself at its start, so that a slow or odd job explains itself."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from typing import Any

import peft
import psutil
import torch
import transformers

import comps
from comps.tuning.training import precision


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers."""
    return {
        "service": comps.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def optional_stack() -> str:
    """Whether Intel's archived accelerators are there and usable, in a sentence.

    They are never needed: stock PyTorch carries their optimisations.
    """
    found = []
    for module in ("intel_extension_for_pytorch", "oneccl_bindings_for_pytorch"):
        if importlib.util.find_spec(module) is None:
            continue
        try:
            importlib.import_module(module)
            found.append(f"{module} is loaded")
        except Exception as error:  # an incompatible IPEX raises whatever it likes, AttributeError included
            found.append(f"{module} is installed but not compatible ({type(error).__name__}: {error})")
    return "; ".join(found) or "stock PyTorch (no IPEX or oneCCL installed)"


def machine() -> dict[str, Any]:
    """Where the run is, its cores and threads, and the instruction sets that matter."""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "process_began": psutil.Process().create_time(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": precision.native_bf16(),
    }

"""Everything global that a load could leave changed, to be compared before and after."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from typing import Any

import torch
import transformers


def snapshot() -> dict[str, Any]:
    """Return the state of torch, transformers and the process."""
    gc.collect()  # a model in a reference cycle keeps its files mapped
    factories = ("empty", "zeros", "ones", "full", "rand", "randn", "tensor", "arange", "linspace")
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
        "factories": [getattr(torch, name) for name in factories],
        "nn.init": {k: v for k, v in vars(torch.nn.init).items() if callable(v)},
        "Module.__init__": torch.nn.Module.__init__,
        "tie_weights": transformers.PreTrainedModel.tie_weights,
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "threads": set(threading.enumerate()),
        "files": sorted(_open_files()),
        "directory": os.getcwd(),
    }


def _open_files() -> list[str]:
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return [name for name in names if "/proc/" not in name]

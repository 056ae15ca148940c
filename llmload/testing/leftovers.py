"""Everything global that a load could leave changed, to be compared before and after."""

from __future__ import annotations

import gc
import locale
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy
import torch
import transformers
from torch import nn

_SWITCHES = (
    ("transformers.integrations.deepspeed", "_hf_deepspeed_config_weak_ref"),
    ("deepspeed.runtime.zero.partition_parameters", "zero_init_context"),
    ("deepspeed.runtime.zero.partition_parameters", "top_level_context"),
    ("colossalai.lazy.lazy_init", "LazyInitContext._replaced"),
)
"""Module and name of what libraries set for the length of a load, where they are imported."""


def snapshot() -> dict[str, Any]:
    """Return the state of torch, transformers and the process, by what it is the state of.

    Two snapshots are equal if nothing was left behind; see :func:`changes` for what was.
    """
    gc.collect()  # a model in a reference cycle keeps its files mapped
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
        "other random": [random.getstate(), str(numpy.random.get_state())],
        "torch.nn.functional": _functions(nn.functional),
        "nn.init": _functions(nn.init),
        "nn.Module": _functions(nn.Module),
        "nn.Linear": _functions(nn.Linear),
        "nn.Embedding": _functions(nn.Embedding),
        "PreTrainedModel": _functions(transformers.PreTrainedModel),
        "PretrainedConfig": _functions(transformers.PretrainedConfig),
        "torch": _functions(torch),
        "torch.Tensor": _functions(torch.Tensor),
        "libraries": _of_libraries(),
        "module hooks": [list(hooks) for hooks in _global_hooks()],
        "environment": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
        "warnings": list(warnings.filters),
        "logging": [logging.root.level, list(logging.root.handlers), logging.root.manager.disable],
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "excepthook": sys.excepthook,
        "sys.path": [*sys.path, *sys.meta_path, *sys.path_hooks],
        "stdout": [sys.stdout, sys.stderr],
        "process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "children": multiprocessing.active_children(),
        "locale": locale.setlocale(locale.LC_ALL),
        "threads": set(threading.enumerate()),
        "files": sorted(_open_files()),
        "directory": os.getcwd(),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Return what differs between two snapshots, by its key, in words."""
    found = {}
    for key, old in before.items():
        new = after[key]
        if new == old:
            continue
        if isinstance(old, dict):
            names = sorted(str(n) for n in old.keys() | new.keys() if old.get(n) != new.get(n))
            found[key] = f"{', '.join(names[:5])} differ"
        elif isinstance(old, list | set):
            more = [str(item) for item in new if item not in old]
            less = [str(item) for item in old if item not in new]
            words = [f"{', '.join(more[:3])} are new"] if more else []
            words += [f"{', '.join(less[:3])} are gone"] if less else []
            found[key] = "; ".join(words) if words and key != "random" else "was changed"
        else:
            found[key] = f"{old} became {new}"
    return found


@contextmanager
def nothing_left_behind(allow: Collection[str] = ("random",)) -> Iterator[None]:
    """Assert that the block leaves the global state as it found it, whether it raises or not.

    :param allow: keys of :func:`snapshot` that may change. A load that succeeds moves the random
        stream as the libraries do that it calls; a plan and a load that fails do not.
    :raises AssertionError: something else was left behind; the message says what.
    """
    before = snapshot()
    try:
        yield
    finally:
        left = {key: how for key, how in changes(before, snapshot()).items() if key not in allow}
        if left:
            told = "; ".join(f"{key}: {how}" for key, how in left.items())
            raise AssertionError(f"the block left this behind: {told}")


def _functions(holder: Any) -> dict[str, Any]:
    # transformers adds smart_apply to nn.Module when it first initialises a model, for good.
    return {k: v for k, v in vars(holder).items() if callable(v) and k != "smart_apply"}


def _of_libraries() -> dict[str, Any]:
    found = {}
    for module, name in _SWITCHES:
        try:
            value = attrgetter(name)(sys.modules.get(module))
        except AttributeError:
            value = None
        found[f"{module}.{name}"] = value or None  # off, as where it was never imported
    return found


def _global_hooks() -> list[Any]:
    """Return torch's hooks that run for every module."""
    found = vars(nn.modules.module)
    return [
        value
        for name, value in sorted(found.items())
        if name.startswith("_global_") and hasattr(value, "keys")
    ]


def _open_files() -> list[str]:
    names = []
    for number in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return [name for name in names if "/proc/" not in name]

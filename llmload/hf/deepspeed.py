"""The DeepSpeed config that a script has set for all of transformers, as its Trainer does.

``TrainingArguments(deepspeed=...)`` and ``HfDeepSpeedConfig`` set it before the model is loaded.
transformers then partitions whatever is built in the process, also what is only to be looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_MODULE = "transformers.integrations.deepspeed"
_REFERENCE = "_hf_deepspeed_config_weak_ref"
_PRECISIONS = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16"}


def partitions() -> bool:
    """Say whether a config of ZeRO stage 3 is set."""
    module: Any = sys.modules.get(_MODULE)  # who has set one has imported it
    return module is not None and bool(module.is_deepspeed_zero3_enabled())


def dtype() -> str | None:
    """Return the dtype in which the config that is set makes parameters; None where it is open.

    DeepSpeed makes all of them in it, whatever is asked of ``from_pretrained``.
    """
    content = sys.modules[_MODULE].deepspeed_config()
    wanted = {key: content.get(key, {}).get("enabled") for key in _PRECISIONS}
    if "auto" in wanted.values():
        return None
    return next((_PRECISIONS[key] for key, enabled in wanted.items() if enabled), "float32")


@contextmanager
def hidden() -> Iterator[None]:
    """Let transformers see no config in the block: what is built there stays whole."""
    module = sys.modules.get(_MODULE)
    if module is None:
        yield
        return
    before = getattr(module, _REFERENCE)
    setattr(module, _REFERENCE, None)
    try:
        yield
    finally:
        setattr(module, _REFERENCE, before)

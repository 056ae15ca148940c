"""What other tools call the keys of the section ``gradient_checkpointing``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmload.plugin import Spelling, switch


def _options(value: object) -> object:
    """Keep the one option of torch's that the section has."""
    given = value if isinstance(value, Mapping) else {}
    return {key: part for key, part in given.items() if key == "use_reentrant"}


SPELLINGS: Final[Mapping[str, Spelling]] = {
    "use_gradient_checkpointing": Spelling("unsloth", "gradient_checkpointing", switch({})),
    "grad_checkpoint": Spelling("ColossalChat", "gradient_checkpointing", switch({})),
    "gradient_checkpointing_kwargs": Spelling(
        "TRL and axolotl", "gradient_checkpointing", _options
    ),
    "use_reentrant_gc": Spelling("LLaMA-Factory", "gradient_checkpointing.use_reentrant"),
}

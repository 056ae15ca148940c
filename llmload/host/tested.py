"""How far each built-in section works on the two sets of versions, as the tests have seen it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

Works: TypeAlias = tuple[Literal["yes", "in part", "no"], str]

STACKS: Final[Mapping[str, Mapping[str, str]]] = {
    "modern": {"torch": "2.13.0", "transformers": "5.24.0", "peft": "0.21.2"},
    "colossalai": {"torch": "2.5.1", "transformers": "4.51.3", "peft": "0.13.2"},
}
"""Name -> what tells it from the other: constraints/NAME.txt has every version."""

TRANSFORMERS: Final[Mapping[str, str]] = {
    "5.24.0": "streaming",
    "5.23.0": "streaming",
    "5.22.2": "streaming",
    "5.21.1": "streaming",
    "5.20.2": "streaming",
    "5.19.0": "streaming",
    "5.18.0": "streaming",
    "5.15.1": "transformers",
    "5.3.0": "transformers",
    "5.0.0": "refused",
    "4.57.6": "transformers",
    "4.51.3": "streaming",
}
"""Version -> the loader that an ordinary load on it has; ``nox -s versions`` holds it to that."""

LIBRARIES: Final[Mapping[str, tuple[str, str]]] = {
    "peft": ("0.13.2", "0.21.2"),
    "accelerate": ("1.3.0", "1.15.0"),
    "deepspeed": ("0.19.4", "0.19.8"),
    "bitsandbytes": ("0.50.0", "0.50.2"),
}
"""Library -> the oldest release that is taken, and the newest that was tried."""

_EVERYWHERE: Final[Mapping[str, Works]] = {"modern": ("yes", ""), "colossalai": ("yes", "")}

ON_STACKS: Final[Mapping[str, Mapping[str, Works]]] = {
    "streaming": _EVERYWHERE,
    "transformers": _EVERYWHERE,
    "tokenizer": _EVERYWHERE,
    "embeddings": _EVERYWHERE,
    "dropout": _EVERYWHERE,
    "cast": _EVERYWHERE,
    "gradient_checkpointing": {
        "modern": ("yes", ""),
        "colossalai": ("in part", "without `every_n_layers` and `offload`"),
    },
    "lora": _EVERYWHERE,
    "kbit": {
        "modern": ("yes", "on the CPU too"),
        "colossalai": ("in part", "on an accelerator only: transformers 4.51 refuses the CPU"),
    },
    "coati": _EVERYWHERE,
    "colossalai": {
        "modern": ("in part", "lazy initialisation only"),
        "colossalai": ("yes", ""),
    },
    "verify": _EVERYWHERE,
    "zero3": {
        "modern": ("yes", "on the CPU with gloo too"),
        "colossalai": ("yes", "on the CPU with gloo too"),
    },
}
"""Plugin -> stack -> how far, and why not further."""

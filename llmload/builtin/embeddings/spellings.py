"""What other tools call the keys of the section ``embeddings``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmload.plugin import Spelling, switch

SPELLINGS: Final[Mapping[str, Spelling]] = {
    "resize_vocab": Spelling("LLaMA-Factory", "embeddings", switch({})),
    "resize_token_embeddings_to_32x": Spelling(
        "axolotl", "embeddings.pad_to_multiple_of", switch(32)
    ),
    "shrink_embeddings": Spelling("axolotl", "embeddings.allow_shrink"),
    "mean_resizing_embeddings": Spelling("axolotl", "embeddings.init_new", switch("mean")),
}

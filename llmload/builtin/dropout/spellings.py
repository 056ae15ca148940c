"""What other tools call the keys of the section ``dropout``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from llmload.plugin import Spelling, switch

SPELLINGS: Final[Mapping[str, Spelling]] = {
    "disable_dropout": Spelling("TRL and DeepSpeed-Chat", "dropout.p", switch(0.0)),
}

"""The spec key ``coati``."""

from __future__ import annotations

from typing import Final

from llmload.plugin import Section

STARTS: Final = (True, "pissa_niter_4")
"""Values of ``init_lora_weights`` that ColossalChat has; the second is its ``PiSSA``."""


class CoatiSection(Section):
    """LoRA layers as ColossalChat makes them; what they are like is said in the section ``lora``.

    Factors are plain float32 parameters whatever the base's dtype, embeddings have the same two as
    linear layers, and with ``bias`` other than none an adapted linear layer without a bias gets one
    of zeros, which is trained.
    """

    faults: bool = False
    """Reproduce what is wrong there: linear layers take ``lora_alpha`` 32 and no dropout whatever
    is asked for, and their pretrained biases are dropped where ``bias`` is none."""

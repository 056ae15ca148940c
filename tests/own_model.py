"""A model class that is not transformers' own, for ``auto_class: own_model:OwnLlama``."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM


class OwnLlama(LlamaForCausalLM):
    """Llama with a fixed buffer of its own, which is not saved."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.register_buffer("ramp", torch.arange(4.0), persistent=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            module.ramp.copy_(torch.arange(4.0))

"""A plugin whose module imports torch, and with it every command that looks for plugins."""

from __future__ import annotations

from typing import Any

import torch

import llmload


class Heavy:
    name = "heavy"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        assert isinstance(model, torch.nn.Module)
        return model

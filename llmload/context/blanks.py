"""The model without storage, built as seldom as can be, and how the checkpoint fits it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llmload.checkpoint import Checkpoint
    from llmload.checkpoint.accounting import Accounting
    from llmload.context.asked import Asked
    from llmload.context.engine import Engine


class Blanks:
    """Builds blank models for plan and load, and keeps one while the config stays the same."""

    __slots__ = ("_accounting", "_asked", "_draws", "_engine", "_kept", "_pristine")

    def __init__(self, asked: Asked, engine: Engine, config: PretrainedConfig) -> None:
        self._asked = asked
        self._engine = engine
        self._pristine = config
        self._kept: PreTrainedModel | None = None
        self._draws = False
        self._accounting: Accounting | None = None

    def config(self) -> PretrainedConfig:
        """Return a copy of the config as the plan found and configured it."""
        return copy.deepcopy(self._pristine)

    def configure(self, fields: dict[str, Any]) -> None:
        """Set fields for every run to come; what was built before is forgotten."""
        for name, value in fields.items():
            setattr(self._pristine, name, value)
        self._kept = self._accounting = None

    def untie(self, config: PretrainedConfig) -> None:
        """Let a run's config, and those to come, say that no weights are tied."""
        for each in (config, self._pristine):
            for part in (each, each.get_text_config(), each.get_text_config(decoder=True)):
                part.tie_word_embeddings = False
        self._kept = self._accounting = None

    def blank(self, checkpoint: Checkpoint | None) -> PreTrainedModel:
        """Return the kept model, which belongs to the plan."""
        if self._kept is None:
            self._kept, self._draws = self._build_aside(self._pristine, checkpoint)
        return self._kept

    def take(
        self, config: PretrainedConfig, checkpoint: Checkpoint | None, *, aside: bool
    ) -> PreTrainedModel:
        """Return a model that belongs to the caller: the kept one, if its config is still right.

        :param aside: leave the random stream as it is. Otherwise a class that draws while it is
            built does so now.
        """
        blank, self._kept = self._kept, None
        if blank is not None and self._is_changed(config):
            blank = None
        if aside:
            return self._build_aside(config, checkpoint)[0] if blank is None else blank
        return self._build(config, checkpoint) if blank is None or self._draws else blank

    def account(
        self, model: PreTrainedModel, config: PretrainedConfig, checkpoint: Checkpoint
    ) -> Accounting:
        """Return how the checkpoint fits a blank model; found out once per config."""
        unchanged = not self._is_changed(config)
        if unchanged and self._accounting is not None:
            return self._accounting
        found = self._engine.account(model, checkpoint, tied=model is not self._kept)
        if unchanged:
            self._accounting = found
        return found

    def accounted(self, config: PretrainedConfig) -> Accounting | None:
        """Return what :meth:`account` found out, if it was asked and the config is the same."""
        return None if self._is_changed(config) else self._accounting

    def _is_changed(self, config: PretrainedConfig) -> bool:
        # As dicts: comparing configs whose layers differ raises.
        return bool(config.to_dict() != self._pristine.to_dict())

    def _build_aside(
        self, config: PretrainedConfig, checkpoint: Checkpoint | None
    ) -> tuple[PreTrainedModel, bool]:
        """Build a model that no load hands out, and say whether its class draws meanwhile.

        The random stream does not move: the plan must leave it to the load, which draws as often as
        ``from_pretrained``. On the meta device few classes draw at all (DiffLlama does).
        """
        import torch

        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            blank = self._build(config, checkpoint)
            return blank, not torch.equal(before, torch.get_rng_state())

    def _build(self, config: PretrainedConfig, checkpoint: Checkpoint | None) -> PreTrainedModel:
        asked = self._asked
        return self._engine.blank(
            asked.model_class,
            config,
            asked.dtype,
            stored=() if checkpoint is None else checkpoint.names,
            asked=asked.spec.dtype != "auto",
        )

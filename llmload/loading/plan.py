"""What a load will do, as data."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from llmload.errors import Line, PlanError, Problem
from llmload.loading.memory import Memory


class Step(BaseModel):
    """One call of one plugin's hook."""

    hook: str
    """``init_context``, ``load``, ``post_load``, ``wrap_adapter`` or ``distribute``; ``check``
    for a plugin that only looks."""
    plugin: str
    """The plugin that does it."""
    notes: list[str] = Field(default_factory=list)
    """What the plugin says it will do; given with its first step."""


class Plan(BaseModel):
    """What a load of a spec will do, and what stands in the way."""

    model: str
    """The spec's ``model``."""
    folder: str
    """The local folder that will be read."""
    model_class: str
    """The concrete class."""
    dtype: str
    """The floating-point dtype of the model."""
    plugins: dict[str, str]
    """Plugins in plan order -> distribution and version."""
    steps: list[Step] = Field(default_factory=list)
    """In the order in which they will run."""
    loader: str = ""
    """The first loader that does not decline."""
    declined: dict[str, str] = Field(default_factory=dict)
    """Loaders that will not be asked, with the reason each gave."""
    declined_adapters: dict[str, str] = Field(default_factory=dict)
    """Adapter plugins that declined, with the reason each gave."""
    device_map: dict[str, int | str] = Field(default_factory=dict)
    """Where the modules go, by name, ``auto`` and the like resolved; empty for the CPU alone, and
    where it is known only in the load, as of weights that are quantised on the way."""
    checkpoint_tensors: int = 0
    """Tensors in the checkpoint."""
    checkpoint_bytes: int = 0
    """Bytes of all tensors in the checkpoint."""
    to_fetch: dict[str, int] = Field(default_factory=dict)
    """Files of weights on the hub that are not in the cache -> their bytes. A plan reads their
    headers; a load fetches them once nothing stands in its way."""
    keys: list[str] = Field(default_factory=list)
    """How many of the checkpoint's keys each rule renames, a line each."""
    parameters: int = 0
    """Elements in all parameters of the finished model, tied ones once."""
    parameter_bytes: int = 0
    """Their bytes."""
    trainable: int = 0
    """Elements in the parameters that will require gradients."""
    trainable_parameters: list[str] | None = None
    """Their names; None where a hook could not be rehearsed, and nothing is promised."""
    tied: list[str] = Field(default_factory=list)
    """Parameters of the base model that the config ties to others. transformers leaves them apart
    where the checkpoint holds both with different values."""
    frozen: list[str] = Field(default_factory=list)
    """Parameters of the base model that its class freezes, such as sinusoidal positions. They stay
    so, though transformers 5 makes whatever it reads from a checkpoint trainable."""
    new_parameters: dict[str, str] = Field(default_factory=dict)
    """Parameters that do not come from the checkpoint as they are -> the plugin that makes them."""
    memory: Memory | None = None
    """What the load will take; None where it could not be rehearsed."""
    facts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What plugins recorded, by plugin; ``facts["lora"]["targets"]`` names the LoRA targets."""
    lines: list[Line] = Field(default_factory=list)
    """What plugins want people to see of their facts."""
    problems: list[Problem] = Field(default_factory=list)
    """Errors, which stop the load, and warnings."""

    def __repr__(self) -> str:
        found = f"{len(self.errors)} errors, {len(self.warnings)} warnings"
        return f"<Plan of {self.model!r}: {self.model_class} by {self.loader!r}, {found}>"

    def __str__(self) -> str:
        from llmload.loading import printed  # needs rich

        return printed.text(printed.plan(self))

    def _repr_html_(self) -> str:
        from llmload.loading import page  # needs jinja2

        return page.of_plan(self)

    @property
    def errors(self) -> list[Problem]:
        """The problems that stop the load."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def warnings(self) -> list[Problem]:
        """The problems that are only shown."""
        return [problem for problem in self.problems if problem.severity == "warning"]

    def raise_for_errors(self) -> None:
        """Raise :class:`PlanError` with all problems of severity ``error``, if there are any."""
        if self.errors:
            raise PlanError(self.errors)

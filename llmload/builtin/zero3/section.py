"""The spec key ``zero3``: a DeepSpeed config, or the few of its fields that a load depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmload.builtin.zero3.spellings import SPELLINGS
from llmload.plugin import InvalidValueError, Section


class OffloadParam(Section):
    """DeepSpeed's ``zero_optimization.offload_param``."""

    device: Literal["none", "cpu", "nvme"] = "none"
    """Where the partitions are kept between uses; ``none`` for the accelerator itself."""
    nvme_path: str | None = None
    """Folder on a fast disk, for ``nvme``."""
    buffer_count: Annotated[int, Field(ge=0)] = 5
    """Buffers between disk and memory, for ``nvme``."""
    buffer_size: Annotated[int, Field(ge=0)] = 100_000_000
    """Elements of one such buffer: at least those of the largest partition."""
    max_in_cpu: Annotated[int, Field(ge=0)] = 1_000_000_000
    """Elements kept in host memory all the same, for ``nvme``."""
    pin_memory: bool = True
    """Keep the partitions in page-locked memory."""

    @model_validator(mode="after")
    def _path_for_nvme(self) -> OffloadParam:
        if self.device == "nvme" and self.nvme_path is None:
            raise InvalidValueError(
                "`device: nvme` needs `nvme_path`",
                fix="Name a folder on a local fast disk in `nvme_path`.",
            )
        return self


class Zero3Section(Section):
    """How DeepSpeed partitions the model over the ranks.

    Either ``config`` or the plain fields: with those a DeepSpeed config is made, whose precision is
    the model's dtype. The whole config that was used is in the report.
    """

    spellings = SPELLINGS

    config: str | Mapping[str, Any] | None = None
    """A DeepSpeed config: a JSON or YAML file, relative to the working directory, or a mapping."""
    stage: Literal[0, 1, 2, 3] = 3
    """3: each rank holds a part of every parameter; 0 to 2: the model stays whole."""
    stage3_param_persistence_threshold: Annotated[int, Field(ge=0)] | None = None
    """Parameters of at most so many elements stay gathered in training; null for DeepSpeed's own
    value, 100,000."""
    offload_param: OffloadParam | None = None
    """Keep the partitions in host memory or on a disk."""
    leaf_modules: tuple[str, ...] = ()
    """Names of module classes that are gathered as one: mixtures of experts whose experts are
    modules of their own, or ranks that use different experts wait for one another forever. Those
    that keep them in a list or mapping called ``experts`` are found without being named."""
    deadline: Annotated[float, Field(gt=0)] = 15.0
    """Seconds after which a rank that gives no sign of life stops the load on all ranks."""
    digests: bool = False
    """Have every rank read all weights once more and compare digests of them with rank 0's; without
    it they compare a sample of every tensor."""

    @model_validator(mode="after")
    def _one_way(self) -> Zero3Section:
        plain = self.model_fields_set & {
            "stage",
            "stage3_param_persistence_threshold",
            "offload_param",
        }
        if self.config is not None and plain:
            raise InvalidValueError(
                f"`config` and {', '.join(f'`{name}`' for name in sorted(plain))} say the same"
                " thing twice",
                fix="Write it into the DeepSpeed config, or remove `config`.",
            )
        return self

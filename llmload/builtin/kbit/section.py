"""The spec key ``kbit``: how a model is quantised with bitsandbytes, and prepared for training."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

from pydantic import Field, model_validator

from llmload.builtin.kbit.spellings import SPELLINGS
from llmload.plugin import Dtype, InvalidValueError, Section

if TYPE_CHECKING:
    from collections.abc import Mapping

Profile: TypeAlias = Literal["minimal", "legacy", "trl", "trl_legacy"]

_ONLY_FOR: Final[Mapping[str, int]] = MappingProxyType(
    {
        "quant_type": 4,
        "double_quant": 4,
        "compute_dtype": 4,
        "quant_storage": 4,
        "block_size": 4,
        "threshold": 8,
    }
)
"""Key -> the number of bits for which it means something."""


class Casts(Section):
    """Dtypes of the parameters that are not quantised; null leaves a group to the profile."""

    norms: Dtype | None = None
    """Normalisation layers."""
    embeddings: Dtype | None = None
    """Embedding layers, and a head that shares their weight."""
    head: Dtype | None = None
    """The output head."""
    other: Dtype | None = None
    """All others: biases, routers, convolutions and the like."""


class Cache(Section):
    """Where quantised weights are kept, so that the next load of the same base need not quantise.

    ``cache: {}`` does it with the defaults; ``llmload cache`` lists and clears them.
    """

    folder: Annotated[str, Field(min_length=1)] | None = None
    """A folder that belongs to this user alone; null: ``$XDG_CACHE_HOME/llmload/kept``, by default
    ``~/.cache/llmload/kept``."""
    max_gb: Annotated[float, Field(gt=0)] = 100.0
    """What all that is kept there may take, in GB: the least recently used goes."""
    verify: bool = False
    """Hash every byte of the source and of what is kept, each time. Else size, inode and times of
    each file are looked at, and a few bytes of each tensor of the source. The section ``verify``
    and ``lock`` ask for it too."""


class KbitSection(Section):
    """Linear layers in 8 or 4 bits, the base model frozen: what QLoRA trains adapters on."""

    spellings = SPELLINGS

    bits: Literal[4, 8] = 4
    """4: NF4 or FP4 in blocks; 8: LLM.int8(), row by row."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code."""
    double_quant: bool = False
    """Quantise the blocks' statistics too: about 0.4 bits per parameter less."""
    compute_dtype: Dtype | None = None
    """Dtype in which a 4-bit layer multiplies; null: the model's."""
    quant_storage: Literal["uint8", "int8", "float16", "bfloat16", "float32"] | None = None
    """Dtype as which packed codes are stored; the bytes are the same. null: uint8, or the model's
    dtype where the section ``zero3`` or ``accelerate launch`` says that ZeRO-3 or FSDP will shard
    the model: FSDP wants one floating-point dtype, and DeepSpeed casts every other one."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Values that share one statistic. transformers knows 64 only; others need the streaming
    loader."""
    threshold: Annotated[float, Field(ge=0)] = 6.0
    """8 bits: input features larger than this are multiplied in 16 bits; 0 for none."""
    skip_modules: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Modules that stay as they are, as transformers matches them: a name, the end of one or a
    regular expression. The output head and what is tied to the embeddings stay so in any case."""
    fp32_cpu_offload: bool = False
    """Keep the modules that ``device_map`` puts on the CPU out of quantisation."""
    prepare: Profile = "minimal"
    """How the frozen base is prepared. minimal: nothing is cast. legacy: everything that is not
    quantised in float32, as by ``prepare_model_for_kbit_training``. trl: as minimal, with the
    adapter in bfloat16 (``lora.adapter_dtype``), as in TRL the SFTTrainer since 0.26 and the
    DPOTrainer since 0.29. trl_legacy: as with ``bf16=True`` the one from 0.12 to 0.24 and the other
    to 0.28."""
    cast: Casts = Casts()
    """Other dtypes than the profile's, by group of parameters."""
    cache: Cache | None = None
    """Keep the quantised weights, and take them from there when the same base is loaded again."""

    @model_validator(mode="after")
    def _fits_the_bits(self) -> KbitSection:
        for key, bits in _ONLY_FOR.items():
            if key in self.model_fields_set and bits != self.bits:
                raise InvalidValueError(
                    f"`{key}` has no meaning for {self.bits} bits",
                    fix=f"Remove it, or set `bits: {bits}`.",
                )
        return self

"""The spec key ``lora``: every field of PEFT's ``LoraConfig`` by its own name, and eight of ours.

Defaults are PEFT's own. Only keys that are given are handed on, so that the installed PEFT fills in
the rest; a key that it does not know yet is refused with the version that brought it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from llmload.builtin.lora.spellings import SPELLINGS
from llmload.plugin import InvalidValueError, Regex, Section, nearest, replacements

OWN_FIELDS: Final = frozenset(
    {
        "adapter",
        "adapter_dtype",
        "adapter_name",
        "adapter_revision",
        "key_map",
        "lora_config",
        "merge",
        "merge_first",
        "tied_weights",
    }
)
"""Fields of the section that are not PEFT's."""

LEFT_TO_PEFT: Final = frozenset({"peft_type", "peft_version"})
"""Fields of ``LoraConfig`` that PEFT fills in itself."""

INITIALISATIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "gaussian": "0.13.2",
        "olora": "0.13.2",
        "pissa": "0.13.2",
        "loftq": "0.13.2",
        "eva": "0.14.0",
        "corda": "0.15.0",
        "orthogonal": "0.16.0",
        "lora_ga": "0.19.0",
        "mica": "0.20.0",
    }
)
"""Initialisation by name -> the PEFT that brought it, or the oldest that is supported."""

FIELDS_SINCE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "alora_invocation_tokens": "0.18.0",
        "arrow_config": "0.18.0",
        "corda_config": "0.15.0",
        "ensure_weight_tying": "0.18.0",
        "eva_config": "0.14.0",
        "exclude_modules": "0.14.0",
        "kasa_config": "0.21.0",
        "lora_bias": "0.14.0",
        "lora_ga_config": "0.19.0",
        "monteclora_config": "0.20.0",
        "qalora_group_size": "0.16.0",
        "target_parameters": "0.17.0",
        "trainable_token_indices": "0.15.0",
        "use_bdlora": "0.19.0",
        "use_qalora": "0.16.0",
        "velora_config": "0.20.0",
    }
)
"""Fields that the oldest supported PEFT lacks -> the PEFT that brought them."""

_FAST_PISSA: Final = r"pissa_niter_\d+"

_MOST: Final = 10_000
"""Names that PEFT holds against each module in turn."""
_MOST_PATTERNS: Final = 4096
_MOST_LAYERS: Final = 4096
_MOST_MERGED: Final = 64

Names: TypeAlias = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=_MOST)
]
Options: TypeAlias = Mapping[str, Any]
"""A nested configuration of PEFT, by its own field names."""


def _one_pattern(value: str) -> str:
    # A text is a regular expression to PEFT; "q_proj,v_proj" would match nothing.
    if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", value):
        names = ", ".join(part.strip() for part in value.split(","))
        raise InvalidValueError(
            f"{value!r} is several names in one text, which is read as a regular expression",
            fix=f"Write [{names}].",
        )
    if value.startswith("[") and value.endswith("]"):
        raise InvalidValueError(
            f"{value!r} is a list in quotes, which is read as a regular expression",
            fix=f"Write {value} without the quotes.",
        )
    return value


def _rank(value: int) -> int:
    if value > 0:
        return value
    raise InvalidValueError(
        f"a LoRA of rank {value} has no parameters",
        fix="Give a rank of 1 or more, or remove the section `lora` to load without an adapter.",
    )


def _initialisation(value: bool | str) -> bool | str:
    if isinstance(value, bool) or value in INITIALISATIONS or re.fullmatch(_FAST_PISSA, value):
        return value
    raise InvalidValueError(
        f"{value!r} is not an initialisation of PEFT",
        fix=nearest(value, INITIALISATIONS)
        or f"Write true, false, {', '.join(INITIALISATIONS)} or pissa_niter_N.",
    )


def _token_ids(value: tuple[int, ...]) -> tuple[int, ...]:
    if not value:
        raise InvalidValueError(
            "no token id is named, so that no row would be trained",
            fix="List ids of tokens, or remove the key.",
        )
    wrong = [number for number in value if number < 0]
    if wrong:
        raise InvalidValueError(
            f"{wrong[0]} is no token id: PEFT would count from the last row, padding included",
            fix="Give ids from 0 on, as the tokenizer has them.",
        )
    twice = sorted(number for number, times in Counter(value).items() if times > 1)
    if twice:
        raise InvalidValueError(
            f"{twice[0]} is named twice, and of two trained rows for one token one is lost",
            fix="Name each id once.",
        )
    return value


def _some_modules(
    value: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None,
) -> tuple[int, ...] | Mapping[str, tuple[int, ...]] | None:
    if isinstance(value, Mapping) and not value:
        raise InvalidValueError(
            "no module is named, so that no row would be trained",
            fix="Write module: [ids], or [ids] for the input embedding, or remove the key.",
        )
    return value


TokenIds: TypeAlias = Annotated[tuple[int, ...], AfterValidator(_token_ids)]
Targets: TypeAlias = Annotated[Regex, AfterValidator(_one_pattern)] | Names


def _replication(
    ranges: tuple[tuple[int, int], ...] | None,
) -> tuple[tuple[int, int], ...] | None:
    from llmload.plugin import replicated_layers

    layers = replicated_layers(ranges)
    if layers > _MOST_LAYERS:
        raise InvalidValueError(
            f"{layers:,} layers are more than the {_MOST_LAYERS:,} that a stack may have",
            fix="Give ranges of the model's own layers.",
        )
    return ranges


Rank: TypeAlias = Annotated[int, AfterValidator(_rank)]
Alpha: TypeAlias = Annotated[int | float, Field(gt=0)]


class LoraSection(Section):
    """A LoRA adapter by PEFT: a new one, or one that is resumed."""

    spellings = SPELLINGS

    r: Rank = 8
    """Rank of the adapter."""
    target_modules: Targets | None = Field(default=None, examples=["all-linear"])
    """``all-linear``; a list of names that module names end with; or a regular expression for the
    whole module name. null: PEFT's choice for the model type."""
    exclude_modules: Targets | None = None
    """Modules that ``target_modules`` matches and that get no adapter, written likewise."""
    lora_alpha: Alpha = 8
    """The adapter's output is scaled by ``lora_alpha / r``."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input; the section ``dropout`` leaves it alone."""
    fan_in_fan_out: bool = False
    """Weights are stored as (in, out). PEFT finds that out for the layers it knows."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained too."""
    use_rslora: bool = False
    """Scale by ``lora_alpha / sqrt(r)``."""
    modules_to_save: Names | None = None
    """Modules that are trained in full, as copies, and saved with the adapter."""
    init_lora_weights: Annotated[bool | str, AfterValidator(_initialisation)] = Field(
        default=True, examples=["gaussian"]
    )
    """How the adapter starts: true (no effect at first), gaussian, pissa, pissa_niter_N, olora,
    orthogonal, eva, corda, loftq, lora_ga, mica; false: at random, with an effect."""
    layers_to_transform: int | Annotated[tuple[int, ...], Field(max_length=_MOST_LAYERS)] | None = (
        None
    )
    """Numbers of the layers that get adapters; null for all."""
    layers_pattern: Regex | Annotated[tuple[Regex, ...], Field(max_length=_MOST)] | None = None
    """Name of the list of layers, such as ``layers`` or ``h``, for ``layers_to_transform``."""
    rank_pattern: Mapping[Regex, Rank] = Field(default={}, max_length=_MOST_PATTERNS)
    """Module name (its end, or a regular expression for it) -> rank other than ``r``."""
    alpha_pattern: Mapping[Regex, Alpha] = Field(default={}, max_length=_MOST_PATTERNS)
    """Module name (its end, or a regular expression for it) -> alpha other than ``lora_alpha``."""
    megatron_config: Options | None = None
    """Arguments of Megatron's TransformerConfig, for its parallel linear layers."""
    megatron_core: str | None = "megatron.core"
    """Module from which Megatron's core is imported."""
    trainable_token_indices: Annotated[
        TokenIds | Mapping[str, TokenIds] | None, AfterValidator(_some_modules)
    ] = None
    """Token ids whose embedding rows are trained, or embedding module -> token ids."""
    loftq_config: Options = Field(default={})
    """``LoftQConfig``, for ``init_lora_weights: loftq``."""
    eva_config: Options | None = None
    """``EvaConfig``, for ``init_lora_weights: eva``."""
    corda_config: Options | None = None
    """``CordaConfig``, for ``init_lora_weights: corda``."""
    lora_ga_config: Options | None = None
    """``LoraGAConfig``, for ``init_lora_weights: lora_ga``."""
    use_dora: bool = False
    """Learn magnitude and direction apart (DoRA)."""
    velora_config: Options | None = None
    """``VeloraConfig``: compress the activations kept for the backward pass."""
    alora_invocation_tokens: tuple[int, ...] | None = None
    """Activated LoRA: token ids from which on the adapter acts."""
    use_qalora: bool = False
    """Quantisation-aware LoRA, for GPTQ layers."""
    qalora_group_size: int = 16
    """Group size for ``use_qalora``."""
    monteclora_config: Options | None = None
    """``MontecloraConfig``: Monte Carlo sampling on top of the adapter."""
    layer_replication: Annotated[
        Annotated[tuple[tuple[int, int], ...], Field(max_length=_MOST_LAYERS)] | None,
        AfterValidator(_replication),
    ] = None
    """Ranges of layers, end excluded, of which a new stack is made; weights are shared."""
    runtime_config: Options = Field(default={})
    """``LoraRuntimeConfig``; not saved with the adapter."""
    lora_bias: bool = False
    """Give the adapter's B a bias."""
    target_parameters: Names | None = None
    """Parameters, not modules, that get adapters: the fused experts of MoE models."""
    use_bdlora: Options | None = None
    """``BdLoraConfig``: block-diagonal factors."""
    arrow_config: Options | None = None
    """``ArrowConfig``: routing between several adapters."""
    kasa_config: Options | None = None
    """``KasaConfig``: truncates the base weights and learns singular values."""
    ensure_weight_tying: bool = False
    """Where the adapter reaches a tied embedding or head: one adapter for both."""
    task_type: (
        Literal[
            "SEQ_CLS",
            "SEQ_2_SEQ_LM",
            "CAUSAL_LM",
            "TOKEN_CLS",
            "QUESTION_ANS",
            "FEATURE_EXTRACTION",
        ]
        | None
    ) = None
    """Which ``PeftModel`` class wraps the model. Left out, it follows from ``auto_class``; null:
    the plain one."""
    inference_mode: bool = False
    """Leave no parameter trainable."""
    base_model_name_or_path: str | None = None
    """What the saved adapter calls its base model; null: the spec's ``model``."""
    revision: str | None = None
    """What the saved adapter calls the revision of its base model; null: the spec's."""
    auto_mapping: Mapping[str, str] | None = None
    """Where the saved adapter finds a base class that is not transformers'."""

    adapter: Annotated[str, Field(min_length=1)] | None = None
    """Folder or hub id of a saved adapter to resume; its ``adapter_config.json`` is the
    configuration."""
    adapter_revision: str | None = None
    """Branch, tag or commit, where ``adapter`` is a hub id."""
    merge: bool = False
    """Add the ``adapter`` to the weights of its base and hand out the plain model, all frozen."""
    merge_first: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=_MOST_MERGED)
    ] = ()
    """Folders or hub ids of saved adapters that are merged into the base one after the other,
    before the section's own adapter is made, resumed or merged."""
    key_map: Annotated[Mapping[Regex, str], AfterValidator(replacements)] = {}
    """Renames the keys of the saved ``adapter``: regular expression to replacement, as in
    ``re.sub``, one after the other. One that matches no key is an error."""
    adapter_name: Annotated[str, Field(pattern=r"^[^.\s]+$")] = "default"
    """Name of the adapter in the model."""
    adapter_dtype: Literal["auto", "float32", "bfloat16", "float16", "base"] = "auto"
    """Dtype of the adapter's parameters. auto: float32 where the base is float16 or bfloat16, as
    PEFT does; base: the model's. Modules to save keep the base's."""
    tied_weights: Literal["separate", "untie"] | None = None
    """Where the adapter reaches a tied embedding or head, instead of ``ensure_weight_tying``.
    separate: only what is named gets an adapter; untie: each gets a weight of its own first."""
    lora_config: Annotated[str, Field(min_length=1)] | None = None
    """ColossalChat's ``lora_config.json``, read into this section."""

    @model_validator(mode="after")
    def _one_source(self) -> LoraSection:
        if self.adapter is not None and self.lora_config is not None:
            raise InvalidValueError(
                "`adapter` and `lora_config` both say what the adapter is like",
                fix="Remove `lora_config`: a saved adapter has its own configuration.",
            )
        if self.merge and self.adapter is None:
            raise InvalidValueError(
                "`merge` is for a saved adapter, and none is named",
                fix="Set `adapter` to its folder.",
            )
        if self.key_map and self.adapter is None:
            raise InvalidValueError(
                "`key_map` renames the keys of a saved adapter, and none is named",
                fix="Set `adapter` to its folder, or write the spec's own `key_map` for the model.",
            )
        if self.adapter_revision is not None and self.adapter is None:
            raise InvalidValueError(
                "`adapter_revision` is for a saved adapter, and none is named",
                fix="Set `adapter` to its hub id, or `revision` beside `lora` for the model.",
            )
        if self.ensure_weight_tying and self.tied_weights is not None:
            raise InvalidValueError(
                f"`ensure_weight_tying` and `tied_weights: {self.tied_weights}` contradict each"
                " other",
                fix="Keep one of them.",
            )
        return self

    def given(self) -> dict[str, Any]:
        """Return the fields of ``LoraConfig`` that the spec gives, as plain data."""
        return self.model_dump(mode="json", include=set(self.model_fields_set - OWN_FIELDS))

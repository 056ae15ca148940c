"""What is wanted, as plain frozen data: the core keys here, every other key a plugin's section.

No torch type stands in a spec and nothing here imports torch: a spec can be read, checked, compared
and written where no model could be loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema

from llmload.errors import Problem, SpecError
from llmload.spec import foreign_keys, other_files, patterns
from llmload.spec.foreign_keys import Spelling
from llmload.spec.refusals import (
    SHOWN,
    InvalidValueError,
    explain,
    fields_of,
    lists_once,
    more_faults,
    unknown_key,
    unknown_words,
)
from llmload.spec.values import (
    CLASS_PATH,
    SPREADS,
    amount_of_memory,
    auto_class_name,
    device_name,
    device_or_spread,
    memory_place,
    nbytes,
    regex,
    replacements,
)
from llmload.spec.words import AUTO_CLASSES

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue

    from llmload.spec.document import Document


_MOST_LABELS = 100_000


def _make_scalars_strict(schema: Any) -> None:
    """Make pydantic strict about scalars alone: its own strict mode refuses a list for a tuple."""
    if isinstance(schema, dict):
        if schema.get("type") in ("bool", "float", "int", "str"):
            schema["strict"] = True
        for key, part in schema.items():
            if key not in ("config", "default", "metadata", "serialization"):
                _make_scalars_strict(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _make_scalars_strict(part)


class Section(BaseModel):
    """Base of every part of a spec: frozen, keyword-only, no unknown key, no NaN.

    A plugin subclasses it for its own key. The docstring under each field becomes its description
    in the schema. A validator refuses a value with :class:`InvalidValueError`, which carries a fix.
    Text is not taken for a number, nor a number or true for one another; a list is taken where a
    field asks for a tuple or set, and text where it asks for a path or enum. A spec is written to
    files and reports: let a field name an environment variable rather than hold a secret.
    """

    spellings: ClassVar[Mapping[str, Spelling]] = {}
    """What other tools call the section or its keys, as key or dotted path from the top of a spec
    -> what to write here. Looked up only for keys that nothing here knows."""

    # Built when a spec has the section: most loads have few of the installed plugins'.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _make_scalars_strict(handler.resolve_ref_schema(schema))
        return schema

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        # Not with pydantic's use_attribute_docstrings: that parses the source of each class when it
        # is defined, which every load would wait for.
        from llmload.spec.docstrings import of_attributes

        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in of_attributes(cls).items():
            field = cls.model_fields.get(name)
            described = properties.get((field and field.alias) or name)
            if described is not None:
                described.setdefault("description", text)
        return schema


Regex = Annotated[str, AfterValidator(regex), Field(json_schema_extra={"format": "regex"})]


class KeyExceptions(Section):
    """How strictly a load is proved: checkpoint keys that may be missing or unexpected, by regular
    expressions found in them, a model that may fail to run, and whether it is run at all."""

    allow_missing: tuple[Regex, ...] = ()
    """Parameters of the model that need not be in the checkpoint: they are newly initialised."""
    allow_unexpected: tuple[Regex, ...] = ()
    """Tensors of the checkpoint that the model need not have: they are not read."""
    allow_failing_forward: bool = False
    """Hand out a model whose forward raises on token ids: one that takes other inputs, or is to be
    mended first."""
    run_forward: bool = False
    """Have the audit run a forward on token ids in any case. It does so where some parameters are
    trained and some are frozen, where the class is not transformers' own or a plugin has changed
    the model, and with the sections ``dropout`` and ``gradient_checkpointing``. Of a class of
    transformers that is wholly trained or wholly frozen it does not, for a forward takes longer
    than many a load."""

    def allows_missing(self, key: str) -> bool:
        """Say whether the model's parameter ``key`` may be absent from the checkpoint."""
        return any(patterns.search(pattern, key) for pattern in self.allow_missing)

    def allows_unexpected(self, key: str) -> bool:
        """Say whether the checkpoint's tensor ``key`` may be absent from the model."""
        return any(patterns.search(pattern, key) for pattern in self.allow_unexpected)


def _as_text(value: object) -> object:
    """Turn paths into text, alone or in a list: a spec holds no objects."""
    if isinstance(value, list | tuple):
        return tuple(map(_as_text, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class LoadSpec(Section):
    """One model to load. Keys that are not listed here belong to plugins, one key each.

    In a file, null for a key means the same as leaving it out: ``lora: null`` is "without LoRA".

    The constructor checks the core keys; sections are kept as given until a registry, which knows
    the plugins, validates the whole.

    :raises SpecError: with every fault of the core keys at once.
    """

    model_config = ConfigDict(extra="allow", defer_build=False)

    model: Annotated[str, Field(min_length=1), BeforeValidator(_as_text)] = Field(
        examples=["EleutherAI/pythia-2.8b"]
    )
    """Folder, relative to the working directory, or hub id (``org/name``, or ``gpt2`` alone)."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository; null for its main branch."""
    subfolder: str | None = None
    """Folder inside the repository or model folder that holds the model."""
    auto_class: Annotated[
        str,
        AfterValidator(auto_class_name),
        WithJsonSchema({"anyOf": [{"enum": list(AUTO_CLASSES)}, {"pattern": CLASS_PATH}]}),
    ] = "causal_lm"
    """What the model is for, or its class as ``module:Class``."""
    labels: (
        Annotated[int, Field(gt=0, le=_MOST_LABELS)]
        | Annotated[
            tuple[Annotated[str, Field(min_length=1)], ...],
            Field(min_length=1, max_length=_MOST_LABELS),
        ]
        | None
    ) = None
    """Labels of a classifier: how many, or their names in order; null for those in the config. A
    head that the checkpoint lacks is then new."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Floating-point dtype of the parameters; ``auto`` keeps the checkpoint's."""
    config: Mapping[str, Any] = {}
    """Values in place of those in ``config.json``, by the names that the model type gives them:
    ``{attention_dropout: 0.1}``, ``{text_config: {rope_parameters: {...}}}``."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """``random``: build the model from its config alone and initialise it."""
    weights_from: Annotated[str | None, BeforeValidator(_as_text)] = None
    """File or folder of weights to fill the model with, instead of those in ``model``, which then
    gives config and tokenizer. Also the archive of the DPO reference code, behind
    ``allow_pickle``."""
    lock: Annotated[str | None, BeforeValidator(_as_text)] = None
    """Lock file that ``llmload lock`` wrote: a load that opens any other file, or is made of other
    plugins, is refused."""
    device_map: (
        Annotated[int | str, AfterValidator(device_or_spread)]
        | Mapping[str, Annotated[int | str, AfterValidator(device_name)]]
        | None
    ) = None
    """A device, ``auto`` and the like, or a mapping of module names to devices, as in transformers;
    null for the CPU. Refused where a plugin places the weights itself."""
    max_memory: (
        Annotated[
            Mapping[
                Annotated[str, AfterValidator(memory_place)],
                Annotated[int | str, AfterValidator(amount_of_memory)],
            ],
            Field(min_length=1),
        ]
        | None
    ) = Field(default=None, examples=[{"0": "20GiB", "cpu": "60GiB"}])
    """The most that ``device_map: auto`` and the like give to weights on each accelerator, by its
    number as text, and on the ``cpu``, as in transformers: bytes, or a text such as ``20GiB``.
    Places that are not named get none; null for all that is free."""
    attn_implementation: str | None = None
    """Attention kernel, as in transformers (``eager``, ``sdpa``, ``flash_attention_2``); null for
    the model's own choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    ignore_adapter: bool = False
    """Leave out an adapter that lies in the folder beside the model's weights. Without this, such a
    folder is refused unless `lora` resumes or merges it."""
    allow_pickle: bool = False
    """Read weights from pickle files, restricted to tensors, where there are no safetensors."""
    local_files_only: bool = False
    """Never ask the hub; take what is in the cache."""
    cache_dir: Annotated[str | tuple[str, ...] | None, BeforeValidator(_as_text)] = None
    """Folder for downloads, or candidates of which the first that exists is taken; null for the
    hub's own cache."""
    key_map: Annotated[Mapping[Regex, str], AfterValidator(replacements)] = {}
    """Renames checkpoint keys: regular expression to replacement, as in ``re.sub``, applied one
    after the other in this order. One that matches no key is an error."""
    key_rules: tuple[str, ...] = ()
    """Undoes, after ``key_map`` and in this order, what systems do to keys, where they did it:
    ``deepspeed_chat`` the misspelt ``rwtranrsformer.``; ``ddp`` a leading ``module.``;
    ``compiled`` every ``_orig_mod.``; ``fsdp`` every ``_fsdp_wrapped_module.``;
    ``activation_checkpointing`` every ``_checkpoint_wrapped_module.``; ``fabric`` a leading
    ``_forward_module.``; ``peft`` the prefixes of a wrapped model; or what a plugin undoes, such as
    ``coati`` the removal of the first ``model.`` from each key, held against the model's own names.
    Those of wrappers hold for the keys of an adapter that is resumed, too."""
    strict: bool | KeyExceptions = True
    """``true``: a missing or unexpected checkpoint key is an error; ``false``: it is reported, and
    the load goes on; or the exceptions by name. A model whose forward fails is one too."""
    trainable: bool = True
    """``false``: hand the model out frozen, as a reference or reward model is used: in eval mode,
    no parameter requires gradients, an adapter's no more than the base's."""

    @model_validator(mode="after")
    def _labels_are_of_a_classifier(self) -> LoadSpec:
        if self.labels is None:
            return self
        if not self.auto_class.endswith("_classification") and ":" not in self.auto_class:
            raise InvalidValueError(
                f"`labels` belong to a classifier, and `auto_class` is {self.auto_class!r}",
                fix="Write `auto_class: sequence_classification`, or remove `labels`.",
            )
        names = () if isinstance(self.labels, int) else self.labels
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            raise InvalidValueError(
                f"`labels` has {twice[0]!r} twice", fix="Give each label a name of its own."
            )
        return self

    @model_validator(mode="after")
    def _memory_is_of_a_spread_model(self) -> LoadSpec:
        if self.max_memory is not None and self.device_map not in SPREADS:
            asked = "there is none" if self.device_map is None else "it names devices itself"
            raise InvalidValueError(
                f"`max_memory` says how far `device_map` spreads a model, and {asked}",
                fix="Write `device_map: auto`, or remove `max_memory`.",
            )
        return self

    @model_validator(mode="after")
    def _random_weights_have_no_keys(self) -> LoadSpec:
        given = [key for key in ("weights_from", "key_map", "key_rules") if getattr(self, key)]
        if self.weights == "random" and given:
            raise InvalidValueError(
                f"`weights: random` reads no checkpoint, and `{given[0]}` is set",
                fix="Remove one or the other.",
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, data: Any, handler: ModelWrapValidatorHandler[LoadSpec]) -> LoadSpec:
        try:
            return handler(data)
        except ValidationError as error:
            places = {"": cls.model_fields}
            raise SpecError(explain(error, cls, data, places=places)) from None

    @property
    def sections(self) -> Mapping[str, Any]:
        """The plugins' sections by key, as given: models once validated, else plain data."""
        return MappingProxyType(self.model_extra or {})

    @property
    def most_memory(self) -> dict[int | str, int | str] | None:
        """``max_memory`` as accelerate takes it: numbers for accelerators, bytes for text."""
        if self.max_memory is None:
            return None
        return {
            int(place) if place.isdecimal() else place: nbytes(str(amount)) or 0
            for place, amount in self.max_memory.items()
        }

    @property
    def cache_candidates(self) -> tuple[str, ...]:
        """The folders of ``cache_dir``, however it was written; empty for the hub's own cache."""
        if self.cache_dir is None:
            return ()
        return (self.cache_dir,) if isinstance(self.cache_dir, str) else self.cache_dir

    @property
    def key_exceptions(self) -> KeyExceptions:
        """What ``strict`` tolerates: nothing, anything, or the named exceptions."""
        if isinstance(self.strict, KeyExceptions):
            return self.strict
        every = () if self.strict else ("",)
        return KeyExceptions(
            allow_missing=every, allow_unexpected=every, allow_failing_forward=not self.strict
        )


def validate(
    document: Document,
    sections: Mapping[str, type[BaseModel]],
    *,
    key_rules: Iterable[str] | None = None,
) -> LoadSpec:
    """Return the spec of ``document``, with each section as an instance of its plugin's model.

    :param sections: spec key -> model of the plugin that owns it.
    :param key_rules: what the key of that name can hold; None: whatever stands there.
    :raises SpecError: with every fault of core keys and sections at once, in the file's order.
    """
    try:
        return check(document.data, sections, key_rules=key_rules)
    except SpecError as error:
        problems = other_files.told(error.problems, document)
        raise SpecError(document.placed(problems)) from None


def check(
    data: Mapping[str, Any],
    sections: Mapping[str, type[BaseModel]],
    *,
    beside: Iterable[str] = (),
    key_rules: Iterable[str] | None = None,
) -> LoadSpec:
    """Return the spec that plain data holds, sections checked by their plugins' models.

    A key with null is as if it were not there, wherever one can be left out.

    :param key_rules: what the key of that name can hold; None: whatever stands there.
    :param beside: keys that could have stood there too, for "did you mean".
    :raises SpecError: with every fault at once, none of them with its place in a file.
    """
    data = {key: value for key, value in data.items() if not _is_left_out(key, value, sections)}
    core = {key: value for key, value in data.items() if key in LoadSpec.model_fields}
    places = {key: list(fields_of(model)) for key, model in sections.items()}
    places[""] = [*LoadSpec.model_fields, *sections]
    spellings = foreign_keys.of_sections(sections.values())
    checked: dict[str, BaseModel] = {}
    problems: list[Problem] = []
    unknown: list[str] = []
    try:
        spec = LoadSpec(**core)
    except SpecError as error:
        problems += error.problems
    for key, value in data.items():
        if key in sections:
            try:
                checked[key] = sections[key].model_validate(value)
            except ValidationError as error:
                problems += explain(
                    error, sections[key], value, within=(key,), places=places, spellings=spellings
                )
        elif key not in core:
            unknown.append(key)
    problems += [
        unknown_key((key,), data[key], [*places[""], *beside], places, spellings)
        for key in unknown[:SHOWN]
    ]
    if len(unknown) > SHOWN:
        problems.append(more_faults((unknown[SHOWN],), len(unknown) - SHOWN))
    if key_rules is not None:
        problems += unknown_words("key_rules", data.get("key_rules"), list(key_rules))
    if problems:
        raise SpecError(lists_once(problems))
    return spec.model_copy(update=checked)


def _is_left_out(key: str, value: object, sections: Mapping[str, object]) -> bool:
    field = LoadSpec.model_fields.get(key)
    return value is None and (key in sections or (field is not None and not field.is_required()))

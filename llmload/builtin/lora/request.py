"""What adapter is asked for: the section, a saved adapter or ColossalChat's file made one.

Everything here is known before a model is built; PEFT is imported only to make its ``LoraConfig``.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from llmload.builtin.lora import coati, saved
from llmload.builtin.lora.section import FIELDS_SINCE, INITIALISATIONS, LoraSection
from llmload.plugin import AUTO_CLASSES, Problem, RequestError, nearest, version_of

if TYPE_CHECKING:
    from peft import LoraConfig

    from llmload.plugin import LoadContext

ALL_LINEAR: Final = "all-linear"

# Field -> PEFT's dataclass for it, in peft.tuners.lora.config.
_NESTED: Final = {
    "arrow_config": "ArrowConfig",
    "corda_config": "CordaConfig",
    "eva_config": "EvaConfig",
    "kasa_config": "KasaConfig",
    "loftq_config": "LoftQConfig",
    "lora_ga_config": "LoraGAConfig",
    "monteclora_config": "MontecloraConfig",
    "runtime_config": "LoraRuntimeConfig",
    "use_bdlora": "BdLoraConfig",
    "velora_config": "VeloraConfig",
}
_TAKES_FROM_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The adapter that a load is asked to make."""

    section: LoraSection
    fields: dict[str, Any]
    """The fields of ``LoraConfig`` that are set, as plain data; all others keep PEFT's default."""
    saved: saved.SavedAdapter | None
    """The adapter to resume."""
    coati: coati.CoatiLora | None
    """ColossalChat's file; its targets are found on the model."""

    @property
    def initialisation(self) -> bool | str:
        """``init_lora_weights``, as asked or by default."""
        value: bool | str = self.fields.get("init_lora_weights", True)
        return value

    @property
    def changes_base(self) -> str:
        """What changes the weights of the layers that the adapter is put on; empty for nothing."""
        start = self.initialisation
        if self.fields.get("kasa_config") is not None:
            return "KaSA"
        return repr(start) if isinstance(start, str) and start.startswith(_TAKES_FROM_BASE) else ""

    def config(self, **changes: Any) -> LoraConfig:
        """Make PEFT's configuration; ``changes`` replace fields.

        :raises RequestError: the installed PEFT does not know a field or an initialisation, or
            refuses the combination.
        """
        import peft

        # PEFT adds to the lists it is given.
        fields = copy.deepcopy(self.fields | changes)
        known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
        if self.saved is not None:
            # A file lists all fields of the PEFT that wrote it; a default here asks for nothing.
            fields = {n: v for n, v in fields.items() if n in known or not _is_default(n, v)}
        problems = [*_too_new(fields, known), *_nested_faults(fields, known)]
        if problems:
            raise RequestError(problems)
        try:
            return peft.LoraConfig(**{name: _nested(name, v) for name, v in fields.items()})
        except (ImportError, TypeError, ValueError) as error:
            raise refused(error) from error


def resolve(ctx: LoadContext) -> Request:
    """Put together what the section, a saved adapter or ColossalChat's file say.

    :raises RequestError: a file is wrong, or the section contradicts it.
    """
    return _resolved(ctx, ctx.section(LoraSection))


def merged_first(ctx: LoadContext) -> list[Request]:
    """Return the saved adapters that are merged into the base before the section's own adapter.

    :raises RequestError: as :func:`resolve`.
    """
    section = ctx.section(LoraSection)
    options: dict[str, Any] = {}
    if section.tied_weights is not None:
        options["tied_weights"] = section.tied_weights
    with blamed_on("lora.merge_first"):
        return [
            _resolved(ctx, LoraSection(adapter=folder, merge=True, **options), f"merged{number}")
            for number, folder in enumerate(section.merge_first, 1)
        ]


def _resolved(ctx: LoadContext, section: LoraSection, role: str = "adapter") -> Request:
    """Put together one adapter; ``role`` is what its folder is for among the load's files."""
    adapter = theirs = None
    given = section.given()
    base: dict[str, Any] = {}
    if section.adapter is not None:
        folder = saved.locate(section.adapter, section.adapter_revision, ctx.spec)
        adapter = saved.open_adapter(folder, section.key_map, ctx.spec.key_rules)
        ctx.files.adopt(role, adapter.files)
        base = adapter.fields
        _refuse_contradictions(given, base, f"the adapter in {section.adapter!r}")
        section = _as_it_was_tied(section, adapter)
        # What the section says of targets agrees in effect (see `targets.agree`); the file's words
        # stand, as PEFT wrote them out.
        given = {name: value for name, value in given.items() if name not in base}
    elif section.lora_config is not None:
        theirs = coati.read(section.lora_config)
        base = theirs.fields()
        _refuse_contradictions(given, base, repr(section.lora_config))
        if "target_modules" in given:
            raise RequestError(
                Problem(
                    where="lora.target_modules",
                    message=f"{section.lora_config!r} says which modules are adapted",
                    fix="Remove `target_modules` from the section or `lora_config`.",
                )
            )
    if "task_type" not in base and "task_type" not in given:
        known = AUTO_CLASSES.get(ctx.spec.auto_class)
        base = base | {"task_type": known.peft if known else None}
    request = Request(section=section, fields=base | given, saved=adapter, coati=theirs)
    _refuse_impossible(ctx, request)
    return request


def _refuse_impossible(ctx: LoadContext, request: Request) -> None:
    """Refuse what PEFT could not make of any model of this type."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    fields = request.fields
    if fields.get("arrow_config") is not None:
        raise RequestError(
            Problem(
                where="lora.arrow_config",
                message="Arrow routes between adapters that are there already, and this makes one",
                fix="Load the base model without `lora`, and call peft's create_arrow_model.",
            )
        )
    named = fields.get("target_modules") is not None or fields.get("target_parameters")
    if not named and request.coati is None and ctx.config.model_type not in DEFAULTS:
        raise RequestError(
            Problem(
                where="lora.target_modules",
                message="PEFT knows no default targets for the model type"
                f" {ctx.config.model_type!r}",
                fix="Write `target_modules: all-linear`, or a list of names.",
            )
        )


def _as_it_was_tied(section: LoraSection, adapter: saved.SavedAdapter) -> LoraSection:
    """Return the section with the choice for tied weights that the saved adapter was trained with.

    :raises RequestError: the section says otherwise.
    """
    how: dict[str, Any] = {}
    if adapter.untied:
        how = {"tied_weights": "untie"}
    elif adapter.fields.get("ensure_weight_tying"):
        how = {"ensure_weight_tying": True}
    if how and section.tied_weights not in (None, how.get("tied_weights")):
        name, value = next(iter(how.items()))
        raise RequestError(
            Problem(
                where="lora.tied_weights",
                message=f"the section says {section.tied_weights!r}, and the adapter in"
                f" {section.adapter!r} was trained with `{name}: {str(value).lower()}`",
                fix="Remove `tied_weights` from the section.",
            )
        )
    return section.model_copy(update=how)


def _refuse_contradictions(given: dict[str, Any], base: dict[str, Any], source: str) -> None:
    problems = [
        Problem(
            where=f"lora.{name}",
            message=f"the section says {given[name]!r}, and {source} says {base[name]!r}",
            fix=f"Remove `{name}` from the section.",
        )
        for name in given
        if name in base and not _agree(name, given[name], base[name])
    ]
    if problems:
        raise RequestError(problems)


def _agree(name: str, asked: Any, found: Any) -> bool:
    """Say whether a field asks for what a saved adapter has; PEFT keeps lists of names as sets."""
    if name in ("target_modules", "exclude_modules") and isinstance(asked, str):
        # Saved as the names that it matched: compared on the model.
        return True
    if isinstance(asked, dict) and isinstance(found, dict):
        # A nested configuration is saved with the defaults of what was left out.
        return all(found.get(key) == value for key, value in asked.items())
    if _are_names(asked) and _are_names(found):
        # PEFT adds the classification head to the modules that are saved.
        return set(asked) == set(found) or (name == "modules_to_save" and set(asked) < set(found))
    return bool(asked == found)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_default(name: str, value: Any) -> bool:
    return bool(LoraSection().model_dump(mode="json")[name] == value)


def _too_new(fields: dict[str, Any], known: set[str]) -> Iterator[Problem]:
    """Yield what the installed PEFT does not have yet."""
    installed = version_of("peft") or "none"
    for name in sorted(fields.keys() - known):
        yield _since(f"lora.{name}", f"the field {name!r}", FIELDS_SINCE[name], installed)
    start = fields.get("init_lora_weights")
    since = INITIALISATIONS.get(start) if isinstance(start, str) else None
    if since is not None and _release(installed) < _release(since):
        yield _since("lora.init_lora_weights", f"the initialisation {start!r}", since, installed)


def _since(where: str, what: str, since: str, installed: str) -> Problem:
    return Problem(
        where=where,
        message=f"{what} came with peft {since}, and peft {installed} is installed",
        fix=f"Install it with `pip install 'peft>={since}'`, or remove the key.",
    )


def _release(version: str) -> tuple[int, ...]:
    from packaging.version import Version

    return Version(version).release


def _nested_faults(fields: dict[str, Any], known_fields: set[str]) -> Iterator[Problem]:
    for name in sorted(_NESTED.keys() & fields.keys() & known_fields):
        if not fields[name]:
            continue
        known = [f.name for f in dataclasses.fields(_nested_class(name)) if f.init]
        for key in fields[name]:
            if key not in known:
                yield Problem(
                    where=f"lora.{name}.{key}",
                    message="unknown key",
                    fix=nearest(key, known) or f"Known keys are: {', '.join(known)}.",
                )


def _nested(name: str, value: Any) -> Any:
    """Return a nested configuration as PEFT's dataclass; an empty LoftQ means none to PEFT."""
    if name not in _NESTED or value is None or (name == "loftq_config" and not value):
        return value
    return _nested_class(name)(**value)


def _nested_class(name: str) -> Any:
    from peft.tuners.lora import config

    return getattr(config, _NESTED[name])


def refused(
    error: Exception, where: str = "lora", fix: str = "Change what it names."
) -> RequestError:
    """Tell PEFT's own refusal of a request, in one line."""
    reason = " ".join(str(error).split()).rstrip(".")
    return RequestError(
        Problem(
            where=where,
            message=f"PEFT refuses this adapter: {reason}",
            # Of a missing package PEFT itself says that it must be installed.
            fix="" if isinstance(error, ImportError) else fix,
        )
    )


@contextmanager
def blamed_on(where: str) -> Iterator[None]:
    """Say of what a block refuses of a saved adapter which key of the spec names it."""
    try:
        yield
    except RequestError as error:
        named = ("lora.adapter", "lora.merge")
        raise type(error)(
            problem.model_copy(update={"where": where}) if problem.where in named else problem
            for problem in error.problems
        ) from error


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect what PEFT warns of, each text once, instead of letting it pass unseen in a log."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    for warning in caught:
        text = str(warning.message)
        if issubclass(warning.category, UserWarning | RuntimeWarning) and text not in texts:
            texts.append(text)

"""Which modules an adapter is asked to reach, which it reaches, and which of them are tied."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmload.builtin.lora.layers import own_name
from llmload.builtin.lora.request import ALL_LINEAR
from llmload.plugin import Problem, RequestError, closest, partitions, patterns, some

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

    from llmload.builtin.lora.request import Request

_ADAPTABLE: Final = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LINEAR: Final = (nn.Linear, Conv1D)
_NEAREST: Final = 2
_SHOWN: Final = 12


_Matcher: TypeAlias = Callable[[str, str], bool]


def hold_to_names(request: Request, config: LoraConfig, model: nn.Module) -> list[str]:
    """Find the names in a request that match nothing in ``model``.

    :param config: the configuration made of it, translated to today's names. Names that the
        translation dropped or brought are PEFT's affair.
    :param model: the base model before it is wrapped.
    :returns: ``field: name`` for each such name that is no error: to exclude what is not there is
        idle unless it is misspelt, and a saved adapter is held to the names of its weights.
    :raises RequestError: any other name that matches nothing; PEFT itself speaks up for
        ``target_modules`` only, and where none of them matches.
    """
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    unmatched: list[str] = []
    problems: list[Problem] = []
    for field, entries, matches in _named(config):
        given = request.fields.get(field) or ()
        asked = [entry for entry in entries if entry in _listed(given)]
        among = {
            "target_parameters": parameters,
            # Patterns hold for whatever is adapted.
            "rank_pattern": modules + parameters,
            "alpha_pattern": modules + parameters,
        }.get(field, modules)
        misses = [entry for entry in asked if not any(matches(entry, name) for name in among)]
        unmatched += [f"{field}: {entry}" for entry in misses]
        if field == "exclude_modules":
            misses = [entry for entry in misses if matches is _end and _is_misspelt(entry, model)]
        if misses and request.saved is None:
            what = "parameter" if among is parameters else "module"
            problems.append(
                Problem(
                    where=f"lora.{field}",
                    message=f"no {what} of {type(model).__name__} is called"
                    f" {' or '.join(map(repr, misses))}",
                    fix=_way_out(field, misses, model, whole=matches is _whole),
                )
            )
    if problems:
        raise RequestError(problems)
    if request.saved is not None:
        _hold_file(request, config, model, unmatched)
    return unmatched


def _hold_file(
    request: Request, config: LoraConfig, model: nn.Module, unmatched: list[str]
) -> None:
    """Refuse a saved adapter of whose targets the model has none.

    Some may be stale, of other layers or of another version: it is held to its weights.
    """
    targets = {
        f"{field}: {entry}"
        for field, entries, _ in _named(config)
        for entry in entries
        if field.startswith("target_") and entry in _listed(request.fields.get(field) or ())
    }
    if targets and targets <= set(unmatched):
        names = sorted({target.partition(": ")[2] for target in targets})
        raise RequestError(
            Problem(
                where="lora.adapter",
                message=f"the adapter in {request.section.adapter!r} is for modules called"
                f" {', '.join(names[:_SHOWN])}, and {type(model).__name__} has none of them",
                fix="Check that model and adapter belong together.",
            )
        )


def hold_to_layers(request: Request, model: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """Refuse what is said of layers that got no adapter: their rank, their alpha, their number.

    :param model: the base model.
    :param layers: those that carry the adapter, by their names in the base model.
    :raises RequestError: names what nothing took.
    """
    if request.saved is not None:
        return  # held to its weights
    names = {own_name(name) for name in layers}
    names |= {
        f"{own_name(name)}.{layer.parameter_name}"
        for name, layer in layers.items()
        if hasattr(layer, "parameter_name")
    }
    problems = []
    for field in ("rank_pattern", "alpha_pattern"):
        idle = [
            entry
            for entry in request.fields.get(field) or ()
            if not any(_pattern(entry, name) for name in names)
        ]
        if idle:
            problems.append(
                Problem(
                    where=f"lora.{field}",
                    message=f"no layer that gets an adapter is called"
                    f" {' or '.join(map(repr, idle))}",
                    fix=f"Adapted are {', '.join(by_kind(names)[:_SHOWN])}.",
                )
            )
    asked = request.fields.get("layers_to_transform")
    numbers = [asked] if isinstance(asked, int) else asked or ()
    parts = {part for name in names for part in name.split(".")}
    beyond = [number for number in numbers if str(number) not in parts]
    if beyond:
        problems.append(
            Problem(
                where="lora.layers_to_transform",
                message=f"no layer of {type(model).__name__} that gets an adapter has the number"
                f" {' or '.join(map(str, beyond))}",
                fix="Numbers go from 0 on, one less than there are layers.",
            )
        )
    if problems:
        raise RequestError(problems)


def refuse_ranks_beyond(request: Request, layers: Mapping[str, LoraLayer], adapter: str) -> None:
    """Refuse ranks for which a layer has too few singular values; PEFT looks once it has values.

    :param layers: those that carry the adapter, by their names in the base model.
    :raises RequestError: names the layers.
    """
    kasa = request.fields.get("kasa_config") is not None
    if not kasa and request.initialisation != "mica":
        return
    beyond: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        most = min(layer.in_features, layer.out_features) - kasa
        # A plugin's layer starts as the plugin says.
        if layer.r[adapter] > most and type(layer).__module__.startswith("peft."):
            beyond[name] = layer.r[adapter], most
    if beyond:
        rank, most = min(beyond.values(), key=lambda found: found[1])
        narrow = by_kind(name for name, (_, bears) in beyond.items() if bears == most)
        what = "KaSA drops" if kasa else "'mica' starts from"
        raise RequestError(
            Problem(
                where="lora.r",
                message=f"{what} as many singular values of a weight as the rank, here {rank}, and"
                f" {', '.join(narrow[:_SHOWN])} cannot bear more than {most}",
                fix=f"Write `r: {most}` or less, or leave those layers out."
                if most
                else "Leave those layers out of `target_modules`.",
            )
        )


def refuse_what_returns_no_tensor(layers: Mapping[str, LoraLayer]) -> None:
    """Refuse layers that PEFT takes for linear ones and that return more than a tensor, as routers
    of experts do: with an adapter their forward fails.

    :param layers: name -> the adapter's layer, of a rehearsed model.
    """
    found = []
    for name, layer in layers.items():
        base = layer.get_base_layer()
        of_its_own = isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward
        if not of_its_own or not base.weight.is_meta or not base.weight.is_floating_point():
            continue
        with suppress(Exception):  # it may want other arguments, and then nothing is known
            if not isinstance(base(base.weight.new_empty(2, base.in_features)), torch.Tensor):
                found.append(name)
    if found:
        ends = ", ".join(_ends(found, 1))
        raise RequestError(
            f"{some(found)} return more than a tensor, and PEFT's layers take a tensor",
            fix=f"Leave them out with `exclude_modules: [{ends}]`.",
            where="lora.target_modules",
        )


def refuse_rows_beyond(request: Request, model: PreTrainedModel) -> None:
    """Refuse token ids to train for which an embedding or head has no row.

    :raises RequestError: names each module with the rows it has.
    """
    asked = request.fields.get("trainable_token_indices") or {}
    if not isinstance(asked, Mapping):
        asked = {"": asked}
    problems = []
    for name, ids in asked.items():
        if name:
            found = [module for path, module in model.named_modules() if _bare_end(name, path)]
        else:
            found = [model.get_input_embeddings()]
        for module in found:
            weight = getattr(module, "weight", None)
            beyond = [number for number in ids if number >= partitions.shape(weight)[0]]
            if weight is not None and beyond:
                problems.append(
                    Problem(
                        where="lora.trainable_token_indices",
                        message=f"the token id {beyond[0]} has no row: {name or 'the embedding'!r}"
                        f" has {partitions.shape(weight)[0]}",
                        fix="Give ids below that; for tokens that are added, `embeddings: {}` makes"
                        " rows.",
                    )
                )
    if problems:
        raise RequestError(problems)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _named(config: LoraConfig) -> Iterator[tuple[str, list[str], _Matcher]]:
    """Yield the fields that hold names, their entries, and PEFT's rule for a match."""
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field, None)
        if isinstance(value, str):
            if value.lower() != ALL_LINEAR:
                yield field, [value], _whole
        elif value:
            yield field, sorted(value), _end
    if config.modules_to_save:
        yield "modules_to_save", config.modules_to_save, _bare_end
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, Mapping):
        yield "trainable_token_indices", [*tokens], _bare_end
    if getattr(config, "target_parameters", None):
        yield "target_parameters", sorted(config.target_parameters), _end
    for field in ("rank_pattern", "alpha_pattern"):
        yield field, [*getattr(config, field)], _pattern


def _whole(entry: str, name: str) -> bool:
    return patterns.fullmatch(entry, name) is not None


def _end(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _bare_end(entry: str, name: str) -> bool:
    return name.endswith(entry)


def _pattern(entry: str, name: str) -> bool:
    return patterns.match(rf"(.*\.)?({entry})$", name) is not None


def _way_out(field: str, misses: list[str], model: nn.Module, *, whole: bool) -> str:
    """Return the nearest names, or the form in which a name would have matched.

    :param whole: the one entry is a text, which stands for whole names.
    """
    if field == "target_parameters":
        names = [name for name, _ in model.named_parameters()]
    else:
        names = [n for n, module in model.named_modules() if isinstance(module, _ADAPTABLE)]
    ends = _ends(names, 2 if field == "target_parameters" else 1)
    if field in ("target_modules", "exclude_modules") and misses[0] in ends:
        return f"A text is a regular expression for the whole name; write [{misses[0]}]."
    if whole:
        example = next(iter([*closest(misses[0], names, 1), *linear_layers(model), *names]), "")
        return f"A text is a regular expression for the whole name, such as {example!r}."
    near = [name for entry in misses for name in _near(entry, names, ends)]
    if near:
        return f"The nearest: {', '.join(dict.fromkeys(near))}."
    more = ", ..." if len(ends) > _SHOWN else ""
    return f"Names are {', '.join(ends[:_SHOWN])}{more}."


def _is_misspelt(entry: str, model: nn.Module) -> bool:
    """Say whether a name that is not there is much like one that is."""
    names = [n for n, module in model.named_modules() if isinstance(module, _ADAPTABLE)]
    return bool(_near(entry, names, _ends(names, 1)))


def _near(entry: str, names: list[str], ends: list[str]) -> list[str]:
    """Return the names most like an entry: of one with dots, those of as many parts."""
    among = _ends(names, entry.count(".") + 1) if "." in entry else ends
    return closest(entry, among, _NEAREST) or closest(entry.rpartition(".")[2], ends, _NEAREST)


def _ends(names: Iterable[str], parts: int) -> list[str]:
    return sorted({".".join(name.split(".")[-parts:]) for name in names})


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of all linear layers, the output head included."""
    return [name for name, module in model.named_modules() if isinstance(module, _LINEAR)]


def by_kind(names: Iterable[str]) -> list[str]:
    """Write layers of one kind as one: ``model.layers.*.self_attn.q_proj``."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names})

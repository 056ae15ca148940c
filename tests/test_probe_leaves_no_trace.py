"""After the probe a model is what it was, wherever it keeps things; and a model that cannot run is
not handed out."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import computed_tensors
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import llmload
from llmload.model import reachable
from llmload.model.dry_run import probe
from llmload.testing import tiny_llama, tiny_model


def everything(model: nn.Module) -> dict[str, Any]:
    """Describe all that a model can reach, by hand: another walk than the one that is tested."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def look(path: str, value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            data = None if value.is_meta else value.detach().clone()
            gradient = value.grad if value.is_leaf else None
            found[path] = (id(value), value.device.type, data, value.requires_grad, gradient)
        elif isinstance(value, int | float | str | bool | type(None)):
            found[path] = value
        elif depth < 12 and id(value) not in seen:
            seen.add(id(value))
            found[path] = id(value)
            if isinstance(value, dict):
                found[f"{path} keys"] = list(map(repr, value))
                for key, item in value.items():
                    look(f"{path}[{key!r}]", item, depth + 1)
            elif isinstance(value, list | tuple | set | collections.deque):
                found[f"{path} length"] = len(value)
                for at, item in enumerate(value):
                    look(f"{path}[{at}]", item, depth + 1)
            elif callable(value) and hasattr(value, "__closure__"):
                for at, cell in enumerate(value.__closure__ or ()):
                    look(f"{path} closure {at}", cell.cell_contents, depth + 1)
            elif isinstance(value, functools.partial):
                look(f"{path} args", value.args, depth + 1)
                look(f"{path} keywords", value.keywords, depth + 1)
            elif hasattr(value, "__dict__") and not isinstance(value, type):
                look(f"{path}.", vars(value), depth + 1)
            for name in getattr(type(value), "__slots__", ()):
                look(f"{path}.{name}", getattr(value, name, "absent"), depth + 1)

    look("model", model, 0)
    for module in model.modules():
        for name, value in vars(type(module)).items():
            if isinstance(value, list | dict | set) and not name.startswith("__"):
                look(f"{type(module).__name__}.{name}", value, 0)
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(
        path
        for path in before.keys() | after.keys()
        if path not in before or path not in after or not same(before[path], after[path])
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


class Caching(nn.Module):
    """Adds up a vector that ``take`` keeps somewhere in its first forward."""

    shared: dict[str, torch.Tensor] = {}  # noqa: RUF012 - a class's own cache is what is tested

    def __init__(self, take: Callable[[Caching, torch.Tensor], None], *, values: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.take = take
        self.values = values
        self.cache: dict[str, torch.Tensor] = {}
        self.kept: list[torch.Tensor] = []
        self.nested: dict[str, Any] = {"deep": [{}], "pair": (torch.ones(4), [])}
        self.recent: collections.deque[torch.Tensor] = collections.deque(maxlen=2)
        self.notes = Notes()
        self.slots = Slots(torch.ones(4))
        self.running = torch.zeros(4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        self.take(self, hidden.detach().mean((0, 1)))
        if self.values:  # cannot be told on meta tensors: it runs for real
            hidden = hidden * float(hidden.detach().sum())
        return hidden


class Notes:
    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None


@dataclasses.dataclass(slots=True)
class Slots:
    mask: torch.Tensor


def in_closure() -> Callable[[Caching, torch.Tensor], None]:
    seen: list[torch.Tensor] = []
    last: torch.Tensor | None = None

    def take(model: Caching, value: torch.Tensor) -> None:
        nonlocal last
        last = value
        seen.append(value)

    take(None, torch.zeros(4))  # type: ignore[arg-type]
    return take


TAKES: dict[str, Callable[[Caching, torch.Tensor], Any]] = {
    "a dict": lambda model, value: model.cache.update(x=value),
    "a list": lambda model, value: model.kept.append(value),
    "a list in a dict": lambda model, value: model.nested["deep"].append(value),
    "a dict in a list": lambda model, value: model.nested["deep"][0].update(x=value),
    "a list in a tuple": lambda model, value: model.nested["pair"][1].append(value),
    "a tensor in a tuple": lambda model, value: model.nested["pair"][0].add_(1),
    "a queue": lambda model, value: model.recent.append(value),
    "an attribute": lambda model, value: setattr(model, "new", value),
    "an object": lambda model, value: setattr(model.notes, "mask", value),
    "slots": lambda model, value: setattr(model.slots, "mask", value),
    "a tensor": lambda model, value: model.running.add_(1),
    "a buffer": lambda model, value: model.count.add_(1),
    "a parameter": lambda model, value: model.embedding.weight.data.add_(1),
    "the class": lambda model, value: type(model).shared.update(x=value),
    "a module": lambda model, value: setattr(model, "late", nn.Linear(2, 2)),
    "a closure": in_closure(),
    "a partial": functools.partial(lambda kept, model, value: kept.append(value), []),
}


@pytest.mark.parametrize("values", [False, True], ids=["on meta", "for real"])
@pytest.mark.parametrize("place", TAKES)
def test_what_a_forward_keeps_is_gone_after_the_probe(place: str, values: bool) -> None:
    model = Caching(TAKES[place], values=values)
    before = everything(model)
    assert probe(model).method == ("real" if values else "meta")
    assert changes(before, everything(model)) == []


_by_length: dict[int, torch.Tensor] = {}
_mask: torch.Tensor | None = None


class Kept:
    """An object of a module's own."""

    def __init__(self) -> None:
        self.cache: dict[int, torch.Tensor] = {}


class Attributed(dict[str, Any]):
    """A dict with attributes."""


_kept = Kept()


class Keeps(nn.Module):
    """Adds a vector that it makes once, on the device of its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.entries = Attributed()
        self.config = LlamaConfig()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(input_ids) + self.once(input_ids.device)

    def once(self, device: torch.device) -> torch.Tensor:
        raise NotImplementedError


class InAGlobalDict(Keeps):
    def once(self, device: torch.device) -> torch.Tensor:
        return _by_length.setdefault(4, torch.ones(4, device=device))


class InAGlobal(Keeps):
    def once(self, device: torch.device) -> torch.Tensor:
        global _mask
        if _mask is None:
            _mask = torch.ones(4, device=device)
        return _mask


class InAGlobalObject(Keeps):
    def once(self, device: torch.device) -> torch.Tensor:
        return _kept.cache.setdefault(4, torch.ones(4, device=device))


class InACachedMethod(Keeps):
    @functools.lru_cache  # noqa: B019 - what is tested
    def ones(self, number: int) -> torch.Tensor:
        return torch.ones(number, device=self.embedding.weight.device)

    def once(self, device: torch.device) -> torch.Tensor:
        return self.ones(4)


class InADefault(Keeps):
    def once(self, device: torch.device, cache: dict[int, torch.Tensor] = {}) -> torch.Tensor:  # noqa: B006
        return cache.setdefault(4, torch.ones(4, device=device))


class InAKeywordsDefault(Keeps):
    def once(self, device: torch.device, *, cache: dict[int, torch.Tensor] = {}) -> torch.Tensor:  # noqa: B006
        return cache.setdefault(4, torch.ones(4, device=device))


def _helper(device: torch.device) -> torch.Tensor:
    if not hasattr(_helper, "ones"):
        _helper.ones = torch.ones(4, device=device)  # type: ignore[attr-defined]
    return _helper.ones  # type: ignore[attr-defined,no-any-return]


class InAFunction(Keeps):
    def once(self, device: torch.device) -> torch.Tensor:
        return _helper(device)


class InADictsAttribute(Keeps):
    def once(self, device: torch.device) -> torch.Tensor:
        if not hasattr(self.entries, "ones"):
            self.entries.ones = torch.ones(4, device=device)  # type: ignore[attr-defined]
        return self.entries.ones  # type: ignore[attr-defined,no-any-return]


class InTheConfig(Keeps):
    def once(self, device: torch.device) -> torch.Tensor:
        if not hasattr(self.config, "ones"):
            self.config.ones = torch.ones(4, device=device)
        return self.config.ones  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", Keeps.__subclasses__(), ids=lambda kind: kind.__name__)
def test_what_the_code_of_a_model_keeps_is_gone_after_the_probe(kind: type[Keeps]) -> None:
    model = kind()
    assert probe(model).method == "meta"
    ids = torch.arange(4)[None]
    assert torch.equal(model(ids), model.embedding(ids) + 1)
    assert probe(model).method != "unavailable"  # with what the first forward has left
    assert torch.equal(model(ids), model.embedding(ids) + 1)


class Draws(nn.Module):
    """Draws from generators of its own, and counts in an array."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.torch = torch.Generator().manual_seed(0)
        self.python = random.Random(0)
        self.numpy = np.random.default_rng(0)
        self.older = np.random.RandomState(0)
        self.count = np.zeros(2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.count += 1
        drawn = self.python.random() + self.numpy.random() + self.older.rand()
        return self.embedding(input_ids) * drawn * float(torch.rand((), generator=self.torch))

    def draws(self) -> list[Any]:
        numbers = [self.python.random(), self.numpy.random(), self.older.rand()]
        return [*numbers, float(torch.rand((), generator=self.torch)), list(self.count)]


def test_generators_and_arrays_of_a_model_are_as_they_were_after_the_probe() -> None:
    model = Draws()
    assert probe(model).method == "meta"
    assert model.draws() == Draws().draws()


class Numbers(nn.Module):
    """Takes from iterators of its own, one of which it has under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4)
        self.calls = itertools.count()
        self.turns = itertools.cycle("abc")
        self.rows = [iter([1, 2, 3, 4])]
        self.same = self.rows[0]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        next(self.turns)
        return self.embedding(input_ids) * (next(self.calls) + next(self.rows[0]) + next(self.same))


def test_iterators_of_a_model_are_where_they_were_after_the_probe() -> None:
    model = Numbers()
    assert probe(model).method == "meta"
    assert (next(model.calls), next(model.turns), list(model.same)) == (0, "a", [1, 2, 3, 4])
    assert model.same is model.rows[0]


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_a_hook_that_fires_once_is_still_there(kind: str) -> None:
    model = tiny_model("llama")
    fired: list[str] = []

    def once(module: nn.Module, *args: Any) -> None:
        fired.append("fired")
        handle.remove()

    handle = getattr(model.model, f"register_{kind}")(once)
    before = everything(model)
    assert probe(model).method == "meta"
    assert changes(before, everything(model)) == []
    assert fired == []
    model(torch.arange(4)[None])
    model(torch.arange(4)[None])
    assert fired == ["fired"]


PROBED = {
    "causal_lm": architectures.causal_lm_types()[::6],
    "seq2seq_lm": architectures.seq2seq_types()[::6],
    "base": architectures.encoder_types()[::6],
}
"""Every sixth of the architectures."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model_type"), [(kind, name) for kind, names in PROBED.items() for name in names]
)
def test_no_architecture_is_changed_by_the_probe(kind: str, model_type: str) -> None:
    model = architectures.build(kind, model_type)
    before = everything(model)
    probe(model)
    assert changes(before, everything(model)) == []


# --- a model that cannot run --------------------------------------------------------------------


class WrongShapes(LlamaForCausalLM):
    """Its layers do not fit together."""

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        return self.lm_head(torch.cat([hidden, hidden], -1))


class Refuses(LlamaForCausalLM):
    """Its forward raises whatever it is given."""

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        raise ValueError("the mask is of another time")


class NeedsPixels(LlamaForCausalLM):
    """Its forward takes what no example has."""

    def forward(self, input_ids: torch.Tensor, pixels: torch.Tensor, **others: Any) -> Any:
        return super().forward(input_ids, **others)


class ClashingDtypes(LlamaForCausalLM):
    """Writes in place what it computes in another dtype, which no autocast mends."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.added = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        hidden = self.model(input_ids).last_hidden_state.flatten(0, 1)
        shifts = hidden.to(self.added.weight.dtype) * 2
        rows = torch.zeros_like(shifts, dtype=torch.long)
        return self.lm_head(hidden.clone().scatter_(0, rows, shifts))


class LooksAtValues(ClashingDtypes):
    """The same, and it cannot run on the meta device."""

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        assert int(input_ids.max()) >= 0
        return super().forward(input_ids, **others)


LORA = {"target_modules": ["q_proj"]}


def spec(folder: Path, model_class: type, **others: Any) -> dict[str, Any]:
    path = f"{__name__}:{model_class.__name__}"
    return {"model": str(folder), "auto_class": path, "lora": LORA, **others}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    ("model_class", "said"),
    [
        (Refuses, "ValueError: the mask is of another time"),
        (WrongShapes, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
@pytest.mark.parametrize("loader", ["streaming", "transformers"])
@pytest.mark.refused_late  # a forward shows it
def test_a_model_whose_forward_raises_is_not_handed_out(
    loader: str, model_class: type, said: str, folder: Path
) -> None:
    registry = llmload.create_registry(block={"streaming"} - {loader})
    with pytest.raises(llmload.AuditError) as caught:
        llmload.load(spec(folder, model_class), registry=registry)
    message = str(caught.value)
    name = model_class.__name__
    assert message.startswith(f"the forward of {name} fails on a row of token ids: {said}")
    assert message.endswith(
        "Mend the class or the config. If it takes other inputs, or is not meant to run yet, set"
        " `strict: {allow_failing_forward: true}`."
    )


WHOLLY: dict[str, dict[str, Any]] = {
    "trained": {"lora": None},
    "frozen": {"lora": None, "trainable": False},
}
"""All of a model is trained, or nothing is."""


@pytest.mark.parametrize("wholly", WHOLLY)
@pytest.mark.refused_late  # a forward shows it
def test_a_class_of_the_users_is_run_even_where_it_is_wholly_trained_or_frozen(
    wholly: str, folder: Path
) -> None:
    with pytest.raises(llmload.AuditError) as caught:
        llmload.load(spec(folder, Refuses, **WHOLLY[wholly]))
    assert str(caught.value).startswith(
        "the forward of Refuses fails on a row of token ids: ValueError: the mask is of another"
    )
    strict = {"allow_failing_forward": True}
    report = llmload.load(spec(folder, Refuses, strict=strict, **WHOLLY[wholly])).report
    assert any("the mask is of another time" in line for line in report.audit)


class Detaches(LlamaForCausalLM):
    """Its forward computes without gradients."""

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        with torch.no_grad():
            return super().forward(input_ids, **others)


@dataclasses.dataclass
class Output:
    scores: torch.Tensor


class ReturnsItsOwn(LlamaForCausalLM):
    """Its forward returns an object that no library knows."""

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        return Output(super().forward(input_ids, **others).logits)


class WantsLabels(LlamaForCausalLM):
    """Its forward returns a loss, and nothing without labels."""

    def forward(self, input_ids: torch.Tensor, labels: Any = None, **others: Any) -> Any:
        return None if labels is None else super().forward(input_ids, labels=labels).loss


@pytest.mark.refused_late  # a forward shows it
def test_a_class_that_lets_no_gradient_through_is_not_handed_out_to_be_trained(
    folder: Path,
) -> None:
    with pytest.raises(llmload.AuditError) as caught:
        llmload.load(spec(folder, Detaches, **WHOLLY["trained"]))
    assert str(caught.value) == (
        "no gradient reaches any trainable parameter. The forward detaches its output, or runs"
        " without gradients: mend the class."
    )
    llmload.load(spec(folder, Detaches, **WHOLLY["frozen"]))


@pytest.mark.parametrize(
    ("model_class", "said"),
    [
        (ReturnsItsOwn, "gradients reach 21 of 21 trainable parameters"),
        (
            WantsLabels,
            "the gradient path was not looked at: the forward returns nothing of floating point on"
            " ids alone",
        ),
    ],
)
def test_what_a_forward_returns_may_be_of_any_kind(
    model_class: type, said: str, folder: Path
) -> None:
    assert said in llmload.load(spec(folder, model_class, **WHOLLY["trained"])).report.audit


def _replaces_the_head(model: nn.Module) -> None:
    model.lm_head = nn.Linear(3, 8)


def _raises_in_a_hook(model: nn.Module) -> None:
    def hook(module: nn.Module, given: Any) -> None:
        raise ValueError("the hook")

    model.lm_head.register_forward_pre_hook(hook)


def _replaces_the_forward(model: nn.Module) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise ValueError("the forward")

    model.lm_head.forward = forward


@pytest.mark.parametrize("wholly", WHOLLY)
@pytest.mark.parametrize("change", [_replaces_the_head, _raises_in_a_hook, _replaces_the_forward])
@pytest.mark.refused_late  # a forward shows it
def test_a_model_that_a_plugin_has_changed_is_run(
    change: Callable[[nn.Module], None], wholly: str, folder: Path
) -> None:
    class Changes:
        name = "changes"

        @llmload.hookimpl
        def post_load(self, ctx: Any, model: nn.Module) -> nn.Module:
            change(model)
            return model.requires_grad_(ctx.spec.trainable)

    registry = llmload.create_registry([Changes()])
    with pytest.raises(llmload.AuditError) as caught:
        llmload.load({"model": str(folder), **WHOLLY[wholly]}, registry=registry)
    assert str(caught.value).startswith(
        "the forward of LlamaForCausalLM fails on a row of token ids: "
    )


@pytest.mark.parametrize(
    ("wholly", "unrun", "run"),
    [
        ("trained", "every parameter is trainable", "gradients reach 21 of 21 trainable"),
        ("frozen", "no parameter is trainable", "a forward on token ids runs"),
    ],
)
def test_a_class_of_transformers_is_run_where_the_spec_wants_it(
    wholly: str, unrun: str, run: str, folder: Path
) -> None:
    wanted = {"model": str(folder), **WHOLLY[wholly]}
    said = llmload.load(wanted).report.audit
    assert f"{unrun}, so no gradient path was looked for, and no forward was run" in said
    result = llmload.load({**wanted, "strict": {"run_forward": True}})
    assert [line for line in result.report.audit if line.startswith(run)]
    assert run in str(result.report)


@pytest.mark.parametrize("wholly", WHOLLY)
def test_a_run_of_a_wholly_trained_or_frozen_model_leaves_no_trace(
    wholly: str, folder: Path
) -> None:
    wanted = {"model": str(folder), **WHOLLY[wholly]}
    plain = llmload.load(wanted).model
    run = llmload.load({**wanted, "strict": {"run_forward": True}}).model
    before, after = everything(plain), everything(run)
    assert before.keys() == after.keys()
    assert not [path for path, value in after.items() if _is_meta(value)]
    assert plain.training is run.training is False
    assert all(parameter.grad is None for parameter in run.parameters())
    ids = torch.arange(8)[None]
    assert torch.equal(plain(ids).logits, run(ids).logits)


def _is_meta(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 5 and value[1] == "meta"


@pytest.mark.parametrize("strict", [{"allow_failing_forward": True}, False])
def test_a_model_whose_forward_raises_is_handed_out_where_the_spec_says_so(
    strict: Any, folder: Path
) -> None:
    report = llmload.load(spec(folder, Refuses, strict=strict)).report
    assert (
        "the gradient path was not looked at: on meta tensors: ValueError: the mask is of another"
        " time; for real: ValueError: the mask is of another time"
    ) in report.audit


CAST = {"dtype": "bfloat16", "cast": {"modules": {"added": "float32"}}}


@pytest.mark.parametrize("model_class", [ClashingDtypes, LooksAtValues])
@pytest.mark.refused_late  # a forward shows it
def test_a_model_whose_dtypes_do_not_go_together_is_not_handed_out(
    model_class: type, folder: Path
) -> None:
    strict = {"allow_missing": ["added"]}
    llmload.load(spec(folder, model_class, strict=strict, dtype="bfloat16"))
    with pytest.raises(llmload.AuditError) as caught:
        llmload.load(spec(folder, model_class, strict=strict, **CAST))
    message = str(caught.value)
    assert message.startswith(
        f"the forward of {model_class.__name__} fails in the dtypes that its parameters have, under"
        " autocast too, and runs where all have one: RuntimeError: "
    )
    assert message.endswith(
        ". Give them one with `dtype` or the section `cast`. If somebody casts them later, set"
        " `strict: {allow_failing_forward: true}`."
    )
    strict["allow_failing_forward"] = True
    report = llmload.load(spec(folder, model_class, strict=strict, **CAST)).report
    assert "gradients reach 4 of 4 trainable parameters" in report.audit


def test_a_forward_that_takes_what_no_example_has_is_not_held_against_the_model(
    folder: Path,
) -> None:
    report = llmload.load(spec(folder, NeedsPixels)).report
    assert any(line.endswith("; no example has pixels") for line in report.audit)


def test_an_id_beyond_the_embedding_is_found_where_the_forward_runs_for_real() -> None:
    model = tiny_model("llama")
    model.config.eos_token_id = 500
    assert probe(Eager(model)).raised == "IndexError: index out of range in self"


class Eager(nn.Module):
    """Asks for a value, so that it runs for real."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids).logits
        return logits * float(logits.detach().sum())


def test_what_the_classes_made_for_it_keep_is_not_changed(tmp_path: Path) -> None:
    for name in ("PlainAttributes", "Aliases", "Views"):
        model = computed_tensors.reference(computed_tensors.save(name, tmp_path / name), name)
        before = everything(model)
        probe(model)
        assert changes(before, everything(model)) == []
        assert not any(tensor.is_meta for _, tensor in reachable.tensors(model))


class FailsUnderCheckpoint(nn.Module):
    """Raises for real inside torch.utils.checkpoint, which then keeps its hooks on the thread."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.ones(2, 4, device=input_ids.device, requires_grad=True)
        return checkpoint(self.inner, x, use_reentrant=False)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        raise ValueError("as asked")


def test_a_probe_that_fails_under_gradient_checkpointing_leaves_no_hooks_on_the_thread() -> None:
    result = probe(FailsUnderCheckpoint())
    assert result.raised == "ValueError: as asked"

    x = torch.ones(2, 2, requires_grad=True)
    checkpoint(lambda x: x.sin().exp(), x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (x.sin().exp() * x.cos()).detach())

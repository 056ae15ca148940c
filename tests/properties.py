"""What must hold of every architecture, each as a function that lists what does not.

``test_properties.py`` holds a few types to it in every run, ``sweep_properties.py`` all of them by
hand. The reference is a model that its constructor built on the CPU: saved, and loaded again, each
tensor that it can reach must be what it was.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import architectures
import torch
from safetensors.torch import load_file, save_file
from stacks import IS_MODERN
from torch import nn

import llmload
from llmload.hookspecs import hookimpl
from llmload.model import reachable
from llmload.testing import edit_config, save_checkpoint

TYPES = architectures.every()
LOADERS = ("streaming", "transformers")
Found = dict[str, torch.Tensor]


def saved(kind: str, model_type: str, folder: Path) -> tuple[Path, Any]:
    """Save a seeded model; returns the folder and the model."""
    model = architectures.build(kind, model_type).eval()
    return save_checkpoint(model, folder), model


def load(folder: Path, kind: str, loader: str = "streaming", **keys: Any) -> llmload.LoadResult:
    spec = {"model": str(folder), "auto_class": kind, "dtype": "float32", **keys}
    return llmload.load(spec, registry=registry(loader))


def registry(loader: str, *plugins: object) -> llmload.Registry:
    return llmload.create_registry(block={"streaming"} - {loader}, plugins=plugins)


# --- every tensor is accounted for ----------------------------------------------------------------


def unaccounted(kind: str, model_type: str, place: Path) -> Iterator[str]:
    """Load the whole of a checkpoint, and one that lacks a parameter, with either loader.

    Yields the tensors that neither the checkpoint, nor the constructor, nor the report accounts
    for, and those that are on the meta device.
    """
    folder, model = saved(kind, model_type, place / "whole")
    right = dict(reachable.tensors(model))
    unsaved: set[str] = set()  # fixed positions, which the class computes
    for loader in LOADERS:
        result = load(folder, kind, loader)
        unsaved |= result.report.newly_initialised.keys()
        yield from _tagged(loader, differences(right, dict(reachable.tensors(result.model)), ()))
    lacking = without_one(folder, model)
    if lacking is None:
        return
    strict = {"allow_missing": [f"^{lacking.replace('.', '[.]')}$"]}
    for loader in LOADERS:
        result = load(folder, kind, loader, strict=strict)
        new = result.report.newly_initialised.keys() - unsaved
        if new != {lacking}:
            yield f"{loader}: without {lacking!r}, new are {sorted(new)}"
        found = dict(reachable.tensors(result.model))
        yield from _tagged(f"{loader} without {lacking}", differences(right, found, new))


def differences(right: Found, found: Found, new: Any) -> Iterator[str]:
    """Yield the places in which a loaded model is not as the reference; what is new is plausible.

    Parameters that are new, and what looks at them, are drawn or constant: not what memory held.
    """
    for path in right.keys() ^ found.keys():
        yield f"{path!r} is in one of the models only"
    memory = {_address(right[name]) for name in new if name in right}
    for path in right.keys() & found.keys():
        mine, wanted = found[path], right[path]
        if mine.is_meta:
            yield f"{path!r} is on the meta device"
        elif path in new or _address(wanted) in memory:
            if not (torch.isfinite(mine).all() and mine.abs().max() < 1e3):
                yield f"{path!r} is new, and holds {mine.flatten()[:3].tolist()}"
        elif mine.dtype != wanted.dtype or not torch.equal(_bits(mine), _bits(wanted)):
            yield f"{path!r} differs"


def without_one(folder: Path, model: nn.Module) -> str | None:
    """Take a parameter of two dimensions out of a folder's only file, one that is stored under its
    own name; returns which."""
    file = folder / "model.safetensors"
    state = load_file(file)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    alone = [group[0] for group in names.values() if len(group) == 1]
    ignored = model._keys_to_ignore_on_load_missing or ()
    stored = [
        name
        for name in alone
        if name in state and state[name].dim() == 2 and not any(i in name for i in ignored)
    ]
    if not stored:
        return None
    del state[stored[-1]]
    save_file(state, file, metadata={"format": "pt"})
    return stored[-1]


def _address(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _tagged(tag: str, found: Iterator[str]) -> Iterator[str]:
    return (f"{tag}: {text}" for text in found)


# --- the plan says what the load says -------------------------------------------------------------


def _keys(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def mutilate(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return mutilate


def _drop(state: dict[str, torch.Tensor]) -> None:
    del state[max(state)]


def _wrap(state: dict[str, torch.Tensor]) -> None:
    for name in list(state):
        state[f"module.{name}"] = state.pop(name)


def _grow(state: dict[str, torch.Tensor]) -> None:
    name = max(state, key=lambda name: state[name].numel())
    state[name] = torch.cat([state[name], state[name]])


def _integers(state: dict[str, torch.Tensor]) -> None:
    weights = [name for name in state if name.endswith("weight")]  # a buffer may be stored so
    name = max(weights, key=lambda name: state[name].numel())
    state[name] = state[name].to(torch.int32)


def _vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    if "vocab_size" in config:
        edit_config(folder, vocab_size=config["vocab_size"] + 8)


def _layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    if isinstance(config.get("num_hidden_layers"), int):
        edit_config(folder, num_hidden_layers=config["num_hidden_layers"] + 1)


MUTILATED: dict[str, Callable[[Path], None]] = {
    "a key is missing": _keys(_drop),
    "a key is unknown": _keys(lambda state: state.update({"unknown.weight": torch.ones(2)})),
    "keys are wrapped": _keys(_wrap),
    "a shape is another": _keys(_grow),
    "a weight is integers": _keys(_integers),
    "the vocabulary is larger": _vocabulary,
    "there is a layer more": _layers,
}
"""What can be wrong with a folder, and headers and config tell."""


def late(kind: str, model_type: str, place: Path) -> Iterator[str]:
    """Yield each mutilation that a load refuses though the plan has no error; none is handed out
    with other values than are stored."""
    whole, model = saved(kind, model_type, place / "whole")
    right = dict(reachable.tensors(model))
    for what, mutilate in MUTILATED.items():
        for loader in LOADERS:
            folder = Path(shutil.copytree(whole, place / "mutilated"))
            mutilate(folder)
            yield from _tagged(f"{what}, {loader}", _late(folder, kind, loader, right))
            shutil.rmtree(folder)


def _late(folder: Path, kind: str, loader: str, right: Found) -> Iterator[str]:
    spec = {"model": str(folder), "auto_class": kind, "dtype": "float32"}
    try:
        errors = list(map(str, llmload.plan(spec, registry=registry(loader)).errors))
    except llmload.RequestError:
        errors = ["of another kind"]
    try:
        result = llmload.load(spec, registry=registry(loader))
    except llmload.LlmloadError as error:
        if not errors:
            yield f"the plan had no error, and the load says {error}"
        return
    if errors:
        yield f"the load did what the plan refuses: {errors}"
    # What is loaded nevertheless was not touched by it.
    yield from differences(right, dict(reachable.tensors(result.model)), ())


# --- a folder that holds a model and an adapter ---------------------------------------------------


def adapter_lost(kind: str, model_type: str, place: Path) -> Iterator[str]:
    """Yield what becomes of an adapter beside the weights against what the spec says."""
    folder, _ = saved(kind, model_type, place / "model")
    section = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    try:
        trained = load(folder, kind, lora=section).model
    except Exception:  # a type that PEFT cannot adapt: other tests list them with their reasons
        return
    with warnings.catch_warnings():
        # Of a head that PEFT takes for an embedding and saves whole beside the adapter.
        warnings.simplefilter("ignore", UserWarning)
        trained.save_pretrained(place / "adapter")
    for file in (place / "adapter").iterdir():
        if file.name.startswith("adapter_"):
            shutil.copy(file, folder)
    spec = {"model": str(folder), "auto_class": kind, "dtype": "float32"}
    if not any("holds an adapter" in str(error) for error in llmload.plan(spec).errors):
        yield "a spec that says nothing of it is not refused"
    for loader in LOADERS:
        plain = load(folder, kind, loader, ignore_adapter=True)
        if any("lora_" in name for name, _ in plain.model.named_parameters()):
            yield f"{loader}: it is there though it was to be ignored"
        resumed = load(folder, kind, loader, lora={"adapter": str(folder)})
        found, wanted = dict(resumed.model.named_parameters()), dict(trained.named_parameters())
        yield from _tagged(f"{loader}, resumed", differences(wanted, found, ()))
        for result in (plain, resumed):
            if result.plan.parameters != result.report.parameters:
                yield f"{loader}: {result.plan.parameters} for {result.report.parameters}"


# --- a model that cannot run ----------------------------------------------------------------------


class Breaks:
    """Lets the forward raise, on stand-ins and for real."""

    name = "breaks"
    stage = "model"

    @hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: nn.Module) -> nn.Module:
        def fail(*args: Any) -> None:
            raise ValueError("as asked")

        next(model.parameters()).requires_grad_(False)  # else the audit need not run it
        model.register_forward_pre_hook(fail)
        return model


def handed_out(kind: str, model_type: str, place: Path) -> Iterator[str]:
    """Yield whether a model whose forward raises is handed out."""
    folder, _ = saved(kind, model_type, place / "model")
    spec = {"model": str(folder), "auto_class": kind, "dtype": "float32"}
    try:
        llmload.load(spec, registry=registry("streaming", Breaks))
    except llmload.AuditError as error:
        if "fails on a row of token ids: ValueError: as asked" not in str(error):
            yield str(error)
    else:
        yield "it is handed out"


PROPERTIES = {
    "accounted": unaccounted,
    "plan": late,
    "adapter": adapter_lost,
    "runs": handed_out,
}


_ODD = (
    ("causal_lm", "megatron-bert"),
    ("causal_lm", "prophetnet"),
    ("seq2seq_lm", "marian"),
    *((("causal_lm", "deepseek_v3"), ("causal_lm", "laguna")) if IS_MODERN else ()),
)
FEW = list(dict.fromkeys([*TYPES[::29], *_ODD]))
"""Those that are asked in every run; the last have ties of their own, positions of no file, and
adapters whose names patterns for older ones match."""


def faults(name: str, kind: str, model_type: str, place: Path) -> list[str]:
    """List in which ways a type does not have a property."""
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        return list(PROPERTIES[name](kind, model_type, place))

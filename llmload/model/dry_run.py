"""One train-mode forward and backward of the model as it is, without touching a weight.

Whether a model is still random in training, and which trainable parameters a loss can reach, are
questions about the forward that the model really runs: with its adapters, hooks, attention
implementation and checkpointing. So the probe runs exactly that forward on a few tokens, with every
parameter and buffer replaced by a stand-in on the meta device that has its shape, dtype and
``requires_grad``. It costs Python overhead, no arithmetic and no weight page. Models whose control
flow depends on values cannot run on meta tensors; small ones then run for real.

Imported lazily, by functions: this module needs torch.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from llmload.model import partitions
from llmload.model.randomness import RandomOp, Recorder, states_kept

TOKENS = 8
"""Length of the example input: one row of so many token ids."""

SMALL = 64 * 2**20
"""A model of at most so many parameters may run for real where meta tensors do not suffice."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What one forward and backward in training mode showed."""

    method: Literal["meta", "real", "unavailable"]
    """How it ran; ``unavailable``: neither way, and the other fields say nothing."""
    reason: str = ""
    """Why it did not run on meta tensors, and for ``unavailable`` why not for real either."""
    random_ops: tuple[RandomOp, ...] = ()
    """Every random operation, in the order of the forward."""
    unreached: tuple[str, ...] = ()
    """Trainable parameters that the backward gave no gradient, in the model's order."""


def probe(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> ProbeResult:
    """Run one train-mode forward and backward and say what is random and what gets a gradient.

    The model is left as it was: weights, gradients, buffers, training mode and all attributes of
    its modules. So are torch's, Python's and NumPy's random states.

    :param model: the finished model, adapters and all; on any device, also on meta.
    :param inputs: keyword arguments of the forward; by default one row of ``TOKENS`` token ids, or
        as many rows as the model's ``rows_per_example`` says, for decoder and encoder alike.
        Tensors among them are moved to where the probe runs.
    """
    try:
        return _run(model, inputs, on_meta=True, reason="")
    except Exception as error:  # the model's own code, which may raise anything
        reason = f"on meta tensors: {_first_line(error)}"
    if len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1:
        # It may want the autocast of its training, which the meta device has not. No dtype changes
        # what is random and what gets a gradient.
        with suppress(Exception):
            return _run(model, inputs, on_meta=True, reason=reason, dtype=torch.float32)
    size = sum(partitions.elements(parameter) for parameter in model.parameters())
    if size > SMALL or any(p.is_meta or partitions.is_partitioned(p) for p in model.parameters()):
        return ProbeResult(method="unavailable", reason=reason)
    try:
        return _run(model, inputs, on_meta=False, reason=reason)
    except Exception as error:
        reason = f"{reason}; for real: {_first_line(error)}"
        return ProbeResult(method="unavailable", reason=reason)


def _run(
    model: nn.Module,
    inputs: Mapping[str, Any] | None,
    *,
    on_meta: bool,
    reason: str,
    dtype: torch.dtype | None = None,
) -> ProbeResult:
    recorder = Recorder(model)
    with ExitStack() as stack:
        devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        stack.enter_context(states_kept(devices))
        stack.enter_context(_modules_kept(model))
        # The training that follows will warn; looking need not.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_autocast_on_meta())
        if on_meta:
            _put_stand_ins(model, dtype)
        else:
            _put_clones_of_buffers(model)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        stack.enter_context(_gradients_kept(trainable.values()))
        device = torch.device("meta") if on_meta else next(model.parameters()).device
        arguments = example_inputs(model, device) if inputs is None else _moved(inputs, device)
        model.train()
        with recorder:
            outputs = model(**arguments)
            found = tuple(recorder.found)
            roots = [t.sum() for t in _tensors(outputs) if t.requires_grad]
            if roots:
                torch.autograd.backward(roots)
        unreached = tuple(name for name, p in trainable.items() if p.grad is None)
    return ProbeResult(
        method="meta" if on_meta else "real",
        reason=reason,
        random_ops=found,
        unreached=unreached,
    )


# --- inputs and outputs -----------------------------------------------------------------------


def example_inputs(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Make the arguments of one forward: a row of token ids that ends with the end-of-text id."""
    config = getattr(model, "config", None)
    # A model of pairs says how many rows its forward wants; they differ from the second token on.
    rows = getattr(_innermost(model), "rows_per_example", 1)
    ids = torch.arange(TOKENS).repeat(rows, 1)
    ids[:, 1:] += torch.arange(rows)[:, None]
    eos = getattr(config, "eos_token_id", None)
    if isinstance(eos, int):
        # Sequence classifiers of the BART and T5 families look for it.
        ids[:, -1] = eos
    ids = ids.to(device)
    arguments: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
    }
    if getattr(config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = ids
    taken = inspect.signature(_innermost(model).forward).parameters
    # use_cache is not for those that hand on whatever they get: not everybody takes it.
    unnamed = {*arguments} - {"use_cache"} if _takes_anything(taken) else set()
    return {name: arguments[name] for name in arguments if name in taken or name in unnamed}


def _takes_anything(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())


def _innermost(model: nn.Module) -> nn.Module:
    """Return the transformers model inside an adapter, whose signature says what it takes."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def _moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors in a model's output, however nested."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


# --- leaving everything as it was -------------------------------------------------------------


@contextmanager
def _modules_kept(model: nn.Module) -> Iterator[None]:
    """Restore the attributes, parameters, buffers, submodules and mode of every module."""
    registries = ("_parameters", "_buffers", "_modules")
    kept = [
        (module, dict(vars(module)), {name: dict(vars(module)[name]) for name in registries})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, entries in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for name, registry in entries.items():
                attributes[name].clear()
                attributes[name].update(registry)


@contextmanager
def _gradients_kept(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    kept = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


class _Autocast(torch.autocast):
    """``torch.autocast`` that takes the meta device, where models ask for their input's device."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    original = torch.autocast
    torch.autocast = _Autocast  # type: ignore[misc]
    try:
        yield
    finally:
        torch.autocast = original  # type: ignore[misc]


# --- stand-ins --------------------------------------------------------------------------------


def _put_stand_ins(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace every tensor of the model by one on the meta device; ties stay ties.

    Floating-point ones are of ``dtype``, or with None of their own.
    """
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if _is_packed_linear(module):
            module.forward = functools.partial(_dense_forward, module)
        registries: tuple[dict[str, Any], ...] = (
            module._parameters,
            module._buffers,
            vars(module),  # tensors that a model keeps as plain attributes
        )
        for registry in registries:
            for name, value in registry.items():
                if isinstance(value, torch.Tensor):
                    registry[name] = made.setdefault(id(value), _stand_in(value, dtype))


def _stand_in(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    empty = torch.empty(partitions.shape(tensor), dtype=dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _is_packed_linear(module: nn.Module) -> bool:
    """Whether the weight is a linear layer's, packed as bitsandbytes packs four-bit weights."""
    weight = module._parameters.get("weight")
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return weight is not None and None not in sizes and not weight.is_floating_point()


def _dense_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Do what the packed layer does to shapes and gradients, with a dense weight of no storage."""
    size: Any = (module.out_features, module.in_features)
    weight = torch.empty(size, dtype=x.dtype, device="meta")
    bias = module._parameters.get("bias")
    return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _put_clones_of_buffers(model: nn.Module) -> None:
    """Let a real train-mode forward update running statistics of its own."""
    for module in model.modules():
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else value.clone()


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}"

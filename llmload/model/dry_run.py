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
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from llmload.model import partitions, reachable
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
    raised: str = ""
    """What the forward raised for real, on inputs that it takes: the model cannot run. Empty where
    it ran, and where stand-ins, inputs or this machine may be what did not suffice."""
    clash: str = ""
    """What the forward raised for real in the dtypes that the parameters have, under autocast too,
    where it runs once all have one: the other fields tell of that run."""
    random_ops: tuple[RandomOp, ...] = ()
    """Every random operation, in the order of the forward."""
    unreached: tuple[str, ...] = ()
    """Trainable parameters that the backward gave no gradient, in the model's order."""
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Watched module that the forward called -> the shape of what it returned, of several tensors
    the first one's."""


def probe(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, *, watch: Collection[str] = ()
) -> ProbeResult:
    """Run one train-mode forward and backward and say what is random and what gets a gradient.

    The model is left as it was: weights, gradients, buffers, training mode, hooks and whatever else
    it can reach (:mod:`llmload.model.reachable`). So are torch's, Python's and NumPy's random
    states.

    :param model: the finished model, adapters and all; on any device, also on meta.
    :param inputs: keyword arguments of the forward; by default one row of ``TOKENS`` token ids, or
        as many rows as the model's ``rows_per_example`` says, for decoder and encoder alike.
        Tensors among them are moved to where the probe runs.
    :param watch: names of modules whose outputs the result is to tell the shapes of.
    """
    run = functools.partial(_run, model, inputs, watch)
    try:
        return run(on_meta=True, reason="")
    except Exception as error:  # the model's own code, which may raise anything
        reason = f"on meta tensors: {_first_line(error)}"
    in_one = None
    mixed = len({p.dtype for p in model.parameters() if p.is_floating_point()}) > 1
    if mixed:
        # It may want the autocast of its training, which the meta device has not. No dtype changes
        # what is random and what gets a gradient.
        in_one = _in_one_dtype(run, on_meta=True, reason=reason)
    size = sum(partitions.elements(parameter) for parameter in model.parameters())
    if size > SMALL or any(p.is_meta or partitions.is_partitioned(p) for p in model.parameters()):
        return in_one or ProbeResult(method="unavailable", reason=reason)
    found = _for_real(run, next(model.parameters()).device.type, reason)
    if isinstance(found, ProbeResult):
        return in_one or found
    lacking = _lacking(model, inputs)
    excused = bool(lacking) or _is_of_this_machine(found)
    if mixed and in_one is None:
        in_one = _in_one_dtype(run, on_meta=False, reason=reason)
    if in_one is not None:
        return in_one if excused else replace(in_one, clash=_first_line(found))
    reason = f"{reason}; for real: {_first_line(found)}"
    if lacking:
        reason += f"; no example has {lacking}"
    raised = "" if excused else _first_line(found)
    return ProbeResult(method="unavailable", reason=reason, raised=raised)


def _in_one_dtype(run: Callable[..., ProbeResult], **options: Any) -> ProbeResult | None:
    """Run with everything of floating point in float32; None where that raises too."""
    with suppress(Exception):
        return run(dtype=torch.float32, **options)
    return None


def _for_real(run: Callable[..., ProbeResult], device: str, reason: str) -> ProbeResult | Exception:
    """Run on copies of the values, under autocast if it must be; what it raises without that."""
    try:
        return run(on_meta=False, reason=reason)
    except Exception as error:
        failure = error
    with suppress(Exception), torch.autocast(device, torch.bfloat16):
        return run(on_meta=False, reason=reason)
    return failure


def _is_of_this_machine(error: Exception) -> bool:
    """Whether it tells of a kernel, package or memory that is not here, not of the model."""
    if isinstance(error, NotImplementedError | ImportError | MemoryError | torch.OutOfMemoryError):
        return True
    words = ("not implemented for", "cuda", "triton", "out of memory", "no kernel", "not compiled")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _lacking(model: nn.Module, inputs: Mapping[str, Any] | None) -> str:
    """Return the first argument that the forward needs and an example does not have, or ''."""
    if inputs is not None:
        return ""
    inner = _innermost(model)
    given = example_inputs(model, torch.device("cpu"))
    needed = [
        name
        for name, parameter in inspect.signature(inner.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    needed.append(getattr(inner, "main_input_name", "input_ids"))
    return next((name for name in needed if name not in given), "")


def _run(
    model: nn.Module,
    inputs: Mapping[str, Any] | None,
    watch: Collection[str],
    *,
    on_meta: bool,
    reason: str,
    dtype: torch.dtype | None = None,
) -> ProbeResult:
    recorder = Recorder(model)
    with ExitStack() as stack:
        devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        stack.enter_context(states_kept(devices))
        stack.enter_context(reachable.kept(model))
        # The training that follows will warn; looking need not.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_autocast_on_meta())
        device = torch.device("meta") if on_meta else next(model.parameters()).device
        _put_stand_ins(model, on_meta=on_meta, dtype=dtype)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        stack.enter_context(_gradients_kept(trainable.values()))
        arguments = example_inputs(model, device) if inputs is None else _moved(inputs, device)
        model.train()
        outputs = _watched(model, watch)
        with recorder:
            try:
                given = model(**arguments)
                found = tuple(recorder.found)
                # Any loss starts from some of the outputs: what none of them reaches, no loss can.
                returned = list(_tensors(given))
                roots = [tensor.sum() for tensor in returned if tensor.requires_grad]
                if roots:
                    torch.autograd.backward(roots)
            except Exception as error:
                # torch.utils.checkpoint takes its hooks off the thread when the generator that it
                # left suspended goes, which the traceback would keep (torch 2.5.1).
                traceback.clear_frames(error.__traceback__)
                raise
        unreached = tuple(name for name, p in trainable.items() if p.grad is None)
    if trainable and not returned:
        return ProbeResult(
            method="unavailable",
            reason="the forward returns nothing of floating point on ids alone",
        )
    return ProbeResult(
        method="meta" if on_meta else "real",
        reason=reason,
        random_ops=found,
        unreached=unreached,
        outputs=outputs,
    )


def _watched(model: nn.Module, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Return a mapping that the next forward fills; the hooks go with what else the probe put."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str, output: Any) -> None:
        for tensor in _tensors(output):
            found.setdefault(name, tuple(tensor.shape))
            break

    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: note(name, output)
        )
    return found


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
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name, None))


# --- leaving everything as it was -------------------------------------------------------------


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


def _put_stand_ins(model: nn.Module, *, on_meta: bool, dtype: torch.dtype | None) -> None:
    """Replace every tensor that the model can reach by another one; ties stay ties.

    Those of floating point are of ``dtype``, or with None of their own: on the meta device, else
    copies, but for those of a library's own type, which are more than their values.
    """
    made: dict[int, torch.Tensor] = {}
    if on_meta:
        for module in model.modules():
            if _is_packed_linear(module):
                module.forward = functools.partial(_dense_forward, module)

    def stand_in(path: str, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = (_stand_in if on_meta else _copy)(tensor, dtype)
        return made[id(tensor)]

    reachable.replace_tensors(model, stand_in, code=True)


def _stand_in(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    empty = torch.empty(partitions.shape(tensor), dtype=dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def _copy(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return tensor
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    copied = tensor.detach().to(dtype, copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied


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


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}"

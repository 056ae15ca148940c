"""What transformers makes of a model to be quantised, done to one that is on the meta device.

Replacing layers, turning a weight into a quantised parameter and marking the model are left to
transformers' own quantiser; only when and with what they are called is ours. Imported lazily.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from llmload.builtin.kbit import check
from llmload.builtin.kbit.cache import KeptWeights, device_names
from llmload.builtin.kbit.casting import Casting
from llmload.plugin import Part, Plain, RequestError, default_dtype, installed_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmload.builtin.kbit.section import KbitSection
    from llmload.plugin import LoadContext, Placement, Source, Splitting, Target

QuantisedLayer: TypeAlias = Linear4bit | Linear8bitLt


def configuration(
    ctx: LoadContext, section: KbitSection, model: PreTrainedModel
) -> BitsAndBytesConfig:
    """Return what transformers calls the quantisation to do.

    :param model: the model on the meta device. It is asked what transformers would leave as it is:
        in a ``BitsAndBytesConfig``, names of modules to skip stand in place of those, here beside.
    """
    skip = None
    if section.skip_modules:
        skip = [
            *sorted(installed_transformers().modules_left_unquantised(model)),
            *section.skip_modules,
        ]
    common = {
        "llm_int8_skip_modules": skip,
        "llm_int8_enable_fp32_cpu_offload": section.fp32_cpu_offload,
    }
    if section.bits == 8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=float(section.threshold), **common
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.quant_type,
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=check.compute_dtype(ctx, section),
        bnb_4bit_quant_storage=check.storage(ctx, section),
        **common,
    )


def quantiser(config: Any, *, stored: bool) -> Any:
    """Return transformers' quantiser; ``stored``: for a checkpoint that is quantised already."""
    from transformers.quantizers.auto import AutoHfQuantizer

    return AutoHfQuantizer.from_config(config, pre_quantized=stored)


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, QuantisedLayer]]:
    """Yield the layers of bitsandbytes with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            yield name, module


class KbitPlacement:
    """Quantises each weight as it is read; the others go straight to the dtype they end up with."""

    replaceable = True

    def __init__(self, ctx: LoadContext, section: KbitSection, config: BitsAndBytesConfig) -> None:
        self._ctx = ctx
        self._section = section
        self._quantiser = quantiser(config, stored=False)
        # Where a plugin before us partitions, it does so with quantised weights too.
        if ctx.placement is not None and not hasattr(ctx.placement, "part"):
            raise RequestError(check.unsuited(f"`{type(ctx.placement).__name__}`"))
        self._splitting: Splitting | None = ctx.placement
        self._others: Placement = ctx.placement or Plain()
        # Spreading a model over devices goes by the sizes of its quantised layers, which only
        # from_pretrained weighs; before transformers 5, it quantises in ways of its own.
        one_by_one = installed_transformers().quantises_weight_by_weight()
        ours = ctx.spec.device_map not in check.SPREADING and one_by_one
        self.honours = frozenset({"quantization_config"}) if ours else frozenset[str]()
        self._kept: KeptWeights | None = None
        if section.cache is not None:
            self._kept = KeptWeights(ctx, section)

    def default_device_map(self) -> dict[str, Any]:
        """Return the device that transformers would choose, of this process's local rank."""
        chosen: dict[str, Any] = self._quantiser.update_device_map(None)
        rank = os.environ.get("LOCAL_RANK")
        return chosen if rank is None or chosen == {"": "cpu"} else {"": int(rank)}

    def prepare(self, model: PreTrainedModel) -> None:
        """Put bitsandbytes' layers in place of linear ones."""
        _hold_to_names(self._section, model)
        replace_layers(model, self._quantiser, self._ctx, self._section)
        self._others.prepare(model)
        self._model = model
        self._casting = Casting(self._section, model)
        self._operation = self._quantiser.get_quantize_ops()
        model.hf_quantizer = self._quantiser
        if self._kept is not None:
            names = [
                f"{path}.weight"
                for path, _ in quantised_layers(model)
                if self._quantiser.param_needs_quantization(model, f"{path}.weight")
            ]
            self._kept.look(names, self._devices())

    def _devices(self) -> str:
        """Return on what kinds of device weights are quantised."""
        if self._splitting is not None:
            return device_names([self._splitting.device])
        chosen = self._ctx.load_options.get("device_map", self._ctx.spec.device_map)
        places = chosen.values() if isinstance(chosen, Mapping) else [chosen or "cpu"]
        return device_names(places)

    def extent(
        self, name: str, module: nn.Module, attribute: str, shape: Sequence[int]
    ) -> tuple[int, int]:
        """Return all of what is quantised, unless it was kept; see ``llmload.plugin.Plain``."""
        if self._quantiser.param_needs_quantization(self._model, name):
            kept = self._kept is not None and self._kept.found
            return 0, 0 if kept else math.prod(shape)
        of_others = getattr(self._others, "extent", None)
        found: tuple[int, int] = of_others(name, module, attribute, shape) if of_others else (0, 0)
        return found

    def place(self, target: Target, source: Source) -> torch.Tensor | Part:
        """Quantise on the target's device; the value is cast to the model's dtype before."""
        if self._quantiser.param_needs_quantization(self._model, target.name):
            return self._quantised(target, source)
        placed = self._others.place(target, source)
        if (
            isinstance(placed, Part)
            or placed.dtype != source.dtype
            or target.attribute not in target.module._parameters
        ):
            # A second cast, of what was rounded already, is not made on the way.
            return placed
        cast = placed.to(self._casting.dtype(target.name, target.module, placed))
        if cast is not placed:
            if self._kept is not None:
                self._kept.remember(target.name, placed)
            source.release()
        return cast

    def _quantised(self, target: Target, source: Source) -> torch.Tensor | Part:
        splitting = self._splitting
        device = target.device if splitting is None else splitting.device
        if self._kept is not None and self._kept.found:
            made = self._kept.weight(target, device, may_stay=source.may_stay)
        else:
            # The rounding to the model's dtype is part of the outcome: from_pretrained casts first
            # too.
            value = source.to(device, target.dtype)
            made = self._operation.convert({target.name: value}, model=self._model)[target.name]
            source.release()
        if splitting is None:
            return made  # type: ignore[no-any-return]
        codes = made.data.flatten()
        # One element stands for the whole; the statistics stay whole on every rank.
        made.data = codes[:1].clone().expand(made.shape)
        return splitting.part(made, lambda start, stop: codes[start:stop])

    def finish(self, model: PreTrainedModel) -> None:
        """Mark the model as transformers does: that it is quantised, and how."""
        self._quantiser.postprocess_model(model)
        if self._kept is not None:
            self._kept.finish(model, splits=self._splitting is not None)
        self._others.finish(model)


def replace_layers(
    model: PreTrainedModel, quantiser: Any, ctx: LoadContext, section: KbitSection
) -> None:
    """Let ``quantiser`` put its layers into a model on the meta device."""
    # Of the new layers' biases.
    with default_dtype(ctx.dtype):
        quantiser.preprocess_model(
            model=model,
            dtype=ctx.dtype,
            device_map=ctx.load_options.get("device_map", ctx.spec.device_map),
            keep_in_fp32_modules=model._keep_in_fp32_modules,
        )
    for _, layer in quantised_layers(model):
        if isinstance(layer, Linear4bit):
            # transformers' config has no such key; the weight takes it along when it is quantised.
            layer.weight.blocksize = section.block_size


def rehearse(ctx: LoadContext, section: KbitSection, model: PreTrainedModel) -> None:
    """Make of a model on the meta device what the load will make of it."""
    stored = check.stored_quantisation(ctx)
    config = stored or configuration(ctx, section, model)
    made_by = quantiser(config, stored=stored is not None)
    # The load quantises before any plugin changes the model: the names are those of the blank one.
    _hold_to_names(section, ctx.blank)
    replace_layers(model, made_by, ctx, section)
    for _, layer in quantised_layers(model):
        size = layer.in_features * layer.out_features
        if isinstance(layer, Linear4bit):
            # As the load leaves it: nothing that a later `.to` has to quantise.
            layer.weight.bnb_quantized = True
            dtype = layer.quant_storage
            # Two codes to the byte, in one column, as bitsandbytes packs them.
            shape = (math.ceil(size / 2) // dtype.itemsize, 1)
        else:
            dtype, shape = torch.int8, (layer.out_features, layer.in_features)
        outline = torch.empty(shape, dtype=dtype, device="meta")
        layer.weight = type(layer.weight)(outline, requires_grad=False, **vars(layer.weight))
    model.hf_quantizer = made_by
    made_by.postprocess_model(model)


def _hold_to_names(section: KbitSection, model: nn.Module) -> None:
    """Refuse a name in ``skip_modules`` that is no linear layer's."""
    if not section.skip_modules:
        return
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    for position, name in enumerate(section.skip_modules):
        if not any(installed_transformers().leaves_unquantised(name, module) for module in linear):
            ends = sorted({module.rpartition(".")[2] for module in linear})
            raise RequestError(
                f"no linear layer is called {name!r}",
                fix=f"Names end in {', '.join(ends)}.",
                where=f"kbit.skip_modules.{position}",
            )

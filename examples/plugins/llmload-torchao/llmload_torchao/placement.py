"""Weights quantised one by one, as transformers' own quantiser for torchao has it done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

import llmload
from llmload.plugin import Part, Plain, closest, installed_transformers, partitions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmload.plugin import Source, Target
    from llmload_torchao.section import TorchaoSection


def configuration(section: TorchaoSection, blank: PreTrainedModel) -> TorchAoConfig:
    """Return what transformers calls the quantisation to do.

    :param blank: the model on the meta device, whose modules have the names to skip.
    :raises RequestError: a name means no linear layer.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig if section.weights == "int8" else Float8WeightOnlyConfig
    linear = [name for name, module in blank.named_modules() if isinstance(module, nn.Linear)]
    skip = set(installed_transformers().modules_left_unquantised(blank))
    for position, wanted in enumerate(section.skip_modules):
        # transformers takes a name here for the beginning of one.
        meant = [name for name in linear if f".{wanted}." in f".{name}."]
        skip.update(meant)
        if not meant:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise llmload.RequestError(
                llmload.Problem(
                    where=f"torchao.skip_modules.{position}",
                    message=f"no linear layer of {type(blank).__name__} is called {wanted!r}",
                    fix=f"Names end in {', '.join(closest(wanted, ends) or ends)}.",
                )
            )
    # torchao would else set options of the compiler, for the whole process.
    return TorchAoConfig(kind(set_inductor_config=False), modules_to_not_convert=sorted(skip))


class Quantiser:
    """transformers' quantiser for torchao, made ready for one model."""

    def __init__(self, config: TorchAoConfig, model: PreTrainedModel) -> None:
        self._model = model
        self._quantiser: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
        self._quantiser.validate_environment(device_map=None)
        self._quantiser.preprocess_model(
            model=model, keep_in_fp32_modules=model._keep_in_fp32_modules
        )
        self._operation = self._quantiser.get_quantize_ops()

    def names(self) -> list[str]:
        """Return the parameters that are to be quantised."""
        return [name for name, _ in self._model.named_parameters() if self.takes(name)]

    def takes(self, name: str) -> bool:
        """Whether a parameter is to be quantised."""
        return bool(self._quantiser.param_needs_quantization(self._model, name))

    def quantise(self, name: str, value: torch.Tensor) -> nn.Parameter:
        """Put a value into the model, quantised, and return what is there now."""
        self._operation.convert(
            {name: value}, model=self._model, full_layer_name=name, missing_keys=set()
        )
        made: nn.Parameter = self._model.get_parameter(name)
        made.requires_grad = False
        return made

    def finish(self) -> None:
        """Mark the model as transformers does, so that it can be saved and adapted."""
        self._model.hf_quantizer = self._quantiser
        self._quantiser.postprocess_model(self._model)


class TorchaoPlacement:
    """Quantises each weight as it is read; the others go to the dtype of the model."""

    replaceable = True
    honours = frozenset({"quantization_config"})

    def __init__(self, config: TorchAoConfig) -> None:
        self._config = config
        self._others = Plain()

    def prepare(self, model: PreTrainedModel) -> None:
        """Find out which weights are to be quantised."""
        self._quantiser = Quantiser(self._config, model)
        self._wanted = frozenset(self._quantiser.names())

    def extent(
        self, name: str, module: nn.Module, attribute: str, shape: Sequence[int]
    ) -> tuple[int, int]:
        """Say what ``place`` will ask for: the whole of every value."""
        return self._others.extent(name, module, attribute, shape)

    def place(self, target: Target, source: Source) -> torch.Tensor | Part:
        """Quantise on the target's device; the value is cast to the model's dtype before."""
        if target.name not in self._wanted:
            return self._others.place(target, source)
        made = self._quantiser.quantise(target.name, source.to(target.device, target.dtype))
        source.release()
        return Part(made, partitions.stored(made)[0])

    def finish(self, model: PreTrainedModel) -> None:
        """Mark the model."""
        self._quantiser.finish()


def rehearse(config: TorchAoConfig, model: PreTrainedModel) -> None:
    """Make of a model on the meta device what the load will make of it."""
    quantiser = Quantiser(config, model)
    for name in quantiser.names():
        quantiser.quantise(name, model.get_parameter(name).data)
    quantiser.finish()


def quantised(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are torchao's, by name."""
    from torchao.utils import TorchAOBaseTensor

    return {n: p for n, p in model.named_parameters() if isinstance(p.data, TorchAOBaseTensor)}


def agrees(stored: torch.Tensor, weight: nn.Parameter, dtype: torch.dtype) -> bool:
    """Say whether the first and the last row of a weight are what the file's values give.

    Each row has a scale of its own, so that one can be quantised alone.

    :param stored: the weight as the checkpoint has it, of which two rows are read.
    :param dtype: of the model, to which values are cast before they are quantised.
    """
    found = partitions.stored(weight)
    for at in {0, len(stored) - 1}:
        row = stored[at : at + 1].to(weight.device, dtype)
        for wanted, held in zip(_alone(row, weight), found, strict=True):
            if not _same(wanted, held[at : at + 1]):
                return False
    return True


def _alone(row: torch.Tensor, weight: nn.Parameter) -> list[torch.Tensor]:
    """Return what a row is stored as that is quantised as the whole weight was."""
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8Tensor,
        Int8WeightOnlyConfig,
        quantize_,
    )

    layer = nn.Linear(row.shape[1], 1, bias=False, device="meta")
    layer.weight = nn.Parameter(row, requires_grad=False)
    kind = Int8WeightOnlyConfig if isinstance(weight.data, Int8Tensor) else Float8WeightOnlyConfig
    quantize_(layer, kind(set_inductor_config=False))
    return partitions.stored(layer.weight)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    # As bytes, so that NaN equals NaN.
    return torch.equal(*(tensor.contiguous().view(torch.uint8) for tensor in (one, other)))

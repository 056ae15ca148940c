"""Which dtype each parameter of a quantised model ends up with. Imported lazily: it needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from llmload.builtin.kbit.section import KbitSection

Group: TypeAlias = Literal["norms", "embeddings", "head", "other"]

# TRL 0.12 to 0.28, peft_module_casting_to_bf16: looked for anywhere in a module's name.
_BFLOAT16_IN_TRL = ("lm_head", "embed_tokens", "wte", "wpe")


class Casting:
    """The dtypes that a section asks for, in one model."""

    def __init__(self, section: KbitSection, model: nn.Module) -> None:
        self._profile = section.prepare
        self._asked = {
            group: getattr(torch, name)
            for group, name in section.cast.model_dump(exclude_none=True).items()
        }
        # TRL casts to bfloat16 on top of the legacy preparation only where the base is in 4 bits.
        if self._profile == "trl_legacy" and section.bits == 8:
            self._profile = "legacy"
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = None if head is None else id(head)
        self._owners: dict[int, list[tuple[str, nn.Module]]] = {}
        for path, owner in model.named_modules():
            for parameter in owner.parameters(recurse=False):
                self._owners.setdefault(id(parameter), []).append((path, owner))

    def dtype(self, name: str, module: nn.Module, parameter: torch.Tensor) -> torch.dtype:
        """Return the dtype that a parameter is to have.

        :param name: the parameter's name in the model.
        :param module: the module that owns it.
        :param parameter: the parameter, as it is, in the dtype in which transformers loads it.
        """
        if is_quantised(parameter) or not parameter.is_floating_point():
            return parameter.dtype
        asked: torch.dtype | None = self._asked.get(self.group(name, module))
        if asked is not None:
            return asked
        # A shared one has several names, of which a rule may know only one.
        owners = self._owners.get(id(parameter)) or [(name.rpartition(".")[0], module)]
        return self._by_profile(owners, parameter.dtype)

    def group(self, name: str, module: nn.Module) -> Group:
        """Return the group of parameters that a parameter of ``module`` belongs to."""
        if isinstance(module, nn.Embedding):
            return "embeddings"
        if id(module) == self._head:
            return "head"
        if _is_norm(name.rpartition(".")[0], module) or "norm" in type(module).__name__.lower():
            return "norms"
        return "other"

    def _by_profile(
        self, owners: Iterable[tuple[str, nn.Module]], dtype: torch.dtype
    ) -> torch.dtype:
        if self._profile in ("minimal", "trl"):
            return dtype
        found = torch.float32
        if self._profile == "trl_legacy":
            for path, owner in owners:  # TRL goes through all modules, and the last one wins
                if _is_norm(path, owner):
                    found = torch.float32
                elif any(part in path for part in _BFLOAT16_IN_TRL):
                    found = torch.bfloat16
        return found


def _is_norm(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or "norm" in name


def is_quantised(parameter: torch.Tensor) -> bool:
    """Say whether a parameter is, or is to be, in 4 or 8 bits."""
    from bitsandbytes.nn import Int8Params, Params4bit

    return isinstance(parameter, Params4bit | Int8Params)


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield each parameter once, with its name and the module that owns it."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{attribute}" if path else attribute, module, parameter

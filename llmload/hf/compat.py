"""The only place that asks which version of transformers or peft is installed.

Two versions of transformers are supported, 5.23 and 4.51.3; each function says what differs.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Collection, Container
from contextlib import AbstractContextManager, ExitStack
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmload.errors import CheckpointError, Problem, in_one_line
from llmload.hf import bounds

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from llmload.checkpoint.accounting import Accounting
    from llmload.checkpoint.contents import Checkpoint


def major(distribution: str) -> int:
    """Return the major version of an installed distribution."""
    return int(importlib.import_module(distribution).__version__.partition(".")[0])


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the keyword for ``from_pretrained``: ``dtype``, or ``torch_dtype`` before 4.56."""
    return {"dtype" if major("transformers") >= 5 else "torch_dtype": dtype}


def config_dtype(config: PretrainedConfig) -> torch.dtype | None:
    """Return the dtype a config declares; the attribute was ``torch_dtype`` before 4.56."""
    import torch

    name = "dtype" if major("transformers") >= 5 else "torch_dtype"
    declared = getattr(config, name, None)
    return getattr(torch, declared) if isinstance(declared, str) else declared


def concrete_class(
    auto_name: str, config: PretrainedConfig, trust_remote_code: bool
) -> tuple[type[PreTrainedModel], PretrainedConfig] | None:
    """Return what an ``Auto`` class would build, and the config it would build it from.

    None where the model type has no such head. As in transformers' ``auto_factory``: remote code
    wins where it is trusted, a class that takes only the text part gets only the text config (5.x),
    and among several classes the config's ``architectures`` decides.
    """
    import transformers
    from transformers.models.auto import auto_factory

    auto = getattr(transformers, auto_name)
    remote = (getattr(config, "auto_map", None) or {}).get(auto_name)
    if remote is not None and trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(remote, config._name_or_path), config
    if type(config) not in auto._model_mapping:
        return None
    found = auto_factory._get_model_class(config, auto._model_mapping)
    sub_configs = getattr(config, "sub_configs", {})
    takes_text = sub_configs.get("text_config") is not None and (
        getattr(found, "config_class", None) == sub_configs["text_config"]
    )
    if takes_text and major("transformers") >= 5:
        quantization = getattr(config, "quantization_config", None)
        config = config.get_text_config()
        if quantization is not None:
            config.quantization_config = quantization
    return found, config


def meta_contexts(
    model_class: type[PreTrainedModel], dtype: torch.dtype
) -> list[AbstractContextManager[Any]]:
    """Return the contexts under which ``from_pretrained`` builds a model on the meta device.

    Taken from transformers 5 itself; 4.51.3 has the same contexts but sets the default dtype apart.
    """
    if major("transformers") >= 5:
        return model_class.get_init_context(dtype, False, False, None)  # type: ignore[no-any-return]
    import torch
    from transformers.modeling_utils import no_init_weights

    return [default_dtype(dtype), no_init_weights(), torch.device("meta")]


def build_on_meta(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    dtype: torch.dtype,
    stored: Container[str] = (),
    *,
    asked: bool = True,
) -> PreTrainedModel:
    """Build a model as ``from_pretrained`` does before it reads, from a copy of ``config``.

    Weights are tied by the constructor at most. In 4.51.3 buffers have their values, and in
    composite models the dtype of a part depends on whether one was ``asked`` for.

    4.51.3 freezes fixed positions (Marian's, which are never saved) when it initialises them, and
    since 5.0 the constructor does: so they are frozen here, unless they are among the ``stored``
    names of the checkpoint.
    """
    if seam().unsuited() is None:
        options = {} if major("transformers") >= 5 else {"asked": asked}
        model: PreTrainedModel = _building().build(model_class, config, dtype, **options)
    else:
        with ExitStack() as stack:
            for context in meta_contexts(model_class, dtype):
                stack.enter_context(context)
            model = model_class(copy.deepcopy(config))
    if major("transformers") < 5:
        unsaved = set(model_class._keys_to_ignore_on_save or ())
        for path, module in model.named_modules():
            name = f"{path}.weight"
            if hasattr(module, "_init_weight") and name in unsaved and name not in stored:
                module.weight.requires_grad_(False)
    return model


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the parameters that the config ties to another one, which keeps its own name.

    transformers 5 has the pairs per model; 4.51.3 has a list per class and one switch.
    """
    pairs = getattr(model, "all_tied_weights_keys", None)
    if pairs is None:
        tied = getattr(model.config, "tie_word_embeddings", False)
        pairs = (model._tied_weights_keys or ()) if tied else ()
    return set(pairs)


def tied_blank(blank: PreTrainedModel) -> PreTrainedModel:
    """Return the plan's blank as the seam's ``rehearse`` takes it.

    That of 4.51.3 calls a weight missing whose tie, if there is one, does not show yet: it gets a
    tied copy.
    """
    if major("transformers") >= 5:
        return blank
    tied = copy.deepcopy(blank)
    tied.tie_weights()
    return tied


def seam() -> ModuleType:
    """Return the module that joins the streaming engine to this transformers' loading code."""
    return _for_this_version("seam")


def _building() -> ModuleType:
    return _for_this_version("building")


def _for_this_version(name: str) -> ModuleType:
    suffix = "" if major("transformers") >= 5 else "_4_51"
    return importlib.import_module(f"llmload.hf.{name}{suffix}")


class Engine:
    """What a load context asks of transformers: see ``llmload.context.engine.Engine``."""

    def blank(
        self,
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        stored: Collection[str],
        asked: bool,
    ) -> PreTrainedModel:
        """Build the model on the meta device, weights not tied.

        :raises CheckpointError: the class refuses the config, for example an attention
            implementation it does not have; or the config asks for far more than is stored.
        """
        try:
            with bounds.while_building(len(stored)):
                blank = build_on_meta(model_class, config, dtype, stored, asked=asked)
            bounds.hold_built(blank, len(stored))
        except Exception as error:
            raise CheckpointError(
                Problem(
                    where="model",
                    message=f"{model_class.__name__} cannot be built from the config:"
                    f" {in_one_line(error).rstrip('.')}",
                    fix="Check the config, `auto_class` and `attn_implementation`.",
                )
            ) from error
        if major("transformers") >= 5 and not hasattr(blank, "all_tied_weights_keys"):
            raise CheckpointError(
                Problem(
                    where="auto_class",
                    message=f"the constructor of {model_class.__name__} does not call"
                    " `self.post_init()`, without which transformers cannot load into it",
                    fix="Call it at the end of `__init__`.",
                )
            )
        return blank

    def to_fill(self, blank: PreTrainedModel) -> PreTrainedModel:
        """Make a blank model ready for its values: 4.51.3 ties before it fills, 5.x after."""
        return blank if major("transformers") >= 5 else _building().tie(blank)

    def built_under(
        self,
        context: AbstractContextManager[Any],
        model_class: type[PreTrainedModel],
        config: PretrainedConfig,
        dtype: torch.dtype,
        *,
        asked: bool,
    ) -> PreTrainedModel:
        """Build the model to fill under a plugin's context, which keeps it without memory.

        In transformers 5 with the meta device beneath it, which every model there is made for; in
        4.51.3, which moves each parameter by itself, in the place of that.
        """
        if major("transformers") < 5:
            lazy = _building().build(model_class, config, dtype, context, asked=asked)
            lazy.tie_weights()
            return lazy
        with context:
            return _building().build(model_class, config, dtype)

    def account(self, model: PreTrainedModel, checkpoint: Checkpoint, *, tied: bool) -> Accounting:
        """Say how the checkpoint's keys fit a model; one that is not ``tied`` stays so."""
        found: Accounting = seam().rehearse(model if tied else tied_blank(model), checkpoint)
        return found


def no_init_weights() -> AbstractContextManager[Any]:
    """Return a context in which new modules keep uninitialised memory; it moved with 5.0."""
    if major("transformers") >= 5:
        from transformers.initialization import no_init_weights
    else:
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()  # type: ignore[no-any-return]


def auxiliary_wrapper() -> type[Any]:
    """Return PEFT's class around what it trains beside its layers; before 0.16 there was but one,
    for ``modules_to_save``."""
    from peft.utils import other

    return getattr(other, "AuxiliaryTrainingWrapper", other.ModulesToSaveWrapper)  # type: ignore[no-any-return]


class default_dtype(AbstractContextManager[None]):  # noqa: N801 - reads as a function
    """Set torch's default dtype and restore it, whatever happens."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        import torch

        self._before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *exc: object) -> None:
        import torch

        torch.set_default_dtype(self._before)

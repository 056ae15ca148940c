"""Which class with which config and dtype is to be built."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import TYPE_CHECKING, Any

from llmload.checkpoint.strict_json import short
from llmload.errors import CheckpointError, SpecError, in_one_line
from llmload.hf import bounds, hub, locating
from llmload.hf.overrides import override
from llmload.hf.versions import installed_transformers
from llmload.spec.words import AUTO_CLASSES

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from llmload.checkpoint import Checkpoint
    from llmload.checkpoint.untrusted import UntrustedFolder
    from llmload.spec.loadspec import LoadSpec

_AS_A_PATH = "Write it as `module:Class`, and check that the module is on the path."
_INSTALL = "Install the package that it needs, or mend the code."


def load_config(
    files: UntrustedFolder, content: dict[str, Any], spec: LoadSpec, checkpoint: Checkpoint | None
) -> PretrainedConfig:
    """Read the model's config with transformers, after :func:`locating.read_config` let it pass.

    :param content: of ``config.json``, read through ``files``; transformers reads it again.
    :param checkpoint: whose headers say how much of a model there can be.
    :raises CheckpointError: transformers does not know the model type, or refuses a value; the
        config asks for more than the checkpoint can hold, or has a key that would hide a method.
    :raises SpecError: as :func:`override`.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    bounds.hold_counts(files, content, checkpoint)
    options: dict[str, Any] = {}
    if spec.attn_implementation is not None:
        options["attn_implementation"] = spec.attn_implementation
    for key in content:
        if callable(getattr(PretrainedConfig, key, None)):
            raise files.refusal(
                locating.CONFIG,
                f"the config's key {short(key)} would hide what transformers calls by that name",
                "Remove the key.",
            )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            files.root,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            cache_dir=hub.cache_dir(spec),
            **options,
        )
    except (Exception, SystemExit) as error:  # transformers raises many kinds, own code any
        own = "auto_map" in content and content.get("model_type") not in CONFIG_MAPPING
        message, fix = (
            f"transformers cannot read the config of model type {short(content.get('model_type'))}:"
            f" {in_one_line(error).rstrip('.')}",
            "Check the folder, or install the transformers version it was saved with.",
        )
        if own and not spec.trust_remote_code:
            message = (
                f"transformers has no model type {short(content.get('model_type'))}, and the folder"
                " brings code of its own for it"
            )
            fix = "Set `trust_remote_code: true` if you trust whoever made it."
        elif own:
            message, fix = own_code_failed(error)
        raise CheckpointError(message, fix=fix, file=str(files.root / locating.CONFIG)) from error
    files.check()
    if spec.config:
        config = override(config, files, content, spec.config, checkpoint)
    return config


def resolve_class(
    spec: LoadSpec, config: PretrainedConfig
) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return the concrete class for ``spec.auto_class`` and the config it takes.

    The config differs from the one passed in where a text model is taken out of a composite one.

    :raises SpecError: the class cannot be imported, or the model type has no such head.
    """
    if ":" in spec.auto_class:
        return _imported_class(spec.auto_class), config
    try:
        named = AUTO_CLASSES[spec.auto_class].transformers
        found = _concrete_class(named, config, spec)
    except (Exception, SystemExit) as error:  # the folder's own code may raise anything
        message = f"no class can be chosen by this config: {in_one_line(error)}"
        fix = "Check `architectures` and `auto_map` in the config."
        if getattr(config, "auto_map", None) and spec.trust_remote_code:
            message, fix = own_code_failed(error)
        raise CheckpointError(message, fix=fix, where="model") from error
    if found is None:
        raise SpecError(
            f"model type {config.model_type!r} has no class for {spec.auto_class!r}",
            fix=f"Use one of {', '.join(_heads(config))}, or `module:Class`.",
            where="auto_class",
        )
    return found


def set_labels(spec: LoadSpec, config: PretrainedConfig) -> None:
    """Give a classifier's config the labels that the spec asks for, under transformers' keys."""
    if spec.labels is None:
        return
    if isinstance(spec.labels, int):
        if config.num_labels != spec.labels:  # names that are there already stay
            config.num_labels = spec.labels
        return
    config.id2label = dict(enumerate(spec.labels))
    config.label2id = {name: number for number, name in config.id2label.items()}


def own_code_failed(error: BaseException) -> tuple[str, str]:
    """Return message and fix where code that came with a model cannot be imported."""
    raised = traceback.extract_tb(error.__traceback__)
    of_model = raised and "transformers_modules" in raised[-1].filename
    fix = "Mend the code, or use the versions of Python, torch and transformers it was written for."
    if isinstance(error, ImportError):
        fix = _INSTALL
    elif isinstance(error, OSError):
        fix = "Fetch it with `hf download`, from the repository that `auto_map` names."
    return (
        "the code that comes with the model cannot be imported"
        f" ({_raised(error, raised[-1] if of_model else None)}",
        fix,
    )


def _raised(error: BaseException, frame: traceback.FrameSummary | None) -> str:
    """Return what code raised while it was imported: type, place and, after a bracket, reason."""
    place = ""
    if isinstance(error, SyntaxError):
        place = f", {error.filename} line {error.lineno}"
    elif frame is not None and not frame.filename.startswith("<"):
        place = f", {frame.filename} line {frame.lineno}"
    return f"{type(error).__name__}{place}): {in_one_line(error).rstrip('.')}"


def _concrete_class(
    auto_name: str, config: PretrainedConfig, trusting: LoadSpec | None
) -> tuple[type[PreTrainedModel], PretrainedConfig] | None:
    """Return what an ``Auto`` class would build, and the config it would build it from.

    None where the model type has no such head. As in transformers' ``auto_factory``: remote code
    wins where it is trusted, and among several classes the config's ``architectures`` decides.

    :param trusting: the spec, where the config's own classes may be chosen.
    """
    import transformers
    from transformers.models.auto import auto_factory

    auto = getattr(transformers, auto_name)
    remote = (getattr(config, "auto_map", None) or {}).get(auto_name)
    if remote is not None and trusting is not None and trusting.trust_remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        place = hub.cache_dir(trusting)
        return get_class_from_dynamic_module(
            remote, config._name_or_path, cache_dir=place, local_files_only=True
        ), config
    if type(config) not in auto._model_mapping:
        return None
    found = auto_factory._get_model_class(config, auto._model_mapping)
    return found, installed_transformers().config_for(found, config)


def _heads(config: PretrainedConfig) -> list[str]:
    return [
        name
        for name, auto in AUTO_CLASSES.items()
        if _concrete_class(auto.transformers, config, None) is not None
    ]


def _imported_class(path: str) -> type[PreTrainedModel]:
    from transformers import PreTrainedModel

    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        message, fix = f": {in_one_line(error)}", _AS_A_PATH
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(
            f"{error.name}."
        )
        lacking = isinstance(error, AttributeError) and module in sys.modules
        if not (absent or lacking):
            frames = traceback.extract_tb(error.__traceback__)
            message = f" ({_raised(error, frames[-1])}"
            fix = _INSTALL if isinstance(error, ImportError) else "Mend the code."
        raise SpecError(
            f"{path!r} cannot be imported{message}", fix=fix, where="auto_class"
        ) from None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise SpecError(
            f"{path!r} is not a subclass of transformers.PreTrainedModel",
            fix="Name a model class, such as `transformers:LlamaForCausalLM`.",
            where="auto_class",
        )
    return found


def resolve_dtype(
    spec: LoadSpec, config: PretrainedConfig, checkpoint: Checkpoint | None
) -> torch.dtype:
    """Return the model's dtype: the spec's, else the config's, else the first float tensor's.

    The same order as transformers' ``dtype="auto"``; float32 where nothing says.
    """
    import torch

    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)  # type: ignore[no-any-return]
    declared = installed_transformers().config_dtype(config)
    if isinstance(declared, torch.dtype) and declared.is_floating_point:
        return declared
    if declared is not None:
        raise CheckpointError(
            f"the config's dtype is {short(declared)}, in which no model is computed",
            fix="Say in the spec which it is to be, such as `dtype: bfloat16`.",
            where="dtype",
        )
    stored = [t.dtype for t in checkpoint.tensors.values()] if checkpoint else []
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return next((names[dtype] for dtype in stored if dtype in names), torch.float32)

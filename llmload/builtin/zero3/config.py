"""A DeepSpeed config as a load needs it: read, its ``auto`` resolved or refused, held to the spec.

``auto`` is no value of DeepSpeed. The Trainer of transformers and ``accelerate`` fill it in from
their own arguments, after the model has been loaded; what the load itself needs is filled in here,
by the Trainer's rules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from llmload.builtin.zero3.section import Zero3Section
from llmload.plugin import Problem, RequestError, parse_yaml

AUTO: Final = "auto"

_TRAINERS: Final = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
"""What only training needs. Left as it is, and left out while loading."""

_BY_HIDDEN_SIZE: Final[Mapping[str, Callable[[int], int]]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
"""Keys of ``zero_optimization`` -> the value that the Trainer of transformers gives ``auto``."""

_SHOWN: Final = 5
_TOP_LEVEL: Final = frozenset(
    {
        "zero_optimization",
        "bf16",
        "fp16",
        "bfloat16",
        "optimizer",
        "scheduler",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "activation_checkpointing",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "communication_data_type",
        "tensor_parallel",
        "weight_quantization",
        "data_types",
        "torch_autocast",
        "aio",
        "steps_per_print",
        "wall_clock_breakdown",
        "flops_profiler",
    }
)
"""Keys of which a DeepSpeed config has at least one."""

_PRECISIONS: Final = {"bf16": "bfloat16", "fp16": "float16"}

_WANTS_DEEPSPEEDS_OWN: Final = {
    "zero_quantized_weights": (False, "quantises the partitions for their way between ranks"),
    "zero_quantized_nontrainable_weights": (False, "quantises frozen partitions"),
    "zero_hpz_partition_size": (1, "partitions a second time within each host"),
}
"""Keys of ``zero_optimization`` -> the value without effect, and what others do to partitions."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A DeepSpeed config whose every ``auto`` that matters to a load is resolved."""

    content: Mapping[str, Any]
    """The whole config; ``auto`` is left where only the training loop knows."""
    left: tuple[str, ...] = ()
    """Dotted keys that are still ``auto``."""

    @property
    def stage(self) -> int:
        """The ZeRO stage; 0 where the config says none."""
        return int(self.zero.get("stage", 0))

    @property
    def zero(self) -> Mapping[str, Any]:
        """The part ``zero_optimization``."""
        zero: Mapping[str, Any] = self.content.get("zero_optimization", {})
        return zero

    @property
    def dtype(self) -> str:
        """The dtype of the parameters in training, by the names of a spec's ``dtype``."""
        for key, dtype in _PRECISIONS.items():
            if self.content.get(key, {}).get("enabled"):
                return dtype
        return "float32"

    def for_loading(self) -> dict[str, Any]:
        """Return what is handed to DeepSpeed while loading: a copy without the training's part."""
        content = {k: v for k, v in self.content.items() if k not in _TRAINERS}
        # DeepSpeed reads no config without a batch size, and uses none of it here.
        return copy.deepcopy(content) | {"train_micro_batch_size_per_gpu": 1}

    def beyond_us(self) -> str | None:
        """Return why DeepSpeed must partition while transformers loads, or None if we can."""
        for key, (neutral, effect) in _WANTS_DEEPSPEEDS_OWN.items():
            if self.zero.get(key, neutral) != neutral:
                return f"`zero_optimization.{key}` {effect}"
        if (self.zero.get("offload_param") or {}).get("device") == "nvme":
            return "`zero_optimization.offload_param` moves the partitions to a disk"
        if "weight_quantization" in self.content:
            return "`weight_quantization` quantises while the model is built"
        if self.content.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
            return "`tensor_parallel` splits the modules first"
        return None


def read(section: Zero3Section) -> dict[str, Any]:
    """Return the DeepSpeed config that a section asks for, ``auto`` and all.

    :raises RequestError: the file cannot be read, or is no mapping.
    """
    from llmload.plugin import local_path, read_file

    if section.config is None:
        return _made(section)
    if isinstance(section.config, Mapping):
        return _recognised(copy.deepcopy(dict(section.config)), "the mapping")
    path = local_path(section.config, "zero3.config")
    try:
        text = read_file(path, "zero3.config", "the DeepSpeed config").decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(
            f"the DeepSpeed config {str(path)!r} cannot be read: it is not text in UTF-8",
            fix="Check the name; it is relative to the working directory.",
            where="zero3.config",
        ) from None
    content, _ = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise RequestError(
            f"the DeepSpeed config {str(path)!r} is no mapping of keys to values",
            fix='Write at least {"zero_optimization": {"stage": 3}}.',
            where="zero3.config",
        )
    return _recognised(content, repr(str(path)))


def _recognised(content: dict[str, Any], what: str) -> dict[str, Any]:
    """Refuse what is no config of DeepSpeed's, such as accelerate's or a spec."""
    if content.keys() & _TOP_LEVEL:
        return content
    shown = ", ".join(map(str, [*content][:_SHOWN])) or "nothing"
    raise RequestError(
        f"{what} has none of DeepSpeed's keys: it has {shown}",
        fix='Give a DeepSpeed config, with at least {"zero_optimization": {"stage": 3}}.',
        where="zero3.config",
    )


def _made(section: Zero3Section) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": section.stage}
    if section.stage3_param_persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = section.stage3_param_persistence_threshold
    if section.offload_param is not None:
        zero["offload_param"] = section.offload_param.model_dump(exclude_none=True)
    precision = {key: {"enabled": AUTO} for key in _PRECISIONS}
    return {"zero_optimization": zero, **precision, "train_micro_batch_size_per_gpu": AUTO}


def plain(dtype: str) -> DeepSpeedConfig:
    """Return the config of stage 3 that is made where a spec says no more, for a model's dtype."""
    precision = {key: {"enabled": name == dtype} for key, name in _PRECISIONS.items()}
    return DeepSpeedConfig({"zero_optimization": {"stage": 3}, **precision})


def stage_of(section: Zero3Section) -> int:
    """Return the ZeRO stage that a section asks for.

    :raises RequestError: it cannot be told.
    """
    zero = read(section).get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if isinstance(stage, bool) or stage not in range(4):
        found = "which `accelerate launch` fills in" if stage == AUTO else f"found {stage!r}"
        raise RequestError(
            f"expected a ZeRO stage from 0 to 3, {found}",
            fix='Write {"zero_optimization": {"stage": 3}}.',
            where="zero3.config.zero_optimization.stage",
        )
    return int(stage)


def resolve(
    section: Zero3Section,
    dtype: str,
    hidden_size: int | None,
    announced: Mapping[str, Any] | None = None,
) -> DeepSpeedConfig:
    """Return the config with every ``auto`` resolved that a load depends on.

    The one that the script has ``announced`` to transformers is taken where the section has only
    plain fields; with a config of its own the two must say the same.

    :param dtype: the model's, by the names of a spec's ``dtype``.
    :param hidden_size: the model's, for what the Trainer derives from it; None if it has none.
    :raises RequestError: with every ``auto`` that nothing here can resolve.
    """
    stage_of(section)
    asked = content = read(section)
    if announced is not None and section.config is None:
        content = copy.deepcopy(dict(announced))
    left, problems = [], []
    for path, parent, key in list(_autos(content, ())):
        name = ".".join(path)
        if path[0] in _TRAINERS:
            left.append(name)
        elif key == "enabled" and path[0] in _PRECISIONS:
            parent[key] = _PRECISIONS[path[0]] == dtype
        elif name == f"zero_optimization.{key}" and key in _BY_HIDDEN_SIZE and hidden_size:
            parent[key] = _BY_HIDDEN_SIZE[key](hidden_size)
        elif name != "data_types.keep_in_fp32_modules":  # there it is a value of DeepSpeed's
            problems.append(_unresolved(name, key))
    if announced is not None:
        whole = section.config is not None
        problems += _disagreements(content if whole else asked, announced, whole=whole)
    if problems:
        raise RequestError(problems)
    return DeepSpeedConfig(content, tuple(left))


def _disagreements(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, whole: bool
) -> Iterator[Problem]:
    """Yield the keys by which our config and the one that the script has set would differ.

    :param whole: ours is all there is; else what it lacks is left to theirs.
    """
    mine, other = _leaves(ours), _leaves(theirs)
    for path in sorted(mine.keys() | other.keys()):
        if path[0] in _TRAINERS or (path not in mine and not whole):
            continue
        # Elsewhere than in the part that decides on partitions, what one lacks says nothing.
        if path[0] != "zero_optimization" and (path not in mine or path not in other):
            continue
        one, two = mine.get(path), other.get(path)
        if AUTO in (one, two) or one == two:
            continue
        name = ".".join(path)
        yield Problem(
            where=f"zero3.config.{name}" if whole else f"zero3.{'.'.join(path[1:])}",
            message=f"{_said(path in mine, one)} here, and {_said(path in other, two)} in the"
            " DeepSpeed config that is set for transformers already, as"
            " `TrainingArguments(deepspeed=...)` does",
            fix=f"Let both say the same of {name!r}, or write `zero3: {{}}` to take that config.",
        )


def _said(there: bool, value: Any) -> str:
    return f"{value!r} is asked for" if there else "nothing is said"


def _leaves(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}
    for key, value in node.items():
        here = (*path, key)
        found |= _leaves(value, here) if isinstance(value, Mapping) else {here: value}
    return found


def _autos(
    node: dict[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], str]]:
    """Yield the path of every ``auto``, and the mapping and key that hold it."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _autos(value, (*path, key))
        elif value == AUTO:
            yield (*path, key), node, key


def _unresolved(name: str, key: str) -> Problem:
    reason = "nothing in a load says what it is to be"
    if key in _BY_HIDDEN_SIZE:
        reason = "it follows from `hidden_size`, which the model's config lacks"
    return Problem(
        where=f"zero3.config.{name}",
        message=f"`auto` cannot be resolved here: {reason}",
        fix="Write the value, or remove the key for DeepSpeed's default.",
    )


def precision_problem(config: DeepSpeedConfig, dtype: str) -> Problem | None:
    """Return what is wrong where DeepSpeed would train in another dtype than the spec's.

    DeepSpeed makes every parameter in its own dtype, whatever is asked of ``from_pretrained``.
    """
    if config.dtype == dtype:
        return None
    key = next((key for key, name in _PRECISIONS.items() if name == dtype), None)
    enable = f' or write "{key}": {{"enabled": true}} in the DeepSpeed config' if key else ""
    return Problem(
        where="zero3",
        message=f"the DeepSpeed config trains in {config.dtype}, the model's dtype is {dtype}",
        fix=f"Set `dtype: {config.dtype}`{enable}.",
    )

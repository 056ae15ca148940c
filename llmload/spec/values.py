"""Values of a spec that no type describes: each is returned as it is, or refused with a fix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from llmload.spec import patterns
from llmload.spec.refusals import InvalidValueError, meant
from llmload.spec.suggest import nearest
from llmload.spec.words import AUTO_CLASSES

CLASS_PATH: Final = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
_LONGEST_PATTERN: Final = 10_000
SPREADS: Final = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of ``device_map`` by which a model is spread over what is there."""
_DEVICES: Final = ("cpu", "cuda", "mps", "xpu", "npu", "hpu", "mlu", "musa")
_UNITS: Final = {
    **{f"{letter}B": 1000 ** (place + 1) for place, letter in enumerate("KMGT")},
    **{f"{letter}IB": 1024 ** (place + 1) for place, letter in enumerate("KMGT")},
    "B": 1,
    "": 1,
}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def dtype_name(dtype: object) -> str:
    """What specs, configs and torch call a ``torch.dtype``: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def regex(pattern: str) -> str:
    """Hold a value to the syntax of regular expressions."""
    if len(pattern) > _LONGEST_PATTERN:
        raise InvalidValueError(
            f"a regular expression of {len(pattern)} characters is more than the"
            f" {_LONGEST_PATTERN} allowed",
            fix="Write several shorter ones.",
        )
    try:
        re.compile(pattern)
    except patterns.FAULTS as error:
        raise InvalidValueError(
            f"{pattern!r} is not a regular expression: {error}",
            fix=f"To match the text as it stands, write {re.escape(pattern)!r}.",
        ) from None
    return pattern


def auto_class_name(name: str) -> str:
    """Hold a value to what ``auto_class`` takes: a name of ours, or ``module:Class``."""
    if name in AUTO_CLASSES or re.fullmatch(CLASS_PATH, name):
        return name
    raise InvalidValueError(
        f"expected {', '.join(map(repr, AUTO_CLASSES))} or 'module:Class', found {name!r}",
        fix=meant(name, AUTO_CLASSES),
    )


def device_name(name: int | str) -> int | str:
    """Hold a value to a device as torch or accelerate name it, or its number."""
    if isinstance(name, int):
        if name >= 0:
            return name
    elif re.fullmatch(rf"({'|'.join(_DEVICES)})(:\d+)?", name):
        return name
    if name == "disk":
        raise InvalidValueError(
            "weights are not kept on a disk: no loader here does that",
            fix="Write a device; ZeRO-3 keeps its partitions on one with `zero3: {offload_param:"
            " {device: nvme, nvme_path: ...}}`.",
        )
    raise InvalidValueError(
        f"{name!r} is not a device",
        fix=(isinstance(name, str) and nearest(name, _DEVICES))
        or "Write one such as cpu, cuda, cuda:0 or 0.",
    )


def device_or_spread(value: int | str) -> int | str:
    """Hold a value to a device, or a way to spread a model over several."""
    if value in SPREADS:
        return value
    if value == "disk":
        return device_name(value)  # which refuses it in words of its own
    try:
        return device_name(value)
    except InvalidValueError:
        raise InvalidValueError(
            f"{value!r} is neither a device nor a way to spread the model",
            fix=(isinstance(value, str) and nearest(value, (*SPREADS, *_DEVICES)))
            or f"Write {', '.join(SPREADS)}, a device such as cuda:0, or a mapping of modules"
            " to devices.",
        ) from None


def nbytes(text: str) -> int | None:
    """Return the bytes that a text such as ``80GB`` or ``512 GiB`` says, None where it is none."""
    found = _SIZE.fullmatch(text.strip())
    unit = None if found is None else _UNITS.get(found[2].upper())
    return None if found is None or unit is None else int(float(found[1]) * unit)


def memory_place(name: str) -> str:
    """Hold a key of ``max_memory`` to what accelerate takes: the number of one, cpu or mps."""
    if re.fullmatch(r"0|[1-9]\d*|cpu|mps", name):
        return name
    if name == "disk":
        raise InvalidValueError("weights are not kept on a disk", fix="Remove the key.")
    kind, _, number = name.partition(":")
    raise InvalidValueError(
        f"{name!r} is no place for weights that `max_memory` knows",
        fix=f"Accelerators have numbers: write {number or '0'!r}."
        if kind in _DEVICES and kind != "cpu"
        else "Write the number of an accelerator, such as '0', or cpu or mps.",
    )


def amount_of_memory(value: int | str) -> int | str:
    """Hold a value to bytes as accelerate reads them: a number, or text with a unit."""
    found = value if isinstance(value, int) else nbytes(value)
    if found is None or found < 0:
        raise InvalidValueError(
            f"{value!r} is no amount of memory",
            fix="Write bytes, or a number and a unit, such as 80GB (10**9 bytes) or 80GiB (2**30).",
        )
    if isinstance(value, str) and value.endswith("b"):
        raise InvalidValueError(
            f"{value!r} would be bits: transformers takes a small b for those",
            fix=f"Write '{value[:-1]}B' for bytes.",
        )
    return value


def replacements(rules: Mapping[str, str]) -> Mapping[str, str]:
    """Hold each replacement to the groups of its pattern, a regular expression already."""
    for pattern, replacement in rules.items():
        try:
            re.sub(pattern, replacement, "")
        except (*patterns.FAULTS, IndexError, KeyError) as error:
            raise InvalidValueError(
                f"the replacement {replacement!r} does not fit the pattern {pattern!r}: {error}",
                fix="Number the groups of the pattern from \\1, and write a backslash as \\\\.",
            ) from None
    return rules

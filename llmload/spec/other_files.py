"""Files that are given in place of a spec: what they are, and what to give instead."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llmload.errors import Problem
from llmload.spec.suggest import nearest

if TYPE_CHECKING:
    from llmload.spec.document import Document

ENDINGS: Final = (".yaml", ".yml", ".json")
"""How the name of a spec ends."""
WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
"""How the name of a file of weights ends."""
_OF_A_MODEL: Final = frozenset(
    ("architectures", "transformers_version", "weight_map", "tokenizer_class")
)
"""Keys of the small files in a model's folder, of which no spec has one."""
_HUB_PAGE: Final = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
_MOST: Final = 1000
"""Names in a folder among which one that is not there is looked for."""
_THEIR_MODEL: Final = ("base_model", "model_name_or_path")
"""What tools call the model, whose configs ``llmload convert`` reads."""


def told(problems: Iterable[Problem], document: Document) -> list[Problem]:
    """Return what is wrong with a document: where it is a file of another kind, that alone."""
    if "model" in document.data or not document.file:
        return list(problems)
    other = _other(document)
    if other is not None:
        return [other]
    convertible = any(key in document.data for key in _THEIR_MODEL)
    fix = f"Add it, or have a spec made of the whole file: `llmload convert {document.file}`."
    return [
        problem.model_copy(update={"fix": fix})
        if convertible and problem.where == "model"
        else problem
        for problem in problems
    ]


def _other(document: Document) -> Problem | None:
    """Return what a file that names no model is, and what to give instead; None: perhaps a spec."""
    data = document.data
    folder = os.fspath(Path(document.file).parent)
    if "peft_type" in data:
        base = data.get("base_model_name_or_path") or "BASE"
        return Problem(
            message="this is the config of an adapter, not a spec",
            fix=f"Write `model: {base}` and `lora: {{adapter: {folder}}}`.",
        )
    if _OF_A_MODEL & data.keys():
        return Problem(
            message="this is a file of a model, not a spec",
            fix=f"Give the folder it is in, {folder!r}, or write a spec with `model: {folder}`.",
        )
    if "zero_optimization" in data:
        return Problem(
            message="this is a config of DeepSpeed, not a spec",
            fix=f"Write `zero3: {{config: {document.file}}}` into a spec.",
        )
    return None


def instead_of(name: str) -> str:
    """Return what to write in place of the name of a spec under which there is no file; empty where
    nothing shows it."""
    found = meant(name)
    if found or name.endswith(ENDINGS):
        return found
    return f"Check the name; of a model write `model: {name}` in a spec."


def meant(name: str, *, folder: bool = False) -> str:
    """Return what was meant by a name under which there is nothing; empty where nothing shows it.

    :param folder: it is of a folder, not of a file.
    """
    page = _HUB_PAGE.match(name)
    if page is not None:
        return f"Of a model of the hub give the id, {page[1]}."
    full = os.path.expanduser(name)
    if full != name:
        return f"Write the path in full: {full}."
    if "$" in name:  # its value may be a secret, and is not shown
        return "Write the path in full: no variable is put in here."
    try:
        beside = list(islice(Path(name).parent.iterdir(), _MOST))
        return nearest(name, (str(path) for path in beside if path.is_dir() or not folder))
    except (OSError, ValueError):  # such as a name with a null character
        return ""

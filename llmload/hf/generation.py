"""Whether transformers will take a folder's ``generation_config.json``, and write it again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmload.errors import CheckpointError, Problem, in_one_line
from llmload.hf.versions import installed_transformers

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

FILE = "generation_config.json"


def read(folder: Path, model_class: type[PreTrainedModel]) -> GenerationConfig | None:
    """Return the generation config that a load gives to the model; None where the folder has none.

    :raises CheckpointError: transformers refuses it.
    """
    from transformers import GenerationConfig

    file = folder / FILE
    if not file.is_file() or not model_class.can_generate():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a bad value
        raise CheckpointError(
            f"transformers refuses the generation config: {in_one_line(error).rstrip('.')}",
            fix="Mend the value, or remove the file.",
            file=str(file),
        ) from error


def problems(folder: Path, model_class: type[PreTrainedModel]) -> Iterator[Problem]:
    """Yield what ``from_pretrained`` would raise for the file, or ``save_pretrained`` later."""
    try:
        config = read(folder, model_class)
    except CheckpointError as error:
        yield from error.problems
        return
    if config is None:
        return
    reason = _unsaved(config)
    if reason is not None:
        yield Problem(
            file=str(folder / FILE),
            severity="warning",
            message="once one of its values has changed, as the alignment of token ids changes"
            f" some, transformers will refuse to save the generation config, and the model with"
            f" it: {reason}",
            fix="Set `do_sample` to true in the file, or remove what does not go with it.",
        )


def _unsaved(config: GenerationConfig) -> str | None:
    """Return why ``save_pretrained`` refuses a generation config, or None.

    It raises for what it only warns of otherwise.
    """
    config = copy.deepcopy(config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            installed_transformers().validate_to_save(config)
    except (ValueError, Warning) as error:
        return in_one_line(error).rstrip(".")
    return None

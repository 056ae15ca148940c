"""From a spec, or from what was loaded, to a folder that plain transformers or PEFT loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel

from llmload.errors import LlmloadError, LoadFailedError, RequestError, in_one_line
from llmload.hf import bars
from llmload.host.registry import Registry, create_registry
from llmload.loading.pipeline import LoadResult, load_held
from llmload.model import partitions
from llmload.ranks.environment import world_size
from llmload.saving import card, obstacles, proof, writing

if TYPE_CHECKING:
    from llmload.loading.prepared import Prepared
    from llmload.spec.files import SpecLike

_SIZE: Final = re.compile(r"[1-9]\d*(\.\d+)?[KMG]i?B", re.IGNORECASE)
_BESIDE: Final = 32 << 20
"""Bytes that tokenizer, configs and card take at most, roughly."""


class SavedFile(BaseModel):
    """One file of a saved folder."""

    name: str
    """In the folder."""
    size: int
    """Bytes."""


class Saved(BaseModel):
    """What was written."""

    folder: str
    """Where, as it was asked for."""
    kind: Literal["model", "quantised model", "adapter"]
    """A ``model`` is loaded by transformers, an ``adapter`` by PEFT."""
    files: list[SavedFile]
    """Every file, by name."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def save(
    source: SpecLike | LoadResult,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: str = "5GB",
    registry: Registry | None = None,
) -> Saved:
    """Save a model or adapter as a folder that plain transformers, PEFT and llmload load again.

    Weights are written as safetensors; with them go the tokenizer or processor with its chat
    template, the generation config, and a model card to go on from, which repeats the spec. What
    was written is compared with the model, bit by bit, before the folder gets its name: there is
    all of it, or nothing.

    :param source: what :func:`load` returned, trained since or not; or a spec, which is then
        loaded. With ``lora: {merge: true}`` the merged model is saved, with ``lora`` else the
        adapter.
    :param folder: a new or an empty one.
    :param max_shard_size: of one file of a model's weights, such as ``5GB`` or ``500MB``; a tensor
        that is larger has a file of its own.
    :param registry: the plugins to use; by default all installed ones.
    :raises RequestError: the folder or the model is none that can be saved so. Of a spec that is
        found out before a weight is read.
    :raises LoadFailedError: a library failed to write it, or what it wrote is not the model.
    """
    registry, place = registry or create_registry(), Path(folder)
    _hold_size(max_shard_size)
    writing.require_new(place)
    if isinstance(source, LoadResult):
        obstacles.hold_model(source.model, source.awaiting)
        result = source
    else:
        _hold_to_one_process()
        result = load_held(
            source, registry=registry, agree=lambda prepared: _hold_plan(prepared, place)
        )
    return _written(result, place, max_shard_size, registry)


def _hold_size(text: str) -> None:
    if not _SIZE.fullmatch(text):
        raise RequestError(
            f"the size {text!r} is none that files can have",
            fix="Write a number and a unit, such as 5GB or 500MB.",
            where="max_shard_size",
        )


def _hold_to_one_process() -> None:
    ranks = world_size()
    if ranks is not None and ranks > 1:
        raise RequestError(
            f"{ranks} processes would each save the same folder",
            fix="Start it once, without a launcher.",
        )


def _hold_plan(prepared: Prepared, place: Path) -> None:
    """Refuse what the plan tells cannot be saved, or does not fit on the disk."""
    obstacles.hold_plan(prepared)
    if prepared.rehearsal is not None:
        of_base = not prepared.ctx.wraps_adapter or prepared.rehearsal.merged_into
        nbytes = prepared.plan.parameter_bytes if of_base else 0
        writing.require_new(place, room=nbytes + _BESIDE)


def _written(result: LoadResult, place: Path, max_shard_size: str, registry: Registry) -> Saved:
    adapter = obstacles.is_peft(result.model)
    with (
        _failures_named(),
        bars.hidden(),  # that of transformers tells of files and not of bytes
        writing.refused(place),
        writing.whole_folder(place) as folder,
    ):
        if adapter:
            _write_adapters(result, folder)
        else:
            _write_model(result.model, folder, max_shard_size)
            _copy_code(Path(result.report.folder), result.model, folder)
        if result.processor is not None:
            result.processor.save_pretrained(folder)
        elif result.tokenizer is not None:
            result.tokenizer.save_pretrained(folder)
        (folder / card.FILE).write_text(_card(result, adapter=adapter), "utf-8")
        if not adapter:
            asked = result.report.spec
            proof.prove_model(result.model, folder, asked, registry, target=place)
        files = [_described(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    quantised = not adapter and obstacles.is_quantised(result.model)
    kind: Any = "adapter" if adapter else "quantised model" if quantised else "model"
    return Saved(folder=str(place), kind=kind, files=files)


def _card(result: LoadResult, *, adapter: bool) -> str:
    return card.text(result, adapter=adapter, rows=_other_rows(result) if adapter else None)


def _described(path: Path, folder: Path) -> SavedFile:
    return SavedFile(name=path.relative_to(folder).as_posix(), size=path.stat().st_size)


def _write_model(model: Any, folder: Path, max_shard_size: str) -> None:
    """Let transformers write the model, and its generation config whatever is in that.

    transformers refuses to save some generation configs that it loads, as Llama 2's.
    """
    from transformers import GenerationConfig

    generation = getattr(model, "generation_config", None)
    if generation is None or not model.can_generate():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    finally:
        model.generation_config = generation
    generation.to_json_file(folder / "generation_config.json")


def _write_adapters(result: LoadResult, folder: Path) -> None:
    """Let PEFT write every adapter: one alone at the top, several in folders by their names."""
    model = result.model
    embeddings: bool | str = "auto" if _other_rows(result) is None else True
    with warnings.catch_warnings():
        # It asks the hub for the size of a vocabulary that is known here.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        model.save_pretrained(str(folder), save_embedding_layers=embeddings)
        names = list(model.peft_config)
        if len(names) == 1 and names[0] != "default":
            shutil.copytree(folder / names[0], folder, dirs_exist_ok=True)
            shutil.rmtree(folder / names[0])
        for name in names:
            alone = len(names) == 1 or name == "default"
            place = folder if alone else folder / name
            proof.prove_adapter(model, name, place, embeddings=embeddings)


def _other_rows(result: LoadResult) -> int | None:
    """Return how many rows the embeddings have, where the base has others: PEFT then needs them."""
    weight = getattr(result.model.get_input_embeddings(), "weight", None)
    if weight is None:
        return None
    config = json.loads((Path(result.report.folder) / "config.json").read_text("utf-8"))
    rows, stored = partitions.shape(weight)[0], config.get("text_config", config).get("vocab_size")
    return rows if stored is not None and rows != stored else None


def _copy_code(source: Path, model: Any, folder: Path) -> None:
    """Copy the code of a model that brings its own, by which its config names the classes."""
    named = getattr(model.config, "auto_map", None) or {}
    if any("--" not in str(name) for name in named.values()):
        for path in source.glob("*.py"):
            shutil.copyfile(path, folder / path.name)


@contextmanager
def _failures_named() -> Iterator[None]:
    """Say of what a library raises that it was while saving; refusals of ours stay as they are."""
    try:
        yield
    except LlmloadError:
        raise
    except Exception as error:
        raise LoadFailedError(
            f"saving failed, and nothing is left of it: {type(error).__name__}:"
            f" {in_one_line(error).rstrip('.')}"
        ) from error

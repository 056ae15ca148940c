"""A saved adapter: its configuration and the headers of its weights, before any weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import ValidationError

from llmload.builtin.lora.section import LEFT_TO_PEFT, OWN_FIELDS, LoraSection
from llmload.builtin.lora.spellings import SPELLINGS
from llmload.plugin import (
    Checkpoint,
    CheckpointError,
    MappedCheckpoint,
    Problem,
    Renaming,
    UntrustedFolder,
    explain,
    hold_adapter,
    local_path,
    locate_files,
    unwrapped,
)

if TYPE_CHECKING:
    import torch

    from llmload.plugin import LoadSpec

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
LAYER_PLUGINS: Final = "llmload_plugins"
"""Our key in the configuration, written where plugins made layers of the adapter: their names with
distribution and version. llmload 0.1.0 wrote a list of names."""
TIED_WEIGHTS: Final = "llmload_tied_weights"
"""Our key in the configuration: ``untie`` where rows of untied embeddings were trained, which PEFT
would tie again."""
MERGED_FIRST: Final = "llmload_merged_first"
"""Our key in the configuration: folders of adapters that were merged into the base before."""
_PICKLE: Final = "adapter_model.bin"

# What the file says of where it came from, and of how it is used; neither is inherited.
_NOT_INHERITED: Final = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "revision"}
)


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """A folder written by ``PeftModel.save_pretrained``."""

    folder: Path
    fields: dict[str, Any]
    """The fields of ``LoraConfig`` in ``adapter_config.json`` that hold for a resumed adapter."""
    layer_plugins: Mapping[str, str]
    """Plugins whose ``lora_layer`` made layers of it -> distribution and version, as the file says;
    empty where it does not."""
    untied: bool
    """Whether embedding and head had been untied, and rows of one of them were trained alone."""
    merged_first: tuple[str, ...]
    """Folders of the adapters that were merged into its base before it was trained."""
    checkpoint: Checkpoint
    """Names, shapes and dtypes of the weights."""
    files: UntrustedFolder
    """The folder, whose configuration was read and checked."""

    def read(self) -> dict[str, torch.Tensor]:
        """Return the weights by name, on the CPU, the caller's own.

        :raises CheckpointError: a file is no longer the one that was checked.
        """
        with MappedCheckpoint(self.checkpoint) as mapped:
            values = {
                name: mapped.tensor(info).clone() for name, info in self.checkpoint.tensors.items()
            }
            mapped.check()
        self.files.check()
        return values

    def outline(self) -> dict[str, torch.Tensor]:
        """Return the weights by name on the meta device: shapes and dtypes, nothing read."""
        import torch

        from llmload.plugin import torch_dtype

        return {
            name: torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")
            for name, info in self.checkpoint.tensors.items()
        }


class _Config(NamedTuple):
    """What a configuration says, by the fields of :class:`SavedAdapter`."""

    fields: dict[str, Any]
    layer_plugins: Mapping[str, str]
    untied: bool
    merged_first: tuple[str, ...]


def locate(path: str, revision: str | None, spec: LoadSpec) -> Path:
    """Return the folder of a saved adapter, or the snapshot of its hub repository.

    Fetched are its configuration and its weights, for a plan too: an adapter is small.

    :param spec: says which cache is used, and whether the hub is asked.
    :raises CheckpointError: there is no such folder and no such repository.
    """
    folder = local_path(path, "lora.adapter")
    if folder.exists() and not folder.is_dir():
        raise _refusal(
            f"{path!r} is a file, and a saved adapter is a folder",
            f"Give the folder that holds {CONFIG}.",
        )
    if not folder.is_dir() and (path.count("/") > 1 or path.startswith((".", "~", "/"))):
        raise _refusal(
            f"the adapter folder {path!r} does not exist",
            "Give a folder written by save_pretrained of a PeftModel.",
        )
    place = {"model": path, "revision": revision, "subfolder": None}
    try:
        return locate_files(spec.model_copy(update=place), weights=False, files=(CONFIG, WEIGHTS))
    except CheckpointError as error:
        keys = {"model": "lora.adapter", "revision": "lora.adapter_revision"}
        raise CheckpointError(
            problem.model_copy(update={"where": keys.get(problem.where, problem.where)})
            for problem in error.problems
        ) from None


def open_adapter(
    folder: Path, key_map: Mapping[str, str] = MappingProxyType({}), key_rules: Sequence[str] = ()
) -> SavedAdapter:
    """Describe the adapter in ``folder``, reading its configuration and headers.

    :param key_map: the section's, applied to the adapter's keys first.
    :param key_rules: the spec's; those that undo wrappers hold for the adapter's keys too.
    :raises CheckpointError: a file is missing, damaged, no LoRA, or made by a PEFT
        that knows more than this one.
    """
    path = str(folder)
    files = UntrustedFolder(folder)
    config = _read_config(files)
    if not files.holds(WEIGHTS):
        if files.holds(_PICKLE):
            raise _refusal(
                f"the adapter's weights in {path!r} are a pickle, which can run code when opened",
                f"Load it elsewhere with PEFT and save it again, which writes {WEIGHTS}.",
            )
        raise _refusal(
            f"the adapter folder {path!r} holds no {WEIGHTS}",
            "Give a folder written by save_pretrained of a PeftModel.",
        )
    files.path(WEIGHTS)  # which no link may lead out of the folder
    checkpoint = Checkpoint.open(folder / WEIGHTS)
    renaming = Renaming(checkpoint.tensors, where="lora.key_map", of="the adapter")
    for pattern, replacement in key_map.items():
        renaming.by_regex(pattern, replacement)
    renaming.refuse_collisions()
    names = {key: unwrapped(name, key_rules) for key, name in renaming.names.items()}
    if len(set(names.values())) < len(names):
        raise _refusal(
            f"two keys of the adapter in {path!r} have one name after {list(key_rules)}",
            "Remove the rule, or save the adapter again.",
        )
    checkpoint = checkpoint.renamed(names)
    hold_adapter(files, config.fields, checkpoint)
    return SavedAdapter(folder=folder, checkpoint=checkpoint, files=files, **config._asdict())


def _read_config(files: UntrustedFolder) -> _Config:
    if not files.holds(CONFIG):
        raise _refusal(
            f"the adapter folder {str(files.root)!r} holds no {CONFIG}",
            "Give a folder written by save_pretrained of a PeftModel.",
        )
    file = files.root / CONFIG
    try:
        content = files.config(CONFIG, CONFIG)
    except CheckpointError as error:
        raise CheckpointError(
            # What is wrong with the file itself has its path there.
            problem.model_copy(update={"where": f"lora.adapter.{problem.where}".rstrip(".")})
            if problem.file
            else problem
            for problem in error.problems
        ) from None
    kind = content.get("peft_type")
    if kind != "LORA":
        raise _refusal(
            f"the adapter is of PEFT's type {kind!r}, and the section `lora` resumes 'LORA'",
            "Give the folder of a LoRA adapter.",
            file,
        )
    layer_plugins = _layer_plugins(content.pop(LAYER_PLUGINS, {}), file)
    before = content.pop(MERGED_FIRST, [])
    if not isinstance(before, list) or not all(isinstance(name, str) for name in before):
        raise _refusal(
            f"{MERGED_FIRST!r} is not a list of folders", "Save the adapter again.", file
        )
    tied_weights = content.pop(TIED_WEIGHTS, None)
    if tied_weights not in (None, "untie"):
        raise _refusal(
            f"{TIED_WEIGHTS!r} is {tied_weights!r}, and can be 'untie' or null",
            "Save the adapter again.",
            file,
        )
    ours = LoraSection.model_fields.keys() - OWN_FIELDS
    known = {name: value for name, value in content.items() if name in ours}
    # PEFT writes every field it has: an unknown one that is not set changes nothing.
    unknown = [name for name in content.keys() - known.keys() - LEFT_TO_PEFT if content[name]]
    if unknown:
        version = content.get("peft_version")
        raise CheckpointError(
            Problem(
                where=name,
                file=str(file),
                message=f"the adapter was saved with a setting that is not known here,"
                f" {content[name]!r}",
                fix="It was written by"
                f" {f'peft {version}' if version else 'another peft'}; use an llmload that knows"
                " it.",
            )
            for name in sorted(unknown)
        )
    try:
        section = LoraSection.model_validate_json(json.dumps(known), strict=True)
    except ValidationError as error:
        problems = explain(error, LoraSection, known, spellings=SPELLINGS)
        raise CheckpointError(p.model_copy(update={"file": str(file)}) for p in problems) from None
    fields = {name: v for name, v in section.given().items() if name not in _NOT_INHERITED}
    return _Config(fields, layer_plugins, tied_weights == "untie", tuple(before))


def _layer_plugins(value: Any, file: Path) -> dict[str, str]:
    found = dict.fromkeys(value, "") if isinstance(value, list) and _texts(value) else value
    if (
        not isinstance(found, dict)
        or not _texts(found.values())
        or not all(re.fullmatch(r"\w[\w.-]{0,99}", name) for name in found)
    ):
        raise _refusal(
            f"{LAYER_PLUGINS!r} does not map names of plugins to their distributions",
            "Save the adapter again.",
            file,
        )
    return found


def _texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _refusal(message: str, fix: str, file: Path | None = None) -> CheckpointError:
    return CheckpointError(
        Problem(where="lora.adapter", file=str(file) if file else "", message=message, fix=fix)
    )

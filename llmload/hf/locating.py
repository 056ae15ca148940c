"""Where the model is: a folder or the snapshot of a hub repository; and that its config is safe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmload.checkpoint import mistaken
from llmload.checkpoint.folder import member
from llmload.checkpoint.strict_json import short
from llmload.checkpoint.untrusted import UntrustedFolder, local_path
from llmload.errors import CheckpointError, Problem
from llmload.hf import hub
from llmload.spec import other_files

if TYPE_CHECKING:
    from llmload.checkpoint.contents import FileElsewhere
    from llmload.spec.loadspec import LoadSpec

CONFIG = "config.json"

GENERATION_CONFIG = "generation_config.json"
_OTHER_CONFIGS = (
    GENERATION_CONFIG,
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Configs beside the model's that transformers may read along with it."""

_TOKENIZER_CONFIG = "tokenizer_config.json"

WEIGHTS_KEY = "transformers_weights"
"""The config key that names the file of weights."""


def resolve(spec: LoadSpec, *, weights: bool) -> Path:
    """Return the local folder of ``spec.model``, fetching a hub repository's files if need be.

    :param weights: fetch the weight files too. Without, only config, tokenizer and index come.
    :raises CheckpointError: as :func:`locate`, or the folder holds no ``config.json``.
    """
    folder = locate(spec, weights=weights)
    if spec.subfolder:
        folder = local_path(os.path.join(folder, spec.subfolder), "subfolder")
    if not os.path.lexists(folder / CONFIG):
        what, fix = mistaken.without_config(folder)
        message = f"the folder {str(folder)!r} holds no {CONFIG}"
        raise CheckpointError(
            Problem(where="model", message=f"{message}, {what}" if what else message, fix=fix)
        )
    return folder


def locate(spec: LoadSpec, *, weights: bool, files: Sequence[str] | None = None) -> Path:
    """Return the folder that ``spec.model`` names, whatever it holds, or the hub's snapshot.

    :param weights: fetch the weight files too.
    :param files: of the hub fetch these alone, in place of configs and tokenizer.
    :raises CheckpointError: the folder does not exist; the hub does not have the repository or
        cannot be reached.
    """
    folder = local_path(spec.model, "model")
    if folder.is_dir():
        if spec.revision is not None:
            raise CheckpointError(
                Problem(
                    where="revision",
                    message=f"revision {spec.revision!r} was asked for, but {spec.model!r} is a"
                    " local folder, which has none",
                    fix="Remove `revision`, or give the id of a hub repository.",
                )
            )
        return folder
    if folder.exists():
        raise CheckpointError(
            Problem(
                where="model",
                message=f"{str(folder)!r} is a file, and a model is a folder",
                fix="Give the folder that holds config.json; name a file of weights in"
                " `weights_from`.",
            )
        )
    if _is_hub_id(str(spec.model)):
        return hub.snapshot(spec, weights=weights, files=files)
    raise CheckpointError(
        Problem(
            where="model",
            message=f"the folder {short(str(spec.model), 1000)} does not exist",
            fix=other_files.meant(str(spec.model), folder=True)
            or "Give a folder written by save_pretrained, or a hub id such as `org/name`.",
        )
    )


def elsewhere(spec: LoadSpec, folder: Path) -> dict[str, FileElsewhere]:
    """Return the files of the model's weights that a load would have to fetch, by name.

    :param folder: that :func:`resolve` returned.
    """
    if spec.weights_from is not None or local_path(spec.model, "model").is_dir():
        return {}
    return hub.unfetched(spec, folder)


def _is_hub_id(model: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    # One word may be an id too, as `gpt2` is; hub and cache are asked, as transformers does.
    if model.count("/") > 1 or model.startswith((".", "~", "/")):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def read_config(files: UntrustedFolder, spec: LoadSpec) -> dict[str, Any]:
    """Read ``config.json``, and refuse what could make a library fetch or run code.

    The configs beside it that transformers reads with the model are held to the same. Where the
    spec trusts code, what lies in other repositories comes into the cache. A library
    that is given the folder reads them again: see :meth:`UntrustedFolder.check`.

    :raises CheckpointError: a file is not a plain one of the folder, too large, not JSON, not an
        object, or has a key that leads to code or to another file.
    """
    trusted = spec.trust_remote_code
    others = [
        files.config(name, "the file", trusted=trusted)
        for name in _OTHER_CONFIGS
        if files.holds(name)
    ]
    content = files.config(CONFIG, "the config", trusted=trusted)
    if trusted:
        if files.holds(_TOKENIZER_CONFIG):
            others.append(files.tokenizer_config(_TOKENIZER_CONFIG, trusted=True))
        for repository in sorted({name for one in (content, *others) for name in _code_of(one)}):
            hub.fetch_code(repository, spec)
    return content


def _code_of(content: dict[str, Any]) -> Iterator[str]:
    """Yield the other repositories that an ``auto_map`` names: ``org/x--module.Class``."""
    auto_map = content.get("auto_map") or {}
    named = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for classes in named:
        for text in classes if isinstance(classes, list) else [classes]:
            if isinstance(text, str) and "--" in text:
                yield text.partition("--")[0]


def weights_place(files: UntrustedFolder, content: dict[str, Any], spec: LoadSpec) -> Path:
    """Return the folder or file that the weights are to be read from.

    :param content: of ``config.json``, which may name the file itself, as transformers allows.
    :raises CheckpointError: it names something that is not a file of weights in the folder.
    """
    if spec.weights_from is not None:
        return local_path(spec.weights_from, "weights_from")
    name = content.get(WEIGHTS_KEY)
    if name is None:
        return files.root
    if not isinstance(name, str):
        raise files.refusal(
            CONFIG, f"{WEIGHTS_KEY!r} is {short(name)}, not the name of a file", "Remove the key."
        )
    is_index = name.endswith(".index.json")
    suffix = Path(name.removesuffix(".index.json")).suffix
    # Held to the rules for what an index names; what is no safetensors there is a pickle.
    member(files.root, name, ".json" if is_index else suffix or ".safetensors")
    return files.root / name

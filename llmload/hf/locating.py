"""Where the model is: a folder or the snapshot of a hub repository; and that its config is safe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmload.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmload.spec.loadspec import LoadSpec

CONFIG = "config.json"
_METADATA_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*"]
_SAFE_WEIGHTS = ["*.safetensors"]
_PICKLED_WEIGHTS = ["*.bin"]

# Keys by which a config.json has made transformers fetch or run code although remote code was not
# trusted: CVE-2026-4372 (transformers 4.56 to 5.2), CVE-2026-5241 (5.2.0).
_CODE_KEYS = frozenset(
    {"_attn_implementation_internal", "_experts_implementation_internal", "trust_remote_code"}
)
_KERNEL_KEYS = frozenset({"attn_implementation", "_attn_implementation", "experts_implementation"})


def resolve(spec: LoadSpec, *, weights: bool) -> Path:
    """Return the local folder of ``spec.model``, fetching a hub repository's files if need be.

    :param weights: fetch the weight files too. Without, only config, tokenizer and index come.
    :raises CheckpointError: as :func:`locate`, or the folder holds no ``config.json``.
    """
    folder = locate(spec, weights=weights)
    if spec.subfolder:
        folder = folder / spec.subfolder
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            Problem(
                where="model",
                message=f"the folder {str(folder)!r} holds no {CONFIG}",
                fix="Give a folder written by save_pretrained.",
            )
        )
    return folder


def locate(spec: LoadSpec, *, weights: bool) -> Path:
    """Return the folder that ``spec.model`` names, whatever it holds, or the hub's snapshot.

    :raises CheckpointError: the folder does not exist; the hub does not have the repository or
        cannot be reached.
    """
    folder = Path(spec.model).expanduser()
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
    if _is_hub_id(str(spec.model)):
        return _snapshot(spec, weights=weights)
    raise CheckpointError(
        Problem(
            where="model",
            message=f"the folder {str(spec.model)!r} does not exist",
            fix="Give a folder written by save_pretrained, or a hub id such as `org/name`.",
        )
    )


def _is_hub_id(model: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    # An id of one word is allowed by the hub, but here it is far more often a mistyped folder.
    if model.count("/") != 1 or model.startswith((".", "~", "/")):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _snapshot(spec: LoadSpec, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = list(_METADATA_FILES)
    if weights:
        patterns += _SAFE_WEIGHTS + (_PICKLED_WEIGHTS if spec.allow_pickle else [])
    try:
        return Path(
            snapshot_download(
                str(spec.model),
                revision=spec.revision,
                cache_dir=cache_dir(spec),
                local_files_only=spec.local_files_only,
                allow_patterns=patterns,
            )
        )
    except GatedRepoError:
        fix = "Ask for access on the model's page, then log in with `hf auth login`."
        message = f"the hub repository {spec.model!r} is gated"
    except RevisionNotFoundError:
        fix = "Give a branch, tag or commit of the repository."
        message = f"the hub repository {spec.model!r} has no revision {spec.revision!r}"
    except RepositoryNotFoundError:
        fix = "Check the id, or log in with `hf auth login` if it is private."
        message = f"neither a folder nor a hub repository is called {spec.model!r}"
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        fix = "Give a local folder, or fetch it beforehand with `hf download`."
        message = (
            f"{spec.model!r} is not a folder, and the hub repository of that name is neither in"
            f" the cache nor could it be fetched ({type(error).__name__})"
        )
    raise CheckpointError(Problem(where="model", message=message, fix=fix))


def cache_dir(spec: LoadSpec) -> Path | None:
    """Return the hub cache: the first candidate that exists, else the last, else the default."""
    candidates = [Path(candidate).expanduser() for candidate in spec.cache_candidates]
    existing = [candidate for candidate in candidates if candidate.is_dir()]
    if existing:
        return existing[0]
    return candidates[-1] if candidates else None


def read_config(folder: Path, spec: LoadSpec) -> dict[str, Any]:
    """Read ``config.json``, and refuse what could make a library fetch or run code.

    :raises CheckpointError: not JSON, not an object, or a key that leads to code.
    """
    file = folder / CONFIG
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            Problem(
                file=str(file),
                message=f"the config is not valid JSON: {error}",
                fix="Save or download the folder again.",
            )
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            Problem(
                file=str(file),
                message=f"the config is a JSON {type(content).__name__}, not an object",
                fix="Save or download the folder again.",
            )
        )
    if not spec.trust_remote_code:
        problems = [
            Problem(
                file=str(file),
                where=path,
                message=f"the config sets {path!r} to {value!r}, by which a model folder can make"
                " code run that nobody here chose",
                fix="Remove the key from the config, or set `trust_remote_code: true` if you trust"
                " whoever made the folder.",
            )
            for path, value in _code_paths(content)
        ]
        if problems:
            raise CheckpointError(problems)
    return content


def _code_paths(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of the keys that lead to code, at any depth."""
    children = node if isinstance(node, dict) else {}
    if isinstance(node, list):
        children = {str(position): child for position, child in enumerate(node)}
    for key, value in children.items():
        here = f"{path}.{key}" if path else key
        names_repository = key in _KERNEL_KEYS and isinstance(value, str) and "/" in value
        if (key in _CODE_KEYS and value) or names_repository:
            yield here, value
        else:
            yield from _code_paths(value, here)

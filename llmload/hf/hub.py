"""The snapshot of a hub repository: what a load needs of it, from the cache or fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmload.checkpoint.contents import FileElsewhere
from llmload.checkpoint.folder import INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE
from llmload.checkpoint.untrusted import local_path
from llmload.errors import CheckpointError, in_one_line
from llmload.spec import other_files
from llmload.spec.suggest import nearest

if TYPE_CHECKING:
    from llmload.spec.loadspec import LoadSpec

_METADATA: Final = (
    "*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.codes", "tokenizer*", "vocab*",
    "merges*", "dict*.txt",
)  # fmt: skip
_CODE: Final = "*.py"
_SHOWN: Final = 5


def snapshot(spec: LoadSpec, *, weights: bool, files: Sequence[str] | None = None) -> Path:
    """Return the folder of a hub repository's snapshot, with what the load needs.

    Fetched are configs and tokenizer, the code where it is trusted, and of the weights just the
    files that will be read: those that the index names, or the single one; pickles only where they
    are allowed and there is nothing else. Where the hub cannot be reached, what is in the cache
    has to do: what is missing there is found when it is looked for.

    :param weights: fetch the weights too.
    :param files: fetch these, as far as they are there, in place of configs, tokenizer and code.
    :raises CheckpointError: the hub does not have it, or neither hub nor cache can give it.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        small = [*_METADATA, *([_CODE] if spec.trust_remote_code else [])]
        folder = _fetch(spec, small if files is None else files, below=False)
        for names in weights_of(folder / (spec.subfolder or ""), spec) if weights else ():
            folder = _fetch(spec, names, below=True)
        return folder
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
        found = _cached(spec)
        if found is not None:
            return found
        message, fix = _unreachable(spec, type(error).__name__)
    raise CheckpointError(message, fix=fix, where="model")


def unfetched(spec: LoadSpec, folder: Path) -> dict[str, FileElsewhere]:
    """Return the files of weights that a load would fetch, by their names in the model's folder.

    Empty where all of them are in the cache, and where the hub is not asked or does not answer.

    :param folder: of the model, in the snapshot that :func:`snapshot` returned.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    if spec.local_files_only or constants.HF_HUB_OFFLINE:
        return {}
    repository, base = str(spec.model), f"{spec.subfolder}/" if spec.subfolder else ""
    commit = Path(str(folder).removesuffix(base.rstrip("/"))).name
    for names in weights_of(folder, spec):
        missing = [base + name for name in names if not (folder / name).exists()]
        try:
            found = HfApi().get_paths_info(repository, missing, revision=commit) if missing else []
        except failures():
            return {}
        if found or not missing:
            return {
                file.path.removeprefix(base): FileElsewhere(
                    file.size, partial(_range, hf_hub_url(repository, file.path, revision=commit))
                )
                for file in found
                if isinstance(file, RepoFile)
            }
    return {}


def _range(url: str, start: int, length: int) -> bytes:
    """Fetch some bytes of a file on the hub.

    :raises CheckpointError: it cannot be fetched.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # which lists no names
        build_hf_headers,
        hf_raise_for_status,
        http_backoff,
    )

    headers = {**build_hf_headers(), "range": f"bytes={start}-{start + length - 1}"}
    try:
        answer = http_backoff("GET", url, headers=headers)
        hf_raise_for_status(answer)
    except failures() as error:
        message = f"the header of {url} cannot be fetched: {in_one_line(error)}"
        fix = "Try again, or fetch the weights with `hf download`."
        raise CheckpointError(message, fix=fix, where="model") from error
    return bytes(answer.content[:length])


def failures() -> tuple[type[Exception], ...]:
    """Return what a request raises that the hub does not answer, or answers with an error."""
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library's own error is above it, and not below OSError in every version.
    return HfHubHTTPError, HfHubHTTPError.__bases__[0], OSError


def fetch_code(repository: str, spec: LoadSpec) -> None:
    """Fetch the code of another repository, which a trusted config names, into the cache.

    What cannot be fetched may be there; what is missing is found when it is imported.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with suppress(HfHubHTTPError, HFValidationError, OSError):
        snapshot_download(
            repository,
            cache_dir=cache_dir(spec),
            local_files_only=spec.local_files_only,
            allow_patterns=[_CODE],
        )


def _fetch(spec: LoadSpec, names: Sequence[str], *, below: bool) -> Path:
    """Fetch files of the model's own folder.

    :param below: also of folders in it, which patterns would match too (``original/``, ``onnx/``).
    """
    from huggingface_hub import snapshot_download

    base = f"{spec.subfolder}/" if spec.subfolder else ""
    return Path(
        snapshot_download(
            str(spec.model),
            revision=spec.revision,
            cache_dir=cache_dir(spec),
            local_files_only=spec.local_files_only,
            allow_patterns=[f"{base}{name}" for name in names],
            ignore_patterns=None if below else [f"{base}*/*"],
        )
    )


def weights_of(folder: Path, spec: LoadSpec) -> Iterator[list[str]]:
    """Yield the files of weights that a load reads, by kind, until there are some."""
    kinds = [(SINGLE, INDEX)] + ([(PICKLE_SINGLE, PICKLE_INDEX)] if spec.allow_pickle else [])
    for single, index in kinds:
        yield _shards(folder / index) or [single]
        if (folder / single).exists() or (folder / index).exists():
            return


def _shards(index: Path) -> list[str]:
    """Return the files that an index names; it is held to the rules when it is read for the load.

    A name that leads elsewhere is none of the repository, and fetches nothing.
    """
    try:
        content = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    found: Any = mapping.values() if isinstance(mapping, dict) else ()
    return sorted({name for name in found if isinstance(name, str) and "*" not in name})


def _cached(spec: LoadSpec) -> Path | None:
    """Return the snapshot in the cache, whatever of the repository it lacks."""
    from huggingface_hub import try_to_load_from_cache

    base = f"{spec.subfolder}/" if spec.subfolder else ""
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        found = try_to_load_from_cache(
            str(spec.model), base + name, cache_dir=cache_dir(spec), revision=spec.revision
        )
        if isinstance(found, str):
            return Path(found.removesuffix(base + name))
    return None


def _unreachable(spec: LoadSpec, error: str) -> tuple[str, str]:
    """Return what to say where neither the cache nor the hub has what is asked for."""
    from huggingface_hub import constants

    if spec.local_files_only:
        error = "`local_files_only` is set"
    elif constants.HF_HUB_OFFLINE:
        error = "HF_HUB_OFFLINE is set"
    cache = cache_dir(spec) or Path(constants.HF_HUB_CACHE)
    place = cache / f"models--{str(spec.model).replace('/', '--')}"
    known = sorted(path.name for path in place.glob("refs/*"))
    known += sorted(path.name for path in place.glob("snapshots/*"))
    if known:
        asked = spec.revision or "main"
        shown = ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
        return (
            f"the cache {str(cache)!r} holds {spec.model!r} at {shown}, not at the revision"
            f" {asked!r}, which could not be fetched ({error})",
            f"Write `revision` with one of those, or fetch it with `hf download {spec.model}"
            f" --revision {asked}`.",
        )
    return (
        f"{spec.model!r} is not a folder, and the hub repository of that name is neither in the"
        f" cache nor could it be fetched ({error})",
        _meant(spec) or "Give a local folder, or fetch it beforehand with `hf download`.",
    )


def _meant(spec: LoadSpec) -> str:
    """Return ``Did you mean ...?`` for a folder beside the one that is asked for, or a repository
    in the cache; empty where none is called alike."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = (cache_dir(spec) or Path(HF_HUB_CACHE)).glob("models--*")
    ids = (path.name.removeprefix("models--").replace("--", "/") for path in cached)
    return nearest(str(spec.model), ids) or other_files.meant(str(spec.model), folder=True)


def cache_dir(spec: LoadSpec) -> Path | None:
    """Return the hub cache: the first candidate that exists, else the last, else the default.

    For what transformers looks for there by itself: trusted code of another repository.
    """
    candidates = [local_path(candidate, "cache_dir") for candidate in spec.cache_candidates]
    existing = [candidate for candidate in candidates if candidate.is_dir()]
    if existing:
        return existing[0]
    return candidates[-1] if candidates else None

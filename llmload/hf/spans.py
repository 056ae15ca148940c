"""Weights of a hub repository of which only the bytes that are read come here, by range requests.

They are kept beside the hub's cache, in a folder of our own: huggingface_hub never takes them for a
file that was downloaded. What is in the cache whole is read from there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmload.checkpoint.contents import Checkpoint, CheckpointFile, FileElsewhere
from llmload.checkpoint.sparse import SparseFile
from llmload.checkpoint.untrusted import local_path
from llmload.errors import CheckpointError, in_one_line
from llmload.hf import hub

if TYPE_CHECKING:
    from llmload.spec.loadspec import LoadSpec

FOLDER: Final = "llmload-spans"
_WHERE: Final = "streaming.fetch"
_WHOLE: Final = "Leave out `fetch: spans`, which downloads whole files."


class _Listed(BaseModel):
    """What the hub says of a file; kept for a load without a network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=0)
    oid: str = Field(pattern=r"^[0-9a-f]{40,64}$")
    """Tells its content from any other; a file name of ours."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")


def checkpoint_by_ranges(spec: LoadSpec, folder: Path, place: Path) -> Checkpoint | None:
    """Describe the weights of a hub repository, each byte of which is fetched when it is read.

    All processes of a machine share what they fetched, and later loads too.

    :param folder: of the model, in the snapshot with config and index.
    :param place: of the weights, as the spec or the config says.
    :return: None where nothing is to be fetched: a local folder, weights of another place, or
        files that are all in the hub's cache; and where neither the hub nor an earlier load says
        what there is.
    :raises CheckpointError: the hub gives no ranges, the weights are pickles, or damaged.
    """
    if place != folder or spec.weights_from is not None or local_path(spec.model, "model").is_dir():
        return None
    repository = _Repository(spec, folder)
    listed = repository.listed()
    if not listed:
        return None
    pickles = [name for name in listed if not name.endswith(".safetensors")]
    if pickles:
        raise CheckpointError(
            f"the weights of {spec.model!r} are pickles, such as {pickles[0]!r}: what in them is"
            " where is known only once they are here whole",
            fix=_WHOLE,
            where=_WHERE,
        )
    elsewhere = {name: repository.file(name, listed[name]) for name in listed}
    return Checkpoint.open(place, elsewhere=elsewhere)


class _Repository:
    """One commit of a repository, and what of it is kept here."""

    def __init__(self, spec: LoadSpec, folder: Path) -> None:
        from huggingface_hub import constants

        self._spec = spec
        self._id = str(spec.model)
        self._folder = folder
        self._base = f"{spec.subfolder}/" if spec.subfolder else ""
        self._commit = Path(str(folder).removesuffix(self._base.rstrip("/"))).name
        self._is_offline = spec.local_files_only or constants.HF_HUB_OFFLINE
        cache = hub.cache_dir(spec) or Path(constants.HF_HUB_CACHE)
        self._place = cache / FOLDER / f"models--{self._id.replace('/', '--')}"

    def listed(self) -> dict[str, _Listed]:
        """Return the files of weights that are not in the hub's cache, by name in the folder."""
        for names in hub.weights_of(self._folder, self._spec):
            missing = [name for name in names if not (self._folder / name).exists()]
            if not missing:
                return {}
            found = self._asked(missing) if not self._is_offline else None
            if found:
                self._hold_to_ranges(next(iter(found)))
                self._remember(found)
            elif found is None:
                known = self._remembered()
                found = {name: known[name] for name in missing if name in known}
            if found:
                return found
        return {}

    def file(self, name: str, listed: _Listed) -> FileElsewhere:
        """Return how one of them is read."""
        url = self._url(name)
        source = _Offline(url) if self._is_offline else _Source(url, listed)
        sparse = SparseFile(self._place / listed.oid, listed.size, source.get, listed.sha256)
        file = CheckpointFile.fetched(
            url,
            listed.size,
            sparse.fetch,
            name=name,
            version=listed.oid,
            prefetch=sparse.prefetch,
        )

        def read(start: int, length: int) -> bytes:
            data = bytearray(max(0, min(length, listed.size - start)))
            sparse.fetch([(start, memoryview(data))])
            return bytes(data)

        return FileElsewhere(listed.size, read, file)

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self._id, self._base + name, revision=self._commit)

    def _asked(self, names: list[str]) -> dict[str, _Listed] | None:
        """Ask the hub what it has; None where it does not answer."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        paths = [self._base + name for name in names]
        try:
            found = HfApi().get_paths_info(self._id, paths, revision=self._commit)
        except hub.failures():
            return None
        return {
            file.path.removeprefix(self._base): _listed(file)
            for file in found
            if isinstance(file, RepoFile)
        }

    def _hold_to_ranges(self, name: str) -> None:
        """Refuse a server that sends whole files only, before it sends one."""
        url = self._url(name)
        try:
            answer = _request("HEAD", url, 0, 1)
        except hub.failures():
            return  # a store that the hub leads to may allow GET alone, whose answer is looked at
        if answer.status_code != 206 and answer.headers.get("accept-ranges", "") != "bytes":
            raise _no_ranges(url)

    # --- what the hub said, kept ----------------------------------------------------------------

    @property
    def _list(self) -> Path:
        return self._place / f"{self._commit}.json"

    def _remember(self, found: Mapping[str, _Listed]) -> None:
        """Keep what the hub said; where that cannot be written, the weights cannot either."""
        known = {**self._remembered(), **found}
        content = {self._base + name: listed.model_dump() for name, listed in known.items()}
        new = self._list.with_name(f".{self._commit}-{os.getpid()}.json")
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(content))
            new.replace(self._list)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise CheckpointError(
                f"what is fetched cannot be kept in {str(self._place)!r}: {error.strerror}",
                fix="Make room there, or name another place by `cache_dir`.",
                where=_WHERE,
            ) from error

    def _remembered(self) -> dict[str, _Listed]:
        try:
            content = json.loads(self._list.read_bytes())
            return {
                name.removeprefix(self._base): _Listed.model_validate(listed)
                for name, listed in content.items()
                if name.startswith(self._base)
            }
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}


class _Source:
    """A file on the hub, of which bytes are asked for."""

    def __init__(self, url: str, listed: _Listed) -> None:
        self._url = url
        self._listed = listed

    def get(self, start: int, length: int) -> bytes:
        """Fetch some bytes.

        :raises CheckpointError: the hub does not send them, or sends another file.
        """
        try:
            answer = _request("GET", self._url, start, length)
        except hub.failures() as error:
            raise _unfetched(self._url, error) from error
        if answer.status_code != 206:
            raise _no_ranges(self._url)
        expected = f"bytes {start}-{start + length - 1}/{self._listed.size}"
        given = answer.headers.get("content-range", "")
        etag = _etag(answer)
        data = bytes(answer.content)
        if given != expected or (etag and etag != self._listed.oid):
            raise CheckpointError(
                f"{self._url} is not the file any more that the hub listed: it gave"
                f" {given or 'no range'!r} with the tag {etag!r}, where {expected!r} of"
                f" {self._listed.oid!r} was expected",
                fix="Load again when nobody writes to the repository.",
                where=_WHERE,
            )
        if len(data) != length:
            raise _unfetched(self._url, f"it sent {len(data)} bytes of {length}")
        return data


class _Offline:
    """The same, where the hub is not to be asked."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, start: int, length: int) -> bytes:
        """Fetch nothing.

        :raises CheckpointError: always.
        """
        raise CheckpointError(
            f"bytes {start} to {start + length} of {self._url} are not here, and the hub is not to"
            " be asked",
            fix="Load once with a network, with as many ranks as then; or fetch all of it with"
            " `hf download`.",
            where=_WHERE,
        )


def _listed(file: Any) -> _Listed:
    sha256 = file.lfs.sha256 if file.lfs is not None else None
    try:
        return _Listed(size=file.size, oid=sha256 or file.blob_id, sha256=sha256)
    except ValidationError as error:
        raise CheckpointError(
            f"the hub does not say what is in {file.path!r}: {in_one_line(error)}",
            fix=_WHOLE,
            where=_WHERE,
        ) from None


def _request(method: Any, url: str, start: int, length: int) -> Any:
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # which lists no names
        build_hf_headers,
        hf_raise_for_status,
        http_backoff,
    )

    headers = {**build_hf_headers(), "range": f"bytes={start}-{start + length - 1}"}
    # What is compressed on the way has other ranges.
    headers["accept-encoding"] = "identity"
    answer = http_backoff(method, url, headers=headers)
    hf_raise_for_status(answer)
    return answer


def _etag(answer: Any) -> str:
    """Return the tag by which the hub calls a file's content; empty where only a store spoke that
    it led to, which has tags of its own."""
    tags = [one.headers.get("x-linked-etag") for one in (*answer.history, answer)]
    tags += [] if answer.history else [answer.headers.get("etag")]
    tag = next((tag for tag in tags if tag), "")
    found = re.fullmatch(r'(?:W/)?"?([0-9a-f]{40,64})"?', tag)
    return found[1] if found else ""


def _unfetched(url: str, error: object) -> CheckpointError:
    said = in_one_line(error) if isinstance(error, Exception) else str(error)
    return CheckpointError(
        f"a part of {url} could not be fetched: {said.rstrip('.')}",
        fix="Load again when the hub can be reached; what is here by then stays.",
        where=_WHERE,
    )


def _no_ranges(url: str) -> CheckpointError:
    return CheckpointError(
        f"the server of {url} sends whole files only, and no ranges of bytes",
        fix=_WHOLE,
        where=_WHERE,
    )

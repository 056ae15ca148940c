"""A folder of safetensors in an object store, reached through fsspec."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from llmload.plugin import CheckpointError, CheckpointFile, Problem, in_one_line, some

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_MAX_INDEX_BYTES: Final = 25_000_000
_VERSIONS: Final = ("ETag", "etag", "md5Hash", "md5", "Content-MD5")
"""Where stores say what is in an object; a time does not."""


class Store:
    """One folder of a store.

    :param url: its address.
    :param options: of fsspec's file system.
    :raises CheckpointError: fsspec does not know such addresses, or lacks a library for them.
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        import fsspec  # type: ignore[import-untyped]

        try:
            self._files, path = fsspec.core.url_to_fs(url, **options)
        except Exception as error:  # each file system raises what it likes
            raise _refused(
                f"fsspec cannot open {url!r}: {in_one_line(error).rstrip('.')}",
                "Check the address and `options`, and install what fsspec needs for it.",
            ) from error
        self._path = path.rstrip("/")
        self._url = url.rstrip("/")

    def shards(self) -> list[CheckpointFile]:
        """Return the files of weights: those that the index names, else the single one.

        :raises CheckpointError: there are none, the index is damaged, or one of them is missing.
        """
        index = self._read_index()
        if index is None:
            return [self._file(SINGLE)]
        names = sorted(set(index.values()))
        wrong = [name for name in names if "/" in name or not name.endswith(".safetensors")]
        if wrong:
            raise _refused(
                f"{self._url}/{INDEX} names {some(wrong)}, which is no file of safetensors beside"
                " it",
                "Upload the folder again, as save_pretrained writes it.",
            )
        return [self._file(name) for name in names]

    def _read_index(self) -> dict[str, str] | None:
        info = self._info(INDEX)
        if info is None:
            return None
        try:
            if (info.get("size") or 0) > _MAX_INDEX_BYTES:
                raise ValueError(f"it has {info['size']:,} bytes")
            content = json.loads(self._files.cat_file(f"{self._path}/{INDEX}"))
            found = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(found, dict) or not found:
                raise ValueError("it has no weight_map")
            if not all(isinstance(name, str) for name in found.values()):
                raise ValueError("its weight_map names no files")
        except ValueError as error:
            raise _refused(
                f"{self._url}/{INDEX} cannot be read: {in_one_line(error).rstrip('.')}",
                "Upload the folder again, as save_pretrained writes it.",
            ) from error
        return found

    def _info(self, name: str) -> dict[str, Any] | None:
        """Return what the store says of an object; None where there is none."""
        try:
            found: dict[str, Any] = self._files.info(f"{self._path}/{name}")
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _refused(
                f"{self._url}/{name} cannot be looked at: {in_one_line(error).rstrip('.')}",
                "Check the address, and who may read there.",
            ) from error
        return found

    def _file(self, name: str) -> CheckpointFile:
        info = self._info(name)
        if info is None:
            raise _refused(
                f"there is no {self._url}/{name}",
                "Give the address of a folder that save_pretrained wrote, all of it uploaded.",
            )
        if not info.get("size"):
            raise _refused(
                f"the store does not say how large {self._url}/{name} is",
                "Serve it by a store that does, and that sends parts of an object.",
            )
        path = f"{self._path}/{name}"

        def fetch(spans: Iterable[tuple[int, memoryview]]) -> None:
            self._fetch(path, name, list(spans))

        return CheckpointFile.fetched(
            f"{self._url}/{name}", info["size"], fetch, version=version(info)
        )

    def _fetch(self, path: str, name: str, spans: list[tuple[int, memoryview]]) -> None:
        starts = [start for start, _ in spans]
        ends = [start + len(into) for start, into in spans]
        try:
            pieces = self._files.cat_ranges([path] * len(spans), starts, ends)
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
        except Exception as error:
            raise CheckpointError(
                Problem(
                    where="object_store.url",
                    message=f"{self._url}/{name} could not be fetched: "
                    + in_one_line(error).rstrip("."),
                    fix="Load again when the store can be reached.",
                )
            ) from error
        for (start, into), piece in zip(spans, pieces, strict=True):
            if len(piece) != len(into):
                raise CheckpointError(
                    Problem(
                        where="object_store.url",
                        message=f"{self._url}/{name} gave {len(piece)} bytes of the {len(into)}"
                        f" from {start} on",
                        fix="Load again from a store that sends parts of an object, when nothing"
                        " writes to it.",
                    )
                )
            into[:] = piece

    def changed(self, files: Iterable[CheckpointFile]) -> list[str]:
        """Return the names of files that are not what they were when they were described."""
        self._files.invalidate_cache()
        names = []
        for file in files:
            info = self._info(file.name) or {}
            if (info.get("size"), version(info)) != (file.size, file.version):
                names.append(file.name)
        return names


def version(info: dict[str, Any]) -> str:
    """Return what the store says that tells an object's content; empty where it says nothing."""
    return next((str(info[key]) for key in _VERSIONS if info.get(key)), "")


def _refused(message: str, fix: str) -> CheckpointError:
    return CheckpointError(Problem(where="object_store.url", message=message, fix=fix))

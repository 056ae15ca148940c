"""What a checkpoint holds, found out once from its index and headers and never changed after."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

from llmload.checkpoint.folder import (
    inside,
    main_file,
    member,
    read_index,
    refuse,
    regular_file,
    unlisted_shards,
)
from llmload.checkpoint.header import (
    DESCRIBED,
    TensorInfo,
    hold_to_rules,
    is_no_model,
    read_header,
    read_header_afar,
)
from llmload.checkpoint.page_cache import expect
from llmload.checkpoint.pickled import read_pickle, refuse_pickle, require_safe_torch
from llmload.errors import CheckpointError, Problem, some

_AT_ONCE = 8
"""Headers that are fetched at a time."""
_INCOMPLETE = "Download or save the whole folder again."


Fetch: TypeAlias = Callable[[Iterable[tuple[int, memoryview]]], None]
"""Fills each memory with a file's bytes from the place before it on, all of it or raises. Several
at a time, so that they can be asked for at once; any thread may call it."""

Prefetch: TypeAlias = Callable[[int, int], int]
"""Has a file's bytes, from the first number to before the second, lie on this machine before they
are asked for, and returns how many of them did not. Any thread may call it."""


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """One file of weights as it was when its header was checked."""

    path: Path
    """Links resolved. Of a file that is fetched a name that no other one has; nothing need lie
    there."""
    name: str
    """As the index calls it, or the file's own name."""
    size: int
    """Bytes, header included."""
    identity: tuple[int, int, int]
    """Device, inode and time of the last change of content, in ns."""
    metadata: Mapping[str, str]
    """Free text from the header, usually ``{"format": "pt"}``."""
    is_here: bool = True
    """Whether there is such a file; False where only its header was fetched."""
    fetch: Fetch | None = None
    """How its bytes come here; None for a file on a disk, which is mapped."""
    version: str = ""
    """What tells the content of one that is fetched from any other, such as a store's checksum."""
    prefetch: Prefetch | None = None
    """How bytes of one that is fetched are brought nearer, where what was fetched is kept."""

    @classmethod
    def on_disk(cls, path: Path, root: Path) -> CheckpointFile:
        """Look at a file of a layout of one's own, without reading it.

        :param root: the folder of the checkpoint, which no link may lead out of.
        :raises CheckpointError: it is missing, no plain file, or lies elsewhere.
        """
        real = inside(root, path)
        with regular_file(real) as (_, state):
            size, found = state.st_size, identity(state)
        return cls(real, os.path.relpath(path, root), size, found, MappingProxyType({}))

    @classmethod
    def fetched(
        cls,
        place: str,
        size: int,
        fetch: Fetch,
        *,
        name: str = "",
        version: str = "",
        prefetch: Prefetch | None = None,
    ) -> CheckpointFile:
        """Describe a file that lies on no disk of this machine.

        :param place: its address, for messages; no other file of the checkpoint has the same.
        :param size: bytes.
        :param fetch: gets bytes of it, and raises where it is not that file any more.
        :param name: for the report; by default the last part of the address.
        :param version: equal where the content is, such as a checksum that the store knows.
        :param prefetch: brings bytes nearer, to where ``fetch`` finds them; threads of a load call
            it in the order of the file, for what this process will ask for.
        """
        name = name or place.rpartition("/")[2]
        nothing = MappingProxyType[str, str]({})
        unknown = (0, 0, 0)
        return cls(
            Path(place),
            name,
            size,
            unknown,
            nothing,
            fetch=fetch,
            version=version,
            prefetch=prefetch,
        )

    def safetensors(self) -> tuple[TensorInfo, ...]:
        """Read what tensors lie in it, by its header, where it is a file of safetensors.

        :raises CheckpointError: it is none, or damaged.
        """
        if self.fetch is not None:
            return tuple(read_header(self._fetched, self.path, self.size)[0])
        with regular_file(self.path) as (descriptor, _):
            read = partial(_pread, descriptor)
            return tuple(read_header(read, self.path, self.size)[0])

    def _fetched(self, start: int, length: int) -> bytes:
        assert self.fetch is not None
        data = bytearray(max(0, min(length, self.size - start)))
        self.fetch([(start, memoryview(data))])
        return bytes(data)


@dataclass(frozen=True, slots=True)
class FileElsewhere:
    """A file of weights that is not in its folder, of which a plan needs the header only."""

    size: int
    """Bytes, header included."""
    read: Callable[[int, int], bytes]
    """Returns that many bytes from an offset on: ``read(start, length)``."""
    file: CheckpointFile | None = None
    """What a load reads in its stead, where it can: one that is fetched as it is read."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's weights: validated, immutable, nothing of their data read."""

    root: Path
    """The folder that holds the files, or that of the model where they are fetched."""
    format: Literal["safetensors", "pickle", "other"]
    """``other``: as a plugin described it, or fetched."""
    files: tuple[CheckpointFile, ...]
    tensors: Mapping[str, TensorInfo]
    """By name, file by file, each file in the order of its bytes."""
    as_stored: bool = True
    """Whether transformers finds the same in the files: these names, and all of them."""

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        allow_pickle: bool = False,
        elsewhere: Mapping[str, FileElsewhere] = MappingProxyType({}),
    ) -> Checkpoint:
        """Describe the checkpoint at ``path``: a folder, an index file or a file of weights.

        ``elsewhere`` has files of the folder that are not there, by name; of those just the headers
        are read, and of such a checkpoint no tensor can be but of those that are fetched.

        A pickle may be the archive of the DPO reference code (``step_idx``, ``state`` and
        ``metrics``), whose ``state`` is then read. Takes ``model.safetensors`` before
        ``model.safetensors.index.json`` before ``pytorch_model.bin``, as transformers does. Pickles
        are opened only where ``allow_pickle`` is set and torch is at least 2.10; nothing else
        imports torch.

        :raises CheckpointError: anything is missing, damaged, unsafe or contradictory; it lists
            every faulty shard with the bytes expected and found.
        """
        start = Path(path)
        if not start.exists() and start.name not in elsewhere:
            raise refuse(start, f"there is no checkpoint at {start}", "Check the path.")
        if start.is_dir():
            start = main_file(start, elsewhere)
            real = inside(start.parent, start)
        else:
            real = start.resolve()
            # The hub's cache keeps a file under its digest, and only the link to it has a name.
            start = real if real.suffix else start
        is_index = start.name.endswith(".index.json")
        suffix = Path(start.name.removesuffix(".index.json")).suffix
        is_pickle = suffix != ".safetensors"
        if is_pickle:
            if not allow_pickle:
                raise refuse_pickle(start)
            require_safe_torch(start)
        if not is_index:
            shards = {start.name: real}
            return cls._assemble(start.parent, is_pickle, shards, None, elsewhere)
        weight_map = read_index(real)
        names = sorted(set(weight_map.values()))
        shards = {name: member(start.parent, name, suffix) for name in names}
        left_out = unlisted_shards(start.parent, set(names))
        if left_out:
            raise refuse(
                start,
                f"the index does not list {', '.join(left_out)}, which lies beside its shards",
                _INCOMPLETE,
            )
        return cls._assemble(start.parent, is_pickle, shards, weight_map, elsewhere)

    @classmethod
    def _assemble(
        cls,
        root: Path,
        is_pickle: bool,
        shards: Mapping[str, Path],
        weight_map: Mapping[str, str] | None,
        elsewhere: Mapping[str, FileElsewhere],
    ) -> Checkpoint:
        files: list[CheckpointFile] = []
        tensors: dict[str, TensorInfo] = {}
        problems: list[Problem] = []
        promised: dict[str, set[str]] = defaultdict(set)
        for name, shard in (weight_map or {}).items():
            promised[shard].add(name)
        afar = {name: elsewhere[name] for name in shards if name in elsewhere}
        headers = _headers_of(afar, shards)
        for name, path in shards.items():
            try:
                if name in headers:
                    file, found = headers[name].result()
                else:
                    file, found = _describe(path, name, is_pickle)
            except CheckpointError as error:
                problems.extend(error.problems)
                continue
            files.append(file)
            if weight_map is not None:
                problems.extend(_disagreements(file, found, promised[file.name], weight_map))
            tensors.update((tensor.name, tensor) for tensor in found)
        if problems:
            raise CheckpointError(problems)
        _hold_to_be_a_model(root, tensors)
        is_found = all(file.fetch is None for file in files)
        known: Literal["safetensors", "pickle"] = "pickle" if is_pickle else "safetensors"
        return cls(
            root,
            known if is_found else "other",
            tuple(files),
            MappingProxyType(tensors),
            as_stored=is_found,
        )

    @classmethod
    def described(
        cls, root: Path, files: Iterable[CheckpointFile], tensors: Iterable[TensorInfo]
    ) -> Checkpoint:
        """Say what lies where in files of a layout that only the caller knows.

        Each tensor's bytes lie in one piece, row by row and little endian.

        :param root: the folder that holds the files, or that of the model where they are fetched.
        :param tensors: each of one of the files; ``dtype`` as safetensors spells it.
        :raises CheckpointError: a tensor cannot be what is said of it, or two have one name.
        """
        files = tuple(files)
        sizes = {file.path: file.size for file in files}
        found: dict[str, TensorInfo] = {}
        if len(sizes) < len(files):
            raise refuse(root, "two files of the checkpoint have one path", DESCRIBED)
        for info in tensors:
            if info.file not in sizes:
                raise refuse(
                    info.file, f"tensor {info.name!r} is in no file of the checkpoint", DESCRIBED
                )
            hold_to_rules(info, sizes[info.file])
            if info.name in found:
                raise refuse(info.file, f"two tensors are called {info.name!r}", DESCRIBED)
            found[info.name] = info
        _hold_to_be_a_model(root, found)
        return cls(root, "other", files, MappingProxyType(found), as_stored=False)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the same files with other names; a tensor that ``names`` lacks is left out.

        :param names: name here -> new name, all different.
        """
        tensors = {
            names[name]: replace(tensor, name=names[name])
            for name, tensor in self.tensors.items()
            if name in names
        }
        return replace(self, tensors=MappingProxyType(tensors), as_stored=False)

    @property
    def fetched(self) -> tuple[CheckpointFile, ...]:
        """The files that lie on no disk of this machine."""
        return tuple(file for file in self.files if file.fetch is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, file by file, each file in the order of its bytes."""
        return tuple(self.tensors)

    @property
    def to_fetch(self) -> dict[str, int]:
        """Files that are not here, by name, and their bytes."""
        return {file.name: file.size for file in self.files if not file.is_here}

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def reads_per_file(
        self, nbytes: Mapping[Path, int | None], reads: Mapping[Path, int]
    ) -> dict[str, dict[str, int | None]]:
        """Return for the report, by file: the bytes of its tensors, those read, in how many pieces.

        :param nbytes: bytes read by path; None where that is not known.
        :param reads: pieces read by path.
        """
        held = dict.fromkeys(nbytes, 0)
        for tensor in self.tensors.values():
            held[tensor.file] += tensor.nbytes
        return {
            file.name: {
                "tensor_bytes": held[file.path],
                "bytes_read": nbytes[file.path],
                "reads": reads[file.path],
            }
            for file in self.files
        }

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _describe(path: Path, name: str, is_pickle: bool) -> tuple[CheckpointFile, list[TensorInfo]]:
    with regular_file(path) as (descriptor, state):
        metadata: dict[str, str] = {}
        if is_pickle:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                tensors = read_pickle(path, file, state.st_size)
        else:
            read = partial(_pread, descriptor)
            tensors, metadata = read_header(read, path, state.st_size)
    file_info = CheckpointFile(
        path, name, state.st_size, identity(state), MappingProxyType(metadata)
    )
    return file_info, tensors


def _headers_of(
    afar: Mapping[str, FileElsewhere], paths: Mapping[str, Path]
) -> dict[str, Future[tuple[CheckpointFile, list[TensorInfo]]]]:
    """Read headers of files that are elsewhere, several at a time: each is some way off."""
    if not afar:
        return {}
    with ThreadPoolExecutor(_AT_ONCE, "llmload-headers") as pool:
        return {
            name: pool.submit(_describe_afar, paths[name], name, file)
            for name, file in afar.items()
        }


def _describe_afar(
    path: Path, name: str, file: FileElsewhere
) -> tuple[CheckpointFile, list[TensorInfo]]:
    """Describe a file of which only the header is fetched, by the rules for any other."""
    if file.file is not None:
        tensors, metadata = read_header(file.read, path, file.size)
        return replace(
            file.file, path=path, name=name, metadata=MappingProxyType(metadata)
        ), tensors
    tensors, metadata = read_header_afar(file.read, path, file.size)
    unknown = (0, 0, 0)
    found = CheckpointFile(
        path, name, file.size, unknown, MappingProxyType(metadata), is_here=False
    )
    return found, tensors


def _pread(descriptor: int, start: int, length: int) -> bytes:
    expect(descriptor, sequence=False)  # a header is wanted, not what lies behind it
    return os.pread(descriptor, length, start)


def _hold_to_be_a_model(root: Path, tensors: Mapping[str, TensorInfo]) -> None:
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    if is_no_model(len(tensors), nbytes):
        raise refuse(
            root,
            f"the checkpoint lists {len(tensors):,} tensors of {nbytes:,} bytes in all, which"
            " is no model",
            _INCOMPLETE,
        )


def identity(state: os.stat_result) -> tuple[int, int, int]:
    """What tells that an open file is still the one that was checked, besides its size."""
    return state.st_dev, state.st_ino, state.st_mtime_ns


def _disagreements(
    file: CheckpointFile,
    found: list[TensorInfo],
    promised: set[str],
    weight_map: Mapping[str, str],
) -> Iterator[Problem]:
    held = {tensor.name for tensor in found}
    elsewhere: dict[str, list[str]] = defaultdict(list)
    for name in sorted(held - promised):
        elsewhere[weight_map.get(name, "")].append(name)
    for shard, names in elsewhere.items():
        said = f"the index places in {shard}" if shard else "the index does not list"
        yield _fault(file, f"the shard holds {some(names)}, which {said}")
    if promised - held:
        missing = some(sorted(promised - held))
        yield _fault(file, f"the index places {missing} in this shard, which does not hold it")


def _fault(file: CheckpointFile, message: str) -> Problem:
    return Problem(message=message, fix=_INCOMPLETE, where=str(file.path))

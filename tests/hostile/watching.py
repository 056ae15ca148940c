"""What Python itself sees a load do: files opened and mapped, code imported, processes, sockets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_REACHING_OUT = (
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "subprocess.Popen",
)


@dataclass
class Seen:
    """What happened while it was watched."""

    root: Path
    """The folder whose files count."""
    opened: set[str] = field(default_factory=set)
    """Paths below the folder as they were opened, and the targets of links."""
    mapped: set[str] = field(default_factory=set)
    """Real paths below the folder that were mapped by Python."""
    reached_out: list[str] = field(default_factory=list)
    """Events that no load of untrusted files may cause, with what they were about."""
    imported: set[str] = field(default_factory=set)
    """Modules that an import was tried of."""

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Write down an event of the interpreter."""
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            self._file(self.opened, os.fspath(arguments[0]))
        elif event == "mmap.__new__" and arguments[0] >= 0:
            self._file(self.mapped, os.readlink(f"/proc/self/fd/{arguments[0]}"))
        elif event == "import":
            self.imported.add(str(arguments[0]))
        elif event in _REACHING_OUT:
            self.reached_out.append(f"{event} {arguments[:2]}")

    def _file(self, where: set[str], path: str) -> None:
        if Path(path).is_relative_to(self.root):
            where.add(os.path.realpath(path))

    def names(self) -> set[str]:
        """Return the names of the files that were opened, those outside the folder in full."""
        return {
            str(Path(path).relative_to(self.root)) if Path(path).is_relative_to(self.root) else path
            for path in self.opened
        }


_watched: list[Seen] = []
_installed: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched:
        seen = _watched.pop()  # what is noted must not be noted itself
        try:
            seen.note(event, arguments)
        finally:
            _watched.append(seen)


@contextmanager
def watching(root: Path) -> Iterator[Seen]:
    """Watch what the block does to the files of a folder, and to the world."""
    if not _installed:
        sys.addaudithook(_hook)  # which stays for good, and does nothing while nobody watches
        _installed.append(True)
    seen = Seen(Path(os.path.realpath(root)))
    _watched.append(seen)
    try:
        yield seen
    finally:
        _watched.clear()

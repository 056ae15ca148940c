"""On what kind of file system a file lies, whether others than this machine write to it, what tells
a file from what it becomes, and that it has reached the disk."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeAlias

FileState: TypeAlias = tuple[int, int, int, int, int]
"""Device, inode, size, and the times of the last change of content and of the inode, in ns."""

_MOUNTS = Path("/proc/self/mountinfo")
# Those that several machines mount at once, as Linux names them.
_SHARED = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "glusterfs",
        "gpfs",
        "lustre",
        "nfs",
        "nfs4",
        "orangefs",
        "smb3",
        "wekafs",
    }
)


def kind(path: Path, mounts: Path = _MOUNTS) -> str:
    """Return the type of the file system that ``path`` lies on, as Linux names it.

    Empty where the system does not say (``proc_pid_mountinfo(5)``).
    """
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    real, found, longest = os.path.realpath(path), "", -1
    for line in lines:
        before, _, after = line.partition(" - ")
        if not after:
            continue
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:  # of two mounts at one place the later one counts
            found, longest = after.split()[0], len(point)
    return found


def is_shared(kind: str) -> bool:
    """Say whether other machines may write to a file system of this kind."""
    return kind in _SHARED or kind.startswith("fuse.")


def settle(folder: Path) -> None:
    """Have all that lies in a folder reach the disk, before it gets its name."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_state(path: Path) -> FileState | None:
    """Return what tells a file from what it becomes; None where there is none."""
    try:
        return state_of(os.stat(path))
    except OSError:
        return None


def state_of(found: os.stat_result) -> FileState:
    """Return the same of a file that was looked at.

    The time of the inode's last change cannot be put back by whoever writes to it.
    """
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

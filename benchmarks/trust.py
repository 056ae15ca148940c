"""What it costs to trust nothing: the checks of every load, those that are asked for, and locks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .case import Case, Mark
from .loading import from_pretrained_as, llmload_as, weights_mib

TITLE = "Checks and locks"

_ALONE = "0.95-1.05x the time of the load alone"


def timed(folder: Path) -> Iterator[Mark]:
    """Load, and measure what of the time the checks of headers and small files take."""
    import llmload

    with _checks_timed() as spent:
        model = llmload.load({"model": str(folder), "dtype": "bfloat16"})
        yield "load", {"ms in checks": 1000 * sum(spent)}
    del model


@contextmanager
def _checks_timed() -> Iterator[list[float]]:
    """Collect the seconds of each call of a check, of those that no other one calls."""
    from llmload.checkpoint import contents
    from llmload.checkpoint.patching import replaced
    from llmload.checkpoint.untrusted import UntrustedFolder
    from llmload.hf import bounds

    spent: list[float] = []
    inside: list[str] = []

    def measured(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            if inside:
                return function(*args, **options)
            inside.append(function.__name__)
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent.append(time.perf_counter() - began)
                inside.pop()

        return run

    places: dict[Any, tuple[str, ...]] = {
        UntrustedFolder: ("config", "read", "vet", "check"),
        bounds: ("hold_counts", "hold_built"),
        contents: ("read_header",),
    }
    with ExitStack() as stack:
        for place, names in places.items():
            found = {name: measured(getattr(place, name)) for name in names}
            stack.enter_context(replaced(place, found))
        yield spent


def unproved(folder: Path) -> Any:
    """Load without the audit of the result."""
    import llmload

    return llmload.load({"model": str(folder), "dtype": "bfloat16"}, prove=False)


def finite(folder: Path) -> Any:
    """Load, and look at every value."""
    import llmload

    spec = {"model": str(folder), "dtype": "bfloat16", "verify": {"finite": True}}
    return llmload.load(spec)


def locked(folder: Path) -> Any:
    """Load, and hold every file to a lock, which the first run makes."""
    import llmload

    lock = folder.parent / f"{folder.name}.lock"
    if not lock.exists():
        write_lock(folder, lock)
    return llmload.load({"model": str(folder), "dtype": "bfloat16", "lock": str(lock)})


def write_lock(folder: Path, lock: Path) -> None:
    """Hash what a load opens, and write it down."""
    from llmload import create_registry
    from llmload.loading import lock as locks
    from llmload.loading.planning import prepare_to_load

    registry = create_registry()
    spec = registry.validate({"model": str(folder), "dtype": "bfloat16"})
    locks.write(locks.make(prepare_to_load(spec, registry)), lock)


def lock_alone(folder: Path) -> None:
    """Make a lock, as ``llmload lock`` does."""
    write_lock(folder, folder.parent / f"{folder.name}.made.lock")


def hash_alone(folder: Path) -> None:
    """Hash the weights with Python's own SHA-256, one file after the other."""
    import hashlib

    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            hashlib.file_digest(opened, "sha256")


def cold(side: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Do the same with files that are not in memory."""

    def run(folder: Path) -> Any:
        for file in folder.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return side(folder)

    return run


def _lock(title: str, around: Callable[[Callable[[Path], Any]], Callable[[Path], Any]]) -> Case:
    return Case(
        title=title,
        sides={
            "llmload": around(llmload_as("bfloat16")),
            "with a lock": around(locked),
            "llmload lock": around(lock_alone),
            "SHA-256 alone": around(hash_alone),
        },
        target="a lock costs what hashing costs, less what is read meanwhile",
        final=weights_mib,
        sizes=("1.1B",),
    )


CASES = {
    "checks": Case(
        title="the checks of every load",
        sides={
            "llmload": timed,
            "without proof": unproved,
            "from_pretrained": from_pretrained_as("bfloat16"),
        },
        target="checks of files below 0.05 s",
        final=weights_mib,
        sizes=("1.1B",),
    ),
    "finite": Case(
        title="verify: {finite: true}",
        sides={"llmload": llmload_as("bfloat16"), "every value looked at": finite},
        target=_ALONE + " where it is not asked for",
        final=weights_mib,
        sizes=("1.1B",),
    ),
    "lock-warm": _lock("locks, files in memory", lambda side: side),
    "lock-cold": _lock("locks, files on the disk", cold),
}

"""One process of one side: import, say ready, then do phase after phase when told to."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from inspect import isgeneratorfunction
from pathlib import Path
from typing import IO, Any, cast

from .case import Case, Mark, cases


def main() -> None:
    topic, name, side, folder = sys.argv[1:]
    say, go_on = _own_channel(), sys.stdin.readline
    case = cases(topic)[name]
    _import(case)
    if case.prepare:
        case.prepare()
    kept: list[object] = []
    phases = _phases(case, side, Path(folder), kept)
    _tell(say, {"ready": True})
    while go_on().strip() == "go":
        start = time.perf_counter()
        mark = next(phases, None)
        seconds = time.perf_counter() - start
        if mark is None:
            _tell(say, {"end": True})
            continue
        phase, figures = (mark, {}) if isinstance(mark, str) else mark
        _tell(say, {"phase": phase, "seconds": seconds, "figures": dict(figures)})


def _own_channel() -> IO[str]:
    """Keep standard output for what we say: what libraries print goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


def _tell(channel: IO[str], what: dict[str, Any]) -> None:
    print(json.dumps(what), file=channel, flush=True)


def _import(case: Case) -> None:
    """Imports are not what is compared here: all sides' are done before the clock starts."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import llmload

    for module in case.imports:
        importlib.import_module(module)
    llmload.load  # noqa: B018 - fetches the pipeline
    llmload.create_registry()


def _phases(case: Case, name: str, folder: Path, kept: list[object]) -> Iterator[Mark]:
    side = case.sides[name]
    assert not isinstance(side, str)
    if isgeneratorfunction(getattr(side, "func", side)):
        yield from cast("Iterator[Mark]", side(folder))
        return
    kept.append(side(folder))
    yield "load"


if __name__ == "__main__":
    main()

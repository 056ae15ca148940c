"""One side of one case: import, say ready, wait, do the work, say how long it took, wait."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from .cases import CASES


def main() -> None:
    name, side, folder = sys.argv[1:]
    case = CASES[name]
    # Imports are not what is compared here: both sides' are done before the clock starts.
    import transformers.models.llama.modeling_llama  # noqa: F401

    import llmload

    for module in case.imports:
        importlib.import_module(module)
    llmload.load  # noqa: B018 - fetches the pipeline
    llmload.create_registry()
    work = case.ours if side == "llmload" else case.peer
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    result = work(Path(folder))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds}), flush=True)
    sys.stdin.readline()
    del result


if __name__ == "__main__":
    main()

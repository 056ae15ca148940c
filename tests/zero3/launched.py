"""A script that ``accelerate launch`` starts with a DeepSpeed config; each rank writes JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from zero3.training import every


def main(folder: str, place: str, way: str, *kinds: str) -> None:
    """Train with trainers of some kinds; ``zero3: {}`` takes the config that is announced."""
    found = every(folder, place, way, list(kinds))
    Path(place, f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

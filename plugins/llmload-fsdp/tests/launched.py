"""A script that ``accelerate launch`` starts: trainers on models of ours, and on transformers' own.

Each rank writes what came of it, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import training


def theirs(folder: str) -> Any:
    """Load as transformers does by itself."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    sizes = DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"]))
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", distributed_config=sizes)


def main(folder: str, out: str) -> None:
    """Train with each trainer, ours first: the script has not made any process group."""
    found: dict[str, Any] = {}
    for name, train in {"Trainer": training.by_trainer, "SFTTrainer": training.by_trl}.items():
        place = Path(out, name)
        found[f"{name} full"] = train(folder, f"{place}-full", adapter=False)
        found[f"{name} adapter"] = train(folder, f"{place}-adapter", adapter=True)
        own = train(folder, f"{place}-theirs", adapter=False, model=theirs(folder))
        found[f"{name} theirs"] = own
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The same spec gives the same: order of plugins, plan, values; in whatever process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from llmload.testing import fake_distributions, tiny_checkpoint

PROCESSES = int(os.environ.get("LLMLOAD_TEST_PROCESSES", "2"))
"""How many: more in ``nox -s long_trust``."""
LOAD = """
import hashlib, json, random, sys
random.Random(int(sys.argv[2])).shuffle(sys.path)
import torch, llmload

torch.manual_seed(0)
result = llmload.load(json.loads(sys.argv[1]))
values = hashlib.sha256()
for name, value in result.model.state_dict().items():
    values.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
print(json.dumps([list(result.plan.plugins), result.plan.model_dump(mode="json"),
                  [info.name for info in llmload.create_registry().plugins], values.hexdigest()]))
"""
PLUGIN = "class Plugin:\n    name = {name!r}\n    stage = 'model'\n"


def test_every_process_loads_the_same_whatever_the_order_of_its_path(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    spec = {"model": str(folder), "lora": {"r": 2}, "embeddings": {"pad_to_multiple_of": 8}}
    found = []
    with fake_distributions(tmp_path) as fakes:
        for name in ("zeta", "alpha", "mid"):
            fakes.add(
                f"dist-{name}", {name: f"module_{name}:Plugin"}, f"module_{name}",
                PLUGIN.format(name=name),
            )  # fmt: skip
        for number in range(PROCESSES):
            done = subprocess.run(
                [sys.executable, "-c", LOAD, json.dumps(spec), str(number)],
                env=os.environ | {"PYTHONHASHSEED": str(number), "PYTHONPATH": str(tmp_path)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            found.append(json.loads(done.stdout.splitlines()[-1]))
    assert "alpha" in found[0][2]
    assert all(one == found[0] for one in found)
    record_property("figure", f"{PROCESSES} processes: one order, one plan, one digest of values")

"""Partitions on a disk (ZeRO-Infinity), on two ranks: ``nox -s zero3_disk``.

Not with the other tests: DeepSpeed compiles its operator async_io first, which needs libaio-dev and
takes some minutes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from zero3.farm import Job, launch

from llmload import testing

LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "vocab_size": 4096}
"""DeepSpeed leaves partitions of less than 1 MiB in memory."""


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_partitions_on_a_disk_are_those_of_the_file_and_train(tmp_path: Path, dtype: str) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder().load(verbose=False)
    folder = str(testing.tiny_llama(tmp_path, **LARGE))
    args = {"folder": folder, "path": str(tmp_path / "disk"), "dtype": dtype}
    (ranks,) = launch([Job("zero3.finishing:disk", args, timeout=200)], timeout=240)
    for rank in ranks:
        assert rank.code == 0, rank.output
        found = rank.result
        assert found["loader"] == "zero3"
        assert found["away"] >= 5
        assert found["bytes"] >= found["partitions"] > 0
        assert "its partition is on a disk" in found["refused"]
        assert found["different"] == []
        assert found["losses"] == found["whole"]

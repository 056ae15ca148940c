"""Other plugins read and write values under ``parallel`` as they do everywhere."""

from __future__ import annotations

from pathlib import Path

from scaled_norm import scaled

from llmload.testing import run_on_ranks, tiny_llama


def test_a_plugin_that_writes_values_does_the_same_whole_and_sharded(tmp_path: Path) -> None:
    spec = {"model": str(tiny_llama(tmp_path)), "scaled_norm": {"by": 3.0}}
    alone = scaled(spec)
    found = run_on_ranks(scaled, spec | {"parallel": {}}, timeout=200)
    assert [rank["values"] for rank in found] == [alone["values"]] * 2
    parts = [rank["seen"] for rank in found]
    assert 0 < min(parts) < alone["seen"]
    assert sum(parts) == alone["seen"]

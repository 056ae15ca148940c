"""The plugin keeps llmload's contract."""

from __future__ import annotations

from llmload.testing import assert_plugin
from llmload_fsdp.plugin import ParallelPlugin


def test_the_plugin_keeps_the_contract() -> None:
    # The group stays for the training, with its sockets; torch.distributed replaces the hook.
    leaves = ("excepthook", "files", "process group")
    assert_plugin(
        ParallelPlugin, spec={"parallel": {}}, bad=[{"fsdp_size": 0}, {"tp": 2}], leaves=leaves
    )

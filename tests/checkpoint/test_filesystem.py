"""On what file system a checkpoint lies, and what the plan says where others write to it."""

from __future__ import annotations

from pathlib import Path

import pytest

import llmload
from llmload.checkpoint import filesystem
from llmload.testing import tiny_llama

MOUNTS = """\
22 1 0:20 / / rw,relatime - overlay overlay rw
30 22 0:30 / /data rw - nfs4 server:/export rw
31 30 0:31 / /data/local\\040disk rw - ext4 /dev/sda rw
32 22 0:32 / /mnt rw - ext4 /dev/sdb rw
33 22 0:33 / /mnt rw shared:1 - fuse.sshfs host:/ rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "shared"),
    [
        ("/models/llama", "overlay", False),
        ("/data", "nfs4", True),
        ("/data/llama", "nfs4", True),
        ("/database", "overlay", False),
        ("/data/local disk/llama", "ext4", False),
        ("/mnt/llama", "fuse.sshfs", True),
    ],
)
def test_the_innermost_and_latest_mount_tells(
    tmp_path: Path, path: str, kind: str, shared: bool
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert filesystem.kind(Path(path), mounts) == kind
    assert filesystem.is_shared(kind) is shared


def test_a_system_that_does_not_say_is_taken_for_local(tmp_path: Path) -> None:
    assert filesystem.kind(tmp_path, tmp_path / "missing") == ""
    assert not filesystem.is_shared("")


def test_the_plan_warns_of_pages_that_other_machines_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A network file system is what this machine cannot have: its kind stands in for it.
    monkeypatch.setattr(filesystem, "kind", lambda path: "nfs4")
    spec = {"model": str(tiny_llama(tmp_path))}
    (warning,) = llmload.plan(spec).warnings
    assert str(warning) == (
        "streaming.mapped: the weights stay on the pages of files on nfs4, to which other machines"
        " may write: the model follows a file that is overwritten in place, and the process ends"
        " where one is cut off. Load with `streaming: {mapped: false}`, or from a local copy."
    )
    for fine in ({"streaming": {"mapped": False}}, {"dtype": "bfloat16"}):
        assert llmload.plan(spec | fine).warnings == []


def test_the_plan_warns_of_a_folder_that_a_training_saves_to(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "trainer_state.json").write_text("{}")
    (warning,) = llmload.plan({"model": str(folder)}).warnings
    assert "the folder of a Trainer's checkpoint, which is saved over" in warning.message

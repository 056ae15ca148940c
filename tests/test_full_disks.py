"""What commands say where the disk is full or cannot be written to, and what they leave: nothing.

The small disk is a tmpfs that a namespace of the test's own mounts, where the system allows that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmload.errors import RequestError
from llmload.saving import writing
from llmload.testing import tiny_checkpoint

UNSHARE = ("unshare", "--mount", "--user", "--map-root-user")
CAN_MOUNT = (
    sys.platform == "linux"
    and subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
)
on_a_small_disk = pytest.mark.skipif(not CAN_MOUNT, reason="needs namespaces of its own")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("spec")
    folder = tiny_checkpoint(place / "model", pad=True)
    file = place / "spec.yaml"
    file.write_text(json.dumps({"model": str(folder), "lora": {"r": 2}}))
    return file


FULL = "cp /dev/zero disk/full 2> /dev/null; "
EVERYWHERE = "HOME=$PWD/disk TMPDIR=$PWD/disk XDG_CACHE_HOME=$PWD/disk HF_HOME=$PWD/disk/hf "


def run_on_disk(
    place: Path, command: str, *, size: str = "256k", options: str = "", first: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command line beside a small disk that is mounted at ``disk``, and list that."""
    (place / "disk").mkdir()
    script = (
        f"mount -t tmpfs -o size={size}{options} tmpfs disk && "
        f"{{ {first}{sys.executable} -m llmload {command}; code=$?; ls -A disk >&2; exit $code; }}"
    )
    return subprocess.run(
        [*UNSHARE, "sh", "-c", script], cwd=place, capture_output=True, text=True, check=False
    )


@on_a_small_disk
def test_a_demo_without_room_is_refused_before_it_trains(tmp_path: Path) -> None:
    done = run_on_disk(tmp_path, "demo --dir disk/demo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "disk/demo: it cannot be written: 8.0 MiB are needed; 256.0 KiB are free there."
        " Name a place that can be written to, with room.\n"
    )


@on_a_small_disk
@pytest.mark.parametrize("command", ["demo --dir disk/demo", "new-plugin acme --dir disk/acme"])
def test_a_disk_that_cannot_be_written_to_is_refused(command: str, tmp_path: Path) -> None:
    done = run_on_disk(tmp_path, command, options=",ro")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        ": it cannot be written: Read-only file system."
        " Name a place that can be written to, with room.\n"
    )


@on_a_small_disk
def test_a_plugin_that_has_no_room_is_not_written_in_part(tmp_path: Path) -> None:
    done = run_on_disk(tmp_path, "new-plugin acme --dir disk/acme", size="8k")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("disk/acme: it cannot be written: No space left on device; ")


@on_a_small_disk
def test_a_lock_that_has_no_room_is_refused(spec: Path, tmp_path: Path) -> None:
    done = run_on_disk(tmp_path, f"lock {spec} -o disk/lock", size="4k", first=FULL)
    assert (done.returncode, done.stdout) == (2, "")
    said, listing = done.stderr.splitlines()[-2:]
    assert said.startswith("disk/lock: it cannot be written: No space left on device; 0 B are free")
    assert listing == "full"


@on_a_small_disk
def test_a_saved_model_that_has_no_room_is_refused_before_it_is_loaded(
    spec: Path, tmp_path: Path
) -> None:
    done = run_on_disk(tmp_path, f"save {spec} --to disk/out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        "disk/out: it cannot be written: 32.0 MiB are needed; 256.0 KiB are free there."
        " Name a place that can be written to, with room."
    )


@on_a_small_disk
@pytest.mark.parametrize(
    ("options", "first"), [("", FULL + EVERYWHERE), (",ro", EVERYWHERE)], ids=["full", "read-only"]
)
def test_a_load_needs_no_room_for_home_cache_and_temporary_files(
    options: str, first: str, spec: Path, tmp_path: Path
) -> None:
    done = run_on_disk(tmp_path, f"load {spec} --json", size="4k", options=options, first=first)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loader"] == "streaming"


def test_a_load_needs_no_home_folder(spec: Path) -> None:
    without = {"HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME"}
    done = subprocess.run(
        [sys.executable, "-m", "llmload", "load", str(spec), "--json"],
        env={key: value for key, value in os.environ.items() if key not in without},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_place_that_is_not_there_is_refused_before_anything_is_hashed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="it cannot be written: there is no folder"):
        writing.require_place(tmp_path / "missing" / "lock")
    with pytest.raises(RequestError, match="it cannot be written: Is a directory"):
        writing.require_place(tmp_path)
    writing.require_place(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False], ids=["an empty folder", "none"])
def test_a_folder_that_is_not_finished_is_removed(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deep"
    if there:
        folder.mkdir(parents=True)

    def stop_half_way() -> None:
        with writing.new_folder(folder):
            (folder / "part").mkdir()
            (folder / "part" / "file").write_text("half")
            (folder / "spec.yaml").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert list(tmp_path.rglob("*")) == ([folder.parent, folder] if there else [])


def test_what_safetensors_says_of_a_full_disk_is_a_refusal_too(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught, writing.refused(tmp_path / "model"):
        raise RuntimeError(
            'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
        )
    assert "it cannot be written: No space left on device; " in str(caught.value)


def test_an_error_that_is_not_of_the_disk_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing.refused(tmp_path):
        raise ZeroDivisionError


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["schema"], ["plugins"], ["plugins", "--json"], ["--help"]])
def test_standard_output_that_is_full_is_told_in_words(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llmload", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_missed_and_no_file_takes_their_place(
    closed: str, spec: Path
) -> None:
    command = f"exec {sys.executable} -m llmload validate {spec} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
    assert done.returncode == 0, done
    assert (b"valid" in done.stdout) == (">&- " not in closed)


@pytest.mark.skipif(find_spec("dill") is None, reason="nothing here asks for a temporary folder")
def test_a_machine_without_a_temporary_folder_is_told_what_to_do(spec: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"ulimit -f 0; exec {sys.executable} -m llmload targets {spec}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("No usable temporary directory found in ['/tmp'")
    assert done.stderr.endswith(
        "], and a library that this needs wants one. Set TMPDIR to a folder that can be written to,"
        " /dev/shm for instance.\n"
    )

"""Two hosts of two ranks each, on one Linux machine: network namespaces, joined by a virtual cable.

Run by ``nox -s two_hosts`` and not with the other tests, because it needs root. Each host has the
model in a folder of its own, and where the other has its, there is an empty file system.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zero3.farm import ENVIRONMENT

from llmload import testing

DEADLINE = 6.0
SLACK = 6.0
"""Seconds for tracebacks and a machine that does something else."""

SCRIPT = Path(__file__).with_name("on_host.py")


@dataclass(frozen=True)
class Host:
    namespace: str
    address: str
    link: str
    folder: Path
    hidden: Path
    """The other host's folder."""

    def start(self, number: int, *arguments: str) -> subprocess.Popen[str]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        launch += ["--nproc_per_node", "2", "--node_rank", str(number), "--monitor_interval", "5"]
        launch += ["--master_addr", "10.77.0.1", "--master_port", "29577"]
        launch += [str(SCRIPT), str(self.folder), *arguments]
        # The namespace has mounts of its own already, which end with it.
        hide = f'mount -t tmpfs none "{self.hidden.parent}" && exec "$@"'
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "sh", "-c", hide, "sh", *launch],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": self.link, "HF_HUB_OFFLINE": "1"},
        )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    original = Path(testing.tiny_llama(tmp_path / "original", shards=2))
    folders = [tmp_path / "first" / "model", tmp_path / "second" / "elsewhere" / "llama"]
    for folder in folders:
        shutil.copytree(original, folder)
    shutil.rmtree(original)
    names = [f"llmload-{os.getpid()}-{number}" for number in (1, 2)]
    links = [f"ll{os.getpid()}v{number}" for number in (1, 2)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        found = []
        for number, (name, link) in enumerate(zip(names, links, strict=True)):
            ip("link", "set", link, "netns", name)
            address = f"10.77.0.{number + 1}"
            ip("-n", name, "address", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            found.append(Host(name, address, link, folders[number], folders[1 - number]))
        yield found
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def run(hosts: list[Host], answers: Path, *, down: bool = False) -> tuple[list[str], float]:
    """Run both hosts; return what they said, and when (``time.time()``) the last rank ended.

    torchrun itself may wait for its peer much longer.
    """
    answers.mkdir()
    running = [
        host.start(number, str(answers), str(DEADLINE), host.link if down else "up")
        for number, host in enumerate(hosts)
    ]
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and not _ended(answers, running):
            time.sleep(0.05)
        ended = time.time()
        for host in running:
            with suppress(subprocess.TimeoutExpired):
                host.wait(5)
    finally:
        for host in running:
            with suppress(ProcessLookupError):
                os.killpg(host.pid, 9)
    return [host.communicate()[0] for host in running], ended


def _ended(answers: Path, running: list[subprocess.Popen[str]]) -> bool:
    if all(host.poll() is not None for host in running):
        return True
    pids = [int(file.read_text() or 0) for file in answers.glob("*.pid")]
    return len(pids) == 4 and not any(_lives(pid) for pid in pids)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.timeout(200)
def test_each_host_reads_its_share_of_its_own_copy(hosts: list[Host], tmp_path: Path) -> None:
    expected: dict[str, Any] = {}
    for file in hosts[0].folder.glob("*.safetensors"):
        expected |= load_file(file)
    said, _ = run(hosts, tmp_path / "answers")
    files = [tmp_path / "answers" / f"{rank}.json" for rank in range(4)]
    assert all(file.exists() for file in files), "\n".join(said)
    ranks = [loads(file.read_text()) for file in files]
    assert [rank["folder"] for rank in ranks] == [str(hosts[i].folder) for i in (0, 0, 1, 1)]
    total = sum(tensor.nbytes for tensor in expected.values())
    for host in (ranks[:2], ranks[2:]):
        assert sum(rank["read"] for rank in host) == total / 2
    for name, tensor in expected.items():
        joined = b"".join(bytes.fromhex(rank["parts"][name][1]) for rank in ranks)
        stored = tensor.flatten().bfloat16().view(torch.uint8).numpy().tobytes()
        assert joined == stored, name


@pytest.mark.timeout(200)
def test_missing_shard_on_one_host_stops_both(hosts: list[Host], tmp_path: Path) -> None:
    next(hosts[1].folder.glob("*-00001-of-*.safetensors")).unlink()
    said, _ = run(hosts, tmp_path / "answers")
    for text in said:
        assert "CheckpointError" in text, text
    assert re.search("LoadFailedError: rank [23] failed: CheckpointError", said[0]), said[0]
    assert not list((tmp_path / "answers").glob("*.json"))


@pytest.mark.timeout(200)
def test_link_that_goes_down_stops_all_ranks(
    hosts: list[Host], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    said, ended = run(hosts, tmp_path / "answers", down=True)
    down = tmp_path / "answers" / "down"
    assert down.exists(), "\n".join(said)
    seconds = ended - float(down.read_text())
    record_property("seconds from the link's end to the last rank's", seconds)
    assert seconds < DEADLINE + SLACK
    assert not list((tmp_path / "answers").glob("*.json"))
    for rank in (0, 1):
        silent = f"rank {rank} stops: rank [23] failed: it gave no sign of life for 4.2 s"
        assert re.search(silent, said[0]), said[0]
    for rank in (2, 3):
        gone = f"rank {rank} stops: the process that keeps the ranks' common store"
        assert gone in said[1], said[1]

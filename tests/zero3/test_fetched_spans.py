"""Under ZeRO-3 each host fetches from the hub what its ranks keep, each byte once, and no more.

Hosts are caches of their own on this machine; a token tells the server which one asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hub_server import Hub, serving
from stacks import IS_MODERN
from zero3.farm import Job, Outcome, launch

from llmload import testing
from llmload.checkpoint import Checkpoint

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    repository: str
    hosts: int
    ranks: int
    whole: bool = False
    """Whether every rank reads what is quantised whole, for statistics over whole weights."""

    @property
    def keys(self) -> dict[str, Any]:
        return {"kbit": {"bits": 4}} if self.whole else {}


CASES = {
    "one host, 2 ranks": Case("org/plain", 1, 2),
    "one host, 4 ranks": Case("org/plain", 1, 4),
    "two hosts, 2 ranks": Case("org/plain", 2, 2),
    "two hosts, 4 ranks": Case("org/plain", 2, 4),
    "four hosts, 4 ranks": Case("org/plain", 4, 4),
    "two hosts, merged experts": Case("org/experts", 2, 2),
    "two hosts, 4 bits": Case("org/plain", 2, 2, whole=True),
}
if not IS_MODERN:  # transformers 4.51 refuses bitsandbytes on the CPU
    del CASES["two hosts, 4 bits"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tmp = tmp_path_factory.mktemp("spans")
    sizes: Any = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        hub.repositories = {
            "org/plain": testing.tiny_llama(tmp, dtype=torch.bfloat16, shards=2, **sizes),
            "org/experts": testing.tiny_checkpoint(
                tmp / "experts", "mixtral", dtype=torch.bfloat16, shards=2
            ),
        }
        for key, value in hub.environment(tmp / "cache").items():
            patch.setenv(key, value)
        jobs = []
        for number, case in enumerate(CASES.values()):
            caches = [str(tmp / f"{number}-{host}") for host in range(case.hosts)]
            folder = str(hub.repositories[case.repository])
            args = {"model": case.repository, "folder": folder, "caches": caches, **case.keys}
            jobs.append(Job("zero3.fetching:load", args, ranks=case.ranks))
        outcomes = dict(zip(CASES, launch(jobs, timeout=280), strict=True))
    return hub, outcomes


@pytest.mark.parametrize("name", CASES)
def test_each_host_fetches_its_share_and_headers(
    found: tuple[Hub, dict[str, list[Outcome]]], name: str, record_property: Any
) -> None:
    hub, outcomes = found
    case, number = CASES[name], list(CASES).index(name)
    checkpoint = Checkpoint.open(hub.repositories[case.repository])
    headers = sum(file.size for file in checkpoint.files) - checkpoint.total_bytes
    for outcome in outcomes[name]:
        assert outcome.code == 0, outcome.output
        assert outcome.result["loader"] == "streaming"
        assert outcome.result["equal"]
        assert any(note.startswith("fetch ") for note in outcome.result["notes"])
    for host in range(case.hosts):
        sent = sum(
            count
            for file, count in hub.sent_to[f"{number}-{host}"].items()
            if file.endswith(".safetensors")
        )
        record_property(f"bytes sent to host {host}", sent)
        ranks = [one.result for one in outcomes[name] if one.result["host"] == host]
        read = sum(file["bytes_read"] for one in ranks for file in one["files"].values())
        if case.hosts == 1:
            assert sent == checkpoint.total_bytes + headers
        else:
            assert sent - headers <= 1.01 * read
        if not case.whole:
            assert sent - headers <= 1.01 * checkpoint.total_bytes / case.hosts

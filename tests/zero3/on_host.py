"""Run by torchrun on every rank of :mod:`zero3.two_hosts`: load this host's copy, write it down."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import llmload
from llmload.host.registry import create_registry
from llmload.model.partitions import held

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


class LinkDown:
    """On one rank, takes this host's end of the link down while all wait for one another."""

    name = "link_down"
    after = ("zero3",)

    def __init__(self, culprit: int, link: str, stamp: Path) -> None:
        self._culprit = culprit
        self._link = link
        self._stamp = stamp

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            torch.distributed.barrier()
            if int(os.environ["RANK"]) == self._culprit:
                self._stamp.write_text(str(time.time()))
                subprocess.run(["ip", "link", "set", self._link, "down"], check=True)
            torch.distributed.barrier()
        return model


def main() -> None:
    folder, answers, deadline, link = sys.argv[1:]
    rank = int(os.environ["RANK"])
    Path(answers, f"{rank}.pid").write_text(str(os.getpid()))
    plugins = []
    if link != "up":
        plugins = [LinkDown(2, link, Path(answers, "down"))]
    spec = {"model": folder, "dtype": "bfloat16", "zero3": {"deadline": float(deadline)}}
    result = llmload.load(spec, registry=create_registry(plugins=plugins))
    parts = {}
    for name, parameter in result.model.named_parameters():
        part = held(parameter)
        assert part is not None
        parts[name] = (part[1], part[0].view(torch.uint8).numpy().tobytes().hex())
    facts = result.report.facts["streaming"]["files"]
    read = sum(file["bytes_read"] for file in facts.values())
    answer = {"host": socket.gethostname(), "folder": folder, "read": read, "parts": parts}
    Path(answers, f"{rank}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()

"""Run on every rank: loads in which one rank goes wrong at a chosen phase."""

from __future__ import annotations

import os
import signal
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed import TCPStore

import llmload
from llmload.host.registry import create_registry

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


kept: list[object] = []
"""What must live as long as the process."""


def fault(kind: str) -> None:
    if kind == "exception":
        raise RuntimeError("the disk is on fire")
    if kind == "exit":
        os._exit(3)
    if kind == "interrupt":
        # Below a shell's background it would be ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGINT)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


class Faulty:
    """Goes wrong on one rank in one hook."""

    name = "faulty"
    after: tuple[str, ...] = ("*",)
    before: tuple[str, ...] = ()

    def __init__(self, phase: str, kind: str) -> None:
        if phase == "before zero3":
            phase, self.after, self.before = "init_context", (), ("zero3",)
        self._phase = phase
        self._kind = kind
        self.pause = 0.0

    def _come(self, phase: str) -> None:
        if phase == self._phase:
            time.sleep(self.pause)
            fault(self._kind)

    @llmload.hookimpl
    def check(self, ctx: Any) -> None:
        self._come("plan")

    @llmload.hookimpl
    def init_context(self, ctx: Any) -> AbstractContextManager[None]:
        self._come("init_context")
        if self._phase == "place":
            place, kind = ctx.placement.place, self._kind
            seen: list[str] = []

            def placing(target: Any, source: Any) -> Any:
                seen.append(target.name)
                if len(seen) == 5:
                    fault(kind)
                return place(target, source)

            ctx.placement.place = placing
        return nullcontext()

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            self._come("post_load")
        return model

    @llmload.hookimpl
    def wrap_adapter(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            self._come("wrap_adapter")
        return llmload.Decline("it only goes wrong")

    @llmload.hookimpl
    def audit(self, ctx: Any, model: Any) -> None:
        self._come("audit")


def load(folder: str, phase: str, kind: str, culprit: int, deadline: float) -> str:
    """Load with a fault on one rank; a survivor returns how long its load took to end."""
    plugins = [Faulty(phase, kind if _rank() == culprit else "none")]
    spec = {"model": folder, "dtype": "float32", "zero3": {"deadline": deadline}}
    _together()
    llmload.load(spec, registry=create_registry(plugins=plugins))
    return "loaded"


def stuck(folder: str, culprit: int, deadline: float) -> str:
    """One rank hangs while the others are in a collective that nothing can interrupt."""

    class Collective:
        name = "collective"
        after = ("zero3",)

        @llmload.hookimpl
        def post_load(self, ctx: Any, model: Any) -> Any:
            if not ctx.rehearsing:
                if _rank() == culprit:
                    fault("stop")
                torch.distributed.barrier()
            return model

    spec = {"model": folder, "dtype": "float32", "zero3": {"deadline": deadline}}
    _together()
    llmload.load(spec, registry=create_registry(plugins=[Collective()]))
    return "loaded"


def different(
    folder: str, other: dict[str, Any], culprit: int, deadline: float, digests: bool = False
) -> str:
    """One rank has another spec, or another folder."""
    section = {"deadline": deadline, "digests": digests}
    spec: dict[str, Any] = {"model": folder, "dtype": "float32", "zero3": section}
    if _rank() == culprit:
        spec = spec | other
    _together()
    llmload.load(spec)
    return "loaded"


def unmet(folder: str, kind: str, culprit: int, deadline: float) -> str:
    """One rank is lost while it plans, before the ranks have met for the first time."""
    plugins = [Faulty("plan", kind if _rank() == culprit else "none")]
    if _rank() == culprit:
        plugins[0].pause = 1.0  # the others see it live first
    spec = {"model": folder, "dtype": "float32", "zero3": {"deadline": deadline}}
    llmload.load(spec, registry=create_registry(plugins=plugins))
    return "loaded"


def elsewhere(folder: str, culprit: int, deadline: float) -> str:
    """The spec of one rank is without ``zero3``; the store is the launcher's."""
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    if _rank() == 0:  # stands in for the launcher, a process apart
        port = int(os.environ["MASTER_PORT"])
        kept.append(TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False))
    spec: dict[str, Any] = {"model": folder, "dtype": "float32", "zero3": {"deadline": deadline}}
    if _rank() == culprit:
        del spec["zero3"]
    llmload.load(spec)
    if _rank() == culprit:
        time.sleep(3 * deadline)  # it trains
    return "loaded"


def busy(folder: str, culprit: int, deadline: float) -> str:
    """One rank fails while another one is healthy and busy in a plugin."""

    class Busy:
        name = "busy"
        after = ("zero3",)

        @llmload.hookimpl
        def post_load(self, ctx: Any, model: Any) -> Any:
            if not ctx.rehearsing:
                if _rank() == culprit:
                    fault("exception")
                try:
                    for _ in range(6000):
                        time.sleep(0.01)
                finally:
                    os.write(1, b"the plugin has tidied up\n")
            return model

    spec = {"model": folder, "dtype": "float32", "zero3": {"deadline": deadline}}
    _together()
    llmload.load(spec, registry=create_registry(plugins=[Busy()]))
    return "loaded"


def after_a_failure(folder: str) -> list[str]:
    """A load that failed on all ranks leaves the next one of the process as if alone."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    linear = torch.nn.functional.linear
    said = []
    for phase in ("plan", "post_load", "audit"):
        try:
            load(folder, phase, "exception", 1, 10.0)
        except llmload.LoadFailedError as error:
            said.append(str(error))
    assert torch.nn.functional.linear is linear
    assert not is_deepspeed_zero3_enabled()
    whole = llmload.load({"model": folder}).model
    assert not any(hasattr(p, "ds_id") for p in whole.parameters())
    split = llmload.load({"model": folder, "dtype": "float32", "zero3": {}}).model
    assert all(hasattr(p, "ds_tensor") for p in split.parameters())
    whole = llmload.load({"model": folder}).model
    assert not any(hasattr(p, "ds_id") for p in whole.parameters())
    return said


def early(folder: str, culprit: int, deadline: float) -> str:
    """One rank's plan fails before there is a process group: the others wait for it there."""
    spec: dict[str, Any] = {"model": folder, "dtype": "float32", "zero3": {"deadline": deadline}}
    if _rank() == culprit:
        spec["model"] += "-missing"
    llmload.load(spec)
    return "loaded"


def alternating(folder: str) -> list[str]:
    """Partitioned, whole by either loader, partitioned: each as if it were the only one."""
    from transformers.integrations import is_deepspeed_zero3_enabled
    from zero3.comparing import deepspeed_config, losses

    spec = {"model": folder, "dtype": "float32"}
    section = {"config": deepspeed_config("float32", 0)}
    found = []
    for options in ({"zero3": section}, {}, {"block": True}, {"zero3": section}):
        block = {"streaming"} if options.pop("block", None) else set()
        result = llmload.load(spec | options, registry=create_registry(block=block))
        assert not is_deepspeed_zero3_enabled()
        partitioned = [hasattr(p, "ds_id") for p in result.model.parameters()]
        assert set(partitioned) == {"zero3" in options}
        if "zero3" in options:
            found.append(repr(losses(result.model, "causal_lm", section["config"])))
        else:
            for name, parameter in result.model.named_parameters():
                assert parameter.numel(), name
            found.append(f"whole, by {result.report.loader}")
    return found


def _rank() -> int:
    return int(os.environ["RANK"])


def _together() -> None:
    """Start the clock on all ranks at once: imports and compilation are behind them."""
    from llmload.builtin.zero3.process_group import connect

    connect()
    torch.distributed.barrier()

"""Whom warnings reach: users of Python by the logger ``llmload``, others on standard error."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import llmload
from llmload import Problem, hookimpl
from llmload.cli import commands
from llmload.testing import tiny_llama

EOS = "tokenizer.pad_token: the pad token is the eos token '</s>'"
"""How the plan's warning begins that ``PADDED`` gives rise to."""
PADDED = {"tokenizer": {"pad_token": "eos"}}


class Remarks:
    """Finds something to say when the model is there."""

    name = "remarks"

    @hookimpl
    def audit(self, ctx: Any, model: Any) -> list[Problem]:
        return [Problem(severity="warning", message="it is a bit large")]


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "llmload" and r.levelno >= 30]


def test_warnings_of_plan_and_audit_are_logged_once_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = llmload.create_registry(plugins=[Remarks()])
    result = llmload.load({"model": str(tiny_llama(tmp_path)), **PADDED}, registry=registry)
    logged = messages(caplog)
    assert logged == result.report.warnings
    assert [text.startswith(EOS) for text in logged] == [True, False]
    assert logged[1] == "plugin 'remarks': it is a bit large"


def test_warnings_of_a_group_name_their_member(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tiny_llama(tmp_path))
    registry = llmload.create_registry(plugins=[Remarks()])
    models = {"policy": {"model": folder, **PADDED}, "critic": {"model": folder}}
    llmload.load_group({"models": models}, registry=registry)
    first, *rest = messages(caplog)
    assert first.startswith(f"models.policy.{EOS}")
    assert rest == [
        "models.policy: plugin 'remarks': it is a bit large",
        "models.critic: plugin 'remarks': it is a bit large",
    ]


def test_what_is_wrong_does_not_hide_what_is_odd(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = {"model": str(tiny_llama(tmp_path)), **PADDED, "lora": {"target_modules": ["nowhere"]}}
    with pytest.raises(llmload.PlanError):
        llmload.load(spec)
    assert [text.startswith(EOS) for text in messages(caplog)] == [True]


def test_of_several_ranks_the_first_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.INFO, "llmload"):
        llmload.load({"model": str(tiny_llama(tmp_path)), **PADDED})
    told = [record for record in caplog.records if record.name == "llmload"]
    assert [record.levelname for record in told if EOS in record.getMessage()] == ["INFO"]
    assert {record.levelname for record in told} == {"INFO"}


def test_a_script_that_sets_nothing_up_sees_them_on_standard_error(tmp_path: Path) -> None:
    spec = {"model": str(tiny_llama(tmp_path)), **PADDED}
    done = subprocess.run(
        [sys.executable, "-c", f"import llmload; llmload.load({spec!r})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"\n{EOS}" in f"\n{done.stderr}"
    assert EOS not in done.stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_command_writes_them_to_standard_error(options: list[str], tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"model": str(tiny_llama(tmp_path)), **PADDED}))
    answer = CliRunner().invoke(commands.app, ["load", str(spec), *options])
    assert answer.exit_code == 0
    assert f"\nwarning: {EOS}" in f"\n{answer.stderr}"
    if options:
        (warning,) = json.loads(answer.stdout)["warnings"]
        assert warning.startswith(EOS)
    else:
        assert "pad token" not in answer.stdout
    logger = logging.getLogger("llmload")
    assert (logger.handlers, logger.propagate) == ([], True)


def test_a_command_says_what_it_does_or_nothing_but_the_answer(tmp_path: Path) -> None:
    spec = [str(tiny_llama(tmp_path)), "--set", "trainable=false", "--set", "lora={}"]

    def said(*switches: str) -> str:
        done = CliRunner().invoke(commands.app, ["load", *spec, *switches])
        assert done.exit_code == 0, done.output
        assert "LlamaForCausalLM" in done.stdout or "model" in done.stdout
        return done.stderr

    assert "warning: lora: the adapter is new and will not be trained" in said()
    assert "warning:" not in said("-q")
    told = said("-v")
    assert re.search(r"^info: load by streaming: \d+\.\d\d s, \d+ MiB$", told, re.MULTILINE)
    assert re.search(r"^info: wrap_adapter by lora: ", told, re.MULTILINE)
    assert "warning:" in told
    assert logging.getLogger("llmload").level == logging.NOTSET


def test_phases_go_to_the_logger_at_level_info(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tiny_llama(tmp_path))
    llmload.load({"model": folder})
    assert "load by streaming" not in caplog.text
    with caplog.at_level(logging.INFO, "llmload"):
        llmload.load({"model": folder})
    assert "load by streaming" in caplog.text


def test_the_model_of_a_result_is_typed() -> None:
    assert llmload.LoadResult.__annotations__["model"] == "PreTrainedModel | PeftModel"

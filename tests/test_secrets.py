"""A token of the user's is shown nowhere: not in what is written, said, logged or raised."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llmload
from llmload.cli import app
from llmload.testing import tiny_checkpoint

TOKEN = "hf_" + "SeCrEtOfSomebody" * 2
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")
COMMANDS = (
    "load SPEC",
    "load SPEC --json",
    "plan SPEC",
    "plan SPEC --json",
    "plan SPEC --set lora.r=no",
    f"plan SPEC --set hf_token={TOKEN}",
    f"plan SPEC --set tokenizer.token={TOKEN}",
    f"plan SPEC --set model=https://me:{TOKEN}@example.org/x",
    "plan SPEC --set model=org/not-here",
    "plan missing.yaml",
    "plan SPEC -p os:environ",
    "plan SPEC -p acme",
    "lock SPEC -o LOCK",
    "verify SPEC",
    "env",
    "env --json",
    "doctor",
    "doctor --json",
    "plugins --json",
    "schema",
)


def test_a_token_is_shown_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{TOKEN}@hub.example")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    caplog.set_level(logging.DEBUG)
    folder = tiny_checkpoint(tmp_path / "model")
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: {folder}\nlora: {{r: 2}}\n")
    said, ran = "", []
    for command in COMMANDS:
        words = command.replace("SPEC", str(spec)).replace("LOCK", str(tmp_path / "lock")).split()
        done = CliRunner().invoke(app, words)
        said += done.output + repr(done.exception)
        ran.append(done.exit_code)
    result = llmload.load(str(spec))
    said += repr(result) + repr(result.report) + repr(result.plan) + caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {0, 2} <= set(ran)
    assert TOKEN not in said
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    record_property("figure", f"{len(ran)} commands, {len(written)} files, logs: 0 occurrences")

"""Twenty common mistakes in one process: all faults at once, no traceback, exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Final

import pytest

MISTAKES: Final[dict[str, tuple[str, list[str]]]] = {
    "a misspelt key": ("model: m\nlora: {target_module: [q]}", ["Did you mean 'target_modules'?"]),
    "a misspelt section": ("model: m\nlorra: {}", ["Did you mean 'lora'?"]),
    "PEFT's short name": ("model: m\nlora: {rank: 8}", ["Write `lora: {r: 8}`."]),
    "a dtype of a trainer": ("model: m\ndtype: bf16", ["Write bfloat16."]),
    "the old name of dtype": ("model: m\ntorch_dtype: float16", ["Write `dtype: float16`."]),
    "no model": ("lora: {}", ["model: the key is required"]),
    "a quoted number": ("model: m\nlora: {r: '8'}", ["Remove the quotes."]),
    "a number that is none": ("model: m\nlora: {r: eight}", ["expected a whole number"]),
    "a negative rank": ("model: m\nlora: {r: -1}", ["lora.r: "]),
    "a dropout in percent": ("model: m\ndropout: {p: 10}", ["dropout.p: must be "]),
    "two bits": ("model: m\nkbit: {bits: 2}", ["kbit.bits: expected 4 or 8, found 2"]),
    "true for a section": ("model: m\nkbit: true", ["Write `kbit: {}` for its defaults."]),
    "a flag of transformers": ("model: m\nload_in_4bit: true", ["Write `kbit: {bits: 4}`."]),
    "a token": ("model: m\ntoken: hf_abcdefghijkl", ["HF_TOKEN"]),
    "a training key": ("model: m\nlearning_rate: 1", ["give it to the trainer"]),
    "labels of no classifier": ("model: m\nlabels: 3", ["auto_class: sequence_classification"]),
    "a tab": ("model: m\nlora:\n\tr: 8", ["<stdin>:3:"]),
    "a key twice": ("model: m\nmodel: n", ["<stdin>:2:1"]),
    "a list": ("- model: m", ["a spec is a mapping of keys to values"]),
    "several at once": (
        "dtype: half\nlora: {rank: 8, alpha: 16}\nkbit: {bits: 3}\nseed: 1",
        ["model: the key", "Write float16.", "{r: 8}", "{lora_alpha: 16}", "kbit.bits", "trainer"],
    ),
}
"""What is wrong -> the spec, and what the refusal has to say."""

_RUN: Final = """
import json, sys
from typer.testing import CliRunner
from llmload.cli import commands
found = {}
for name, text in json.load(sys.stdin).items():
    done = CliRunner().invoke(commands.app, ["validate", "-"], input=text)
    found[name] = [done.exit_code, done.stdout, done.stderr]
print(json.dumps({"found": found, "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def told() -> Any:
    """What one process said of all of them."""
    specs = json.dumps({name: text for name, (text, _) in MISTAKES.items()})
    command = [sys.executable, "-c", _RUN]
    done = subprocess.run(command, input=specs, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_common_mistake_is_refused_with_the_way_out(name: str, told: Any) -> None:
    exit_code, output, error = told["found"][name]
    assert (exit_code, output) == (2, "")
    assert "Traceback" not in error
    assert [words for words in MISTAKES[name][1] if words not in error] == [], error
    assert "hf_abc" not in error


def test_no_mistake_in_a_spec_is_waited_for_until_torch_is_imported(told: Any) -> None:
    assert len(told["found"]) == len(MISTAKES) == 20
    assert told["torch"] is False

"""Forty-five common mistakes in one process: all faults at once, no traceback, exit code 2."""

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
    "a list for a section": (
        "model: m\nlora: [q]",
        ["`llmload explain lora` shows what it takes."],
    ),
    "a value for a section": ("model: m\nkbit: 4", ["`llmload explain kbit` shows what it takes."]),
    "Python's None": ("{model: m, lora: None}", ["Remove the key, or give it a value."]),
    "a key that an entry lacks": (
        "model: m\ntokenizer: {add_tokens: [{contents: x}]}",
        ["add_tokens[0].content: the key is required", "Did you mean 'content'?"],
    ),
    "no space after a colon": ("model: m\nlora: {r:8}", ["after the colon: `r: 8`."]),
    "a list in quotes": ("model: m\nlora: {target_modules: '[q]'}", ["[q] without the quotes."]),
    "a dtype of 8 bits": ("model: m\ndtype: float8", ["are `kbit: {bits: 8}`."]),
    "half a dtype": ("model: m\ndtype: bfloat", ["Did you mean 'bfloat16'?"]),
    "unknown keys": (
        "model: m\nabc: 1\nxyz: 2\nqqq: 3",
        ["abc: unknown key. Known keys are: ", "qqq: unknown key. It is none of those listed"],
    ),
    "no indentation": ("model: m\nlora:\nr: 8", ["Write `lora: {r: 8}`."]),
    "an equals sign": ("model = m", ["found a single value", "`model: ...`"]),
    "the config of a model": (
        '{"architectures": ["A"], "model_type": "llama"}',
        ["this is a file of a model, not a spec. Give the folder it is in"],
    ),
    "the config of an adapter": (
        '{"peft_type": "LORA", "base_model_name_or_path": "m"}',
        ["Write `model: m` and `lora: {adapter: "],
    ),
    "a config of DeepSpeed": ("zero_optimization: {stage: 3}", ["`zero3: {config: "]),
    "a config of axolotl": (
        "base_model: m\nadapter: lora",
        ["of the whole file: `llmload convert"],
    ),
}
"""What is wrong -> the spec, and what the refusal has to say."""

ON_THE_COMMAND_LINE: Final[dict[str, tuple[list[str], str]]] = {
    "a spec of another ending": (["demo.yml"], "Did you mean 'demo.yaml'?"),
    "TOML": (["spec.toml"], "this is TOML, and a spec is YAML or JSON"),
    "a file of weights": (["x.safetensors"], "this is a file of weights, not a spec. Give the fo"),
    "a misspelt folder": (["./modle"], "Did you mean 'model'?"),
    "a model's page": (["https://huggingface.co/org/name/tree/main"], "give the id, org/name."),
    "a model without owner": (["gpt2"], "of a model write `model: gpt2` in a spec."),
    "a tilde": (["~/nowhere-at-all"], "Write the path in full: "),
    "a variable": (["$HF_TOKEN"], "no variable is put in here."),
    "a key as an option": (["m/m", "--lora.r", "8"], "are set by `--set lora.r=VALUE`."),
    "a space for an equals sign": (["m/m", "--set", "lora.r", "8"], "by `--set KEY=VALUE`."),
}
"""What is wrong -> the words of the command line, and what the refusal has to say."""

_RUN: Final = """
import json, sys
from typer.testing import CliRunner
from llmload.cli import commands
found = {}
for name, (words, text) in json.load(sys.stdin).items():
    done = CliRunner().invoke(commands.app, ["validate", *words], input=text)
    found[name] = [done.exit_code, done.stdout, done.stderr]
print(json.dumps({"found": found, "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process said of all of them."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "model").mkdir()
    (folder / "demo.yaml").write_text("model: model", encoding="utf-8")
    (folder / "spec.toml").write_text('[model]\nname = "m"', encoding="utf-8")
    (folder / "x.safetensors").write_bytes(bytes(8))
    asked = {name: (["-"], text) for name, (text, _) in MISTAKES.items()}
    asked |= {name: (words, "") for name, (words, _) in ON_THE_COMMAND_LINE.items()}
    command = [sys.executable, "-c", _RUN]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, check=True, cwd=folder
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_common_mistake_is_refused_with_the_way_out(name: str, told: Any) -> None:
    exit_code, output, error = told["found"][name]
    assert (exit_code, output) == (2, "")
    assert "Traceback" not in error
    assert [words for words in MISTAKES[name][1] if words not in error] == [], error
    assert "hf_abc" not in error


@pytest.mark.parametrize("name", ON_THE_COMMAND_LINE)
def test_a_mistake_on_the_command_line_is_refused_with_the_way_out(name: str, told: Any) -> None:
    exit_code, output, error = told["found"][name]
    assert (exit_code, output) == (2, "")
    assert "Traceback" not in error
    assert ON_THE_COMMAND_LINE[name][1] in error


def test_no_mistake_is_waited_for_until_torch_is_imported(told: Any) -> None:
    assert len(told["found"]) == len(MISTAKES) + len(ON_THE_COMMAND_LINE) == 45
    assert told["torch"] is False

"""What a folder holds is shown as text: it can neither drive the terminal nor be markup."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmload.cli import app
from llmload.errors import visible
from llmload.testing import edit_config, tiny_llama

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
DRIVES = "\x1b]0;owned\x07\x1b[31mred\x9b2K"
TURNS = "a\u202egnp.exe"
MARKUP = "[/bold][link=http://example.org]here"
COMMANDS = ("inspect", "plan", "load", "targets")


def config(folder: Path, text: str, key: str) -> None:
    edit_config(folder, **{key: [text] if key == "architectures" else text})


def generation(folder: Path, text: str) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"cache_implementation": text}))


def tokenizer(folder: Path, text: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": text}))


def template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def tensor(folder: Path, text: str) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors: dict[str, Any] = load_file(file)
    save_file(tensors | {f"more.{text}": torch.zeros(2)}, file, metadata={"format": text})


def adapter(folder: Path, text: str) -> None:
    content = {"peft_type": text, "target_modules": [text], "base_model_name_or_path": text}
    (folder / "adapter_config.json").write_text(json.dumps(content))


PLACES: dict[str, Callable[[Path, str], None]] = {
    **{
        key: lambda folder, text, key=key: config(folder, text, key)
        for key in ("architectures", "model_type", "hidden_act", "torch_dtype", "dtype")
    },
    "quantization_config": lambda folder, text: (
        edit_config(folder, quantization_config={"quant_method": text}) and None
    ),
    "generation config": generation,
    "tokenizer": tokenizer,
    "chat template": template,
    "tensor": tensor,
    "adapter": adapter,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("sound"))


def said(words: list[str]) -> str:
    done = CliRunner().invoke(app, words)
    assert done.exit_code in (0, 2), done.output + str(done.exception)
    return done.output


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", [DRIVES, TURNS, MARKUP], ids=["drives", "turns", "markup"])
def test_nothing_that_a_folder_holds_reaches_the_terminal_as_a_control(
    sound: Path, tmp_path: Path, place: str, text: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    PLACES[place](folder, text)
    for command in COMMANDS:
        found = said([command, str(folder)])
        assert CONTROLS.findall(found) == []
    said(["inspect", str(folder), "--json"])


def test_the_name_of_a_folder_is_no_control_and_no_markup(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / f"{DRIVES}[red]{TURNS}"
    shutil.copytree(sound, folder)
    for command in COMMANDS:
        found = said([command, str(folder)])
        assert CONTROLS.findall(found) == []
        assert command == "targets" or "[red]" in "".join(found.split())


def test_what_is_not_seen_is_written_as_an_escape_and_letters_stay_what_they_are() -> None:
    assert visible("\x1b[0m\x9b\u202e") == "\\x1b[0m\\x9b\\u202e"
    assert visible("é 字 \t\n👍") == "é 字 \t\n👍"

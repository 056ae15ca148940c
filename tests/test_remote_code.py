"""``trust_remote_code``: a folder whose config and model class are its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sameness import differences, from_pretrained
from stacks import IS_MODERN
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmload
from llmload.cli import commands
from llmload.testing import tiny_llama

CONFIGURATION = """
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own_remote"

    def __init__(self, width=8, vocab_size=32, **kwargs):
        self.width = width
        self.vocab_size = vocab_size
        super().__init__(**kwargs)
"""

MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.gamma = nn.Parameter(torch.ones(config.width))
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Embedding, nn.Linear)):
            module.weight.data.normal_(0, 0.02)

    def forward(self, input_ids, **kwargs):
        hidden = self.embed(input_ids) * self.gamma * self.scale
        return CausalLMOutput(logits=self.head(hidden))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose code lies beside it; transformers copies the code to its module cache."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # it looks in the folder of another test
    made = tmp_path / "own"
    made.mkdir()
    (made / "configuration_own.py").write_text(CONFIGURATION)
    (made / "modeling_own.py").write_text(MODELING)
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    config = {"model_type": "own_remote", "architectures": ["OwnModel"], "auto_map": auto_map}
    (made / "config.json").write_text(json.dumps(config))
    weights = {
        "embed.weight": torch.randn(32, 8),
        "gamma": torch.randn(8),
        "head.weight": torch.randn(32, 8),
        "scale": torch.tensor([3.0]),
    }
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


says_no_dtype = pytest.mark.skipif(
    not IS_MODERN, reason="4.51.3 leaves a config that declares no dtype as it is"
)


@pytest.mark.parametrize("dtype", [pytest.param("auto", marks=says_no_dtype), "bfloat16"])
def test_a_trusted_folders_own_class_is_streamed_as_from_pretrained_loads_it(
    dtype: str, folder: Path
) -> None:
    result = llmload.load({"model": str(folder), "trust_remote_code": True, "dtype": dtype})
    assert type(result.model).__name__ == "OwnModel"
    assert result.report.loader == "streaming"
    options = {"trust_remote_code": True, "dtype": dtype}
    assert differences(result.model, from_pretrained(AutoModelForCausalLM, folder, **options)) == []
    assert result.report.audit[0] == "no tensor is on the meta device"


def test_the_code_goes_with_a_model_that_is_saved(folder: Path, tmp_path: Path) -> None:
    spec = {"model": str(folder), "trust_remote_code": True, "dtype": "float32"}
    result = llmload.load(spec)
    llmload.save(result, tmp_path / "out")
    options = {"trust_remote_code": True, "dtype": "float32"}
    plain = from_pretrained(AutoModelForCausalLM, tmp_path / "out", **options)
    mine, theirs = result.model.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_untrusted_folders_code_does_not_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n" + CONFIGURATION
    (folder / "configuration_own.py").write_text(code)
    with pytest.raises(llmload.CheckpointError, match="Set `trust_remote_code: true` if you trust"):
        llmload.load({"model": str(folder)})
    assert not ran.exists()


FAULTS = {
    "import no_such_package": (
        "ModuleNotFoundError",
        "No module named 'no_such_package'",
        "Install the package that it needs, or mend the code.",
    ),
    "def broken(:": (
        "SyntaxError",
        "invalid syntax",
        "Mend the code, or use the versions of Python, torch and transformers it was written for.",
    ),
    "raise RuntimeError('not on\\nthis machine')": (
        "RuntimeError",
        "not on this machine",
        "Mend the code, or use the versions of Python, torch and transformers it was written for.",
    ),
}


LEAVES = {
    "raise SystemExit(3)": (
        "SystemExit",
        "3",
        "Mend the code, or use the versions of Python, torch and transformers it was written for.",
    ),
}


@pytest.mark.parametrize("fault", [*FAULTS, *LEAVES])
def test_a_class_of_the_users_that_cannot_be_imported_is_refused_with_the_reason(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, reason, _ = (FAULTS | LEAVES)[fault]
    folder = tiny_llama(tmp_path)
    module = tmp_path / "of_the_users.py"
    module.write_text(f"import os\n{fault}\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: {folder}\nauto_class: of_the_users:Model\n")
    for command in ("plan", "load"):
        answer = CliRunner().invoke(commands.app, [command, "--json", str(spec)])
        assert answer.exit_code == 2
        (problem,) = json.loads(answer.stdout)["problems"]
        assert problem["where"] == "auto_class"
        assert problem["message"].startswith(
            f"'of_the_users:Model' cannot be imported ({kind}, {module} line 2): {reason}"
        )
        assert problem["fix"] == (
            "Install the package that it needs, or mend the code."
            if kind == "ModuleNotFoundError"
            else "Mend the code."
        )


@pytest.mark.parametrize("file", ["configuration_own.py", "modeling_own.py"])
@pytest.mark.parametrize("fault", [*FAULTS, *LEAVES])
def test_code_that_cannot_be_imported_is_refused_with_the_reason(
    fault: str, file: str, folder: Path, tmp_path: Path
) -> None:
    kind, reason, fix = (FAULTS | LEAVES)[fault]
    code = (folder / file).read_text()
    # transformers looks for packages by itself, but not inside a `try`.
    hidden = f"try:\n    {fault}\nexcept KeyError:\n    pass\n"
    (folder / file).write_text(f"{hidden}{code}")
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: {folder}\ntrust_remote_code: true\n")
    for command in ("plan", "load"):
        answer = CliRunner().invoke(commands.app, [command, "--json", str(spec)])
        assert answer.exit_code == 2
        (problem,) = json.loads(answer.stdout)["problems"]
        assert problem["message"].startswith(
            f"the code that comes with the model cannot be imported ({kind}"
        )
        assert reason in problem["message"]
        assert problem["fix"] == fix

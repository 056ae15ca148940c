"""Saving: what loads again bit-equal in plain transformers, PEFT and llmload, or is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from stacks import IS_MODERN, needs_bitsandbytes
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import llmload
from llmload.cli import commands
from llmload.testing import IDS, losses, tiny_checkpoint, tiny_llama

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("save") / "llama",
        dtype=torch.bfloat16,
        pad=True,
        chat_template=TEMPLATE,
        hidden_size=64,
        intermediate_size=128,
    )


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained for three steps."""
    result = llmload.load({"model": str(llama), "dtype": "float32", "lora": {"r": 4}})
    losses(result.model, 3)
    folder = tmp_path_factory.mktemp("adapter") / "trained"
    llmload.save(result, folder)
    return folder


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])
        for name in mine
    )


def by_transformers(folder: Path) -> Any:
    name = "dtype" if IS_MODERN else "torch_dtype"
    return AutoModelForCausalLM.from_pretrained(folder, **{name: "auto"})


def nothing_left(tmp_path: Path) -> bool:
    return [path.name for path in tmp_path.iterdir()] == []


# --- what is saved --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        pytest.param("llama", {}, id="plain"),
        pytest.param("tied", {}, id="tied"),
        pytest.param("llama", {"dtype": "float32"}, id="another dtype"),
        pytest.param("llama", {"embeddings": {"pad_to_multiple_of": 100}}, id="resized"),
        pytest.param("tied", {"embeddings": {"pad_to_multiple_of": 100}}, id="tied and resized"),
        pytest.param("tied", {"weights": "random", "trainable": False}, id="random"),
        pytest.param("llama", {"config": {"rms_norm_eps": 1e-3}}, id="another config"),
    ],
)
def test_a_model_loads_again_bit_equal_in_transformers_and_llmload(
    kind: str, spec: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    result = llmload.load({"model": str(request.getfixturevalue(kind)), **spec})
    saved = llmload.save(result, tmp_path / "out")
    assert saved.kind == "model"
    plain = by_transformers(tmp_path / "out")
    assert same(result.model, plain)
    again = llmload.load({"model": str(tmp_path / "out")})
    assert same(result.model, again.model)
    assert again.report.newly_initialised == {}
    assert again.report.warnings == []
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, result.model(IDS).logits)


def test_parts_in_another_dtype_are_stored_in_it(llama: Path, tmp_path: Path) -> None:
    spec = {"model": str(llama), "cast": {"modules": {"norm": "float32"}}}
    result = llmload.load(spec)
    llmload.save(result, tmp_path / "out")
    assert same(result.model, llmload.load(spec | {"model": str(tmp_path / "out")}).model)


def test_a_model_is_saved_as_it_was_trained(tied: Path, tmp_path: Path) -> None:
    result = llmload.load({"model": str(tied)})
    losses(result.model, 2)
    llmload.save(result, tmp_path / "out")
    assert same(result.model, by_transformers(tmp_path / "out"))
    assert not same(result.model, by_transformers(tied))


def test_weights_are_sharded_as_asked(llama: Path, tmp_path: Path) -> None:
    saved = llmload.save({"model": str(llama)}, tmp_path / "out", max_shard_size="60KB")
    shards = [file.size for file in saved.files if file.name.endswith(".safetensors")]
    assert len(shards) > 2
    assert "model.safetensors.index.json" in [file.name for file in saved.files]
    assert same(by_transformers(llama), by_transformers(tmp_path / "out"))


def test_an_adapter_is_merged_as_peft_merges_it(llama: Path, trained: Path, tmp_path: Path) -> None:
    spec = {"model": str(llama), "lora": {"adapter": str(trained), "merge": True}}
    saved = llmload.save(spec | {"dtype": "float32"}, tmp_path / "out")
    assert saved.kind == "model"
    name = "dtype" if IS_MODERN else "torch_dtype"
    base = AutoModelForCausalLM.from_pretrained(llama, **{name: torch.float32})
    theirs = peft.PeftModel.from_pretrained(base, trained).merge_and_unload()
    assert same(theirs, by_transformers(tmp_path / "out"))


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({}, id="plain"),
        pytest.param({"lora": {"r": 4, "adapter_name": "second"}}, id="named"),
        pytest.param({"embeddings": {"pad_to_multiple_of": 100}}, id="resized"),
        pytest.param({"lora": {"r": 2, "modules_to_save": ["lm_head"]}}, id="with a head"),
        pytest.param({"kbit": {}}, id="on 4 bits", marks=needs_bitsandbytes),
    ],
)
def test_an_adapter_loads_again_bit_equal_in_peft_and_llmload(
    spec: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    asked = {"model": str(llama), "lora": {"r": 4}, **spec}
    result = llmload.load(asked)
    with torch.no_grad():
        for name, parameter in result.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    saved = llmload.save(result, tmp_path / "out")
    assert saved.kind == "adapter"
    assert "adapter_model.safetensors" in [file.name for file in saved.files]
    again = llmload.load(asked | {"lora": {"adapter": str(tmp_path / "out")}})
    with torch.no_grad():
        logits = result.model(IDS).logits
        assert torch.equal(again.model(IDS).logits, logits)
        if "kbit" not in spec:
            assert torch.equal(_as_the_card_says(tmp_path / "out")(IDS).logits, logits)


def _as_the_card_says(folder: Path) -> Any:
    """Run the Python of a model card."""
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    if not IS_MODERN:
        code = code.replace("dtype=", "torch_dtype=")
    found: dict[str, Any] = {"folder": str(folder)}
    exec(code, found)
    return found["model"]


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_saved_with_its_codes(bits: int, llama: Path, tmp_path: Path) -> None:
    result = llmload.load({"model": str(llama), "kbit": {"bits": bits}, "trainable": False})
    saved = llmload.save(result, tmp_path / "out")
    assert saved.kind == "quantised model"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mine, theirs = dict(result.model.named_parameters()), dict(plain.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].data, theirs[name].data) for name in mine)
    again = {"model": str(tmp_path / "out"), "kbit": {"bits": bits}, "trainable": False}
    with torch.no_grad():
        assert torch.equal(llmload.load(again).model(IDS).logits, result.model(IDS).logits)


def test_tokenizer_and_chat_template_go_with_model_and_adapter(
    llama: Path, trained: Path, tmp_path: Path
) -> None:
    llmload.save(
        {"model": str(llama), "tokenizer": {"add_tokens": ["<new>"]}, "embeddings": {}},
        tmp_path / "out",
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.convert_tokens_to_ids("<new>") == len(tokenizer) - 1
    assert AutoTokenizer.from_pretrained(trained).chat_template == TEMPLATE


def test_a_generation_config_that_transformers_would_not_save_is_saved(
    llama: Path, tmp_path: Path
) -> None:
    result = llmload.load({"model": str(llama)})
    result.model.generation_config.do_sample = False
    result.model.generation_config.temperature = 0.6
    if not IS_MODERN:  # which does not load such a file either
        with pytest.raises(llmload.LoadFailedError) as caught:
            llmload.save(result, tmp_path / "out")
        assert str(caught.value).startswith(
            f"what was written does not load again: {tmp_path / 'out' / 'generation_config.json'}:"
            " transformers refuses the generation config: `do_sample` is set to `False`."
        )
        return
    llmload.save(result, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["temperature"] == 0.6
    assert written["eos_token_id"] == result.model.generation_config.eos_token_id
    assert result.model.generation_config.temperature == 0.6


def test_the_card_names_base_spec_plugins_and_versions(trained: Path, llama: Path) -> None:
    card = (trained / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\ntags:\n- llmload\n- lora\n---\n")
    assert f"## Base model\n\n`{llama}`\n" in card
    assert f"```yaml\nmodel: {llama}\ndtype: float32\nlora:\n  r: 4\n```" in card
    assert re.search(r"^\| lora \| llmload \d", card, re.MULTILINE)
    assert f"| torch | {metadata.version('torch')} |" in card


# --- what is refused ------------------------------------------------------------------------------


class Witness:
    """Tells that a load has begun to load."""

    name = "witness"

    @llmload.hookimpl
    def init_context(self, ctx: llmload.LoadContext) -> None:
        raise AssertionError("the load has begun")


class Extra(Witness):
    """Gives the model a head that its class does not know."""

    name = "extra"

    @llmload.hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
        model.score = torch.nn.Linear(64, 1)
        return model


def refused(spec: dict[str, Any], folder: Path, plugin: Any = Witness, **options: Any) -> str:
    """Return the refusal of a save that must not have read a weight."""
    registry = llmload.create_registry([plugin()])
    with pytest.raises(llmload.RequestError) as caught:
        llmload.save(spec, folder, registry=registry, **options)
    return str(caught.value)


def test_a_folder_with_files_is_refused_and_left_alone(llama: Path) -> None:
    before = {path.name: path.read_bytes() for path in llama.iterdir()}
    assert refused({"model": str(llama)}, llama) == (
        f"the folder {str(llama)!r} has files in it, and nothing is written over. Name a new or an"
        " empty folder."
    )
    assert {path.name: path.read_bytes() for path in llama.iterdir()} == before


def test_a_file_is_no_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    said = f"{tmp_path / 'out'}: it cannot be written: Not a directory."
    assert refused({"model": str(llama)}, tmp_path / "out").startswith(said)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_size_that_is_none_is_refused(llama: Path, tmp_path: Path) -> None:
    assert refused({"model": str(llama)}, tmp_path / "out", max_shard_size="5 gigs") == (
        "max_shard_size: the size '5 gigs' is none that files can have. Write a number and a unit,"
        " such as 5GB or 500MB."
    )


def test_several_processes_save_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in (launcher | {"MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    assert refused({"model": str(llama)}, tmp_path / "out") == (
        "2 processes would each save the same folder. Start it once, without a launcher."
    )


def test_a_head_that_the_class_does_not_know_is_refused(llama: Path, tmp_path: Path) -> None:
    assert refused({"model": str(llama)}, tmp_path / "out", Extra) == (
        "the LlamaForCausalLM has what its class does not know, so that no other program could load"
        " it from a folder: 'score.bias', 'score.weight'. Save it without the plugin that changed"
        " it, or save its `state_dict()` yourself and load it with that plugin."
    )
    assert nothing_left(tmp_path)


class Wrapped(Witness):
    """Hands out something that is no model of transformers."""

    name = "wrapped"

    @llmload.hookimpl
    def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
        return torch.nn.Sequential(model)


class Lazy(Witness):
    """Says that somebody else will load the weights."""

    name = "lazy"

    @llmload.hookimpl
    def check(self, ctx: llmload.LoadContext) -> Any:
        ctx.awaiting = "Booster.boost"
        yield llmload.Note(text="lazy")


class Spread(Witness):
    """Says that weights are split."""

    name = "spread"

    @llmload.hookimpl
    def check(self, ctx: llmload.LoadContext) -> Any:
        ctx.placed_by, ctx.splits = "spread", True
        yield llmload.Note(text="split")


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (
            Wrapped,
            "a Sequential is no model of transformers, and no adapter around one: no other program"
            " could load what is saved of it. Save its `state_dict()` yourself, or the model inside"
            " it.",
        ),
        (
            Lazy,
            "the model has no weights to save: they come with Booster.boost. Save it after"
            " Booster.boost, by its own means, or load it without.",
        ),
        (
            Spread,
            "spread: the weights are kept in parts, of which no process has all. Load it for saving"
            " without `spread`: merging needs no GPU.",
        ),
    ],
)
def test_what_has_no_weights_of_its_own_is_refused_before_any_is_read(
    plugin: Any, said: str, llama: Path, tmp_path: Path
) -> None:
    assert refused({"model": str(llama)}, tmp_path / "out", plugin) == said
    assert nothing_left(tmp_path)


def test_a_model_that_deepspeed_keeps_in_parts_is_refused(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    assert refused({"model": str(llama), "zero3": {}}, tmp_path / "out") == (
        "zero3: the weights are kept in parts, of which no process has all. Load it for saving"
        " without `zero3`: merging needs no GPU."
    )


def test_a_result_that_waits_for_its_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    result = replace(llmload.load({"model": str(llama)}), awaiting="Booster.boost")
    with pytest.raises(llmload.PlanError, match="they come with Booster"):
        llmload.save(result, tmp_path / "out")


def test_a_model_in_parts_is_refused(llama: Path, tmp_path: Path) -> None:
    result = llmload.load({"model": str(llama)})
    next(result.model.parameters()).ds_tensor = None  # as DeepSpeed's have one
    with pytest.raises(llmload.PlanError) as caught:
        llmload.save(result, tmp_path / "out")
    assert str(caught.value) == (
        "the weights are kept in parts, of which no process has all. Save it with what it is"
        " trained with, which knows how its parts become a whole."
    )


@needs_bitsandbytes
def test_a_merge_into_few_bits_is_refused(llama: Path, trained: Path, tmp_path: Path) -> None:
    spec = {"model": str(llama), "kbit": {}, "lora": {"adapter": str(trained), "merge": True}}
    assert refused(spec, tmp_path / "out") == (
        "lora.merge: the base is quantised, and an adapter merged into so few bits is mostly lost."
        " Remove `kbit`: the base is then read in full precision, and merged there."
    )


# --- all or nothing -------------------------------------------------------------------------------


class Broken:
    """Stands for a tokenizer, and fails when everything else is written."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_pretrained(self, folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()
        raise self.error


def test_nothing_is_left_of_a_save_that_is_interrupted(llama: Path, tmp_path: Path) -> None:
    stopped: Any = Broken(KeyboardInterrupt())
    result = replace(llmload.load({"model": str(llama)}), tokenizer=stopped)
    with pytest.raises(KeyboardInterrupt):
        llmload.save(result, tmp_path / "further" / "down" / "out")
    assert nothing_left(tmp_path)
    (tmp_path / "out").mkdir()  # an empty one stays as it was
    with pytest.raises(KeyboardInterrupt):
        llmload.save(result, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert nothing_left(tmp_path / "out")


def test_nothing_is_left_of_a_save_that_fails(llama: Path, tmp_path: Path) -> None:
    failing: Any = Broken(RuntimeError("no such vocabulary."))
    result = replace(llmload.load({"model": str(llama)}), tokenizer=failing)
    with pytest.raises(llmload.LoadFailedError) as caught:
        llmload.save(result, tmp_path / "out")
    assert str(caught.value) == (
        "saving failed, and nothing is left of it: RuntimeError: no such vocabulary"
    )
    full: Any = Broken(OSError(28, "No space left on device"))
    with pytest.raises(llmload.RequestError) as refusal:
        llmload.save(replace(result, tokenizer=full), tmp_path / "out")
    assert str(refusal.value).startswith(
        f"{tmp_path / 'out'}: it cannot be written: No space left on device; "
    )
    assert nothing_left(tmp_path)


def test_what_was_written_is_held_to_the_model(llama: Path, tmp_path: Path) -> None:
    result = llmload.load({"model": str(llama)})
    honest = result.model.save_pretrained

    def dishonest(folder: Path, **options: Any) -> None:
        with torch.no_grad():
            result.model.lm_head.weight[0, 0] += 1
            honest(folder, **options)
            result.model.lm_head.weight[0, 0] -= 1

    result.model.save_pretrained = dishonest
    with pytest.raises(llmload.LoadFailedError) as caught:
        llmload.save(result, tmp_path / "out")
    assert str(caught.value) == (
        "what was written is not what the model holds: 'lm_head.weight'. Nothing is left of it."
        " Report this, with the model's type and the versions."
    )
    assert nothing_left(tmp_path)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_what_python_does_and_lists_it(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    done = CliRunner().invoke(
        commands.app,
        ["save", str(llama), "--set", "lora={r: 2}", "--to", str(target)],
        env={"COLUMNS": "300"},
    )
    assert done.exit_code == 0, done.output
    assert re.search(r"^adapter +.*out", done.stdout, re.MULTILINE)
    assert re.search(r"^file +adapter_model.safetensors, ", done.stdout, re.MULTILINE)
    names = {path.name for path in target.iterdir()}
    done = CliRunner().invoke(commands.app, ["save", str(llama), "--to", str(target), "--json"])
    assert done.exit_code == 2
    assert "has files in it" in json.loads(done.stdout)["problems"][0]["message"]
    assert {path.name for path in target.iterdir()} == names


def test_the_command_writes_json(llama: Path, tmp_path: Path) -> None:
    arguments = ["save", str(llama), "--to", str(tmp_path / "out"), "--max-shard-size", "60KB"]
    done = CliRunner().invoke(commands.app, [*arguments, "--json"])
    found = json.loads(done.stdout)
    assert found["kind"] == "model"
    listed = {file["name"]: file["size"] for file in found["files"]}
    assert listed == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}

"""examples/eric_mitchell_dpo.yaml loads what eric-mitchell/direct-preference-optimization trains.

What its train.py and utils.py do is written down here from f8b8c0f. Nothing of the example is
substituted: the model is found as its cache lays it out.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import EXAMPLES, recipe
from stacks import needs_safe_pickles
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import llmload
from llmload.hf import installed_transformers
from llmload.testing import (
    IDS,
    SENTENCES,
    hold_frozen,
    parameters,
    same,
    save_checkpoint,
    tiny_tokenizer,
    trainable,
)

MODEL = "EleutherAI/pythia-2.8b"
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in a hub cache at ``.cache`` of a working directory."""
    place = tmp_path_factory.mktemp("dpo")
    repository = place / ".cache" / f"models--{MODEL.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    config = AutoConfig.for_model(
        "gpt_neox",
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.float16)
    return save_checkpoint(model, repository / "snapshots" / COMMIT, tokenizer=tiny_tokenizer())


@pytest.fixture
def place(snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of one run, an SFT archive in it."""
    shutil.copytree(snapshot.parents[2], tmp_path / ".cache")
    trained = read(snapshot, torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    (tmp_path / ".cache" / "LATEST").mkdir()
    archive = {"step_idx": 9984, "state": trained.state_dict(), "metrics": {"loss/eval": 1.5}}
    torch.save(archive, tmp_path / ".cache" / "LATEST" / "policy.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, **installed_transformers().dtype_option(dtype)
    )


def get_local_dir(prefixes: list[str]) -> Path:
    """Return the first of the folders that is there, else the last."""
    return next((Path(p) for p in prefixes if Path(p).exists()), Path(prefixes[-1]))


def as_their_script_does(folder: Path, archive: Path | None) -> dict[str, Any]:
    """Build both models, turn the dropout modules off, put the archive's state into both."""
    models = {"policy": read(folder, torch.float32), "reference": read(folder, torch.float16)}
    for model in models.values():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0
        if archive is not None:
            model.load_state_dict(torch.load(archive, map_location="cpu")["state"])
    return models


def held_to(group: Any, theirs: dict[str, Any]) -> None:
    for name, model in theirs.items():
        mine, other = parameters(group[name].model), parameters(model)
        assert mine.keys() == other.keys()
        for key, parameter in mine.items():
            assert same(parameter, other[key]), f"{name}: {key}"
        modules = [m for m in group[name].model.modules() if isinstance(m, nn.Dropout)]
        assert modules
        assert {module.p for module in modules} == {0.0}


@needs_safe_pickles
def test_the_example_as_it_stands_is_their_policy_and_reference(
    place: Path, snapshot: Path
) -> None:
    group = llmload.load_group(EXAMPLES / "eric_mitchell_dpo.yaml")
    held_to(group, as_their_script_does(snapshot, place / ".cache" / "LATEST" / "policy.pt"))
    prefixes = recipe("eric_mitchell_dpo", {})["models"]["policy"]["cache_dir"]
    assert prefixes == ["/scr-ssd", "/scr", ".cache"]
    assert Path(group.plan.members["policy"].folder).is_relative_to(
        get_local_dir(prefixes).absolute()
    )


def test_without_an_archive_both_are_the_model_itself(place: Path, snapshot: Path) -> None:
    spec = recipe("eric_mitchell_dpo", {})
    del spec["models"]["policy"]["weights_from"], spec["models"]["policy"]["allow_pickle"]
    held_to(llmload.load_group(spec), as_their_script_does(snapshot, None))


@needs_safe_pickles
def test_the_policy_alone_is_trained_and_the_reference_is_frozen(place: Path) -> None:
    """Theirs leaves the reference to the trainer's no_grad."""
    group = llmload.load_group(EXAMPLES / "eric_mitchell_dpo.yaml")
    policy, reference = group["policy"].model, group["reference"].model
    assert trainable(policy) == set(parameters(policy))
    hold_frozen(reference)
    before = {name: p.clone() for name, p in parameters(reference).items()}
    policy.train()
    # Dropout is off in attention too, which reads its rate from a number and from no module.
    torch.manual_seed(0)
    losses = [policy(input_ids=IDS, labels=IDS).loss for _ in range(2)]
    assert same(*losses)
    losses[0].backward()
    torch.optim.RMSprop(policy.parameters(), lr=1e-3).step()
    assert all(same(p, before[name]) for name, p in parameters(reference).items())


@needs_safe_pickles
def test_an_archive_that_does_not_fit_is_refused_as_by_their_strict_reading(place: Path) -> None:
    file = place / ".cache" / "LATEST" / "policy.pt"
    archive = torch.load(file)
    archive["state"]["gpt_neox.layers.0.bias"] = torch.zeros(1)
    torch.save(archive, file)
    with pytest.raises(llmload.RequestError, match=r"gpt_neox\.layers\.0\.bias"):
        llmload.load_group(EXAMPLES / "eric_mitchell_dpo.yaml")


@needs_safe_pickles
def test_the_tokenizer_pads_with_eos_where_it_has_no_pad_token(place: Path, snapshot: Path) -> None:
    plain = AutoTokenizer.from_pretrained(snapshot)
    if plain.pad_token_id is None:
        plain.pad_token_id = plain.eos_token_id
    group = llmload.load_group(EXAMPLES / "eric_mitchell_dpo.yaml")
    texts = list(SENTENCES)
    for name in group:
        tokenizer = group[name].tokenizer
        assert tokenizer.pad_token_id == plain.pad_token_id == 2
        assert tokenizer(texts, padding=True).data == plain(texts, padding=True).data

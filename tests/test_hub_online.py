"""Repositories of a hub that is asked: what of them is fetched, when, and what a plan knows before.

The hub is a server on this machine that speaks the protocol of huggingface.co, asked by processes
of their own, as the hub's address is read when its library is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Hub, serving

import llmload
from llmload.testing import tiny_llama

STEPS = """
import json, sys
from urllib.request import urlopen
import llmload

answers = {}
for name, action, spec in json.loads(sys.argv[1]):
    answer = answers[name] = {}
    try:
        found = getattr(llmload, action)(spec)
        if action == "plan":
            answer |= {"to_fetch": found.to_fetch, "errors": list(map(str, found.errors))}
            answer |= {"parameters": found.parameters, "loader": found.loader}
        elif action == "load":
            answer |= {"loader": found.report.loader, "class": type(found.model).__name__}
            answer |= {"parameters": found.report.parameters}
            answer |= {"adapted": sum("lora_" in n for n, _ in found.model.named_parameters())}
        else:
            answer["members"] = list(found)
    except llmload.LlmloadError as error:
        answer["error"] = str(error)
    answer["sent"] = json.load(urlopen(sys.argv[2] + "/sent"))
print(json.dumps(answers))
"""

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .helper_own import NUMBER

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    number = NUMBER
"""
TRUSTED = {"trust_remote_code": True}
UNNEEDED = ("LICENSE.txt", "consolidated.safetensors", "original/params.json", "onnx/model.onnx")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    tmp = tmp_path_factory.mktemp("hub")
    large = {"hidden_size": 128, "vocab_size": 4096}
    with serving() as served:
        plain = tiny_llama(tmp, name="plain", shards=2, **large)
        for name in (*UNNEEDED, "pytorch_model.bin", "checkpoint-5/model.safetensors"):
            (plain / name).parent.mkdir(exist_ok=True)
            (plain / name).write_bytes(b"x" * 5000)
        other = tiny_llama(tmp, name="other", **large)
        inner = tmp / "inner"
        shutil.copytree(other, inner / "actor")
        own, tuned = (_with_code(tmp, other, name) for name in ("own", "tuned"))
        for file in tuned.glob("*.py"):
            file.unlink()
        served.repositories = {
            "org/plain": plain,
            "org/other": other,
            "gpt2": other,
            "org/inner": inner,
            "org/own": own,
            "org/tuned": tuned,
            "org/pickle": _pickled(tmp, other),
            "org/withheld": other,
            "org/adapter": _adapter(tmp, plain, "adapter"),
            "org/second": _adapter(tmp, plain, "second"),
            "org/wicked": _adapter(tmp, plain, "wicked", auto_mapping={"__class__": "x"}),
        }
        served.withheld = {"org/withheld/model.safetensors"}
        yield served


def _with_code(tmp: Path, model: Path, name: str) -> Path:
    """A model with classes of its own; those of ``tuned`` are in the repository of ``own``."""
    folder = tmp / name
    shutil.copytree(model, folder)
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    (folder / "helper_own.py").write_text("NUMBER = 3\n")
    place = "org/own--" if name == "tuned" else ""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {
        "AutoConfig": f"{place}configuration_own.OwnConfig",
        "AutoModelForCausalLM": f"{place}modeling_own.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _adapter(tmp: Path, model: Path, name: str, **config: Any) -> Path:
    """An adapter as a Trainer pushes it: with a tokenizer, an older checkpoint and a pickle."""
    result = llmload.load({"model": str(model), "lora": {"r": 2, "init_lora_weights": False}})
    result.model.save_pretrained(tmp / name)
    for file in ("adapter_model.bin", "training_args.bin", "tokenizer.json", "README.md"):
        (tmp / name / file).write_bytes(b"x" * 5000)
    shutil.copytree(tmp / name, tmp / name / "checkpoint-5")
    content = json.loads((tmp / name / "adapter_config.json").read_text()) | config
    (tmp / name / "adapter_config.json").write_text(json.dumps(content))
    return tmp / name


def _pickled(tmp: Path, model: Path) -> Path:
    import torch
    from safetensors.torch import load_file

    folder = tmp / "pickle"
    shutil.copytree(model, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def _ask(hub: Hub, cache: Path, steps: list[tuple[str, str, Any]], **environment: str) -> Any:
    """Take steps in a new process; returns for each what came out and what was sent for it."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, json.dumps(steps), hub.url],
        env=dict(os.environ) | hub.environment(cache) | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def told(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that goes online was told, and after it one that does not."""
    cache = tmp_path_factory.mktemp("cache")
    nothing, local = tmp_path_factory.mktemp("nothing"), str(hub.repositories["org/tuned"])
    plain, wrong = {"model": "org/plain"}, {"lora": {"target_modules": ["query"]}}
    policy = {"model": "org/other", "trainable": True}
    at_commit = {"adapter": "org/adapter", "adapter_revision": COMMIT}
    inner = {"model": "org/inner", "subfolder": "actor", "tokenizer": {"name_or_path": "org/plain"}}
    group = {"models": {"policy": policy, "reference": {"like": "policy", "trainable": False}}}
    wrong_group = {"models": {"good": policy, "bad": {"like": "good", **wrong}}}
    online = _ask(
        hub,
        cache,
        [
            ("plan", "plan", plain),
            ("wrong target", "load", plain | wrong),
            ("wrong class", "load", plain | {"auto_class": "seq2seq_lm"}),
            ("load", "load", plain),
            ("plan again", "plan", plain),
            ("one word", "plan", {"model": "gpt2"}),
            ("subfolder", "plan", {"model": "org/inner", "subfolder": "actor"}),
            ("no revision", "plan", plain | {"revision": "v3"}),
            ("no repository", "plan", {"model": "org/nobodys"}),
            ("bad group", "load_group", wrong_group),
            ("group", "load_group", group),
            ("pickle refused", "plan", {"model": "org/pickle"}),
            ("pickle planned", "plan", {"model": "org/pickle", "allow_pickle": True}),
            ("withheld", "plan", {"model": "org/withheld"}),
            ("code untrusted", "load", {"model": "org/tuned"}),
            ("code", "load", {"model": "org/own"} | TRUSTED),
            ("code elsewhere", "load", {"model": "org/tuned"} | TRUSTED),
            ("adapter", "plan", plain | {"lora": {"adapter": "org/adapter"}}),
            ("adapter loaded", "load", plain | {"lora": {"adapter": "org/adapter"}}),
            ("adapter at a commit", "load", plain | {"lora": at_commit}),
            ("adapters", "load", plain | {"lora": {"merge_first": ["org/second"], **at_commit}}),
            (
                "adapter, no revision",
                "plan",
                plain | {"lora": at_commit | {"adapter_revision": "v3"}},
            ),
            ("adapter, nobody's", "plan", plain | {"lora": {"adapter": "org/nobodys"}}),
            ("adapter, a model", "plan", plain | {"lora": {"adapter": "org/other"}}),
            ("adapter, wicked", "plan", plain | {"lora": {"adapter": "org/wicked"}}),
            ("adapter in a folder", "plan", inner | {"lora": {"adapter": "org/adapter"}}),
        ],
    )
    offline = _ask(
        hub,
        cache,
        [
            ("offline", "load", plain),
            ("offline, pickles allowed", "load", plain | {"allow_pickle": True}),
            ("offline, code", "load", {"model": "org/own"} | TRUSTED),
            ("offline, code elsewhere", "load", {"model": "org/tuned"} | TRUSTED),
            ("offline, nothing there", "plan", {"model": "gpt2"}),
            ("offline, adapter", "load", plain | {"lora": {"adapter": "org/adapter"}}),
            ("offline, at a commit", "load", plain | {"lora": at_commit}),
            ("offline, no adapter", "load", plain | {"lora": {"adapter": "org/wanting"}}),
            ("offline, no code", "load", {"model": local, "cache_dir": str(nothing)} | TRUSTED),
        ],
        HF_HUB_OFFLINE="1",
    )
    return {**online, **offline}


def sizes(hub: Hub, repository: str) -> dict[str, int]:
    folder = hub.repositories[repository]
    return {path.name: path.stat().st_size for path in folder.glob("model*.safetensors")}


def sent(answer: dict[str, Any], suffix: str = ".safetensors") -> int:
    return sum(count for name, count in answer["sent"].items() if name.endswith(suffix))


def test_a_plan_of_a_model_that_is_not_downloaded_is_made_of_headers(
    hub: Hub, told: dict[str, Any]
) -> None:
    found = told["plan"]
    assert found["errors"] == []
    assert found["loader"] == "streaming"
    assert found["to_fetch"] == sizes(hub, "org/plain")
    assert found["parameters"] == told["load"]["parameters"]
    assert 0 < sent(found) < sum(found["to_fetch"].values())


def test_what_cannot_work_is_refused_before_weights_are_fetched(
    hub: Hub, told: dict[str, Any]
) -> None:
    assert told["wrong target"]["error"].startswith("lora.target_modules: no module of")
    assert told["wrong class"]["error"].startswith("auto_class: model type 'llama' has no class")
    for name in ("wrong target", "wrong class"):
        assert sent(told[name]) < sum(sizes(hub, "org/plain").values())
    assert told["bad group"]["error"].startswith("models.bad.lora.target_modules: no module")
    assert sent(told["bad group"]) < 2 * sum(sizes(hub, "org/other").values())


def test_a_load_fetches_what_it_needs_and_nothing_twice(hub: Hub, told: dict[str, Any]) -> None:
    weights = sum(sizes(hub, "org/plain").values())
    assert told["load"]["loader"] == "streaming"
    assert weights <= sent(told["load"]) < weights * 1.5  # headers are read again
    fetched = {name.removeprefix("org/plain/") for one in told.values() for name in one["sent"]}
    assert not fetched & {*UNNEEDED, "pytorch_model.bin", "checkpoint-5/model.safetensors"}
    assert told["plan again"]["to_fetch"] == {}
    assert sent(told["plan again"]) == 0
    assert told["group"]["members"] == ["policy", "reference"]


def test_an_id_of_one_word_and_a_folder_in_a_repository_are_planned_alike(
    hub: Hub, told: dict[str, Any]
) -> None:
    for name in ("one word", "subfolder"):
        assert told[name]["to_fetch"] == sizes(hub, "org/other")


def test_what_the_hub_does_not_have_is_told(told: dict[str, Any]) -> None:
    assert told["no revision"]["error"] == (
        "model: the hub repository 'org/plain' has no revision 'v3'. Give a branch, tag or commit"
        " of the repository."
    )
    assert told["no repository"]["error"] == (
        "model: neither a folder nor a hub repository is called 'org/nobodys'. Check the id, or log"
        " in with `hf auth login` if it is private."
    )


def test_pickles_are_known_once_they_are_here(told: dict[str, Any]) -> None:
    assert "the folder holds neither model.safetensors nor" in told["pickle refused"]["error"]
    assert told["pickle planned"]["error"] == (
        "model: the weights of 'org/pickle' are not in the cache, and what is in the pickle"
        " 'pytorch_model.bin' is known only once it is here. Fetch it with `hf download"
        " org/pickle`; a load does so."
    )
    assert sent(told["pickle planned"], ".bin") == 0


def test_trusted_code_is_fetched_from_its_own_repository_or_another(told: dict[str, Any]) -> None:
    assert "brings code of its own" in told["code untrusted"]["error"]
    assert sent(told["code untrusted"], ".py") == 0
    for name in ("code", "code elsewhere", "offline, code", "offline, code elsewhere"):
        assert told[name].get("class") == "OwnModel", told[name]


def test_a_header_that_the_hub_withholds_is_told(hub: Hub, told: dict[str, Any]) -> None:
    error = told["withheld"]["error"]
    place = f"{hub.url}/org/withheld/resolve/{COMMIT}/model.safetensors"
    assert error.startswith(f"model: the header of {place} cannot be fetched: ")
    assert error.endswith(" Try again, or fetch the weights with `hf download`.")


def test_trusted_code_that_is_in_no_cache_says_how_to_fetch_it(told: dict[str, Any]) -> None:
    error = told["offline, no code"]["error"]
    assert "the code that comes with the model cannot be imported (OSError): " in error
    assert error.endswith(
        " Fetch it with `hf download`, from the repository that `auto_map` names."
    )


def test_what_one_load_fetched_is_enough_for_the_next_without_a_network(
    told: dict[str, Any],
) -> None:
    for name in ("offline", "offline, pickles allowed"):
        assert told[name].get("loader") == "streaming", told[name]
    assert told["offline, nothing there"]["error"].endswith(
        "Fetch the weights with `hf download gpt2`."
    )
    assert all(one["sent"] == {} for name, one in told.items() if name.startswith("offline"))


def test_code_of_another_repository_comes_into_the_cache_that_the_spec_names(
    hub: Hub, tmp_path: Path
) -> None:
    spec = {"model": "org/tuned", "cache_dir": str(tmp_path / "mine")} | TRUSTED
    found = _ask(hub, tmp_path / "hubs", [("load", "load", spec)])
    assert found["load"].get("class") == "OwnModel", found["load"]
    place = tmp_path / "mine" / "models--org--own" / "snapshots" / COMMIT
    assert sorted(path.name for path in place.iterdir()) == [
        "configuration_own.py",
        "helper_own.py",
        "modeling_own.py",
    ]


def test_a_download_that_was_killed_is_not_taken_for_whole(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["org/slow"] = hub.repositories["org/other"]
    hub.stalled.add("org/slow/model.safetensors")
    steps = [("load", "load", {"model": "org/slow"})]
    killed = subprocess.Popen(
        [sys.executable, "-c", STEPS, json.dumps(steps), hub.url],
        env=dict(os.environ) | hub.environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert hub.half_sent.wait(200)
    finally:
        killed.kill()
        killed.wait()
        hub.stalled.clear()
    offline = _ask(hub, tmp_path, steps, HF_HUB_OFFLINE="1")
    assert "error" in offline["load"]
    again = _ask(hub, tmp_path, steps)
    assert again["load"]["class"] == "LlamaForCausalLM"


def test_an_adapter_of_the_hub_is_fetched_and_nothing_beside_it(
    hub: Hub, told: dict[str, Any]
) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    folder = hub.repositories["org/adapter"]
    planned = {name: count for name, count in told["adapter"]["sent"].items() if "adapter" in name}
    assert planned == {f"org/adapter/{name}": (folder / name).stat().st_size for name in names}
    assert told["adapter"]["errors"] == []
    for name in ("adapter loaded", "adapter at a commit", "adapters"):
        assert told[name].get("adapted"), told[name]
    assert not any(name.startswith("org/adapter/") for name in told["adapter loaded"]["sent"])
    assert told["adapter in a folder"].get("errors") == [], told["adapter in a folder"]


def test_what_is_no_adapter_of_the_hub_is_told_under_its_key(told: dict[str, Any]) -> None:
    assert told["adapter, no revision"]["errors"] == [
        "lora.adapter: the hub repository 'org/adapter' has no revision 'v3'. Give a branch, tag or"
        " commit of the repository."
    ]
    assert told["adapter, nobody's"]["errors"] == [
        "lora.adapter: neither a folder nor a hub repository is called 'org/nobodys'. Check the id,"
        " or log in with `hf auth login` if it is private."
    ]
    (error,) = told["adapter, a model"]["errors"]
    assert "holds no adapter_config.json" in error
    (error,) = told["adapter, wicked"]["errors"]
    assert "by which a model folder can make code run" in error


def test_an_adapter_that_was_fetched_once_is_enough_without_a_network(
    told: dict[str, Any],
) -> None:
    for name in ("offline, adapter", "offline, at a commit"):
        assert told[name].get("adapted"), told[name]
    assert told["offline, no adapter"]["error"].startswith(
        "lora.adapter: 'org/wanting' is not a folder, and the hub repository of that name is"
        " neither in the cache nor could it be fetched"
    )

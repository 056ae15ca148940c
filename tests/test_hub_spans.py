"""Weights on the hub of which only what is read comes here, by range requests, and is kept.

As in :mod:`test_hub_online`, the hub is a server on this machine that counts what it sends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import COMMIT, Hub, serving
from safetensors.torch import load_file, save_file

from llmload.testing import tiny_checkpoint, tiny_llama

STEPS = """
import hashlib, json, sys
from urllib.request import urlopen
import llmload

def values(model):
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

import torch
answers = {}
for name, action, spec in json.loads(sys.argv[1]):
    answer = answers[name] = {}
    try:
        found = getattr(llmload, action)(spec)
        if action == "plan":
            answer |= {"errors": list(map(str, found.errors)), "to_fetch": found.to_fetch}
            answer["notes"] = [note for step in found.steps for note in step.notes]
        else:
            answer |= {"loader": found.report.loader, "values": values(found.model)}
            answer["fetched"] = found.report.facts.get("streaming", {}).get("fetched_ahead")
    except llmload.LlmloadError as error:
        answer["error"] = str(error)
    answer["sent"] = json.load(urlopen(sys.argv[2] + "/sent"))
print(json.dumps(answers))
"""
SPANS = {"streaming": {"fetch": "spans"}}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    tmp = tmp_path_factory.mktemp("hub")
    large: Any = {"hidden_size": 64, "vocab_size": 4096}
    with serving() as served:
        plain = tiny_llama(tmp, name="plain", shards=2, **large)
        single = tiny_llama(tmp, name="single", **large)
        experts = tiny_checkpoint(tmp / "experts", "mixtral", shards=2)
        pickled = tiny_llama(tmp, name="pickled")
        torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
        (pickled / "model.safetensors").unlink()
        served.repositories = {
            "org/plain": plain,
            "org/experts": experts,
            "org/killed": plain,
            "org/two": plain,
            "org/whole": single,
            "org/wrong": single,
            "org/changes": tiny_llama(tmp, name="changes", **large),
            "org/pickle": pickled,
        }
        served.without_ranges = {"org/whole/model.safetensors"}
        served.wrongly_listed = {"org/wrong/model.safetensors"}
        yield served


def start(hub: Hub, cache: Path, steps: Any, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STEPS, json.dumps(steps), hub.url],
        env=dict(os.environ) | hub.environment(cache) | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ask(hub: Hub, cache: Path, steps: Any, **environment: str) -> Any:
    process = start(hub, cache, steps, **environment)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def told(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache = tmp_path_factory.mktemp("cache")
    plain, experts = {"model": "org/plain"}, {"model": "org/experts"}
    local = {"model": str(hub.repositories["org/plain"])}
    pickled = {"model": "org/pickle", "allow_pickle": True}
    online = ask(
        hub,
        cache,
        [
            ("plan", "plan", plain | SPANS),
            ("load", "load", plain | SPANS),
            ("again", "load", plain | SPANS),
            ("folder", "load", local | SPANS),
            ("experts", "load", experts | SPANS),
            ("experts, folder", "load", {"model": str(hub.repositories["org/experts"])}),
            ("part", "plan", {"model": "org/killed"} | SPANS),
            ("no ranges", "load", {"model": "org/whole"} | SPANS),
            ("pickle", "load", pickled | SPANS),
            ("wrong", "load", {"model": "org/wrong"} | SPANS),
            ("local plan", "plan", local | SPANS),
        ],
    )
    offline = ask(
        hub,
        cache,
        [
            ("offline", "load", plain | SPANS),
            ("offline, whole", "load", plain),
            ("offline, part", "load", {"model": "org/killed"} | SPANS),
        ],
        HF_HUB_OFFLINE="1",
    )
    later = ask(hub, cache, [("whole", "load", plain), ("spans then", "load", plain | SPANS)])
    return {**online, **offline, **later, "cache": cache}


def sizes(hub: Hub, repository: str) -> dict[str, int]:
    folder = hub.repositories[repository]
    return {
        f"{repository}/{path.name}": path.stat().st_size
        for path in folder.glob("model*.safetensors")
    }


def weights(answer: dict[str, Any]) -> dict[str, int]:
    return {name: n for name, n in answer["sent"].items() if name.endswith(".safetensors")}


def test_a_plan_fetches_headers_and_says_what_a_load_fetches(
    hub: Hub, told: dict[str, Any]
) -> None:
    found = told["plan"]
    assert found["errors"] == []
    assert found["to_fetch"] == {}
    size = sum(
        tensor.nbytes
        for file in hub.repositories["org/plain"].glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    files = len(sizes(hub, "org/plain"))
    note = f"fetch {size:,} bytes of {files} file(s) by ranges, what is not here yet"
    assert note in found["notes"]
    assert sum(weights(found).values()) + size == sum(sizes(hub, "org/plain").values())


def test_one_process_fetches_each_byte_once_and_loads_the_same(
    hub: Hub, told: dict[str, Any]
) -> None:
    assert told["load"]["loader"] == "streaming"
    both = {name: n + weights(told["load"])[name] for name, n in weights(told["plan"]).items()}
    assert both == sizes(hub, "org/plain")
    assert told["load"]["values"] == told["folder"]["values"]
    assert 0 < told["load"]["fetched"] <= sum(weights(told["load"]).values())
    assert weights(told["experts"]) == sizes(hub, "org/experts")
    assert told["experts"]["values"] == told["experts, folder"]["values"]


def test_what_one_load_fetched_is_enough_for_the_next_with_a_network_or_without(
    told: dict[str, Any],
) -> None:
    for name in ("again", "offline"):
        assert weights(told[name]) == {}
        assert told[name]["values"] == told["load"]["values"]
    assert "are not here, and the hub is not to be asked" in told["offline, part"]["error"]


def test_what_came_in_spans_is_never_taken_for_a_download(hub: Hub, told: dict[str, Any]) -> None:
    assert "error" in told["offline, whole"]
    assert told["whole"]["values"] == told["load"]["values"]
    assert all(weights(told["whole"])[name] >= n for name, n in sizes(hub, "org/plain").items())
    assert weights(told["spans then"]) == {}
    from huggingface_hub import scan_cache_dir

    found = scan_cache_dir(told["cache"])
    assert "org/plain" in {repository.repo_id for repository in found.repos}
    place = told["cache"] / "llmload-spans"
    spans = {path.name for path in place.glob("models--org--plain/*")}
    names = {path.name for path in told["cache"].glob("models--org--plain/blobs/*")}
    assert f"{COMMIT}.json" in spans
    for file in place.glob("*/*.ranges"):
        data = file.with_suffix("")
        assert data.stat().st_size not in {*sizes(hub, "org/plain").values()}
    assert names


def test_a_local_folder_needs_no_fetching(told: dict[str, Any]) -> None:
    assert told["local plan"]["errors"] == []
    assert "fetch nothing: the weights are here" in told["local plan"]["notes"]


def test_what_cannot_come_in_spans_is_refused_before_a_weight_is_fetched(
    hub: Hub, told: dict[str, Any]
) -> None:
    place = f"{hub.url}/org/whole/resolve/{COMMIT}/model.safetensors"
    assert told["no ranges"]["error"] == (
        f"streaming.fetch: the server of {place} sends whole files only, and no ranges of bytes."
        " Leave out `fetch: spans`, which downloads whole files."
    )
    assert told["pickle"]["error"].startswith(
        "streaming.fetch: the weights of 'org/pickle' are pickles, such as 'pytorch_model.bin'"
    )
    for name in ("no ranges", "pickle"):
        assert not any(file.endswith((".bin", ".safetensors")) for file in told[name]["sent"])


def test_a_file_whose_digest_is_not_the_listed_one_is_refused(
    hub: Hub, told: dict[str, Any]
) -> None:
    assert "what was fetched is not the file that the hub lists" in told["wrong"]["error"]
    place = told["cache"] / "llmload-spans" / "models--org--wrong"
    assert {path.suffix for path in place.iterdir()} == {"", ".json"}
    assert not list(place.glob("*.ranges"))


def test_a_file_that_changes_between_plan_and_load_is_refused(hub: Hub, tmp_path: Path) -> None:
    file = hub.repositories["org/changes"] / "model.safetensors"
    changed = {name: tensor + 1 for name, tensor in load_file(file).items()}
    code = STEPS.replace(
        "import torch\n",
        "import torch\nfrom safetensors.torch import load_file, save_file\n"
        "class Changes:\n"
        "    name = 'changes'\n"
        "    @llmload.hookimpl\n"
        "    def init_context(self, ctx):\n"
        f"        save_file(load_file({str(tmp_path / 'new')!r}), {str(file)!r})\n"
        "old = llmload.load\n"
        "llmload.load = lambda spec: old(spec, registry=llmload.create_registry([Changes]))\n",
        1,
    )
    save_file(changed, tmp_path / "new")
    steps = [("load", "load", {"model": "org/changes"} | SPANS)]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(steps), hub.url],
        env=dict(os.environ) | hub.environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    error = json.loads(done.stdout.splitlines()[-1])["load"]["error"]
    assert "is not the file any more that the hub listed" in error


def test_a_load_that_was_killed_is_resumed(hub: Hub, tmp_path: Path) -> None:
    last = max(sizes(hub, "org/killed"))
    steps = [("load", "load", {"model": "org/killed"} | SPANS)]
    ask(hub, tmp_path, [("plan", "plan", steps[0][2])])
    hub.stalled.add(last)
    hub.half_sent.clear()
    killed = start(hub, tmp_path, steps)
    try:
        assert hub.half_sent.wait(200)
        time.sleep(0.5)
    finally:
        killed.kill()
        killed.communicate()
        hub.stalled.clear()
    again = ask(hub, tmp_path, steps)["load"]
    assert again["loader"] == "streaming"
    assert sum(weights(again).values()) < 1.6 * sum(sizes(hub, "org/killed").values())
    record = tmp_path / "llmload-spans" / "models--org--killed"
    assert len(list(record.glob("*.ranges"))) == len(sizes(hub, "org/killed"))


def test_two_processes_at_once_fetch_each_byte_once(hub: Hub, tmp_path: Path) -> None:
    hub.sent_to.clear()
    steps = [("load", "load", {"model": "org/two"} | SPANS)]
    running = [start(hub, tmp_path, steps, HF_TOKEN="two") for _ in range(2)]
    answers = [json.loads(one.communicate()[0].splitlines()[-1])["load"] for one in running]
    assert answers[0]["values"] == answers[1]["values"]
    found = {name: n for name, n in hub.sent_to["two"].items() if name.endswith(".safetensors")}
    assert found == sizes(hub, "org/two")

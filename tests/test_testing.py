"""The kit for authors of plugins: tiny models, contexts, fake distributions, ranks, leftovers."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmload
from llmload import testing
from llmload.testing import (
    FakeDistributions,
    RanksFailedError,
    changes,
    context_of,
    nothing_left_behind,
    run_on_ranks,
    snapshot,
    tiny_checkpoint,
    tiny_config,
    tiny_model,
)

MODEL_TYPES = (
    "llama",
    "gpt2",
    "opt",
    "mistral",
    "qwen3",
    "mixtral",
    "gemma2",
    "gpt_neox",
    "falcon",
)


def test_every_name_of_the_kit_is_there() -> None:
    assert all(getattr(testing, name) is not None for name in testing.__all__)
    assert set(dir(testing)) == set(testing.__all__)
    with pytest.raises(AttributeError, match=r"'llmload\.testing' has no attribute 'tiny_lama'"):
        _ = testing.tiny_lama


def test_importing_the_kit_and_its_fixtures_imports_nothing_heavy() -> None:
    code = (
        "import sys, llmload.testing\n"
        "assert 'pytest' not in sys.modules\n"
        "import llmload.testing.pytest_plugin\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_tiny_folder_is_read_by_transformers_and_by_us(model_type: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, model_type, pad=True)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("the quick fox").input_ids
    assert theirs.config.model_type == model_type
    assert sum(p.numel() for p in theirs.parameters()) < 200_000
    result = llmload.load({"model": str(folder)})
    assert type(result.model) is type(theirs)
    ids = torch.arange(4, 12)[None]
    assert result.model(input_ids=ids).logits.shape[:2] == (1, 8)


def test_one_seed_gives_one_model_and_leaves_the_callers_random_stream_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (tiny_model("mistral", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_a_type_that_transformers_lacks_is_refused_with_its_version() -> None:
    with pytest.raises(ValueError, match=r"transformers [\d.]+ has no model type 'lama'"):
        tiny_config("lama")


# --- contexts -----------------------------------------------------------------------------------


class Notes(llmload.Section):
    """Says how large the checkpoint is."""

    loud: bool = False


class Tells:
    name = "tells"
    Section = Notes

    @llmload.hookimpl
    def check(self, ctx: llmload.LoadContext) -> Any:
        assert ctx.checkpoint is not None
        text = f"{len(ctx.checkpoint.tensors)} tensors"
        yield llmload.Note(text=text.upper() if ctx.section(Notes).loud else text)


def test_one_hook_is_tested_with_the_context_of_a_load(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    ctx = context_of(tiny_model(), Notes(loud=True), folder=folder)
    assert ctx.rehearsing
    (note,) = Tells().check(ctx)
    assert note.text == "21 TENSORS"
    assert context_of(tiny_model(), Notes(), rehearsing=False).checkpoint is None


# --- leftovers ----------------------------------------------------------------------------------

LEFT: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "environment": ("LLMLOAD_LEFT differ", lambda _: os.environ.update(LLMLOAD_LEFT="1")),
    "default dtype": (
        "torch.float32 became torch.float16",
        lambda _: torch.set_default_dtype(torch.float16),
    ),
    "nn.Linear": ("forward differ", lambda patch: patch.setattr(torch.nn.Linear, "forward", id)),
    "warnings": ("are new", lambda _: warnings.simplefilter("always")),
    "module hooks": (
        "are new",
        lambda _: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
    ),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_is_left_behind_is_named(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, leave = LEFT[what]
    monkeypatch.delenv("LLMLOAD_LEFT", raising=False)
    hooks = dict(torch.nn.modules.module._global_forward_hooks)
    try:
        with (
            warnings.catch_warnings(),
            pytest.raises(AssertionError, match=f"left this behind: {what}: .*{words}"),
            nothing_left_behind(),
        ):
            leave(monkeypatch)
    finally:
        os.environ.pop("LLMLOAD_LEFT", None)
        torch.set_default_dtype(torch.float32)
        torch.nn.modules.module._global_forward_hooks.clear()
        torch.nn.modules.module._global_forward_hooks.update(hooks)


def test_nothing_is_left_behind_by_a_block_that_does_nothing_or_only_draws() -> None:
    with nothing_left_behind(allow=()):
        pass
    with nothing_left_behind():
        torch.rand(1)
    with pytest.raises(KeyError), nothing_left_behind():
        raise KeyError
    before = snapshot()
    torch.rand(1)
    assert changes(before, snapshot()) == {"random": "was changed"}


@pytest.mark.usefixtures("llmload_nothing_left_behind")
def test_a_fixture_holds_a_whole_test_to_it(llmload_checkpoint: Callable[..., Path]) -> None:
    folder = llmload_checkpoint("gpt2")
    assert llmload_checkpoint("gpt2") != folder
    assert llmload.load({"model": str(folder)}).report.loader == "streaming"


# --- distributions ------------------------------------------------------------------------------


def test_a_fake_distribution_is_found_as_an_installed_one(
    llmload_distributions: FakeDistributions,
) -> None:
    llmload_distributions.add(
        "fake-dist", {"fake": "fake_module:Fake"}, "fake_module", "class Fake:\n    name = 'fake'\n"
    )
    assert metadata.version("fake-dist") == "1.0"
    found = {info.name: info for info in llmload.create_registry(environ={}).plugins}
    assert (found["fake"].distribution, found["fake"].status) == ("fake-dist 1.0", "active")


# --- ranks --------------------------------------------------------------------------------------


def total(own: int) -> tuple[int, int, str]:
    value = torch.tensor(own + dist.get_rank())
    dist.all_reduce(value)
    return int(value), dist.get_world_size(), os.environ["LOCAL_RANK"]


def fails_on_the_second() -> None:
    sys.stdout.write("about to fail\n")
    if dist.get_rank() == 1:
        raise ValueError("not here")


def leaves() -> None:
    os._exit(7)


def never_ends() -> None:
    import time

    time.sleep(600)


def test_a_function_runs_on_two_ranks_that_hear_of_each_other() -> None:
    assert run_on_ranks(total, 3) == [(7, 2, "0"), (7, 2, "1")]


def test_a_function_made_inside_a_test_runs_on_ranks_too() -> None:
    def rank() -> int:
        return dist.get_rank()

    assert run_on_ranks(rank) == [0, 1]


def test_what_fails_on_one_rank_is_told_with_its_rank_traceback_and_output() -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_on_ranks(fails_on_the_second)
    told = str(caught.value)
    assert told.startswith("fails_on_the_second failed on 1 rank(s)\n--- rank 1 of 2\nTraceback")
    traceback, _, output = told.partition("ValueError: not here\n\n")
    assert "fails_on_the_second" in traceback
    assert "about to fail\n" in f"{output}\n"  # gloo may have warned before


def test_a_rank_that_leaves_or_never_ends_is_told_apart() -> None:
    with pytest.raises(RanksFailedError, match="its process ended with exit code 7"):
        run_on_ranks(leaves, ranks=1, process_group=False)
    with pytest.raises(RanksFailedError, match=r"it did not end within 0\.5 s"):
        run_on_ranks(never_ends, ranks=1, process_group=False, timeout=0.5)

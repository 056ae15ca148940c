"""Groups of models: what each member is, what they share, and that no step reaches another."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import load_file, save_file
from sameness import differences, from_pretrained
from stacks import needs_bitsandbytes
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmload
from llmload import create_registry, hookimpl
from llmload.builtin.streaming.plugin import StreamingLoader
from llmload.cli import commands
from llmload.errors import CheckpointError, LoadFailedError, PlanError
from llmload.testing import IDS, losses, snapshot, tiny_llama

LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16, in two shards."""
    made = tmp_path_factory.mktemp("groups")
    return tiny_llama(made, dtype=torch.bfloat16, shards=2)


def group(folder: Path, policy: dict[str, Any], **others: dict[str, Any]) -> dict[str, Any]:
    return {"models": {"policy": {"model": str(folder), **policy}, **others}}


REFERENCE = {"like": "policy", "lora": None, "trainable": False}


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def shared(said: Any) -> list[tuple[str, str, str, bool]]:
    return [(s.member, s.of, s.how, s.lasting) for s in said.shared]


# --- what a group gives -------------------------------------------------------------------------


@pytest.mark.parametrize("policy_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reference_dtype", ["float16", "float32", "bfloat16"])
def test_each_member_is_what_from_pretrained_gives_at_its_own_dtype(
    folder: Path, policy_dtype: str, reference_dtype: str
) -> None:
    reference = {"like": "policy", "dtype": reference_dtype, "trainable": False}
    loaded = llmload.load_group(group(folder, {"dtype": policy_dtype}, reference=reference))
    assert list(loaded) == ["policy", "reference"]
    policy = from_pretrained(AutoModelForCausalLM, folder, policy_dtype)
    assert differences(loaded["policy"].model, policy) == []
    other = from_pretrained(AutoModelForCausalLM, folder, reference_dtype).requires_grad_(False)
    assert differences(loaded["reference"].model, other) == []
    assert len(loaded["policy"].tokenizer) == len(loaded["reference"].tokenizer)


def test_members_keep_the_order_of_the_file_whatever_needs_what(folder: Path) -> None:
    spec = {
        "models": {
            "off": {"adapter_of": "policy"},
            "reference": REFERENCE,
            "policy": {"model": str(folder), "lora": LORA},
        }
    }
    loaded = llmload.load_group(spec)
    order = ["off", "reference", "policy"]
    assert list(loaded) == list(loaded.plan.members) == list(loaded.report.members) == order


@pytest.mark.parametrize(
    "section",
    [
        pytest.param({}, id="plain"),
        pytest.param({"lora": LORA}, id="adapter"),
        pytest.param({"kbit": {"bits": 4}, "lora": LORA}, id="kbit", marks=needs_bitsandbytes),
        pytest.param({"dropout": {"p": 0.0}}, id="dropout"),
    ],
)
def test_a_member_that_is_not_trainable_is_in_eval_mode_and_requires_no_gradients(
    folder: Path, section: dict[str, Any]
) -> None:
    spec = {"models": {"reward": {"model": str(folder), "trainable": False, **section}}}
    loaded = llmload.load_group(spec)["reward"]
    assert not any(module.training for module in loaded.model.modules())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.plan.trainable == loaded.report.trainable == 0
    assert loaded.plan.trainable_parameters == []
    if "kbit" not in section:  # whose kernel for the CPU does not take layers this small
        assert loaded.model(IDS).logits.grad_fn is None


def test_one_model_can_be_asked_for_frozen_too(folder: Path) -> None:
    loaded = llmload.load({"model": str(folder), "trainable": False})
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert "0 parameters are trainable, as planned" in loaded.report.audit


def test_members_have_plugins_of_their_own(folder: Path) -> None:
    class Freeze:
        name = "freeze_first"

        class Section(llmload.Section):
            pass

        @hookimpl
        def post_load(self, ctx: Any, model: Any) -> Any:
            model.model.layers[0].requires_grad_(False)
            return model

    spec = group(folder, {"freeze_first": {}}, other={"like": "policy", "freeze_first": None})
    loaded = llmload.load_group(spec, registry=create_registry([Freeze], environ={}))
    assert not loaded["policy"].model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert loaded["other"].model.model.layers[0].mlp.up_proj.weight.requires_grad


# --- what is shared -----------------------------------------------------------------------------


def test_at_the_checkpoints_dtype_all_lies_on_its_pages(folder: Path) -> None:
    loaded = llmload.load_group(group(folder, {"lora": LORA}, reference=REFERENCE))
    expected = [("reference", "policy", "checkpoint pages", True)]
    assert shared(loaded.plan) == shared(loaded.report) == expected
    assert loaded.report.saved_bytes == loaded["reference"].report.parameter_bytes
    assert loaded["reference"].report.facts["streaming"]["copied"] == 0


def test_what_both_cast_and_neither_trains_is_read_and_cast_once(folder: Path) -> None:
    spec = group(folder, {"dtype": "float32", "lora": LORA}, reference=REFERENCE)
    loaded = llmload.load_group(spec)
    expected = [("reference", "policy", "one cast", True)]
    assert shared(loaded.plan) == shared(loaded.report) == expected
    assert loaded.plan.shared == loaded.report.shared
    assert loaded.report.saved_bytes == loaded["reference"].report.parameter_bytes
    assert bytes_read(loaded["policy"]) == loaded["policy"].plan.checkpoint_bytes
    assert bytes_read(loaded["reference"]) == 0
    assert loaded["reference"].report.compared == len(list(loaded["reference"].model.parameters()))


def bytes_read(result: llmload.LoadResult) -> int:
    files = result.report.facts["streaming"]["files"]
    return sum(file["bytes_read"] for file in files.values())


def test_a_policy_that_trains_every_weight_is_not_shared_at_another_dtype(folder: Path) -> None:
    reference = {"like": "policy", "trainable": False}
    plan = llmload.plan_group(group(folder, {"dtype": "float32"}, reference=reference))
    assert plan.shared == []
    assert plan.apart == {
        "reference": "'policy' trains or replaces 21 of these weights, and its first step would"
        " copy what was shared"
    }


def test_pages_that_a_policy_trains_are_shared_until_its_first_step(folder: Path) -> None:
    reference = {"like": "policy", "trainable": False}
    plan = llmload.plan_group(group(folder, {}, reference=reference))
    assert shared(plan) == [("reference", "policy", "checkpoint pages", False)]


def test_members_at_two_other_dtypes_are_cast_apart(folder: Path) -> None:
    reference = {**REFERENCE, "dtype": "float16"}
    plan = llmload.plan_group(
        group(folder, {"dtype": "float32", "lora": LORA}, reference=reference)
    )
    assert (plan.shared, plan.saved_bytes) == ([], 0)
    assert plan.apart == {"reference": "it is float16, and 'policy' is float32"}


def test_a_reference_at_the_checkpoints_dtype_needs_no_cast(folder: Path) -> None:
    reference = {**REFERENCE, "dtype": "bfloat16"}
    plan = llmload.plan_group(
        group(folder, {"dtype": "float32", "lora": LORA}, reference=reference)
    )
    assert (plan.shared, plan.apart) == ([], {})


def test_a_plugin_that_stores_weights_itself_is_named(folder: Path) -> None:
    policy = {"dtype": "float32", "kbit": {"bits": 4}, "lora": LORA}
    plan = llmload.plan_group(group(folder, policy, reference={**REFERENCE, "kbit": None}))
    assert plan.shared == []
    assert plan.apart == {
        "reference": "of 'policy': `kbit` stores its weights in its own way, anew for each model"
    }


@needs_bitsandbytes
@pytest.mark.parametrize("section", [{"double_quant": True}, {"bits": 8}], ids=["4", "8"])
def test_quantised_members_do_not_share_and_the_plan_says_so(
    folder: Path, section: dict[str, Any]
) -> None:
    """Nor do they when both are frozen, of one checkpoint and one section."""
    policy = {"kbit": section, "lora": LORA}
    loaded = llmload.load_group(group(folder, policy, reference=REFERENCE))
    assert (loaded.plan.shared, loaded.report.shared) == ([], [])
    assert loaded.plan.apart == {
        "reference": "`kbit` stores its weights in its own way, anew for each model"
    }
    for member in loaded.values():
        assert bytes_read(member) == member.plan.checkpoint_bytes
    before = bytes_of(loaded["reference"].model)
    with torch.no_grad():
        for parameter in loaded["policy"].model.parameters():
            parameter.zero_()
    assert bytes_of(loaded["reference"].model) == before


def test_tied_weights_that_are_stored_twice_are_saved_once(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, tied=True, dtype=torch.bfloat16)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(twice, path, metadata={"format": "pt"})
    spec = group(folder, {"dtype": "float32", "lora": LORA}, reference=REFERENCE)
    loaded = llmload.load_group(spec)
    assert loaded.plan.shared == loaded.report.shared
    assert loaded.report.saved_bytes == loaded["reference"].report.parameter_bytes


def test_a_loader_other_than_ours_is_named(folder: Path) -> None:
    registry = create_registry(block=["streaming"], environ={})
    spec = group(folder, {"dtype": "float32", "lora": LORA}, reference=REFERENCE)
    loaded = llmload.load_group(spec, registry=registry)
    assert loaded.report.shared == []
    assert loaded.plan.apart == {
        "reference": "`transformers` loads it, and stores its weights as it likes"
    }


def test_models_with_other_heads_share_what_lies_below(folder: Path) -> None:
    critic = {"like": "policy", "auto_class": "base", "lora": None, "trainable": False}
    critic["strict"] = {"allow_unexpected": ["lm_head"]}
    spec = group(folder, {"dtype": "float32", "lora": LORA}, critic=critic)
    loaded = llmload.load_group(spec)
    assert shared(loaded.report) == [("critic", "policy", "one cast", True)]
    assert loaded.report.saved_bytes == loaded["critic"].report.parameter_bytes
    assert loaded.plan.shared == loaded.report.shared


def test_three_members_hold_one_cast(folder: Path) -> None:
    spec = group(folder, {"dtype": "float32"}, reference=REFERENCE, reward={"like": "reference"})
    loaded = llmload.load_group(spec)
    assert shared(loaded.report) == [("reward", "reference", "one cast", True)]


def test_random_weights_are_not_shared(folder: Path) -> None:
    spec = group(folder, {"weights": "random"}, other={"like": "policy"})
    plan = llmload.plan_group(spec)
    assert (plan.shared, plan.apart) == ([], {})


ARCHITECTURES = {
    "mixtral": "causal_lm",  # experts merged into one parameter
    "gpt2": "causal_lm",  # tied
    "t5": "seq2seq_lm",  # tied three ways; some layers stay float32 in float16
    "bert": "base",
    "qwen2_moe": "causal_lm",  # experts merged beside one that is not
}


def in_common(one: Any, two: Any) -> int:
    """Return the bytes of the parameters of ``two`` that lie on the same pages as those of ``one``.

    Both map a file privately: the same page of it is at two addresses, which the kernel tells.
    """
    held = {where for p in one.parameters() for where in places(p)}
    return sum(p.nbytes for p in two.parameters() if held.issuperset(places(p)))


def places(parameter: torch.Tensor) -> set[tuple[str, int]]:
    """Return the file and the offset in it of a parameter's first and last byte."""
    found = set()
    first = parameter.data_ptr()
    for address in (first, first + parameter.nbytes - 1):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, offset, _, inode, *name = line.split(maxsplit=5)
            start, stop = (int(end, 16) for end in span.split("-"))
            if start <= address < stop:
                where = int(offset, 16) + address - start if inode != "0" else address
                found.add((f"{inode} {' '.join(name)}", where))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_merged_and_tied_weights_are_shared_as_the_plan_says_and_written_apart(
    model_type: str, dtype: str, tmp_path: Path
) -> None:
    kind = ARCHITECTURES[model_type]
    architectures.build(kind, model_type).to(torch.bfloat16).save_pretrained(tmp_path)
    one = {"model": str(tmp_path), "auto_class": kind, "dtype": dtype, "trainable": False}
    loaded = llmload.load_group({"models": {"one": one, "two": {"like": "one"}}})
    theirs = from_pretrained(architectures.AUTO_CLASSES[kind], tmp_path, dtype)
    for result in loaded.values():
        assert differences(result.model, theirs.requires_grad_(False)) == []
    assert loaded.report.shared
    assert shared(loaded.plan) == shared(loaded.report)
    assert loaded.plan.shared == loaded.report.shared
    assert loaded.report.saved_bytes == in_common(loaded["one"].model, loaded["two"].model)
    expected = bytes_of(loaded["two"].model)
    with torch.no_grad():
        for parameter in loaded["one"].model.parameters():
            parameter.fill_(7)
    assert bytes_of(loaded["two"].model) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["merge", "merge_first", "pissa"])
def test_weights_that_a_load_itself_writes_to_are_not_counted_as_shared(
    how: str, dtype: str, folder: Path, tmp_path: Path
) -> None:
    lora: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
    trained = llmload.load({"model": str(folder), "lora": lora | {"init_lora_weights": False}})
    trained.model.save_pretrained(tmp_path)
    section = {
        "merge": {"adapter": str(tmp_path), "merge": True},
        "merge_first": {"merge_first": [str(tmp_path)], **lora},
        "pissa": lora | {"init_lora_weights": "pissa"},
    }[how]
    spec = group(folder, {"dtype": dtype, "lora": section}, reference=REFERENCE)
    loaded = llmload.load_group(spec)
    assert loaded.plan.shared == loaded.report.shared
    model = loaded["reference"].model
    written = sum(p.nbytes for name, p in model.named_parameters() if "q_proj" in name)
    assert loaded.report.saved_bytes == sum(p.nbytes for p in model.parameters()) - written


def test_a_reference_without_the_policys_adapter_keeps_what_was_merged_first(
    folder: Path, tmp_path: Path
) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"]}
    trained = llmload.load({"model": str(folder), "lora": lora | {"init_lora_weights": False}})
    trained.model.save_pretrained(tmp_path)
    policy = {"lora": {"merge_first": [str(tmp_path)], **lora}}
    loaded = llmload.load_group(group(folder, policy, reference={"adapter_of": "policy"}))
    merged = llmload.load({"model": str(folder), "lora": {"adapter": str(tmp_path), "merge": True}})
    assert torch.equal(logits_of(loaded["reference"].model), logits_of(merged.model))


# --- no step reaches another member ---------------------------------------------------------------

POLICIES = {
    "lora": {"lora": LORA},
    "full": {},
    "dropout in the adapter": {"lora": {**LORA, "lora_dropout": 0.5}},
    "modules to save": {
        "lora": {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    },
    "resized": {
        "lora": {**LORA, "target_modules": ["q_proj"]},
        "tokenizer": {"add_tokens": ["<a>", "<b>"]},
        "embeddings": {"pad_to_multiple_of": 64},
    },
    "pissa": {"lora": {**LORA, "init_lora_weights": "pissa"}},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_training_the_policy_leaves_the_reference_as_the_checkpoint_has_it(
    folder: Path, policy: dict[str, Any], dtype: str
) -> None:
    """In either order of loading, since it is the second that takes what the first left."""
    others: dict[str, Any] = {"tokenizer": None, "embeddings": None}
    reference = {"like": "policy", "trainable": False, "lora": None, **others}
    first = {"policy": {"model": str(folder), "dtype": dtype, **policy}, "reference": reference}
    expected = bytes_of(from_pretrained(AutoModelForCausalLM, folder, dtype))
    for models in (first, dict(reversed(first.items()))):
        loaded = llmload.load_group({"models": models})
        before = bytes_of(loaded["policy"].model)
        assert bytes_of(loaded["reference"].model) == expected
        losses(loaded["policy"].model, 2)
        assert bytes_of(loaded["policy"].model) != before
        assert bytes_of(loaded["reference"].model) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_write_by_mistake_stays_with_its_writer(folder: Path, dtype: str) -> None:
    spec = group(folder, {"dtype": dtype, "lora": LORA}, reference=REFERENCE)
    loaded = llmload.load_group(spec)
    policy, reference = loaded["policy"].model, loaded["reference"].model
    written = next(p for n, p in policy.named_parameters() if "base_layer" in n)
    expected = bytes_of(reference)
    with torch.no_grad():
        written.fill_(7)
    assert bytes_of(reference) == expected
    held = bytes_of(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.fill_(3)
    assert bytes_of(policy) == held
    again = llmload.load({"model": str(folder), "dtype": dtype}).model
    assert bytes_of(again) == expected


def test_nothing_can_be_written_to_the_memory_file_once_all_is_loaded(folder: Path) -> None:
    spec = group(folder, {"dtype": "float32", "lora": LORA}, reference=REFERENCE)
    loaded = llmload.load_group(spec)
    names = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    files = [n for n in names if n.exists() and "llmload-shared" in os.readlink(n)]
    assert files
    for file in files:
        with pytest.raises(PermissionError):
            os.pwrite(int(file.name), b"x", 0)
    assert loaded["policy"].model is not None


def test_the_memory_file_goes_with_the_last_model(folder: Path) -> None:
    before = snapshot()["files"]
    spec = group(folder, {"dtype": "float32", "lora": LORA}, reference=REFERENCE)
    loaded = dict(llmload.load_group(spec))
    assert sum("llmload-shared" in name for name in snapshot()["files"]) == 2
    logits = logits_of(loaded["policy"].model)
    del loaded["policy"]
    gc.collect()
    assert torch.equal(logits_of(loaded["reference"].model), logits)
    del loaded["reference"]
    assert snapshot()["files"] == before


# --- all or none --------------------------------------------------------------------------------


def failing(hook: str, error: type[BaseException]) -> Any:
    class Failing:
        name = "failing"

        class Section(llmload.Section):
            pass

    def function(self: Any, ctx: Any, model: Any) -> Any:
        if ctx.rehearsing:
            return model
        raise error("no")

    setattr(Failing, hook, hookimpl(function))
    return create_registry([Failing], environ={})


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_one_member_fails_nothing_of_the_group_is_left(
    folder: Path, error: type[BaseException], dtype: str
) -> None:
    registry = failing("post_load", error)
    policy = {"dtype": dtype, "lora": LORA}
    spec = group(folder, policy, reference={**REFERENCE, "failing": {}})
    before = snapshot()
    expected = LoadFailedError if error is RuntimeError else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        llmload.load_group(spec, registry=registry)
    if error is RuntimeError:
        assert str(caught.value) == (
            "models.reference: plugin 'failing' (given as an object) failed in post_load:"
            " RuntimeError: no"
        )
    del caught
    assert snapshot() == before


def test_a_member_whose_folder_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    spec = group(folder, {}, reference={"like": "policy", "model": missing})
    with pytest.raises(CheckpointError, match=r"^models\.reference\.model: "):
        llmload.plan_group(spec)


def test_the_plans_errors_of_all_members_come_at_once_and_no_weight_is_read(folder: Path) -> None:
    lora = {"r": 4, "target_modules": ["query"]}
    spec = group(folder, {"lora": lora}, reference={"like": "policy", "trainable": False})
    plan = llmload.plan_group(spec)
    wheres = ["models.policy.lora.target_modules", "models.reference.lora.target_modules"]
    assert [problem.where for problem in plan.errors] == wheres
    with pytest.raises(
        PlanError, match="no module of LlamaForCausalLM is called 'query'"
    ) as caught:
        llmload.load_group(spec)
    assert [problem.where for problem in caught.value.problems] == wheres


# --- what makes no sense in a frozen member -------------------------------------------------------


def test_a_new_adapter_that_is_never_trained_is_warned_of(folder: Path) -> None:
    spec = group(folder, {"lora": LORA}, reference={"like": "policy", "trainable": False})
    plan = llmload.plan_group(spec)
    assert [str(problem) for problem in plan.problems] == [
        "models.reference.lora: the adapter is new and will not be trained: it changes nothing."
        " Remove the section; in a member that is `like` another one, write `lora: null`."
    ]
    assert not plan.errors


def test_gradient_checkpointing_of_a_frozen_member_is_refused(folder: Path) -> None:
    spec = group(folder, {"gradient_checkpointing": {}}, reference=REFERENCE)
    assert [str(problem) for problem in llmload.plan_group(spec).errors] == [
        "models.reference.gradient_checkpointing: 'gradient_checkpointing' cannot be combined with"
        " 'trainable': a model that is not trained has no backward pass to save memory in. Remove"
        " the section; in a member that is `like` another one, write"
        " `gradient_checkpointing: null`."
    ]


# --- on the command line -----------------------------------------------------------------------


def run(*arguments: str, text: str) -> Any:
    return CliRunner().invoke(commands.app, list(arguments), input=text)


@pytest.fixture(scope="module")
def file(folder: Path) -> str:
    return f"""
models:
  policy: {{model: {folder}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}
  reference: {{like: policy, lora: null, trainable: false}}
  half: {{like: reference, dtype: float16}}
  start: {{adapter_of: policy}}
"""


def test_plan_says_what_will_be_shared_and_why_the_rest_is_not(file: str) -> None:
    result = run("plan", "-", text=file)
    assert result.exit_code == 0, result.stderr
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("shared "))
    assert lines[first : first + 3] == [
        "shared      start is policy with its adapter off: 34.3 KiB saved",
        "shared      reference takes what was cast for policy: 34.3 KiB saved",
        "not shared  half: it is float16, and 'policy' is float32",
    ]
    plan = json.loads(run("plan", "--json", "-", text=file).stdout)
    assert list(plan["members"]) == ["policy", "reference", "half", "start"]
    assert [s["how"] for s in plan["shared"]] == ["adapter off", "one cast"]
    assert plan["members"]["reference"]["trainable"] == 0


def test_a_plan_with_errors_is_shown_with_the_member_and_exits_with_2(file: str) -> None:
    result = run("plan", "-", text=file.replace("all-linear", "[query]"))
    assert result.exit_code == 2
    assert "error: models.policy.lora.target_modules: no module of" in " ".join(
        result.stdout.split()
    )


def test_load_reports_every_member_and_what_they_share(file: str) -> None:
    result = run("load", "-", text=file)
    assert result.exit_code == 0, result.stderr
    assert "start is policy with its adapter off: 34.3 KiB saved" in result.stdout
    report = json.loads(run("load", "--json", "-", text=file).stdout)
    assert list(report["members"]) == ["policy", "reference", "half", "start"]
    assert report["members"]["policy"]["trainable"] == 2048
    assert sum(s["saved_bytes"] for s in report["shared"]) == 2 * 35136


# --- what plugins learn of other members ----------------------------------------------------------


class Listening:
    """Remembers what it is told of a group, and fails in the member that says so."""

    name = "listening"

    class Section(llmload.Section):
        fails: bool = False

    def __init__(self) -> None:
        self.heard: list[str] = []

    @hookimpl
    def init_context(self, ctx: Any) -> None:
        self.heard.append(f"begin {ctx.dtype}, kept {sorted(ctx.scope.kept)}")
        ctx.scope.kept[self.name] = self
        ctx.until_end.push(lambda kind, error, trace: self.heard.append(f"end {kind}"))

    @hookimpl
    def stopped(self, asked: Any, error: BaseException) -> None:
        self.heard.append(f"stopped {asked['dtype']}: {error}")

    @hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing and ctx.section(self.Section).fails:
            raise ValueError("no room")
        return model


class FailsElsewhere:
    """Fails in the member that has it."""

    name = "fails"

    class Section(llmload.Section):
        pass

    @hookimpl
    def init_context(self, ctx: Any) -> None:
        raise ValueError("no room")


def heard(folder: Path, **models: dict[str, Any]) -> list[str]:
    listening = Listening()
    registry = create_registry([listening, FailsElsewhere], environ={})
    members = {name: {"model": str(folder), **keys} for name, keys in models.items()}
    try:
        llmload.load_group({"models": members}, registry=registry)
    except LoadFailedError:
        listening.heard.append("failed")
    return listening.heard


ONE, TWO = {"dtype": "float32", "listening": {}}, {"dtype": "float16", "listening": {}}


def test_what_lasts_until_the_end_lasts_until_that_of_the_group(folder: Path) -> None:
    assert heard(folder, one=ONE, two=TWO, three={}) == [
        "begin torch.float32, kept []",
        "begin torch.float16, kept ['listening']",
        "end None",
        "end None",
    ]


def test_a_context_hears_of_the_failure_of_a_member_without_its_plugin(folder: Path) -> None:
    error = "<class 'llmload.errors.LoadFailedError'>"
    assert heard(folder, one=ONE, other={"fails": {}}) == [
        "begin torch.float32, kept []",
        f"end {error}",
        "failed",
    ]


def test_a_plugin_whose_members_come_later_is_told_that_they_will_not(folder: Path) -> None:
    assert heard(folder, other={"fails": {}}, one=ONE, two=TWO) == [
        "stopped float32: models.other: plugin 'fails' (given as an object) failed in init_context:"
        " ValueError: no room",
        "failed",
    ]


def test_a_plugin_is_not_told_again_of_what_its_contexts_heard(folder: Path) -> None:
    error = "<class 'llmload.errors.LoadFailedError'>"
    failing = {"dtype": "float16", "listening": {"fails": True}}
    assert heard(folder, one=ONE, two=failing) == [
        "begin torch.float32, kept []",
        "begin torch.float16, kept ['listening']",
        f"end {error}",
        f"end {error}",
        "failed",
    ]


# --- what any plugin can state --------------------------------------------------------------------


class Doubled:
    """An adapter system of its own, which changes its base as it is put on."""

    name = "doubled"
    stage = "adapter"
    provides = ("adapter",)

    class Section(llmload.Section):
        pass

    @llmload.hookimpl
    def wrap_adapter(self, ctx: llmload.LoadContext, model: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        for name, parameter in wrapped.named_parameters():
            if name.endswith("q_proj.base_layer.weight"):
                ctx.changed_base[name] = "twice the checkpoint's"
                if not ctx.rehearsing:
                    parameter.data *= 2
        for name, _ in wrapped.named_parameters():
            if ".lora_" in name:
                ctx.newly_initialised[name] = "drawn"
        return wrapped


def test_any_adapter_can_say_that_its_base_is_no_longer_the_checkpoints(folder: Path) -> None:
    registry = llmload.create_registry([Doubled], environ={})
    spec = {
        "models": {
            "policy": {"model": str(folder), "doubled": {}},
            "reference": {"adapter_of": "policy"},
        }
    }
    (problem,) = llmload.plan_group(spec, registry=registry).errors
    assert problem.message.startswith(
        "the adapter of 'policy' brings base weights that are not the checkpoint's"
        " ('base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight',"
    )


class Mapper:
    """A loader of a plugin's own, which does as `streaming` does, or less."""

    name = "mapper"
    stage = "load"
    before = ("streaming",)

    def __init__(self, *provides: str) -> None:
        self.provides = provides
        self._loader = StreamingLoader()

    @llmload.hookimpl
    def load(self, ctx: llmload.LoadContext) -> Any:
        return self._loader.load(ctx)


@pytest.mark.parametrize(
    ("provides", "dtype", "how"),
    [
        (("placement", "mapped_pages"), "bfloat16", ["checkpoint pages"]),
        (("placement", "mapped_pages"), "float16", ["one cast"]),
        (("placement",), "bfloat16", ["one cast"]),
        ((), "bfloat16", []),
        ((), "float16", []),
    ],
)
def test_members_share_what_their_loader_says_that_it_can(
    folder: Path, provides: tuple[str, ...], dtype: str, how: list[str]
) -> None:
    registry = llmload.create_registry([Mapper(*provides)], environ={})
    spec = group(folder, {"dtype": dtype, "trainable": False}, reference={"like": "policy"})
    loaded = llmload.load_group(spec, registry=registry)
    assert loaded.report.members["policy"].loader == "mapper"
    assert [found.how for found in loaded.plan.shared] == how
    if provides:
        assert loaded.plan.apart == {}
    else:
        reason = "`mapper` loads it, and stores its weights as it likes"
        assert loaded.plan.apart == {"reference": reason}

"""The plugin ``torchao``: what it does, what it refuses, and that it keeps the contract."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import llmload
from llmload.plugin import partitions
from llmload.testing import IDS, assert_plugin, losses, run_on_ranks, same, tiny_checkpoint
from llmload_torchao.plugin import TorchaoPlugin

Checkpoints = Callable[..., Path]
LINEAR = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32)
"""Values in the linear layers of the tiny Llama, its head apart."""
ROWS = 2 * (16 + 2 * 8 + 16 + 2 * 32 + 16)
"""Rows in them."""
KINDS = {"int8": LINEAR + 5 * ROWS, "float8": LINEAR + 4 * ROWS}
"""What weights are stored as -> bytes: a code for each value, for each row a scale, of int8 with a
zero point."""


def unlike(one: Any, other: Any) -> list[str]:
    """Return the names of the parameters that two models do not have alike."""
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    return [name for name, parameter in mine.items() if not same(parameter, theirs[name])]


@pytest.mark.parametrize("weights", KINDS)
def test_the_plan_tells_the_bytes_and_the_load_takes_them(
    llmload_checkpoint: Checkpoints, weights: str
) -> None:
    folder = llmload_checkpoint(dtype=torch.bfloat16)
    spec = {"model": str(folder), "torchao": {"weights": weights}, "trainable": False}
    plan = llmload.plan(spec)
    assert not plan.problems
    whole = llmload.plan({"model": str(folder)}).parameter_bytes
    assert plan.facts["torchao"]["bytes"] == KINDS[weights]
    assert plan.parameter_bytes == whole - 2 * LINEAR + KINDS[weights]
    assert plan.trainable == 0
    (step, *_) = [step for step in plan.steps if step.plugin == "torchao"]
    assert step.notes == [
        f"quantise linear layers to {weights}, a scale for each row",
        "freeze the base model",
    ]
    assert [line.text.partition(" in ")[0] for line in plan.lines] == [
        f"{LINEAR:,} values",
        "all others",
    ]

    result = llmload.load(spec)
    assert result.report.loader == "streaming"
    assert result.report.parameter_bytes == plan.parameter_bytes
    assert result.report.parameter_bytes == sum(map(partitions.nbytes, result.model.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocked", [(), ("streaming",)], ids=["streaming", "transformers"])
@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torchao")
def test_weights_are_those_of_transformers_bit_by_bit(
    llmload_checkpoint: Checkpoints, weights: str, blocked: tuple[str, ...], dtype: torch.dtype
) -> None:
    folder = llmload_checkpoint(dtype=dtype, shards=2)
    spec = {"model": str(folder), "torchao": {"weights": weights}, "trainable": False}
    registry = llmload.create_registry(block=set(blocked))
    model = llmload.load(spec, registry=registry).model
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=model.config.quantization_config, dtype=dtype
    )
    assert unlike(model, theirs) == []
    assert torch.equal(model(IDS).logits, theirs(IDS).logits)


def test_the_audit_accounts_for_every_tensor(llmload_checkpoint: Checkpoints) -> None:
    spec = {"model": str(llmload_checkpoint()), "torchao": {}, "trainable": False}
    report = llmload.load(spec).report
    facts = report.facts["torchao"]
    assert (facts["layers"], facts["proven"], facts["converted"]) == (14, 14, [])
    assert report.compared == 21 - 14


def test_the_audit_finds_a_weight_that_is_not_the_files(llmload_checkpoint: Checkpoints) -> None:
    class Turned:
        """Turns the first row of a weight round, as a fault of memory could."""

        name = "turned"
        stage = "training"

        @llmload.hookimpl
        def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
            if not ctx.rehearsing:
                model.model.layers[1].mlp.up_proj.weight.qdata[0].neg_()
            return model

    spec = {"model": str(llmload_checkpoint()), "torchao": {}, "trainable": False}
    with pytest.raises(llmload.AuditError) as failed:
        llmload.load(spec, registry=llmload.create_registry([Turned]))
    (problem,) = failed.value.problems
    assert problem.message == (
        "'model.layers.1.mlp.up_proj.weight' are not what the checkpoint's values give when"
        " quantised"
    )
    assert problem.fix == "Try another loader with `-p no:NAME`, and report this."


def test_lora_trains_on_it_and_leaves_it_alone(llmload_checkpoint: Checkpoints) -> None:
    spec = {"model": str(llmload_checkpoint()), "torchao": {}, "lora": {"r": 2}}
    result = llmload.load(spec)
    base = llmload.load({"model": spec["model"], "torchao": {}, "trainable": False}).model
    assert result.report.trainable == result.plan.trainable > 0
    first, *_, last = losses(result.model, 5)
    assert last < first
    assert unlike(result.model.unload(), base) == []


def test_a_saved_model_is_loaded_by_its_own_config(
    llmload_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    model = llmload.load({"model": str(llmload_checkpoint()), "torchao": {}}).model
    model.save_pretrained(tmp_path / "saved")
    spec = {"model": str(tmp_path / "saved"), "trainable": False}
    result = llmload.load(spec)
    assert unlike(model, result.model) == []
    assert result.report.parameter_bytes == sum(map(partitions.nbytes, model.parameters()))
    assert any("bytes, where" in line for line in result.report.audit)
    (problem,) = llmload.plan(spec | {"torchao": {}}).errors
    assert problem.message == "the checkpoint is quantised already"
    assert problem.fix == "Remove `torchao`, or load the checkpoint from before."


def test_modules_that_are_named_stay_as_they_are(llmload_checkpoint: Checkpoints) -> None:
    section = {"skip_modules": ["q_proj", "layers.1"]}
    spec = {"model": str(llmload_checkpoint()), "torchao": section, "trainable": False}
    model = llmload.load(spec).model
    found = {name for name, parameter in model.named_parameters() if partitions.wraps(parameter)}
    kinds = ("self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    assert found == {f"model.layers.0.{kind}_proj.weight" for kind in kinds}


REFUSALS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a name of nothing": (
        "llama",
        {"torchao": {"skip_modules": ["q_porj"]}},
        "no linear layer of LlamaForCausalLM is called 'q_porj'",
        "Names end in q_proj",
    ),
    "a model without linear layers": (
        "gpt2",
        {"torchao": {}},
        "GPT2LMHeadModel has no linear layer to quantise",
        "Remove `torchao`, or list fewer `skip_modules`.",
    ),
    "quantised twice": (
        "llama",
        {"torchao": {}, "kbit": {}},
        "'torchao' cannot be combined with 'kbit': each of them answers for quantised weights: it"
        " makes them, or takes over those of a checkpoint",
        "Remove `torchao` or `kbit`.",
    ),
    **{
        key: (
            "llama",
            {"torchao": {}, **keys},
            f"{key!r} cannot be combined with 'torchao': {reason}",
            f"Remove `{key}`",
        )
        for key, keys, reason in (
            (
                "cast",
                {"cast": {"modules": {"norm": "float32"}}},
                "which weights are codes, and must not be cast, is known there",
            ),
            (
                "coati",
                {"coati": {}, "lora": {"r": 2}},
                "ColossalChat's layers adapt weights that are not quantised",
            ),
            (
                "colossalai",
                {"colossalai": {}},
                "ColossalAI shards and trains weights as they are in the checkpoint",
            ),
        )
    },
    "an adapter that rewrites the base": (
        "llama",
        {"torchao": {}, "lora": {"r": 2, "init_lora_weights": "olora"}},
        "'olora' changes the weights that the adapter starts from, and those are in 8 bits",
        "Remove `init_lora_weights`, or `torchao`.",
    ),
    "nothing to read": (
        "llama",
        {"torchao": {}, "weights": "random"},
        "'torchao' cannot be combined with 'weights': random weights are not read, so nothing can"
        " be quantised on the way",
        "Remove `torchao`, or load a checkpoint.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_done_is_refused_by_the_plan(
    llmload_checkpoint: Checkpoints, name: str
) -> None:
    model_type, keys, message, fix = REFUSALS[name]
    plan = llmload.plan({"model": str(llmload_checkpoint(model_type)), **keys})
    (problem,) = [problem for problem in plan.errors if problem.message == message]
    assert problem.fix.startswith(fix)


def refused(spec: dict[str, Any]) -> list[str]:
    return [problem.message for problem in llmload.plan(spec).errors]


def test_under_zero3_it_is_refused_with_the_reason(llmload_checkpoint: Checkpoints) -> None:
    pytest.importorskip("deepspeed")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    spec = {"model": str(llmload_checkpoint()), "torchao": {}, "zero3": {"config": config}}
    for errors in run_on_ranks(refused, spec, process_group=False):
        assert errors == [
            "the plugin 'zero3' leaves each rank a part of one flat tensor for each weight, and"
            " torchao stores a weight in several"
        ]


def test_a_weight_that_no_checkpoint_has_is_refused(
    llmload_checkpoint: Checkpoints,
) -> None:
    folder = llmload_checkpoint(auto_class="base", num_hidden_layers=1)
    missing = r"layers\.1\..*"
    (folder / "config.json").write_text(
        (folder / "config.json")
        .read_text()
        .replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
    )
    spec = {"model": str(folder), "auto_class": "base", "strict": {"allow_missing": [missing]}}
    (problem,) = llmload.plan(spec | {"torchao": {}}).errors
    assert problem.message.startswith("the checkpoint has no values for 'layers.1.mlp.down_proj")
    assert problem.fix == "List the modules in `torchao: {skip_modules: [...]}`."


def test_the_readmes_snippet_prints_what_stands_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code, printed = (
        re.search(rf"^```{kind}\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
        for kind in ("python", "text")
    )
    assert code is not None
    assert printed is not None
    tiny_checkpoint(tmp_path / "my-model", dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], "README.md", "exec"), {})
    # Importing DeepSpeed, where it is installed, prints a line before that.
    assert capsys.readouterr().out.endswith(printed[1])


def test_the_plugin_keeps_the_contract() -> None:
    bad = [{"weights": "int4"}, {"skip_modules": "q_proj"}, {"skip_modules": ["no such thing"]}]
    assert_plugin(TorchaoPlugin, bad=bad)

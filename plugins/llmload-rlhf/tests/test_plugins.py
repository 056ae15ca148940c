"""The sections in a load: refusals, flags, dtype, adapters, dropout, checkpointing, proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import CASES, IDS, load, read, refusal, saved, write

import llmload
from llmload.testing import tiny_checkpoint, tiny_model

ALL = [*CASES, ("reward_head", "sequence_classification")]
HEAD = {"deepspeed_chat": "v_head", "coati": "value_head", "trl": "v_head"}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("causal"), "llama", pad=True)


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_a_head_on_a_model_of_another_class_is_refused(case: Any, causal: Path) -> None:
    wanted = CASES.get(case, "sequence_classification")
    message = refusal(causal, case, auto_class="token_classification")
    assert message.startswith("auto_class: ")
    assert message.endswith(
        f"and 'token_classification' is asked for. Write `auto_class: {wanted}`."
    )


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_new_head_beside_one_that_is_there_is_refused(case: Any, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, case[1])
    message = refusal(folder, case, head_new=True)
    assert message.startswith(f"{case[0]}: a new head is asked for, and the checkpoint has one: '")
    assert message.endswith(f". Remove `new` from `{case[0]}`.")


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_random_weights_want_a_new_head(case: Any, causal: Path) -> None:
    assert refusal(causal, case, weights="random").endswith(
        f"Write `{case[0]}: {{new: true}}`"
        + (
            "."
            if case[1] == "sequence_classification"
            else " to start with a new head, or map the keys."
        )
    )
    result = load(causal, case, weights="random", head_new=True)
    assert len(result.report.newly_initialised) >= len(list(result.model.parameters()))


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path, "llama", auto_class="sequence_classification", num_labels=2, pad=True
    )
    case = ("reward_head", "sequence_classification")
    assert refusal(folder, case) == (
        "reward_head: a reward model has one label, and the config has 2. Write `reward_head: {new:"
        " true}` to start with a new head of one label."
    )
    assert refusal(folder, case, head_new=True).splitlines()[0] == (
        "reward_head: a new head is asked for, and the checkpoint has one: 'score.weight'. Remove"
        " `new` from `reward_head`."
    )


def test_a_model_gets_one_head(causal: Path) -> None:
    case = ("reward_head", "coati")
    message = refusal(causal, case, head_new=True, critic_head={"layout": "coati", "new": True})
    assert "'reward_head' cannot be combined with 'critic_head': a model gets one head" in message


def test_a_setting_of_another_layout_is_refused(causal: Path) -> None:
    case = ("reward_head", "coati")
    assert refusal(causal, case, head_new=True, head_compute_fp32_loss=True) == (
        "reward_head.compute_fp32_loss: the layout 'coati' has no such setting. Remove the key."
    )


def test_a_version_of_coati_is_refused_in_other_layouts_and_where_there_was_none(
    causal: Path,
) -> None:
    chat = ("critic_head", "deepspeed_chat")
    assert refusal(causal, chat, head_new=True, head_version="0.3.4") == (
        "critic_head.version: the layout 'deepspeed_chat' has no such setting. Remove the key."
    )
    message = refusal(causal, ("critic_head", "coati"), head_new=True, head_version="0.1")
    assert message.startswith("critic_head.version: ")
    assert "'0.2.8', '0.3.4' or 'colossalchat'" in message


def test_without_a_pad_token_the_ends_of_sequences_are_unknown(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "llama")
    assert refusal(folder, ("reward_head", "deepspeed_chat"), head_new=True) == (
        "reward_head: sequences end at their pad token, and neither tokenizer nor config has one."
        " Write `tokenizer: {pad_token: eos}`, or another token."
    )
    keys: dict[str, Any] = {"tokenizer": {"pad_token": "eos"}}
    result = load(folder, ("reward_head", "deepspeed_chat"), head_new=True, **keys)
    assert result.tokenizer.eos_token_id == result.model.PAD_ID


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_head_has_the_dtype_and_the_flag_asked_for(case: Any, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, case[1], dtype=torch.bfloat16)
    result = load(folder, case, head_dtype="float32", head_trainable=False)
    for name, parameter in result.model.named_parameters():
        is_head = name.startswith(HEAD[case[1]])
        assert parameter.requires_grad != is_head
        assert parameter.dtype == (torch.float32 if is_head else torch.bfloat16)
        assert torch.equal(parameter, theirs.state_dict()[name].to(parameter.dtype))
    assert not any(HEAD[case[1]] in n for n in result.plan.trainable_parameters or ())
    outputs = result.model(IDS)
    found = outputs["loss"] if isinstance(outputs, dict) else outputs
    assert (found[2] if isinstance(found, tuple) else found).isfinite().all()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_an_adapter_trains_the_head_that_is_saved_with_it(case: Any, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, case[1])
    head = HEAD[case[1]]
    lora = {"r": 2, "target_modules": "all-linear"}
    assert refusal(folder, case, lora={"r": 2, "target_modules": ["q_proj"]}) == (
        f"lora.modules_to_save: `{case[0]}` is to be trained, and an adapter freezes all but"
        f" itself. Write `modules_to_save: [{head}]` in `lora`, or `trainable: false` in"
        f" `{case[0]}`."
    )
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": [head]}
    result = load(
        folder, case, lora=lora, dropout={"p": 0.0}, gradient_checkpointing={"use_reentrant": False}
    )
    trainable = {n for n, p in result.model.named_parameters() if p.requires_grad}
    assert trainable == set(result.plan.trainable_parameters or ())
    assert (
        {n for n in trainable if "lora_" not in n}
        == {n for n in trainable if f"{head}.modules_to_save" in n}
        != set()
    )
    assert f"gradients reach {len(trainable)} of {len(trainable)}" in "\n".join(result.report.audit)
    kept = result.model.get_submodule(f"base_model.model.{head}.modules_to_save.default")
    for name, value in kept.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[f"{head}.{name}"])


def test_a_new_head_is_trained_with_everything_else_by_one_step(causal: Path) -> None:
    result = load(causal, ("reward_head", "deepspeed_chat"), head_new=True, dropout={"p": 0.0})
    model = result.model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(IDS)["loss"].backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"v_head.weight", "rwtransformer.layers.0.mlp.up_proj.weight"} <= changed


def test_what_is_new_in_the_transformer_is_reported_by_its_name_in_the_model(
    tmp_path: Path,
) -> None:
    folder, _ = saved(tmp_path, "coati")
    state = read(folder)
    del state["model.norm.weight"]
    write(folder, state)
    result = load(folder, ("reward_head", "coati"), strict={"allow_missing": ["^norm"]})
    assert result.report.newly_initialised == {"model.norm.weight": "missing from the checkpoint"}


def test_a_head_that_a_later_plugin_changes_fails_the_audit(tmp_path: Path) -> None:
    class Meddling:
        name = "meddling"
        after = ("reward_head",)

        @llmload.hookimpl
        def post_load(self, ctx: Any, model: Any) -> Any:
            if not ctx.rehearsing:
                with torch.no_grad():
                    model.value_head.weight.add_(1)
            return model

    folder, _ = saved(tmp_path, "coati")
    registry = llmload.create_registry([Meddling()])
    spec = {"model": str(folder), "auto_class": "base", "allow_pickle": True}
    with pytest.raises(llmload.AuditError) as caught:
        llmload.load(spec | {"reward_head": {"layout": "coati"}}, registry=registry)
    assert str(caught.value) == (
        "value_head.weight: the head differs from the checkpoint after loading. A plugin that runs"
        " later changed it; report this to its makers."
    )


def test_the_plan_says_what_head_there_will_be(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "coati")
    plan = llmload.plan(
        {
            "model": str(folder),
            "auto_class": "base",
            "allow_pickle": True,
            "critic_head": {"layout": "coati"},
        }
    )
    (step,) = [step for step in plan.steps if step.plugin == "critic_head"]
    assert step.notes == [
        "coati colossalchat: value_head.weight, value_head.bias, from the checkpoint"
    ]
    assert plan.keys == ["20 renamed by plugin 'critic_head'"]
    size = sum(p.numel() for p in tiny_model("llama", auto_class="base").parameters())
    assert plan.parameters == plan.trainable == size + 17

"""The models compute what their systems compute, told anew in ``systems.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import systems
import torch
from making import CASES, IDS, MASK, PAD, load, saved
from transformers import AutoModelForSequenceClassification

from llmload.testing import edit_config, tiny_checkpoint

CHAT = ("reward_head", "deepspeed_chat")
# Pair by pair: every token the same; the difference at the last token; pads at the beginning.
OTHERS = torch.tensor(
    [[3, 6, 7, 8, 9, 3, 3, 3], [3, 6, 7, 8, 9, 4, 4, 4], [3, 6, 7, 8, 9, 3, 3, 4], [3, 6, 7, 3] * 2]
)


def close(found: Any, expected: Any) -> bool:
    return all(
        torch.allclose(found[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)
        for name, value in expected.items()
    )


@pytest.mark.parametrize("ids", [IDS, OTHERS], ids=["ends padded", "begins padded"])
@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_pairs_are_compared_as_deepspeed_chat_does(
    model_type: str, skipped: int, ids: torch.Tensor, tmp_path: Path
) -> None:
    folder, theirs = saved(tmp_path, "deepspeed_chat", model_type)
    model = load(folder, CHAT, head_num_padding_at_beginning=skipped).model
    assert (model.PAD_ID, model.num_padding_at_beginning) == (PAD, skipped)
    theirs.skipped = skipped
    mask = torch.ones_like(ids)
    expected = theirs.pairs(ids, mask)
    found = model(ids, attention_mask=mask)
    assert close(found, expected)
    found["loss"].backward()
    expected["loss"].backward()
    if expected["loss"].isfinite():  # pads at the beginning that nobody expected leave no token
        ours, their = model.v_head.weight.grad, theirs.v_head.weight.grad
        assert torch.allclose(ours, their, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fp32", [False, True])
def test_the_loss_is_computed_in_float32_where_asked(fp32: bool, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, "deepspeed_chat", dtype=torch.bfloat16)
    model = load(folder, CHAT, head_compute_fp32_loss=fp32).model
    theirs.fp32 = fp32
    found, expected = model(IDS, attention_mask=MASK), theirs.pairs(IDS, MASK)
    assert found["loss"].dtype == expected["loss"].dtype == [torch.bfloat16, torch.float32][fp32]
    assert found["chosen_mean_scores"].dtype == torch.bfloat16
    assert torch.allclose(found["loss"], expected["loss"], rtol=1e-2)


@pytest.mark.parametrize("section", ["reward_head", "critic_head"])
def test_values_are_those_of_deepspeed_chats_third_step(section: str, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, "deepspeed_chat", "gpt2")
    model = load(folder, (section, "deepspeed_chat")).model
    expected = theirs.value(IDS, MASK, 2)
    assert close(model.forward_value(IDS, attention_mask=MASK, prompt_length=2), expected)
    only = model.forward_value(IDS, attention_mask=MASK, return_value_only=True)
    assert torch.equal(only, theirs.score(IDS, MASK))


def test_what_is_no_batch_of_pairs_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "deepspeed_chat")
    model = load(folder, CHAT).model
    with pytest.raises(ValueError, match="chosen, then rejected; found 3 rows"):
        model(IDS[:3])
    with pytest.raises(ValueError, match="a pair differs in its first token"):
        model(torch.stack([IDS[0], IDS[0] + 1]))
    with pytest.raises(ValueError, match="prompt_length must be above 1, found 0"):
        model.forward_value(IDS)


@pytest.mark.parametrize("side", ["right", "left"])
def test_coatis_reward_is_the_score_at_the_last_token(side: str, tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, "coati")
    ids, mask = (IDS, MASK) if side == "right" else (IDS.flip(1), MASK.flip(1))
    found = load(folder, ("reward_head", "coati")).model(ids, attention_mask=mask)
    assert found.shape == (4,)
    assert torch.allclose(found, theirs(ids, mask), rtol=1e-5, atol=1e-6)


def test_coatis_critic_gives_a_value_for_every_token(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, "coati", "opt")
    found = load(folder, ("critic_head", "coati")).model(IDS, attention_mask=MASK)
    assert torch.equal(found, theirs(IDS, MASK, pooled=False))


@pytest.mark.parametrize("version", ["0.2.8", "0.3.4", "colossalchat"])
def test_coatis_reward_and_value_are_those_of_the_version_that_the_spec_names(
    version: str, tmp_path: Path
) -> None:
    folder, theirs = saved(tmp_path, "coati", "gpt2")
    reward, value = (
        load(folder, (section, "coati"), head_version=version).model
        for section in ("reward_head", "critic_head")
    )
    old = systems.OldCoati(theirs.model)
    old.value_head = theirs.value_head
    # As many rows as tokens, where a wrong generation's shape would go unnoticed in a loss.
    ids, mask = IDS.repeat(2, 1), MASK.repeat(2, 1)
    expected = {
        "0.2.8": (old.reward(ids, mask), old.reward(ids, mask)),
        "0.3.4": (theirs(ids, mask), theirs(ids, mask)),
        "colossalchat": (theirs(ids, mask), theirs(ids, mask, pooled=False)),
    }[version]
    found = (reward(ids, attention_mask=mask), value(ids, attention_mask=mask))
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.shape == wanted.shape
        torch.testing.assert_close(ours, wanted)
    if version == "0.2.8":
        left, seen = ids.flip(1), mask.flip(1)
        found = value(left, torch.ones(8, 3), attention_mask=seen)
        torch.testing.assert_close(found[::4], old.value(left, 3, seen)[::4])
        without = value(left, torch.ones(8, 3))
        torch.testing.assert_close(without, old.value(left, 3, torch.ones_like(left)))


def test_trls_model_gives_logits_loss_and_values(tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path, "trl", dtype=torch.bfloat16)
    model = load(folder, ("value_head", "trl")).model
    logits, loss, values = model(IDS, attention_mask=MASK, labels=IDS)
    expected_logits, expected_values = theirs(IDS, MASK)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected_logits)
    assert torch.equal(values, expected_values)
    assert loss.requires_grad
    assert len(model(IDS, return_past_key_values=True)) == 4
    made = model.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False, pad_token_id=PAD)
    expected = theirs.pretrained_model.generate(
        IDS[:1, :4], max_new_tokens=2, do_sample=False, pad_token_id=PAD
    )
    assert torch.equal(made, expected)


@pytest.mark.parametrize("asked", [None, 0.0, 0.25])
@pytest.mark.parametrize("configured", [None, 0.5])
def test_trls_head_is_float32_and_drops_what_the_config_says(
    configured: float | None, asked: float | None, tmp_path: Path
) -> None:
    folder, theirs = saved(tmp_path, "trl", dtype=torch.bfloat16)
    if configured is not None:
        edit_config(folder, summary_dropout_prob=configured)
    keys = {} if asked is None else {"head_summary_dropout_prob": asked}
    model = load(folder, ("value_head", "trl"), **keys).model
    assert {p.dtype for p in model.v_head.parameters()} == {torch.float32}
    assert model.pretrained_model.dtype == torch.bfloat16
    p = asked if asked is not None else configured if configured is not None else 0.1
    theirs.v_head.dropout.p = p
    assert getattr(model.v_head.dropout, "p", 0.0) == p
    model.v_head.train()
    theirs.v_head.train()
    values = []
    for one in (lambda: model(IDS, attention_mask=MASK)[2], lambda: theirs(IDS, MASK)[1]):
        torch.manual_seed(3)
        values.append(one())
    assert values[0].dtype == torch.float32
    assert torch.equal(*values)


def test_a_classifiers_score_is_transformers_own(tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path, "llama", auto_class="sequence_classification", num_labels=1, pad=True
    )
    model = load(folder, ("reward_head", "sequence_classification")).model
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, pad_token_id=PAD)
    model.config.pad_token_id = PAD
    found = model(IDS, attention_mask=MASK).logits
    assert found.shape == (4, 1)
    assert torch.equal(found, theirs(IDS, attention_mask=MASK).logits)


# --- new heads --------------------------------------------------------------------------------

SIZES = {"llama": 4096, "gpt2": 4096, "opt": 2048}


@pytest.mark.parametrize("model_type", SIZES)
@pytest.mark.parametrize(
    ("case", "keys", "deviation"),
    [
        # PARITY: N(0, 1/(size + 1)); torch's own is uniform within 1/sqrt(size).
        (("reward_head", "coati"), {}, lambda size: 1 / (size + 1)),
        (("critic_head", "coati"), {}, lambda size: 1 / (3 * size) ** 0.5),
        (("reward_head", "deepspeed_chat"), {}, lambda size: 1 / (3 * size) ** 0.5),
        (("value_head", "trl"), {}, lambda size: 1 / (3 * size) ** 0.5),
        (("value_head", "trl"), {"v_head_init_strategy": "normal"}, lambda size: 0.2),
    ],
    ids=["coati reward", "coati critic", "deepspeed_chat", "trl", "trl normal"],
)
def test_a_new_head_has_its_systems_size_and_spread(
    case: tuple[str, str], keys: dict[str, Any], deviation: Any, model_type: str
) -> None:
    from transformers import AutoConfig

    from llmload_rlhf.models import head_size
    from llmload_rlhf.plugins import CriticHeadPlugin, RewardHeadPlugin, ValueHeadPlugin

    fields = {"llama": "hidden_size", "gpt2": "n_embd", "opt": "word_embed_proj_dim"}
    config = AutoConfig.for_model(model_type, **{fields[model_type]: SIZES[model_type]})
    size = head_size(config)
    assert size == SIZES[model_type]
    plugin = {p.name: p for p in (CriticHeadPlugin, RewardHeadPlugin, ValueHeadPlugin)}[case[0]]
    layout, section = plugin.layouts[case[1]], plugin.Section(layout=case[1], **keys)
    torch.manual_seed(0)
    head = layout.make_head(config, section)
    weight = head.get_parameter(layout.parts[0])
    assert weight.shape == (1, size)
    assert weight.std().item() == pytest.approx(deviation(size), rel=0.1)
    assert {name for name, _ in head.named_parameters()} == {*layout.parts}
    if keys:
        assert not head.summary.bias.any()


@pytest.mark.parametrize("case", [*CASES, ("reward_head", "sequence_classification")])
def test_a_new_head_goes_on_a_language_model_and_is_listed(
    case: tuple[str, str], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path, "llama", pad=True)
    result = load(folder, case, head_new=True)
    head = {"coati": "value_head", "sequence_classification": "score"}.get(case[1], "v_head")
    assert {name.split(".")[0] for name in result.report.newly_initialised} == {head}
    assert set(result.report.left_out) == (set() if case[1] == "trl" else {"lm_head.weight"})
    assert set(result.plan.new_parameters) == set(result.report.newly_initialised)
    maker = "streaming" if head == "score" else case[0]
    assert set(result.plan.new_parameters.values()) == {maker}
    assert all(p.requires_grad for p in result.model.parameters())
    assert all(not p.is_meta for p in result.model.parameters())

"""The embeddings section: how many rows there will be, what the new ones hold, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from stacks import IS_MODERN, needs_transformers_5
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmload
from llmload.builtin.embeddings.plugin import EmbeddingsPlugin, initialise_rows
from llmload.builtin.embeddings.resizing import named_tensors
from llmload.builtin.embeddings.section import EmbeddingsSection
from llmload.testing import context_of, save_checkpoint, tiny_llama, tiny_model, tiny_tokenizer

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
INPUT, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(folder: Path, *, add: int = 0, **section: Any) -> llmload.LoadResult:
    """Load with ``add`` new tokens; the tiny tokenizer has ids 0 to 50."""
    tokens = [f"<{number}>" for number in range(add)]
    spec = {"model": str(folder), "tokenizer": {"add_tokens": tokens}, "embeddings": section}
    return llmload.load(spec)


def errors(folder: Path, *, add: int = 0, **keys: Any) -> list[str]:
    tokens = [f"<{number}>" for number in range(add)]
    plan = llmload.plan({"model": str(folder), "tokenizer": {"add_tokens": tokens}, **keys})
    return [str(problem) for problem in plan.errors]


def rows(result: llmload.LoadResult) -> int:
    return int(result.model.get_input_embeddings().weight.shape[0])


def reference(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


# --- how many rows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "add", "section", "expected", "note"),
    [
        (51, 0, {}, 51, "51 rows for 51 token ids"),
        (51, 3, {}, 54, "51 rows for 54 token ids, grown to 54; 3 are new (mean)"),
        (
            51,
            3,
            {"pad_to_multiple_of": 8, "init_new": "zero"},
            56,
            "51 rows for 54 token ids, grown to 56; 5 are new (zero)",
        ),
        (
            64,
            3,
            {},
            64,
            "64 rows for 54 token ids; none is cut without `allow_shrink: true`; 3 are new (mean)",
        ),
        (
            60,
            0,
            {"pad_to_multiple_of": 64},
            64,
            "60 rows for 51 token ids, grown to 64; none is cut without `allow_shrink: true`;"
            " 4 are new (mean)",
        ),
        (64, 0, {"allow_shrink": True}, 51, "64 rows for 51 token ids, cut to 51"),
        (
            64,
            0,
            {"allow_shrink": True, "pad_to_multiple_of": 8},
            56,
            "64 rows for 51 token ids, cut to 56",
        ),
        (51, 0, {"pad_to_multiple_of": 1}, 51, "51 rows for 51 token ids"),
    ],
)
@TIED
def test_rows_are_counted(
    tmp_path: Path,
    tied: bool,
    vocabulary: int,
    add: int,
    section: dict[str, Any],
    expected: int,
    note: str,
) -> None:
    result = load(tiny_llama(tmp_path, tied=tied, vocab_size=vocabulary), add=add, **section)
    model = result.model
    assert rows(result) == model.get_output_embeddings().weight.shape[0] == expected
    assert model.config.vocab_size == model.lm_head.out_features == expected
    assert model.model.embed_tokens.num_embeddings == expected
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert result.report.facts["embeddings"]["rows"] == [vocabulary, expected]
    assert [s.notes for s in result.plan.steps if s.plugin == "embeddings"] == [[note]]


@pytest.mark.parametrize("vocabulary", [48, 51, 56, 60, 128])
def test_deepspeed_chats_size_is_reached_whatever_the_checkpoint_had(
    tmp_path: Path, vocabulary: int
) -> None:
    folder = tiny_llama(tmp_path, vocab_size=vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = int(8 * math.ceil(len(tokenizer) / 8.0))
    assert rows(load(folder, pad_to_multiple_of=8, allow_shrink=True)) == theirs


def test_ids_count_and_not_the_number_of_tokens(tmp_path: Path) -> None:
    """A vocabulary with gaps has ids beyond its length."""
    folder = tiny_llama(tmp_path, vocab_size=51)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["fox"] = 60
    file.write_text(json.dumps(content))
    result = load(folder)
    assert result.tokenizer is not None
    assert (len(result.tokenizer), rows(result)) == (51, 61)


def test_without_a_tokenizer_rows_are_only_rounded_up(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model(vocab_size=60), tmp_path)
    result = llmload.load(
        {"model": str(folder), "embeddings": {"pad_to_multiple_of": 8, "allow_shrink": True}}
    )
    assert rows(result) == 64
    expected = reference(folder)[INPUT].mean(0)
    torch.testing.assert_close(result.model.state_dict()[INPUT][62], expected)


def test_the_plan_knows_the_rows_and_reads_no_weight(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").chmod(0o400)
    plan = llmload.plan({"model": str(folder), "embeddings": {"pad_to_multiple_of": 100}})
    assert plan.facts["embeddings"] == {
        "rows": [128, 200],
        "new_rows": list(range(128, 200)),
        "init_new": "mean",
        "changed": [INPUT, HEAD],
    }
    assert plan.parameters == sum(p.numel() for p in tiny_model().parameters()) + 2 * 72 * 16


# --- what the rows hold -------------------------------------------------------------------------


@TIED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_rows_stay_bit_equal_and_new_ones_are_the_mean_of_known_ones(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    """64 rows, 51 tokens, 15 new ones: 51 to 63 are in the checkpoint, 64 to 65 are not."""
    folder = tiny_llama(tmp_path, tied=tied, dtype=dtype, vocab_size=64)
    before, result = reference(folder), load(folder, add=15)
    after = result.model.state_dict()
    assert rows(result) == 66
    for name in (INPUT, HEAD):
        assert after[name].dtype == dtype
        assert torch.equal(after[name][:51], before[name][:51])
        mean = before[name][:51].double().mean(0)
        for row in range(51, 66):
            torch.testing.assert_close(after[name][row].double(), mean, rtol=4e-3, atol=1e-6)
        assert torch.equal(after[name][51:], after[name][51].expand(15, -1))
    assert all(
        torch.equal(after[name], before[name]) for name in before if name not in (INPUT, HEAD)
    )
    assert result.report.facts["embeddings"]["new_rows"] == list(range(51, 66))
    changed = [INPUT] if tied else [INPUT, HEAD]
    assert result.report.facts["embeddings"]["changed"] == changed


def test_spare_rows_that_no_token_uses_are_left_and_do_not_count(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=64)
    with torch.no_grad():
        model.model.embed_tokens.weight[51:] = 1e6
    folder = save_checkpoint(model, tmp_path, tokenizer=tiny_tokenizer())
    after = load(folder, add=2).model.state_dict()[INPUT]
    mean = model.model.embed_tokens.weight[:51].mean(0)
    torch.testing.assert_close(after[51:53], mean.expand(2, -1))
    assert torch.equal(after[53:], torch.full((11, 16), 1e6))


def test_a_token_that_the_checkpoints_tokenizer_has_keeps_its_row(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, pad=True)
    spec = {"model": str(folder), "tokenizer": {"add_tokens": ["<pad>"]}, "embeddings": {}}
    result = llmload.load(spec)
    assert result.report.facts["embeddings"]["new_rows"] == []
    assert torch.equal(result.model.state_dict()[INPUT], reference(folder)[INPUT])


def test_tokens_of_another_tokenizer_are_new_where_the_models_own_has_no_such_id(
    tmp_path: Path,
) -> None:
    folder = tiny_llama(tmp_path, vocab_size=64)
    extended = tiny_tokenizer()
    extended.add_tokens(["<a>", "<b>"])
    extended.save_pretrained(tmp_path / "extended")
    spec = {"model": str(folder), "tokenizer": {"name_or_path": str(tmp_path / "extended")}}
    result = llmload.load(spec | {"embeddings": {}})
    assert result.report.facts["embeddings"]["new_rows"] == [51, 52]


def test_zero_rows_are_zero(tmp_path: Path) -> None:
    after = load(tiny_llama(tmp_path), add=2, init_new="zero").model.state_dict()
    assert not after[INPUT][51:53].any()
    assert not after[HEAD][51:53].any()


def test_normal_rows_have_the_known_rows_mean_and_deviation(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=51)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(torch.arange(1.0, 17)).add_(torch.arange(16.0))
    folder = save_checkpoint(model, tmp_path, tokenizer=tiny_tokenizer())
    after = load(folder, init_new="normal", pad_to_multiple_of=20000).model.state_dict()[INPUT]
    known, new = after[:51], after[51:]
    deviation = known.std(0, correction=0)
    assert torch.all((new.mean(0) - known.mean(0)).abs() < 0.05 * deviation)
    torch.testing.assert_close(new.std(0), deviation, rtol=0.05, atol=0)


def test_normal_rows_are_the_same_in_every_process_and_differ_by_seed(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed())
        result = load(folder, add=4, init_new="normal", seed=seed)
        new: torch.Tensor = result.model.state_dict()[INPUT][51:55]
        return new

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    assert len(drawn(0).unique(dim=0)) == 4


@pytest.mark.parametrize("init_new", ["mean", "normal", "zero"])
def test_the_processs_random_state_does_not_move(tmp_path: Path, init_new: str) -> None:
    folder = tiny_llama(tmp_path)
    torch.manual_seed(5)
    llmload.load({"model": str(folder)})
    plain = torch.get_rng_state()
    torch.manual_seed(5)
    load(folder, add=100, init_new=init_new)
    assert torch.equal(torch.get_rng_state(), plain)


def test_statistics_are_right_over_many_rows_and_in_low_precision() -> None:
    """More rows than one piece of the sum, in a dtype that cannot count to 300."""
    table = torch.full((20000, 3), 1.0, dtype=torch.bfloat16)
    table[10000:] = 3.0
    initialise_rows(table, [0], range(1, 20000), "mean")
    assert torch.equal(table[0], torch.full((3,), 2.0, dtype=torch.bfloat16))


def test_the_heads_bias_gets_values_too() -> None:
    model = tiny_model(vocab_size=51)
    model.lm_head.bias = nn.Parameter(torch.arange(51.0))
    ctx = context(model, tiny_tokenizer(), add=3)
    EmbeddingsPlugin().post_load(ctx, model)
    assert torch.equal(model.lm_head.bias[:51], torch.arange(51.0))
    assert torch.equal(model.lm_head.bias[51:], torch.full((3,), 25.0))


def test_a_buffer_with_one_entry_per_token_grows_with_them_in_its_own_dtype() -> None:
    """transformers makes BART's ``final_logits_bias`` float32 and its new entries zero."""
    model = architectures.build("seq2seq_lm", "bart").to(torch.bfloat16)
    model.final_logits_bias.fill_(3.0)
    ctx = context(model, grown(model)).for_run(rehearsing=False)
    EmbeddingsPlugin().post_load(ctx, model)
    assert model.final_logits_bias.dtype == torch.bfloat16
    assert torch.equal(model.final_logits_bias, torch.full((1, 136), 3.0, dtype=torch.bfloat16))


def test_parameters_stay_the_objects_that_they_were_and_as_trainable() -> None:
    model = tiny_model()
    model.lm_head.requires_grad_(False)
    before = dict(model.named_parameters())
    EmbeddingsPlugin().post_load(context(model, tiny_tokenizer(), add=100), model)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert not model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad


def test_only_parameters_without_any_row_of_the_checkpoint_count_as_new(tmp_path: Path) -> None:
    result = load(tiny_llama(tmp_path), add=100)
    assert result.report.newly_initialised == {}


def test_what_is_saved_loads_again_as_it_was(tmp_path: Path) -> None:
    result = load(tiny_llama(tmp_path), add=100, pad_to_multiple_of=16)
    assert result.tokenizer is not None
    result.model.save_pretrained(tmp_path / "saved")
    result.tokenizer.save_pretrained(tmp_path / "saved")
    again = llmload.load({"model": str(tmp_path / "saved"), "embeddings": {}})
    assert again.report.facts["embeddings"]["rows"] == [160, 160]
    before, after = result.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_goes_around_the_resized_model(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    lora = {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}
    tokens = [f"<{number}>" for number in range(100)]
    result = llmload.load(
        {
            "model": str(folder),
            "tokenizer": {"add_tokens": tokens},
            "embeddings": {},
            "lora": lora,
        }
    )
    shapes = {name: tuple(p.shape) for name, p in result.model.named_parameters() if "lora" in name}
    prefix = "base_model.model."
    assert shapes == {
        f"{prefix}model.embed_tokens.lora_embedding_A.default": (2, 151),
        f"{prefix}model.embed_tokens.lora_embedding_B.default": (16, 2),
        f"{prefix}lm_head.lora_A.default.weight": (2, 16),
        f"{prefix}lm_head.lora_B.default.weight": (151, 2),
    }


# --- what is refused ----------------------------------------------------------------------------

FIX = " Use a tokenizer that the embedding has rows for, and remove the section `embeddings`."


def test_a_model_that_says_no_input_embedding_is_an_error() -> None:
    class Headless(PreTrainedModel):
        _supports_sdpa = True

    model = Headless(tiny_model().config)
    with pytest.raises(llmload.RequestError) as refused:
        EmbeddingsPlugin().post_load(context(model, tiny_tokenizer()), model)
    assert str(refused.value) == (
        "embeddings: Headless does not say which is its input embedding." + FIX
    )


def test_a_quantised_head_is_an_error() -> None:
    model = tiny_model()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(llmload.RequestError) as refused:
        EmbeddingsPlugin().post_load(context(model, tiny_tokenizer(), add=1), model)
    assert str(refused.value) == (
        "embeddings: lm_head.weight is quantised to torch.int8 and can get no new rows." + FIX
    )


def rehearsal_model(ctx: Any) -> Any:
    """The model on which the plan rehearses: on the meta device, tied."""
    model = ctx.take_blank()
    model.tie_weights()
    return model


@pytest.mark.parametrize(
    ("kind", "model_type", "fields", "message"),
    [
        pytest.param(
            "causal_lm",
            "mllama",
            {},
            "transformers leaves model.embed_tokens.weight of MllamaForCausalLM at [144, 32], where"
            " its resized config asks for [152, 32]",
            marks=needs_transformers_5,
        ),
        pytest.param(
            "causal_lm",
            "deepseek_v4",
            {},
            "transformers leaves model.layers.0.mlp.gate.tid2eid of DeepseekV4ForCausalLM at"
            " [128, 2], where its resized config asks for [136, 2]",
            marks=needs_transformers_5,
        ),
        pytest.param(
            "causal_lm",
            "reformer",
            {},
            "to resize the embeddings of ReformerModelWithLMHead, transformers would drop or tie"
            " lm_head.bias, lm_head.decoder.bias",
            marks=needs_transformers_5,
        ),
        pytest.param(
            "causal_lm",
            "dory",
            {"tie_word_embeddings": True},
            "transformers leaves lm_head.logit_scale of DoryForCausalLM at [128], where its resized"
            " config asks for [136]",
            marks=needs_transformers_5,
        ),
        pytest.param(
            "seq2seq_lm",
            "bart",
            {"tie_word_embeddings": False},
            "to resize the embeddings of BartForConditionalGeneration, transformers would drop or"
            " tie model.decoder.embed_tokens.weight, model.encoder.embed_tokens.weight,"
            " model.shared.weight",
            marks=needs_transformers_5,
        ),
        (
            "base",
            "ibert",
            {},
            "transformers cannot resize the embeddings of IBertModel:"
            " IBertPreTrainedModel.resize_token_embeddings() got an unexpected keyword argument"
            " 'mean_resizing'",
        ),
    ],
)
def test_an_architecture_that_transformers_cannot_resize_is_refused_by_name(
    kind: str, model_type: str, fields: dict[str, Any], message: str
) -> None:
    model = architectures.build(kind, model_type, **fields)
    ctx = context(model, grown(model))
    with pytest.raises(llmload.RequestError) as refused:
        EmbeddingsPlugin().post_load(ctx, rehearsal_model(ctx))
    assert str(refused.value) == f"embeddings: {message}.{FIX}"


@needs_transformers_5  # 4.51 resizes it
def test_a_refusal_comes_with_the_plan(tmp_path: Path) -> None:
    model = architectures.build("seq2seq_lm", "bart", tie_word_embeddings=False)
    folder = save_checkpoint(model, tmp_path, tokenizer=tiny_tokenizer())
    keys = {"auto_class": "seq2seq_lm", "embeddings": {"pad_to_multiple_of": 100}}
    (problem,) = errors(folder, **keys)
    assert problem.startswith(
        "embeddings: to resize the embeddings of BartForConditionalGeneration, transformers would"
        " drop or tie model.decoder.embed_tokens.weight,"
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"pad_to_multiple_of": 0},
            "embeddings.pad_to_multiple_of: must be 1 or more, found 0",
        ),
        (
            {"init_new": "random"},
            "embeddings.init_new: expected 'mean', 'normal' or 'zero', found 'random'",
        ),
        ({"shrink": True}, "embeddings.shrink: unknown key. Did you mean 'allow_shrink'?"),
    ],
)
def test_a_wrong_section_is_refused(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(llmload.SpecError) as refused:
        llmload.plan({"model": str(tmp_path), "embeddings": section})
    assert str(refused.value) == message


@pytest.mark.parametrize("part", ["input", "output"])
def test_rows_that_a_later_plugin_changes_are_refused_by_the_plan(
    tmp_path: Path, part: str
) -> None:
    class Meddler:
        name = "meddler"
        after = ("embeddings",)

        @llmload.hookimpl
        def post_load(self, ctx: llmload.LoadContext, model: Any) -> Any:
            module = getattr(model, f"get_{part}_embeddings")()
            module.weight = nn.Parameter(module.weight[:100].detach().clone())
            return model

    registry = llmload.create_registry([Meddler()])
    spec = {"model": str(tiny_llama(tmp_path)), "embeddings": {}}
    with pytest.raises(llmload.PlanError) as refused:
        llmload.load(spec, registry=registry)
    assert str(refused.value) == (
        f"plugin 'embeddings': the {part} embedding has 100 rows, 128 were planned. A plugin after"
        " `embeddings` changed it; report this to its makers."
    )


# --- every architecture -------------------------------------------------------------------------

REFUSED = {
    ("causal_lm", "blt"): "the patcher looks bytes up in an embedding of its own",
    ("causal_lm", "cpmant"): "its prompts take more rows than vocab_size counts",
    ("causal_lm", "deepseek_v4"): "its router finds experts by token id, in a table left as it was",
    ("causal_lm", "dory"): "transformers scales the logits of as many tokens as before, where tied",
    ("causal_lm", "moshi"): "silence takes one row more than vocab_size counts",
    ("causal_lm", "reformer"): "transformers drops the bias of its head",
    ("seq2seq_lm", "encoder-decoder"): "transformers resizes neither half through the whole",
    ("seq2seq_lm", "fsmt"): "its encoder and decoder count their rows apart",
    ("seq2seq_lm", "nemo_speechlm"): "a head for timestamps of the same size is left as it was",
    ("base", "ibert"): "its embedding is quantised",
    ("base", "mllama"): "its images take more rows than vocab_size counts",
    ("base", "molmo2_text"): "its images take more rows than vocab_size counts",
}
"""Types that cannot be resized with transformers, tied or untied, with the reason."""

REFUSED_UNTIED = {
    "causal_lm": (
        # The second name of the head's bias is lost, or it is left as it was.
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "ernie"),
        *("megatron-bert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
        *("xlm-roberta", "xlm-roberta-xl", "xmod"),
        "prophetnet",  # it has two embeddings, of which one is left as it was
    ),
    "seq2seq_lm": (
        # Encoder and decoder would come to share one embedding.
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "led", "m2m_100", "marian"),
        *("mbart", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet"),
        *("seamless_m4t", "seamless_m4t_v2", "switch_transformers"),
        *("t5gemma", "t5gemma2"),  # the decoder's embedding is left as it was
    ),
    "base": (),
}
"""Types that transformers resizes only where input and output embedding are tied, by kind."""

RESIZED_UNTIED = (("causal_lm", "dory"),) if IS_MODERN else (("causal_lm", "reformer"),)
"""Types among ``REFUSED`` that can be resized where they are not tied."""

if not IS_MODERN:
    # transformers 4.51 resizes more heads that are untied, and those whole.
    REFUSED_UNTIED = {
        "causal_lm": (
            *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"),
            "xmod",
        ),
        "seq2seq_lm": (),
        "base": (),
    }

NO_FORWARD = architectures.NO_FORWARD | {
    ("causal_lm", "rwkv"): "it fails in eval mode at this size, resized or not",
}

NEVER_TIED = ("causal_lm", "dbrx", 1)  # its config refuses it

TYPES = [
    (kind, name, tied)
    for kind, name in architectures.tried()
    for tied in ((1,) if kind == "base" else (1, 0))
]
if NEVER_TIED in TYPES:  # transformers 4.51 ties it all the same, or cannot build it
    TYPES.remove(NEVER_TIED)


@pytest.mark.filterwarnings("ignore")  # what transformers says of tiny configs is not the matter
@pytest.mark.parametrize(("kind", "model_type", "tied"), TYPES)
def test_every_architecture_is_resized_as_rehearsed_or_refused(
    kind: str, model_type: str, tied: int
) -> None:
    """Two rows to spare and eight more become new rows; the new ids are looked up and scored."""
    model = architectures.build(kind, model_type, tie_word_embeddings=bool(tied))
    old = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}
    count = model.get_input_embeddings().weight.shape[0]
    ctx = context(model, grown(model), new=range(count - 2, count + 8))
    refuse = (kind, model_type) in REFUSED or (not tied and model_type in REFUSED_UNTIED[kind])
    refuse = refuse and (tied or (kind, model_type) not in RESIZED_UNTIED)
    with pytest.raises(llmload.RequestError) if refuse else nullcontext():
        EmbeddingsPlugin().post_load(ctx, rehearsal_model(ctx))
    if refuse:
        return
    rehearsed = ctx.facts
    ctx = ctx.for_run(rehearsing=False)
    EmbeddingsPlugin().post_load(ctx, model)
    assert ctx.facts == rehearsed
    assert list(EmbeddingsPlugin().audit(ctx, model)) == []
    assert model.config.get_text_config().vocab_size == count + 8
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        assert head.out_features == count + 8
    assert set(named_tensors(model)) == set(old)
    for name, tensor in named_tensors(model).items():
        resized = [d for d, size in enumerate(tensor.shape) if size != old[name].shape[d]]
        if not resized:
            assert same_bits(tensor, old[name]), name
            continue
        table, before = tensor.movedim(resized[0], 0), old[name].movedim(resized[0], 0)
        assert same_bits(table[: count - 2], before[: count - 2]), name
        mean = before[: count - 2].mean(0)
        torch.testing.assert_close(table[count - 2 :], mean.expand_as(table[count - 2 :]))
    if (kind, model_type) not in NO_FORWARD:
        inputs = architectures.dummy_inputs(model, kind)
        for name in inputs.keys() & {"input_ids", "decoder_input_ids"}:
            inputs[name] = inputs[name].clone()
            inputs[name][0, 3] = count + 7
        with torch.no_grad():
            output = model.eval()(**inputs)
        if kind != "base":
            assert output.logits.shape[-1] == count + 8


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    pair = (one, other)
    return torch.equal(*(tensor.flatten().clone().view(torch.uint8) for tensor in pair))


def context(
    model: PreTrainedModel, tokenizer: Any, *, add: int = 0, new: Collection[int] = ()
) -> llmload.LoadContext:
    """Make the context of a load of ``model``, with ``add`` tokens added or the ids ``new`` new."""
    vocabulary = set(tokenizer.get_vocab())
    tokenizer.add_tokens([f"<{number}>" for number in range(add)])
    ctx = context_of(model, EmbeddingsSection(), rehearsing=not add)
    ctx.tokenizer = tokenizer
    ctx.new_tokens = {
        token: i
        for token, i in tokenizer.get_vocab().items()
        if token not in vocabulary or i in new
    }
    return ctx


def grown(model: PreTrainedModel) -> Any:
    """Make a tokenizer with eight ids more than the model's embedding has rows."""
    tokenizer = tiny_tokenizer()
    count = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"[{number}]" for number in range(count + 8 - len(tokenizer))])
    return tokenizer

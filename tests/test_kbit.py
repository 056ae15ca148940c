"""The plugin kbit: what comes out, how it is prepared, and what is refused."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import architectures
import bitsandbytes
import peft
import pytest
import torch
import transformers
from odd_layers import Adapts, MakesOdd, OddLora
from quantised import five_losses, load, plain, unlike
from rich.console import Console
from safetensors.torch import load_file, save_file
from stacks import IS_MODERN, needs_bitsandbytes
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import llmload
from llmload import hookimpl
from llmload.checkpoint.mapped import MappedCheckpoint
from llmload.checkpoint.placement import Plain
from llmload.errors import AuditError, PlanError, SpecError
from llmload.host.registry import create_registry
from llmload.loading import printed
from llmload.testing import edit_config, save_checkpoint, tiny_checkpoint, tiny_model

pytestmark = needs_bitsandbytes

LLAMA = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
"""Layers of more than one block of 64, and of a size that is no multiple of larger blocks."""
BOTH = pytest.mark.parametrize("section", [{"double_quant": True}, {"bits": 8}], ids=["4", "8"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("kbit") / "llama", dtype=torch.bfloat16, shards=2, **LLAMA
    )


def problems(folder: Path, section: dict[str, Any], **keys: Any) -> list[str]:
    spec = {"model": str(folder), "dtype": "bfloat16", "kbit": section, **keys}
    return [str(problem) for problem in llmload.plan(spec).errors]


def refusal(section: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        llmload.plan({"model": "nowhere", "kbit": section})
    return str(caught.value)


# --- what comes out -------------------------------------------------------------------------------


SECTIONS = pytest.mark.parametrize(
    "section",
    [
        {},
        {"double_quant": True},
        {"quant_type": "fp4"},
        {"quant_type": "fp4", "double_quant": True, "compute_dtype": "float32"},
        {"quant_storage": "bfloat16"},
        {"bits": 8},
        {"bits": 8, "threshold": 0.0},
    ],
    ids=str,
)


@SECTIONS
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_a_model_is_quantised_as_transformers_does_it(
    section: dict[str, Any], stored: str, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "llama", dtype=getattr(torch, stored), **LLAMA)
    for dtype in ("bfloat16", "float32"):
        result = load(folder, section, dtype=dtype)
        theirs = plain(folder, section, dtype=dtype).requires_grad_(False)
        assert unlike(result.model, theirs) == []
        assert result.report.loader == "streaming"


@SECTIONS
def test_the_other_loader_gives_the_same(section: dict[str, Any], folder: Path) -> None:
    result = load(folder, section, registry=create_registry(block={"streaming"}))
    assert unlike(result.model, load(folder, section).model) == []
    assert result.report.loader == "transformers"
    assert result.report.facts["kbit"]["proven_layers"] == 14


@BOTH
@pytest.mark.parametrize(
    ("model_type", "auto_class", "auto"),
    [
        ("gpt2", "causal_lm", AutoModelForCausalLM),
        ("opt", "causal_lm", AutoModelForCausalLM),
        ("t5", "seq2seq_lm", AutoModelForSeq2SeqLM),
        ("bert", "sequence_classification", AutoModelForSequenceClassification),
    ],
)
def test_other_heads_and_layers(
    model_type: str, auto_class: str, auto: Any, section: dict[str, Any], tmp_path: Path
) -> None:
    """GPT-2's ``Conv1D`` stores its weight transposed; T5 keeps some modules in float32."""
    folder = tiny_checkpoint(tmp_path / model_type, model_type, auto_class=auto_class)
    for dtype in ("bfloat16", "float16"):
        result = load(folder, section, dtype=dtype, auto_class=auto_class)
        theirs = plain(folder, section, dtype=dtype, auto_class=auto).requires_grad_(False)
        assert unlike(result.model, theirs) == []
        assert result.report.loader == "streaming"
        assert result.report.facts["kbit"]["proven_layers"] == result.report.facts["kbit"]["layers"]


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_block_sizes_that_transformers_does_not_offer(block_size: int, folder: Path) -> None:
    result = load(folder, {"block_size": block_size, "double_quant": True})
    weights = load_folder(folder)
    for name, layer in quantised_layers(result.model):
        packed, state = bitsandbytes.functional.quantize_4bit(
            weights[f"{name}.weight"],
            blocksize=block_size,
            compress_statistics=True,
            quant_type="nf4",
        )
        assert torch.equal(layer.weight.data, packed)
        assert torch.equal(layer.weight.quant_state.absmax, state.absmax)
        assert torch.equal(layer.weight.quant_state.state2.absmax, state.state2.absmax)


def test_skipped_modules_are_left_beside_those_that_transformers_leaves(folder: Path) -> None:
    result = load(folder, {"skip_modules": ["down_proj", "model.layers.0.self_attn"]})
    theirs = plain(
        folder, {"skip_modules": ["lm_head", "down_proj", "model.layers.0.self_attn"]}
    ).requires_grad_(False)
    assert unlike(result.model, theirs) == []
    assert type(result.model.lm_head) is torch.nn.Linear


def test_the_kernel_on_loan_is_used_and_given_back(folder: Path) -> None:
    facts = load(folder, {}).report.facts["kbit"]
    assert facts["quantised_by"] == {
        "compiled": sum(t.numel() for name, t in load_folder(folder).items() if "proj" in name)
    }
    op = "bitsandbytes::quantize_4bit"
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")


def test_without_a_compiler_the_report_says_so_and_nothing_else_differs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = load(folder, {}).model
    monkeypatch.setenv("CC", "no-such-compiler")
    result = load(folder, {})
    facts = result.report.facts["kbit"]
    assert list(facts["quantised_by"]) == ["torch"]
    assert facts["not_compiled"] == "no C compiler 'no-such-compiler' is found"
    assert unlike(result.model, compiled) == []


def test_a_model_to_be_spread_over_devices_is_left_to_from_pretrained(folder: Path) -> None:
    result = load(folder, {}, device_map="auto")
    assert result.report.loader == "transformers"
    assert result.report.declined["streaming"] == (
        "a plugin set quantization_config, for from_pretrained to do"
    )
    assert dict(quantised_layers(result.model))


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def quantised_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    kinds = bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


# --- saved and loaded again -----------------------------------------------------------------------


@BOTH
def test_a_saved_model_loads_again_with_transformers_and_here(
    section: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    ours = load(folder, section).model
    ours.save_pretrained(tmp_path / "ours")
    plain(folder, section).save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours" / "config.json").read_text() == (
        tmp_path / "theirs" / "config.json"
    ).read_text()
    mine, other = load_folder(tmp_path / "ours"), load_folder(tmp_path / "theirs")
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name], other[name]) for name in mine)

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").requires_grad_(False)
    result = load(tmp_path / "ours", {}, dtype="auto")
    assert unlike(result.model, again) == []
    assert result.report.loader == "transformers"
    assert result.report.declined["streaming"] == "the checkpoint is quantised already"
    assert result.report.facts["kbit"] == result.plan.facts["kbit"]


@BOTH
def test_a_quantised_folder_asks_for_the_section(
    section: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    load(folder, section).model.save_pretrained(tmp_path)
    assert [str(p) for p in llmload.plan({"model": str(tmp_path)}).problems] == [
        "kbit: the checkpoint is quantised by bitsandbytes, and the spec has no section that says"
        " how it is prepared. Add `kbit: {}`, which takes over how it was quantised and freezes it."
    ]


def test_a_section_that_contradicts_a_quantised_folder_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    load(folder, {"double_quant": True, "block_size": 128}).model.save_pretrained(tmp_path)
    way_out = "Remove the key, or load the checkpoint from before it was quantised."
    asked = {
        "quant_type": "fp4",
        "double_quant": True,
        "block_size": 64,
        "skip_modules": ["q_proj"],
    }
    assert problems(tmp_path, asked) == [
        f"kbit.block_size: 64 is asked for, and the checkpoint is quantised with 128. {way_out}",
        f"kbit.quant_type: 'fp4' is asked for, and the checkpoint is quantised with 'nf4'."
        f" {way_out}",
        "kbit.skip_modules: the checkpoint is quantised already, with modules left out as it has"
        f" them. {way_out}",
    ]
    assert problems(tmp_path, {"bits": 8}) == [
        f"kbit.bits: 8 is asked for, and the checkpoint is quantised with 4. {way_out}"
    ]
    assert problems(tmp_path, {"bits": 4, "block_size": 128}) == []


def test_a_folder_quantised_by_another_method_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tiny_model(**LLAMA), tmp_path / "gptq")
    edit_config(other, quantization_config={"quant_method": "gptq", "bits": 4})
    assert problems(other, {})[0] == (
        "kbit: the checkpoint is quantised already, by gptq, not by bitsandbytes. Remove `kbit`."
    )


# --- prepared for training ------------------------------------------------------------------------


def dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


def changed(plain_dtypes: dict[str, torch.dtype], model: torch.nn.Module) -> dict[str, str]:
    """Which parameters have another dtype than transformers gave them."""
    return {
        name: str(dtype).removeprefix("torch.")
        for name, dtype in dtypes(model).items()
        if dtype != plain_dtypes[name]
    }


@BOTH
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("loader", ["streaming", "transformers"])
def test_legacy_is_what_peft_prepares(
    model_type: str, loader: str, section: dict[str, Any], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / model_type, model_type)
    registry = create_registry(block={"streaming"} if loader == "transformers" else ())
    ours = load(folder, section | {"prepare": "legacy"}, registry=registry).model
    theirs = peft.prepare_model_for_kbit_training(
        plain(folder, section), use_gradient_checkpointing=False
    )
    assert unlike(ours, theirs) == []
    assert {dtype for dtype in dtypes(ours).values() if dtype.is_floating_point} == {torch.float32}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "bloom"])
def test_trl_legacy_is_what_trl_cast_after_that(model_type: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / model_type, model_type)
    ours = load(folder, {"prepare": "trl_legacy"}).model
    theirs = peft.prepare_model_for_kbit_training(
        plain(folder, {}), use_gradient_checkpointing=False
    )
    for name, module in theirs.named_modules():  # TRL 0.12, peft_module_casting_to_bf16
        if isinstance(module, torch.nn.LayerNorm) or "norm" in name:
            module.float()
        elif any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe")):
            module.bfloat16()
    assert unlike(ours, theirs) == []
    assert set(dtypes(ours).values()) >= {torch.float32, torch.bfloat16}


def test_trl_legacy_in_8_bits_is_legacy(folder: Path) -> None:
    section = {"bits": 8, "prepare": "trl_legacy"}
    legacy = load(folder, {"bits": 8, "prepare": "legacy"})
    assert dtypes(load(folder, section).model) == dtypes(legacy.model)


def test_nothing_is_cast_by_default_and_everything_is_frozen(folder: Path) -> None:
    model = load(folder, {}).model
    assert changed(dtypes(plain(folder, {})), model) == {}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("norms", {"input_layernorm", "post_attention_layernorm", "norm"}),
        ("embeddings", {"embed_tokens"}),
        ("head", {"lm_head"}),
        ("other", set()),
    ],
)
def test_a_group_is_cast_by_itself(group: str, names: set[str], folder: Path) -> None:
    model = load(folder, {"cast": {group: "float32"}}).model
    cast = changed(dtypes(plain(folder, {})), model)
    assert {name.split(".")[-2] for name in cast} == names
    assert set(cast.values()) <= {"float32"}


def test_biases_and_routers_are_the_others(tmp_path: Path) -> None:
    folder = save_checkpoint(
        architectures.build("causal_lm", "qwen2_moe").bfloat16(), tmp_path / "moe"
    )
    cast = changed(dtypes(plain(folder, {})), load(folder, {"cast": {"other": "float32"}}).model)
    kinds = {".".join(name.split(".")[3:]) for name in cast}
    assert kinds == {
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
        "mlp.gate.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }


def test_a_cast_goes_before_the_profile(folder: Path) -> None:
    model = load(folder, {"prepare": "legacy", "cast": {"embeddings": "bfloat16"}}).model
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.float32


def test_a_tied_head_follows_the_embeddings(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True, **LLAMA)
    model = load(folder, {"cast": {"embeddings": "float32", "head": "float16"}}).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32


def test_float32_weights_pass_through_the_model_dtype_as_in_peft(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "float32", dtype=torch.float32, **LLAMA)
    embeddings = load(folder, {"prepare": "legacy"}).model.model.embed_tokens.weight
    stored = load_folder(folder)["model.embed_tokens.weight"]
    assert torch.equal(embeddings, stored.bfloat16().float())


# --- with an adapter ------------------------------------------------------------------------------


LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": "all-linear"}


def with_peft(model: Any, **changes: Any) -> Any:
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA | changes))


# PEFT calls transformers by a name that is deprecated since 5.23.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prepare", ["minimal", "legacy"])
@BOTH
def test_the_same_parameters_train_to_the_same_losses_as_with_transformers_and_peft(
    section: dict[str, Any], prepare: str, checkpointing: bool, folder: Path
) -> None:
    torch.manual_seed(5)
    keys = {"gradient_checkpointing": {"use_reentrant": False}} if checkpointing else {}
    ours = load(folder, section | {"prepare": prepare}, lora=LORA, **keys)
    theirs = plain(folder, section)
    if prepare == "legacy":
        theirs = peft.prepare_model_for_kbit_training(
            theirs,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    elif checkpointing:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    theirs = with_peft(theirs)
    trainable = [name for name, p in theirs.named_parameters() if p.requires_grad]
    assert ours.plan.trainable_parameters == trainable
    assert [name for name, p in ours.model.named_parameters() if p.requires_grad] == trainable
    assert all(
        torch.equal(mine, other)
        for mine, other in zip(ours.model.parameters(), theirs.parameters(), strict=True)
    )
    losses = five_losses(ours.model)
    assert losses == five_losses(theirs)
    assert losses[-1] < losses[0]


# For every type there is `nox -s kbit_architectures`.
@pytest.mark.parametrize(
    "model_type", ["gpt2", "opt", "qwen2", "mixtral", "gpt_neox", "bloom", "gemma2", "phi3"]
)
@BOTH
def test_adapters_of_other_architectures_train_alike(
    model_type: str, section: dict[str, Any], tmp_path: Path
) -> None:
    model = architectures.build("causal_lm", model_type).bfloat16()
    folder = save_checkpoint(model, tmp_path / model_type)
    torch.manual_seed(5)
    # PEFT's adapters on fused experts know no dropout.
    ours = load(folder, section, lora=LORA | {"lora_dropout": 0.0})
    theirs = with_peft(plain(folder, section), lora_dropout=0.0)
    assert ours.plan.trainable_parameters == [
        name for name, p in theirs.named_parameters() if p.requires_grad
    ]
    assert five_losses(ours.model) == five_losses(theirs)


def test_a_plugins_adapter_layers_stand_beside_pefts_on_quantised_ones(folder: Path) -> None:
    lora = {"r": 2, "lora_alpha": 8, "target_modules": ["down_proj", "q_proj"]}
    registry = create_registry([MakesOdd, Adapts])
    section = {"skip_modules": ["down_proj"]}
    model = load(folder, section, lora=lora, registry=registry, dtype="float32").model
    layer = model.get_base_model().model.layers[0]
    assert type(layer.self_attn.q_proj) is peft.tuners.lora.bnb.Linear4bit
    assert type(layer.mlp.down_proj) is OddLora
    losses = five_losses(model)
    assert losses[-1] < losses[0]


# --- the plan and the proof -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"double_quant": True, "block_size": 128, "prepare": "legacy"},
        {"quant_storage": "float16", "cast": {"norms": "float32"}},
        {"bits": 8},
    ],
    ids=str,
)
def test_the_plan_knows_the_sizes_before_a_weight_is_read(
    section: dict[str, Any], folder: Path
) -> None:
    result = load(folder, section, lora=LORA)
    facts = dict(result.report.facts["kbit"])
    assert facts.pop("proven_layers") == facts["layers"] == 14
    quantised_by = facts.pop("quantised_by", None)
    assert quantised_by == (None if section.get("bits") == 8 else {"compiled": facts["parameters"]})
    assert facts == result.plan.facts["kbit"]
    assert result.plan.parameter_bytes == result.report.parameter_bytes
    layers = [module for _, module in quantised_layers(result.model)]
    assert facts["parameters"] == sum(m.in_features * m.out_features for m in layers)
    assert facts["bytes"] == sum(m.weight.nbytes for m in layers)
    assert facts["statistics_bytes"] == sum(map(statistics_bytes, layers))


def statistics_bytes(layer: Any) -> int:
    if layer.weight.dtype == torch.int8:
        return int(layer.weight.SCB.nbytes)
    state = layer.weight.quant_state
    nested = [state.offset, state.state2.absmax] if state.nested else []
    return sum(tensor.nbytes for tensor in [state.absmax, *nested])


@pytest.mark.parametrize("section", [{}, {"quant_storage": "bfloat16"}, {"bits": 8}], ids=str)
def test_parameters_are_counted_as_peft_counts_them(
    section: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = load(folder, section, lora=LORA)
    capsys.readouterr()
    result.model.print_trainable_parameters()
    assert result.report.trainable_line() == capsys.readouterr().out.strip()
    assert result.plan.parameters == result.report.parameters


def test_the_plan_tells_what_a_profile_costs(folder: Path) -> None:
    plan = llmload.plan({"model": str(folder), "dtype": "bfloat16", "kbit": {"prepare": "legacy"}})
    assert plan.facts["kbit"]["unquantised"] == {
        "embeddings": {"parameters": 8192, "bytes": 32768, "cast_bytes": 16384},
        "norms": {"parameters": 320, "bytes": 1280, "cast_bytes": 640},
        "head": {"parameters": 8192, "bytes": 32768, "cast_bytes": 16384},
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"prepare": "legacy"},
        {"prepare": "trl_legacy"},
        {"cast": {"norms": "float32"}},
        {"cast": {"embeddings": "float32", "head": "float32"}},
        {"quant_storage": "bfloat16"},
        {"bits": 8, "prepare": "legacy"},
    ],
    ids=str,
)
def test_what_a_choice_costs_in_the_plan_is_what_it_costs_in_memory(
    changes: dict[str, Any], folder: Path
) -> None:
    def measured(section: dict[str, Any]) -> int:
        return sum(p.untyped_storage().nbytes() for p in load(folder, section).model.parameters())

    spec = {"model": str(folder), "dtype": "bfloat16", "kbit": changes}
    groups = llmload.plan(spec).facts["kbit"]["unquantised"].values()
    plain_section = {"bits": changes.get("bits", 4)}
    cost = sum(group["cast_bytes"] for group in groups)
    assert measured(changes) - measured(plain_section) == cost
    assert (cost > 0) == ("quant_storage" not in changes)


def test_the_plan_shows_what_everything_takes(folder: Path) -> None:
    console = Console(width=120, file=io.StringIO())
    spec = {"model": str(folder), "dtype": "bfloat16", "kbit": {"prepare": "legacy"}}
    console.print(printed.plan(llmload.plan(spec)))
    lines = [line.strip() for line in console.file.getvalue().splitlines() if "k-bit" in line]
    assert lines == [
        "k-bit       86,016 values in 42.0 KiB, and 5.2 KiB of statistics",
        "k-bit       embeddings: 8,192 values in 32.0 KiB, 16.0 KiB more than in bfloat16",
        "k-bit       norms: 320 values in 1.2 KiB, 640 B more than in bfloat16",
        "k-bit       head: 8,192 values in 32.0 KiB, 16.0 KiB more than in bfloat16",
    ]


def notes(folder: Path, section: dict[str, Any], **keys: Any) -> list[str]:
    spec = {"model": str(folder), "dtype": "bfloat16", "kbit": section, **keys}
    steps = llmload.plan(spec).steps
    return [note for step in steps if step.plugin == "kbit" for note in step.notes]


def test_the_plan_says_what_will_be_done(folder: Path) -> None:
    assert notes(folder, {"double_quant": True}) == [
        "quantise to 4 bits: nf4 in blocks of 64, statistics quantised too, stored as uint8,"
        " computing in bfloat16",
        "freeze the base model, prepared as minimal",
    ]
    assert notes(folder, {"bits": 8, "prepare": "legacy"}) == [
        "quantise to 8 bits, outliers above 6 in 16",
        "freeze the base model, prepared as legacy",
        "no gradient checkpointing, which belongs to the preparation in PEFT and has its own"
        " section here",
    ]
    assert len(notes(folder, {"prepare": "legacy"}, gradient_checkpointing={})) == 2


class Spoil:
    """Changes a value of the first layer after it was quantised."""

    name = "spoil"
    after = ("kbit",)

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            model.model.layers[0].self_attn.q_proj.weight.data[0] ^= 1
        return model


@BOTH
@pytest.mark.refused_late  # only the weights tell
def test_a_weight_that_is_not_what_the_file_gives_fails_the_audit(
    section: dict[str, Any], folder: Path
) -> None:
    with pytest.raises(AuditError) as caught:
        load(folder, section, registry=create_registry([Spoil]))
    assert str(caught.value) == (
        "kbit: 'model.layers.0.self_attn.q_proj.weight' are not what the checkpoint's values give"
        " when quantised. Try another loader with `-p no:NAME`, and report this."
    )


# --- what is refused ------------------------------------------------------------------------------


def test_keys_of_the_other_number_of_bits_are_refused() -> None:
    assert refusal({"bits": 8, "quant_type": "nf4"}) == (
        "kbit: `quant_type` has no meaning for 8 bits. Remove it, or set `bits: 4`."
    )
    assert refusal({"threshold": 4.0}) == (
        "kbit: `threshold` has no meaning for 4 bits. Remove it, or set `bits: 8`."
    )


def test_the_profile_of_trl_wants_its_adapter_dtype_said(folder: Path) -> None:
    assert problems(folder, {"prepare": "trl"}, lora=LORA) == [
        "kbit.prepare: `trl` has adapters in bfloat16, and `lora.adapter_dtype` is 'auto'. Set"
        " `lora: {adapter_dtype: bfloat16}`."
    ]
    assert problems(folder, {"prepare": "trl"}, lora=LORA | {"adapter_dtype": "bfloat16"}) == []


def test_random_weights_are_refused(folder: Path) -> None:
    assert problems(folder, {}, weights="random") == [
        "kbit: 'kbit' cannot be combined with 'weights': random weights are not read, so nothing"
        " can be quantised on the way. Remove `kbit`, or load a checkpoint."
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_codes_that_deepspeed_would_cast_are_refused_at_any_stage(stage: int, folder: Path) -> None:
    assert problems(folder, {"quant_storage": "float16"}, zero3={"stage": stage}) == [
        "kbit.quant_storage: DeepSpeed casts every floating-point parameter to bfloat16, codes"
        " stored as float16 too, which ruins them. Remove the key, or set `quant_storage:"
        " bfloat16`."
    ]
    for storage in ("bfloat16", "uint8"):
        assert problems(folder, {"quant_storage": storage}, zero3={"stage": stage}) == []


def test_a_quantised_folder_whose_codes_deepspeed_would_cast_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    load(folder, {"quant_storage": "float16"}).model.save_pretrained(tmp_path / "4")
    assert problems(tmp_path / "4", {}, zero3={"stage": 3}) == [
        "kbit.quant_storage: DeepSpeed casts every floating-point parameter to bfloat16, codes"
        " stored as float16 too, which ruins them. Load the checkpoint from before it was"
        " quantised."
    ]
    load(folder, {"bits": 8}).model.save_pretrained(tmp_path / "8")
    assert (
        "kbit.bits: `zero3` cannot split 8-bit weights"
        in (problems(tmp_path / "8", {}, zero3={"stage": 3})[0])
    )


def test_codes_are_stored_as_the_model_where_zero3_partitions(folder: Path) -> None:
    said = notes(folder, {}, zero3={"stage": 3})
    assert "stored as bfloat16" in said[0]
    assert said[1] == (
        "each rank reads what it quantises whole, one weight at a time, and keeps its part of the"
        " codes and all statistics"
    )
    assert "stored as uint8" in notes(folder, {}, zero3={"stage": 2})[0]
    assert problems(folder, {"bits": 8}, zero3={"stage": 2}) == []


def test_a_skipped_module_that_is_not_there_is_refused(folder: Path) -> None:
    assert problems(folder, {"skip_modules": ["down_proj", "router"]}) == [
        "kbit.skip_modules.1: no linear layer is called 'router'. Names end in down_proj,"
        " gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj."
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_a_linear_layer_is_refused(tmp_path: Path) -> None:
    """Falcon's linear layers are of a class of its own, which transformers leaves as they are."""
    folder = save_checkpoint(architectures.build("causal_lm", "falcon"), tmp_path / "falcon")
    assert problems(folder, {}) == [
        "kbit: FalconForCausalLM has no linear layer to quantise. Remove `kbit`, or list fewer"
        " `skip_modules`."
    ]


def test_a_missing_weight_is_not_quantised_at_random(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "llama", **LLAMA)
    tensors = load_folder(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError) as caught:
        load(folder, {}, strict={"allow_missing": ["up_proj"]})
    assert str(caught.value) == (
        "kbit: the checkpoint has no values for 'model.layers.1.mlp.up_proj.weight', and"
        " bitsandbytes cannot quantise newly initialised ones. List the modules in `kbit:"
        " {skip_modules: [...]}`."
    )
    skipping = {"skip_modules": ["model.layers.1.mlp.up_proj"]}
    load(folder, skipping, strict={"allow_missing": ["up_proj"]})


def test_other_block_sizes_are_refused_where_from_pretrained_must_load(folder: Path) -> None:
    with pytest.raises(PlanError) as caught:
        load(folder, {"block_size": 128}, registry=create_registry(block={"streaming"}))
    assert str(caught.value) == (
        "kbit.block_size: 128 is asked for, and from_pretrained, which had to load this model,"
        " quantises in blocks of 64. Remove the key; the plan says why the streaming loader"
        " declined."
    )


def test_a_device_on_which_bitsandbytes_does_not_work_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(raise_exception: bool) -> None:
        raise RuntimeError("None of the devices are supported. Please check the docs.\nMore.")

    monkeypatch.setattr("transformers.integrations.validate_bnb_backend_availability", refuse)
    assert problems(folder, {}) == [
        f"kbit: transformers {transformers.__version__} refuses bitsandbytes here: None of the"
        " devices are supported. Run on a device that bitsandbytes supports."
    ]


def test_modules_on_the_host_beside_an_accelerator_must_be_left_out(folder: Path) -> None:
    mixed = {"model.embed_tokens": 0, "model.layers": 0, "model.norm": "cpu", "lm_head": "cpu"}
    assert problems(folder, {}, device_map=mixed)[0] == (
        "device_map: some modules are put on cpu, where bitsandbytes does not compute for a model"
        " on an accelerator. Put them on the accelerator, or set `kbit: {fp32_cpu_offload: true}`"
        " to keep them unquantised."
    )
    assert problems(folder, {"fp32_cpu_offload": True}, device_map="cpu") == [
        "kbit.fp32_cpu_offload: no modules are put on the CPU beside others on an accelerator."
        " Remove it, or name the modules in `device_map`."
    ]


def test_modules_on_the_host_are_left_out_if_asked(folder: Path) -> None:
    """What comes of it is tested on an accelerator."""
    split = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), 0)
    split |= {"model.layers.0": 0, "model.layers.1": "cpu"}
    spec = {"model": str(folder), "dtype": "bfloat16", "device_map": split}
    plan = llmload.plan(spec | {"kbit": {"bits": 8, "fp32_cpu_offload": True}})
    # All that may be wrong with it is that this machine has no accelerator.
    absent = "there is no device 0: of kind 'accelerator' there are none here"
    expected = [] if getattr(torch, "accelerator", torch.cuda).is_available() else [absent] * 5
    assert [problem.message for problem in plan.errors] == expected
    assert plan.facts["kbit"]["layers"] == 7


def test_several_processes_do_not_each_spread_a_model_over_all_devices(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert problems(folder, {}, device_map="auto") == [
        "device_map: each of 4 processes would spread its model over all devices. Leave"
        " `device_map` out: each process then takes the device of its local rank."
    ]


# --- sharded later --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "announced",
    [
        {"ACCELERATE_USE_FSDP": "true"},
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    ],
    ids=["fsdp", "zero3"],
)
def test_where_the_model_will_be_sharded_codes_are_stored_in_its_dtype(
    announced: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as environment:
        for name, value in announced.items():
            environment.setenv(name, value)
        result = load(folder, {})
    assert set(dtypes(result.model).values()) == {torch.bfloat16}
    theirs = plain(folder, {"quant_storage": "bfloat16"}).requires_grad_(False)
    assert unlike(result.model, theirs) == []


def test_under_fsdp_parameters_of_several_dtypes_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert problems(folder, {"prepare": "legacy"}) == [
        "kbit: FSDP shards parameters of one floating-point dtype, and the model would have codes"
        " in bfloat16, embeddings and head and norms in float32. Leave `quant_storage`, `prepare`"
        " and `cast` out."
    ]
    assert problems(folder, {"quant_storage": "uint8"}) == [
        "kbit: FSDP shards parameters of one floating-point dtype, and the model would have"
        " embeddings and head and norms in bfloat16, codes in uint8. Leave `quant_storage`,"
        " `prepare` and `cast` out."
    ]


# --- memory ---------------------------------------------------------------------------------------


def anonymous_memory() -> int:
    """Bytes of this process's memory that are not pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_the_full_precision_model_never_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmload.builtin.kbit.quantise import KbitPlacement

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6}
    folder = tiny_checkpoint(tmp_path / "larger", dtype=torch.bfloat16, **sizes)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    peaks: list[int] = []
    place = KbitPlacement.place

    def sampling(self: Any, *arguments: Any) -> Any:
        placed = place(self, *arguments)
        peaks.append(anonymous_memory())
        return placed

    monkeypatch.setattr(KbitPlacement, "place", sampling)
    load(folder, {"double_quant": True, "prepare": "legacy"}, prove=False)  # one-off allocations
    peaks.clear()
    before = anonymous_memory()
    result = load(folder, {"double_quant": True, "prepare": "legacy"}, prove=False)
    final = result.report.parameter_bytes
    assert max(peaks) - before < 1.25 * final < 0.5 * stored


@pytest.mark.refused_late  # a placement that is made in init_context is seen when it is made
@pytest.mark.parametrize("says_so", [True, False], ids=["in its check", "in init_context alone"])
def test_a_placement_that_takes_no_quantised_weights_is_refused_before_any_is_read(
    says_so: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        """Stores weights in a way of its own."""

        name = "elsewhere"
        before = ("kbit",)

        @hookimpl
        def check(self, ctx: Any) -> None:
            if says_so:
                ctx.placed_by = self.name

        @hookimpl
        def init_context(self, ctx: Any) -> None:
            ctx.placement = Plain()

    def read(*args: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(MappedCheckpoint, "tensor", read)
    registry = llmload.create_registry([Elsewhere], environ={})
    who = "`elsewhere`" if says_so else "`Plain`"
    expected = (
        f"kbit: {who} stores the weights in its own way, and takes none that are quantised: it has"
        " no `part`, as llmload.checkpoint.placement.Splitting has. Leave out one of the two. A"
        " plugin whose placement has it says so in its `check`: `ctx.splits = True`."
    )
    plan = llmload.plan({"model": str(folder), "kbit": {}}, registry=registry)
    assert [str(problem) for problem in plan.errors] == ([expected] if says_so else [])
    with pytest.raises(llmload.RequestError) as caught:
        load(folder, {}, registry=registry)
    assert str(caught.value) == expected


@pytest.mark.skipif(not IS_MODERN, reason="4.51.3 keeps experts in linear layers")
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_that_stay_in_16_bits_are_a_warning_with_their_bytes(
    tmp_path: Path, model_type: str
) -> None:
    model = architectures.build("causal_lm", model_type).bfloat16()
    folder = save_checkpoint(model, tmp_path / "moe")
    experts = sum(
        p.numel()
        for n, p in model.named_parameters()
        if ".experts." in n or ".mlp.gate.w" in n or (".router." in n and p.ndim > 1)
    )
    total = sum(p.numel() for p in model.parameters())
    spec = {"model": str(folder), "kbit": {}, "trainable": False}
    (warning,) = llmload.plan(spec).warnings
    assert warning.where == "kbit"
    assert warning.message.startswith(
        f"{experts:,} of {total:,} parameters stay in bfloat16, {2 * experts:,} bytes: bitsandbytes"
        " quantises linear layers, and model.layers.*.mlp.experts.down_proj, "
    )


def test_a_quantised_model_that_nobody_can_train_is_a_warning(folder: Path) -> None:
    (warning,) = llmload.plan({"model": str(folder), "kbit": {}}).warnings
    assert str(warning) == (
        "kbit: no parameter will be trainable: quantised weights are frozen, and nothing is put on"
        " them. Add an adapter with `lora`, or write `trainable: false` if this is meant."
    )
    for keys in ({"trainable": False}, {"lora": {"target_modules": ["q_proj"]}}):
        assert llmload.plan({"model": str(folder), "kbit": {}, **keys}).warnings == []


# --- adapters that look at the weights they are put on --------------------------------------------


@pytest.mark.parametrize(
    ("start", "bits"),
    [({"use_dora": True}, 4), *(({"init_lora_weights": "olora"}, bits) for bits in (4, 8))],
    ids=["DoRA on 4 bits", "OLoRA on 4 bits", "OLoRA on 8 bits"],
)
def test_adapters_that_look_at_quantised_weights_are_planned_made_and_resumed(
    folder: Path, tmp_path: Path, start: dict[str, Any], bits: int
) -> None:
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], **start}
    made = load(folder, {"bits": bits}, lora=lora)
    assert made.plan.warnings == []
    assert made.plan.trainable_parameters
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    made.model.save_pretrained(tmp_path / "adapter")
    again = load(folder, {"bits": bits}, lora={"adapter": str(tmp_path / "adapter")})
    assert again.plan.trainable_parameters == made.plan.trainable_parameters
    assert unlike(again.model, made.model) == []


@pytest.mark.parametrize("where", ["new", "stored", "resumed"])
def test_dora_on_8_bits_is_refused_on_the_cpu_where_its_second_forward_fails(
    where: str, folder: Path, tmp_path: Path
) -> None:
    lora: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "use_dora": True}
    model = folder
    if where == "stored":
        load(folder, {"bits": 8}).model.save_pretrained(tmp_path)
        model = tmp_path
    if where == "resumed":
        load(folder, {"bits": 4}, lora=lora).model.save_pretrained(tmp_path)
        lora = {"adapter": str(tmp_path)}
    with pytest.raises(llmload.PlanError, match="loses the scales of each weight that DoRA looks"):
        load(model, {"bits": 8}, lora=lora)


def test_it_is_refused_for_what_peft_really_does(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = load(folder, {"bits": 8}).model
    plain = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    plain(torch.tensor([[5, 6]]))
    with pytest.raises(AttributeError):
        plain(torch.tensor([[5, 6]]))


def test_dora_on_what_stays_in_full_precision_beside_8_bits_is_not_refused(folder: Path) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"], "use_dora": True}
    model = load(folder, {"bits": 8, "skip_modules": ["q_proj"]}, lora=lora).model
    for _ in range(2):
        model(torch.tensor([[5, 6]]))


def test_dora_on_a_folder_that_holds_4_bits(folder: Path, tmp_path: Path) -> None:
    load(folder, {}).model.save_pretrained(tmp_path)
    lora = {"r": 2, "target_modules": ["q_proj"], "use_dora": True}
    result = load(tmp_path, {}, lora=lora, dtype="auto")
    assert any("magnitude" in name for name in result.plan.trainable_parameters or ())

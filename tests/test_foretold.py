"""What config, headers and the files beside the weights tell is said by the plan, before a load."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stacks import IS_MODERN, needs_transformers_5
from transformers import AutoModelForCausalLM, LlamaForCausalLM, __version__

import llmload
from llmload.checkpoint import TensorInfo
from llmload.hf.quantised import without_scales
from llmload.testing import edit_config, tiny_llama

BLOCK = 128
"""Rows and columns that have one scale in an FP8 folder."""


def said(folder: Path, **keys: Any) -> list[str]:
    """Plan and load; both must refuse alike. Returns the errors."""
    spec = {"model": str(folder), **keys}
    found = [str(problem) for problem in llmload.plan(spec).errors]
    with pytest.raises(llmload.PlanError) as caught:
        llmload.load(spec)
    assert str(caught.value).splitlines() == found
    return found


def quantised(folder: Path, **content: Any) -> Path:
    """Let a folder's config say that it is quantised."""
    return edit_config(folder, quantization_config=content)


# --- quantised folders --------------------------------------------------------------------------


@needs_transformers_5
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"quant_method": "sinq"}, "No module named 'sinq'"),
        ({"quant_method": "metal"}, "it takes the device 'mps', which is not here"),
    ],
    ids=["sinq", "metal"],
)
def test_a_method_that_fails_only_when_it_prepares_the_model_is_refused_by_the_plan_too(
    content: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (text,) = said(quantised(tiny_llama(tmp_path), **content))
    assert f"transformers cannot load that here: {reason}. Install what it asks for" in text


@needs_transformers_5
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"attention": True}, "Unknown fusion type: attention"),
        ({"patch_embeddings": 3}, "Invalid fusion config for patch_embeddings: expected `True`"),
        (["patch_embeddings"], "it is no mapping of names"),
        ("all", "it is no mapping of names"),
    ],
    ids=str,
)
def test_fusions_that_transformers_does_not_know_are_refused(
    asked: Any, reason: str, tmp_path: Path
) -> None:
    (text,) = said(edit_config(tiny_llama(tmp_path), fusion_config=asked))
    assert text.startswith(
        f"model: the config's `fusion_config` asks for fusions that transformers refuses: {reason}"
    )
    assert text.endswith(
        "Remove `fusion_config` from config.json: it changes how a model computes, not what."
    )


@pytest.mark.refused_late  # what no rehearsal finds, from_pretrained says
def test_what_deepspeed_refuses_leads_to_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    batches = {"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}

    def partition(*args: Any, **options: Any) -> Any:
        return config.DeepSpeedConfig(batches | {"gradient_accumulation_steps": 3})

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", partition)
    registry = llmload.create_registry(block={"streaming"})
    with pytest.raises(llmload.RequestError) as caught:
        llmload.load({"model": str(tiny_llama(tmp_path))}, registry=registry)
    assert str(caught.value) == (
        "zero3: DeepSpeed refuses the load before it reads a weight: AssertionError: Check batch"
        " related parameters. train_batch_size is not equal to micro_batch_per_gpu *"
        " gradient_acc_step * world_size 7 != 2 * 3 * 1. Mend the DeepSpeed config, which"
        " `TrainingArguments(deepspeed=...)` or `zero3.config` gives."
    )


@pytest.mark.refused_late  # what no rehearsal finds, from_pretrained says
def test_whatever_from_pretrained_refuses_before_it_reads_a_weight_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AttributeError("'list' object has no attribute 'items'")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", refuse)
    registry = llmload.create_registry(block={"streaming"})
    with pytest.raises(llmload.RequestError) as caught:
        llmload.load({"model": str(tiny_llama(tmp_path))}, registry=registry)
    assert str(caught.value) == (
        "model: transformers refuses the folder before it reads a weight: AttributeError: 'list'"
        " object has no attribute 'items'. Check what config.json asks for; `llmload inspect` shows"
        " it."
    )


@pytest.mark.parametrize(
    "content",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
        {"quant_method": "quanto", "weights": "int8"},
        {"quant_method": "compressed-tensors", "config_groups": {}, "format": "pack-quantized"},
        {"quant_method": "fbgemm_fp8"},
        {"quant_method": "vptq"},
    ],
    ids=lambda content: content["quant_method"],
)
def test_a_method_that_cannot_be_loaded_here_is_refused_with_the_reason(
    content: dict[str, Any], tmp_path: Path
) -> None:
    (text,) = said(quantised(tiny_llama(tmp_path), **content))
    method = content["quant_method"]
    start = (
        f"model: the checkpoint is quantised by {method}, and transformers cannot load that here: "
    )
    assert text.startswith(start)
    reason, _, fix = text.removeprefix(start).partition(". Install what it asks for")
    assert method.partition("-")[0].partition("_")[0] in reason.lower()
    assert fix == (
        ", or load where it runs. Load the checkpoint from before it was quantised otherwise."
    )


@pytest.mark.parametrize(
    ("content", "by"),
    [
        ({"quant_method": "own"}, "by 'own', which transformers does not know"),
        ({"bits": 4}, "and not by what"),
    ],
)
def test_a_method_that_transformers_does_not_know_is_refused_and_not_passed_over(
    content: dict[str, Any], by: str, tmp_path: Path
) -> None:
    (text,) = said(quantised(tiny_llama(tmp_path), **content))
    assert text.startswith(
        f"model: the config says that the checkpoint is quantised {by}; transformers knows aqlm, "
    )
    assert text.endswith(
        "Remove `quantization_config` from config.json if the weights are plain numbers, or install"
        " what knows the method."
    )


@pytest.mark.skipif(not IS_MODERN, reason="4.51.3 takes no such folder without an accelerator")
def test_whether_it_can_be_trained_is_asked_before_anything_is_read(tmp_path: Path) -> None:
    folder = quantised(tiny_llama(tmp_path), quant_method="bitnet", linear_class="bitlinear")
    message = (
        "trainable: the checkpoint is quantised by bitnet, and transformers cannot train a model"
        " that is quantised so, nor through it. Load the checkpoint from before it was quantised,"
        " or set `trainable: false` to use the model as it is."
    )
    assert message in said(folder)
    assert message in said(folder, lora={"r": 2})
    plan = llmload.plan({"model": str(folder), "trainable": False})
    assert "trainable" not in [problem.where for problem in plan.errors]


@pytest.mark.skipif(not IS_MODERN, reason="4.51.3 takes no such folder without an accelerator")
def test_layers_that_a_quantised_folder_lacks_are_missed(tmp_path: Path) -> None:
    folder, _ = fp8_folder(tmp_path)
    edit_config(folder, num_hidden_layers=3)
    (text,) = said(folder)
    assert text.startswith(
        "strict: the checkpoint has no values for 'model.layers.2.input_layernorm.weight',"
    )
    edit_config(folder, num_hidden_layers=1)
    (text,) = said(folder)
    assert text.startswith("strict: the model has no place for 'model.layers.1.")


@pytest.mark.skipif(not IS_MODERN, reason="4.51.3 takes no such folder without an accelerator")
def test_another_vocabulary_than_a_quantised_folder_has_is_refused(tmp_path: Path) -> None:
    folder, _ = fp8_folder(tmp_path)
    edit_config(folder, vocab_size=100)
    assert [text.partition(":")[0] for text in said(folder)] == [
        "lm_head.weight",
        "model.embed_tokens.weight",
    ]


def test_eight_bit_floats_of_a_folder_that_is_not_quantised_are_cast_or_refused(
    tmp_path: Path,
) -> None:
    folder = tiny_llama(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if IS_MODERN:
        model = llmload.load({"model": str(folder)}).model
        assert torch.equal(model.get_parameter(name), tensors[name].float())
        return
    assert said(folder) == [
        f"{name}: the checkpoint has F8_E4M3 (16, 16), which transformers {__version__} leaves so"
        " in a model in float32. Convert them beforehand, or use transformers 5, which casts them."
    ]


def fp8_folder(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save a tiny Llama in FP8 with a scale per block; returns the folder and the exact values."""
    folder = tiny_llama(tmp_path, hidden_size=128, intermediate_size=256, dtype=torch.bfloat16)
    file = folder / "model.safetensors"
    values = load_file(file)
    stored = {}
    for name, value in values.items():
        stored[name] = value
        if name.endswith("_proj.weight"):
            codes = torch.empty(value.shape)
            scales = torch.empty([-(-size // BLOCK) for size in value.shape])
            for row, column in product(*map(range, scales.shape)):
                at = tuple(slice(n * BLOCK, n * BLOCK + BLOCK) for n in (row, column))
                scale = value[at].float().abs().max() / 448
                codes[at] = (value[at].float() / scale).to(torch.float8_e4m3fn).float()
                value[at] = (codes[at] * scale).to(torch.bfloat16)
                scales[row, column] = scale
            stored[name] = codes.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
    save_file(stored, file, metadata={"format": "pt"})
    content = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    return quantised(folder, **content, activation_scheme="dynamic"), values


needs_dequantising = pytest.mark.skipif(
    not IS_MODERN or torch.cuda.is_available(), reason="FP8 is not dequantised here"
)


@needs_dequantising
@pytest.mark.parametrize("keys", [{}, {"trainable": False}, {"lora": {"r": 2}}])
def test_an_fp8_folder_that_transformers_dequantises_is_loaded_and_can_be_trained(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    folder, values = fp8_folder(tmp_path)
    spec = {"model": str(folder), **keys}
    assert [str(problem) for problem in llmload.plan(spec).problems] == [
        "model: the checkpoint is quantised by fp8, of which transformers makes bfloat16 here while"
        " it loads; what it computes so is not held against the file. Load the checkpoint from"
        " before it was quantised for a model of which every value is proved."
    ]
    result = llmload.load(spec)
    model = result.model.get_base_model() if "lora" in keys else result.model
    found = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert result.report.compared == 7  # embedding, head and norms


@needs_dequantising
@pytest.mark.parametrize("how", ["merge", "merge_first"])
def test_an_adapter_is_merged_into_what_transformers_makes_of_an_fp8_folder(
    how: str, tmp_path: Path
) -> None:
    folder, _ = fp8_folder(tmp_path)
    trained = llmload.load({"model": str(folder), "lora": {"r": 2}}).model
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapter = str(tmp_path / "adapter")
    trained.save_pretrained(adapter)
    section = {"adapter": adapter, "merge": True} if how == "merge" else {"merge_first": [adapter]}
    result = llmload.load({"model": str(folder), "lora": {"r": 2, **section}})
    ours: Any = result.model
    if how == "merge_first":
        ours = ours.unload()
    base = AutoModelForCausalLM.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], value) for name, value in other.items())


@needs_dequantising
def test_what_is_plain_in_an_fp8_folder_is_compared_after_a_cast_too(tmp_path: Path) -> None:
    folder, _ = fp8_folder(tmp_path)
    assert llmload.load({"model": str(folder), "dtype": "float32"}).report.compared == 7


@needs_dequantising
@pytest.mark.parametrize("scale", [None, (3, 1)])
def test_eight_bit_floats_without_a_scale_that_fits_are_refused(
    scale: tuple[int, int] | None, tmp_path: Path
) -> None:
    folder, _ = fp8_folder(tmp_path)
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    del tensors[f"{name}_scale_inv"]
    if scale:
        tensors[f"{name}_scale_inv"] = torch.ones(scale)
    save_file(tensors, file, metadata={"format": "pt"})
    (text,) = said(folder)
    if scale:
        assert text == (
            f"{name}: the checkpoint has 8-bit floats (256, 128) with scales (3, 1), which do not"
            " divide them. Check that config.json and weights belong together."
        )
    else:
        assert text == (
            f"{name}: the checkpoint is quantised, and has 8-bit floats here without a scale."
            " Fetch or convert the checkpoint again: a tensor is missing in it."
        )


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale", "scale", "qscale_weight"])
def test_a_scale_is_known_by_every_name_that_it_is_stored_under(leaf: str) -> None:
    def info(name: str, dtype: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, Path("f"), dtype, shape, 0, 0)

    weight, scale = info("a.weight", "F8_E4M3", 8, 8), info(f"a.{leaf}", "F8_E8M0", 2, 2)
    whole = {tensor.name: tensor for tensor in (weight, scale)}
    assert list(without_scales(whole, divided=True)) == []
    assert [problem.where for problem in without_scales({"a.weight": weight}, divided=True)] == [
        "a.weight"
    ]


# --- the generation config ----------------------------------------------------------------------


def generation(folder: Path, **content: Any) -> Path:
    """Write a folder's generation config; returns the file."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"max_new_tokens": -1}, "`max_new_tokens` must be greater than 0, but is -1"),
        ({"cache_implementation": "none of them"}, "Invalid `cache_implementation`"),
    ],
)
def test_a_generation_config_that_transformers_refuses_is_refused(
    content: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path)
    file = generation(folder, **content)
    (text,) = said(folder)
    assert text.startswith(f"{file}: transformers refuses the generation config: {reason}")
    assert text.endswith(". Mend the value, or remove the file.")


@pytest.mark.skipif(not IS_MODERN, reason="4.51.3 refuses to read such a file")
def test_one_that_could_not_be_saved_again_is_a_warning_with_the_way_out(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    file = generation(folder, top_p=0.9, temperature=0.6)
    result = llmload.load({"model": str(folder), "tokenizer": {"add_special_tokens": {}}})
    (text,) = [text for text in result.report.warnings if "generation" in text]
    assert text.startswith(
        f"{file}: once one of its values has changed, as the alignment of token ids changes some,"
        " transformers will refuse to save the generation config, and the model with it: "
    )
    assert text.endswith("Set `do_sample` to true in the file, or remove what does not go with it.")
    with pytest.raises(ValueError, match="do_sample"):
        result.model.save_pretrained(tmp_path / "saved")
    generation(folder, top_p=0.9, temperature=0.6, do_sample=True)
    result = llmload.load({"model": str(folder)})
    assert not [text for text in result.report.warnings if "generation" in text]
    result.model.save_pretrained(tmp_path / "saved")


# --- classes ------------------------------------------------------------------------------------


@pytest.mark.skipif(not IS_MODERN, reason="4.51.3 does without")
def test_a_class_without_post_init_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "forgetful.py").write_text(
        "from torch import nn\n"
        "from transformers import LlamaConfig, PreTrainedModel\n"
        "class Forgetful(PreTrainedModel):\n"
        "    config_class = LlamaConfig\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.head = nn.Linear(2, 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (text,) = said(tiny_llama(tmp_path), auto_class="forgetful:Forgetful")
    assert text == (
        "auto_class: the constructor of Forgetful does not call `self.post_init()`, without which"
        " transformers cannot load into it. Call it at the end of `__init__`."
    )


def test_a_group_is_refused_before_its_first_member_is_read(tmp_path: Path) -> None:
    good = tiny_llama(tmp_path, name="good")
    bad = edit_config(tiny_llama(tmp_path, name="bad"), vocab_size=100)
    spec = {"models": {"policy": {"model": str(good)}, "critic": {"model": str(bad)}}}
    found = [str(problem) for problem in llmload.plan_group(spec).errors]
    assert found[0].startswith("models.critic.lm_head.weight: the checkpoint has float32 (128, 16)")
    with pytest.raises(llmload.PlanError) as caught:
        llmload.load_group(spec)
    assert str(caught.value).splitlines() == found

"""A load under ZeRO-3 on real ranks, held against transformers' own and against the whole model."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import architectures
import pytest
import stacks
import torch
from safetensors.torch import load_file, save_file
from zero3.farm import Job, Outcome, launch_once

import llmload
from llmload import testing

ARCHITECTURES = {
    "llama": "causal_lm",
    "gpt2": "causal_lm",  # tied, Conv1D
    "mixtral": "causal_lm",  # experts converted into one parameter
    "t5": "seq2seq_lm",  # tied three ways
    "bert": "base",
}
BEYOND_TRANSFORMERS = {"marian": "causal_lm", "funnel": "base", "rwkv": "causal_lm"}
"""Architectures that ``from_pretrained`` of 5.23 fails to load under ZeRO-3."""
PRECISIONS = [("bfloat16", None), ("float32", 0)]
HUGE = 10**9

pytestmark = pytest.mark.slow


VARIANTS = {
    "every parameter persists": {"threshold": HUGE, "train": True},
    "no parameter persists": {"threshold": 0, "train": True},
    "partitions in host memory": {"offload": "cpu", "train": True},
    "narrowed": {"folder": "float32", "dtype": "bfloat16"},
    "widened": {"folder": "bfloat16", "dtype": "float32"},
    "half": {"dtype": "float16"},
    "a missing head": {"kind": "sequence_classification"},
    "from_pretrained partitions": {"loader": "zero3", "train": True},
    "other keys": {"folder": "renamed", "key_map": {"^transformer": "model"}},
    "fetched ahead of use": {"folder": "bfloat16", "reading": "ahead"},
    "read into own memory": {"folder": "bfloat16", "reading": "read"},
}
"""Compared with transformers' own beside the architectures."""
BEYOND_4_51 = {"other keys": "state dictionary of the model you are trying to load is corrupted"}
"""Variants that 4.51.3 cannot load: it looks for the base model's prefix before it maps keys. Ours
is the whole model."""
PERSISTS = {
    "every parameter persists": True,
    "no parameter persists": False,
    "from_pretrained partitions": True,
    "partitions in host memory": True,  # by default all that are smaller than 100,000
}


def _variants(tmp: Path) -> dict[str, dict[str, Any]]:
    """Return the cases of ``VARIANTS``, their folders made in ``tmp``."""
    odd = {"hidden_size": 15, "head_dim": 4, "intermediate_size": 21}  # parts with padding
    odd |= {"num_attention_heads": 3, "num_key_value_heads": 3}
    folders = {
        "float32": testing.tiny_llama(tmp, name="float32", **odd),
        "bfloat16": testing.tiny_llama(tmp, name="bfloat16", dtype=torch.bfloat16, **odd),
        "renamed": testing.tiny_llama(tmp, name="renamed", **odd),
    }
    file = folders["renamed"] / "model.safetensors"
    state = {re.sub("^model", "transformer", k): v for k, v in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    usual = {"kind": "causal_lm", "folder": "float32", "dtype": "bfloat16", "threshold": None}
    cases = {name: usual | {"train": False} | case for name, case in VARIANTS.items()}
    return {name: case | {"folder": str(folders[case["folder"]])} for name, case in cases.items()}


def saved_adapter(tmp: Path, folder: str) -> str:
    lora = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    made = llmload.load({"model": folder, "dtype": "bfloat16", "lora": lora}).model
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand(parameter.shape))
        # PEFT saves the embedding with an adapter where tokens were added, for example.
        made.get_input_embeddings().weight[5:9] += 1
    made.save_pretrained(tmp / "adapter", save_embedding_layers=True)
    return str(tmp / "adapter")


def tied_adapters(tmp: Path, folder: str) -> dict[str, dict[str, Any]]:
    """Save adapters of a tied model; returns the sections that merge them, by name."""
    sections: dict[str, dict[str, Any]] = {
        "plain": {"target_modules": ["q_proj"]},
        "untied head": {"target_modules": ["lm_head", "q_proj"], "tied_weights": "untie"},
        "copied head": {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head"],
            "tied_weights": "separate",
        },
        "repeated layers": {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
    }
    merging = {}
    for name, section in sections.items():
        made = llmload.load({"model": folder, "lora": {"r": 2, **section}}).model
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.rand(parameter.shape) - 0.5)
        made.save_pretrained(tmp / name, save_embedding_layers=False)
        merging[name] = {"adapter": str(tmp / name), "merge": True, "adapter_dtype": "bfloat16"}
        merging[name] |= {k: v for k, v in section.items() if k == "tied_weights"}
    return merging


MERGED: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": {
        "experts": {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    },
    "qwen2": {  # whose layers have biases
        "biases": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
        "DoRA": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
        "KaSA": {"target_modules": ["q_proj", "v_proj"], "kasa_config": {}},
    },
}
"""By architecture, adapters by name."""


def merging(tmp: Path, folder: str, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Save adapters of a model; returns sections that merge each, or it first, before another."""
    found: dict[str, Any] = {}
    for name, section in sections.items():
        made = llmload.load({"model": folder, "lora": {"r": 2, **section}}).model
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.rand(parameter.shape) - 0.5)
        with warnings.catch_warnings():
            # PEFT 0.21 takes the bias of `lora_B`, of one dimension, for a part of a matrix.
            warnings.filterwarnings("ignore", message=".* have invalid shape")
            made.save_pretrained(tmp / name, save_embedding_layers=False)
        saved, dtype = str(tmp / name), {"adapter_dtype": "bfloat16"}
        found[name] = {"adapter": saved, "merge": True} | dtype
        another = {"r": 2, "target_modules": ["q_proj"]} | dtype
        found[f"{name} first"] = {"merge_first": [saved]} | another
    return found


def flat(outcomes: list[Outcome]) -> list[Any]:
    for rank in outcomes:
        assert rank.code == 0, rank.output
    return [rank.result for rank in outcomes]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    return launch_once(
        tmp_path_factory, "partitioned", lambda: _jobs(tmp_path_factory), timeout=280
    )


def _jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    cases = []
    for model_type, kind in ARCHITECTURES.items():
        folder = tmp_path_factory.mktemp(model_type)
        architectures.build(kind, model_type).save_pretrained(folder)
        for dtype, threshold in PRECISIONS:
            case = {"kind": kind, "folder": str(folder), "dtype": dtype, "threshold": threshold}
            cases.append(case | {"train": kind == "causal_lm"})
    merged = list(ARCHITECTURES).index("mixtral") * len(PRECISIONS)
    on_four = [cases[0], cases[merged]]
    tmp = tmp_path_factory.mktemp("models")
    variants = _variants(tmp_path_factory.mktemp("variants"))
    tied, untied = (
        str(testing.tiny_llama(tmp, name=str(tied), tied=tied, pad=True)) for tied in (True, False)
    )
    resize = {"dtype": "bfloat16"}
    adapter = {"folder": untied, "dtype": "bfloat16"}
    beyond = []
    for model_type, kind in BEYOND_TRANSFORMERS.items():
        folder = tmp_path_factory.mktemp(model_type)
        architectures.build(kind, model_type).save_pretrained(folder)
        beyond.append({"kind": kind, "folder": str(folder), "dtype": "bfloat16"})
    shared = str(testing.tiny_llama(tmp, name="shared", tied=True, dtype=torch.bfloat16))
    other = str(testing.tiny_llama(tmp, name="other", seed=5, pad=True))
    whole = {}
    for model_type in MERGED if stacks.IS_MODERN else ():
        folder = tmp / model_type / "model"
        architectures.build("causal_lm", model_type).to(torch.bfloat16).save_pretrained(folder)
        whole[model_type] = str(folder)
    return {
        "variants": Job("zero3.comparing:many", {"cases": list(variants.values())}, timeout=200),
        "head": Job("zero3.finishing:value_head", adapter),
        "state": Job("zero3.finishing:state_dict", adapter | {"other": other}),
        "saved": Job("zero3.finishing:modules_to_save", adapter),
        "resumed": Job("zero3.finishing:resume", adapter | {"adapter": saved_adapter(tmp, untied)}),
        "starts": Job("zero3.finishing:starts", {"folder": untied, "dtype": "float32"}),
        "beyond": Job("zero3.comparing:many_unlike_the_whole", {"cases": beyond}),
        "two": Job("zero3.comparing:many", {"cases": cases}, timeout=250),
        "four": Job("zero3.comparing:many", {"cases": on_four}, ranks=4, timeout=150),
        "tied": Job("zero3.finishing:embeddings", {"folder": tied} | resize),
        "merged": Job(
            "zero3.finishing:untied_and_merged",
            {"folder": shared, "adapters": tied_adapters(tmp, shared)},
        ),
        **{
            model_type: Job(
                "zero3.finishing:untied_and_merged",
                {"folder": folder, "adapters": merging(Path(folder).parent, folder, sections)},
            )
            for model_type, folder in whole.items()
            for sections in [MERGED[model_type]]
        },
        "untied": Job("zero3.finishing:embeddings", {"folder": untied} | resize),
        "auto": Job("zero3.finishing:lora", adapter | {"adapter_dtype": "auto"}),
        "base": Job("zero3.finishing:lora", adapter | {"adapter_dtype": "base"}),
    }


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_partitions_buffers_and_losses_are_those_of_transformers(
    outcomes: dict[str, list[Outcome]], ranks: str
) -> None:
    for answers in flat(outcomes[ranks]):
        assert answers
        for answer in answers:
            assert answer.get("differences") == [], answer
            assert "theirs" not in answer, answer
            mine, other = answer.get("losses", ([], []))
            assert mine == other


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_those_of_transformers(
    outcomes: dict[str, list[Outcome]], variant: str
) -> None:
    for answers in flat(outcomes["variants"]):
        answer = answers[list(VARIANTS).index(variant)]
        assert answer.get("differences") == [], answer
        if variant in BEYOND_4_51 and not stacks.IS_MODERN:
            assert BEYOND_4_51[variant] in answer["theirs"]
            continue
        assert "theirs" not in answer, answer
        mine, other = answer.get("losses", ([], []))
        assert mine == other
        assert not isinstance(mine, str), mine
        mine, other = answer.get("persist", ([], []))
        assert mine == other
        assert set(mine) == ({PERSISTS[variant]} if variant in PERSISTS else set())


def test_head_that_a_plugin_adds_is_partitioned_and_equal_on_all_ranks(
    outcomes: dict[str, list[Outcome]],
) -> None:
    zero, one = flat(outcomes["head"])
    for answer in (zero, one):
        assert answer["partitioned"] == [True, True]
        assert answer["empty"] == [0, 0]
        assert answer["shapes"] == [[1, 16], [1]]
        assert answer["new"] == {
            "v_head.weight": "a fresh head",
            "v_head.bias": "a fresh head",
        }
        assert len(set(answer["values"][0])) > 1
    assert zero["values"] == one["values"]
    assert zero["scale"] == one["scale"]
    assert zero["losses"] == sorted(zero["losses"], reverse=True)


def test_state_dict_fills_a_partitioned_model(outcomes: dict[str, list[Outcome]]) -> None:
    for answer in flat(outcomes["state"]):
        assert answer["different"] == []
        assert answer["padding"] == []
        assert answer["empty"] == 0
        assert answer["seen"] == [0.0, 1.0, 2.0]
        assert answer["told"] == [["model.norm.weight"], ["x"]]
        assert answer["refused"] == [
            "model.norm.weight: the state dict has (5,), the model takes (16,). Resize the"
            " embeddings first, or check that weights and model belong together.",
            "model.norm.weights: the model has no place for it. Rename keys, or pass"
            " `strict=False`.",
        ]


def test_modules_to_save_are_copies_of_the_whole_module(
    outcomes: dict[str, list[Outcome]],
) -> None:
    for answer in flat(outcomes["saved"]):
        assert [name for name, _, _ in answer["copies"]] == [
            "base_model.model.model.norm.modules_to_save.default.weight",
            "base_model.model.lm_head.modules_to_save.default.weight",
        ]
        assert {(dtype, trained) for _, dtype, trained in answer["copies"]} == {
            ("torch.bfloat16", True)
        }
        assert answer["different"] == []
        assert answer["losses"] == sorted(answer["losses"], reverse=True)


def test_saved_adapter_goes_on_under_zero3(outcomes: dict[str, list[Outcome]]) -> None:
    for answer in flat(outcomes["resumed"]):
        assert "zero3: trainable parameters are bfloat16 and float32" in answer["refused"]
        assert answer["different"] == []
        assert answer["losses"] == sorted(answer["losses"], reverse=True)


def test_adapters_that_start_from_the_weights_find_them_whole(
    outcomes: dict[str, list[Outcome]],
) -> None:
    adapted = ("self_attn.q_proj", "mlp.down_proj")
    changed = [f"model.layers.{n}.{module}.weight" for n in (0, 1) for module in adapted]
    for answer in flat(outcomes["starts"]):
        assert answer.keys() == {"pissa", "pissa_niter_4", "olora", "pissa_niter_4 coati"}
        assert all(found == [[], changed] for found in answer.values()), answer


def test_architectures_that_transformers_cannot_partition_equal_the_whole_model(
    outcomes: dict[str, list[Outcome]],
) -> None:
    for answers in flat(outcomes["beyond"]):
        assert answers == [[]] * len(BEYOND_TRANSFORMERS)


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_embeddings_resized_under_zero3_are_those_of_the_whole_model(
    outcomes: dict[str, list[Outcome]], model: str
) -> None:
    for answer in flat(outcomes[model]):
        assert answer["different"] == []
        assert answer["losses"] == sorted(answer["losses"], reverse=True)


@pytest.mark.parametrize(("adapter", "dtype"), [("auto", "float32"), ("base", "bfloat16")])
def test_adapter_trains_under_zero3_in_either_dtype(
    outcomes: dict[str, list[Outcome]], adapter: str, dtype: str
) -> None:
    for answer in flat(outcomes[adapter]):
        assert answer["dtypes"] == [f"torch.{dtype}"]
        assert answer["line"] == (
            "trainable params: 2,048 || all params: 10,832 || trainable%: 18.9069"
        )
        assert answer["losses"] == sorted(answer["losses"], reverse=True)


def test_untied_heads_and_merged_adapters_are_those_of_the_whole_model_in_parts(
    outcomes: dict[str, list[Outcome]],
) -> None:
    for answer in flat(outcomes["merged"]):
        assert answer == {
            "untied": [[], False],
            "plain": [[], True],
            "untied head": [[], False],
            "copied head": [[], False],
            "repeated layers": [[], True],
        }


@stacks.needs_transformers_5  # and the PEFT that has these adapters
@pytest.mark.parametrize("model_type", MERGED)
def test_adapters_of_experts_and_biases_are_merged_in_parts_alone_and_before_another(
    outcomes: dict[str, list[Outcome]], model_type: str
) -> None:
    for answer in flat(outcomes[model_type]):
        names = [n for name in MERGED[model_type] for n in (name, f"{name} first")]
        assert {name: different for name, (different, _) in answer.items()} == {
            name: [] for name in ("untied", *names)
        }

"""``llmload convert``: published configs of three tools as specs that validate, plan and load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from published_configs import CONFIGS, LINEAR, LLAMA_3
from stacks import NO_BITSANDBYTES
from typer.testing import CliRunner

import llmload
from llmload.cli import commands
from llmload.spec import converting
from llmload.spec.converting import Conversion
from llmload.spec.document import Document
from llmload.spec.foreign_keys import of_sections
from llmload.testing import tiny_checkpoint, tiny_llama

REGISTRY = llmload.create_registry(environ={})
SPELLINGS = of_sections(REGISTRY.sections.values())
CASES = [
    pytest.param(tool, name, id=f"{tool} {name}")
    for tool, named in CONFIGS.items()
    for name in named
]


def convert(config: dict[str, Any], tool: str | None = None) -> Conversion:
    """Convert without a file; the config goes through YAML first, as files do."""
    document = Document(data=yaml.safe_load(yaml.safe_dump(config)))
    return converting.convert(document, tool, SPELLINGS, REGISTRY.sections, REGISTRY.validate)


def run(*arguments: str, text: str | None = None) -> Any:
    return CliRunner().invoke(commands.app, ["convert", *arguments], input=text)


@pytest.mark.parametrize(("tool", "name"), CASES)
def test_every_key_of_a_published_config_is_accounted_for(tool: str, name: str) -> None:
    config = CONFIGS[tool][name]
    made = convert(config)
    assert made.tool == tool
    left = {each.key for each in made.not_carried}
    carried = made.carried.keys() - made.assumed.keys()
    assert carried | left | set(made.training) == config.keys()
    assert not set(made.training) & (carried | left)
    assert not [each for each in made.not_carried if "nothing here knows it" in each.why]
    REGISTRY.validate(made.spec)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small models, and an adapter of one, in place of what is on the hub."""
    root = tmp_path_factory.mktemp("models")
    llama = tiny_llama(root, hidden_size=64, intermediate_size=128)
    llmload.save({"model": str(llama), "lora": {"r": 2}}, root / "adapter")
    pythia = tiny_checkpoint(root / "pythia", "gpt_neox")
    return {"llama": str(llama), "pythia": str(pythia), "adapter": str(root / "adapter")}


@pytest.mark.parametrize(("tool", "name"), CASES)
def test_a_converted_spec_plans_and_loads(
    tool: str, name: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = convert(CONFIGS[tool][name]).spec
    spec["model"] = models["pythia" if "pythia" in name else "llama"]
    for key in ("revision", "zero3", *(("kbit",) if NO_BITSANDBYTES else ())):
        spec.pop(key, None)  # a folder has no revision, and this is one process without a GPU
    if spec.get("attn_implementation") == "flash_attention_2":
        del spec["attn_implementation"]
    if "adapter" in spec.get("lora", {}):
        spec["lora"]["adapter"] = models["adapter"]
    if "chat_template" in spec.get("tokenizer", {}):
        del spec["tokenizer"]["chat_template"]
    if "loftq_config" in spec.get("lora", {}):  # PEFT wants scipy for it
        del spec["lora"]["loftq_config"], spec["lora"]["init_lora_weights"]
    if "labels" in spec:  # the model in its place has a head of its own
        spec["strict"] = {"allow_unexpected": ["lm_head"]}
    assert llmload.plan(spec).errors == []
    llmload.load(spec)


EXPECTED: dict[tuple[str, str], dict[str, Any]] = {
    ("axolotl", "llama-3 qlora"): {
        "model": LLAMA_3,
        "auto_class": "causal_lm",
        "dtype": "bfloat16",
        "attn_implementation": "flash_attention_2",
        "embeddings": {},
        "gradient_checkpointing": {},
        "kbit": {"bits": 4, "double_quant": True},
        "lora": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"},
        "tokenizer": {
            "add_tokens": [{"content": "<|end_of_text|>", "special": True}],
            "pad_token": "<|end_of_text|>",
            "overwrite_pad": True,
        },
    },
    ("axolotl", "from scratch"): {
        "model": "HuggingFaceTB/SmolLM2-135M",
        "dtype": "float32",
        "config": {"attention_dropout": 0.1},
        "weights": "random",
        "device_map": "cpu",
        "attn_implementation": "eager",
        "gradient_checkpointing": {},
    },
    ("axolotl", "pythia lora"): {
        "model": "EleutherAI/pythia-1.4b-deduped",
        "dtype": "bfloat16",
        "gradient_checkpointing": {},
        "kbit": {"bits": 8},
        "lora": {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "target_modules": ["query_key_value"],
            "fan_in_fan_out": True,
        },
    },
    ("axolotl", "offloaded checkpoints"): {
        "model": "Qwen/Qwen3-32B",
        "dtype": "bfloat16",
        "gradient_checkpointing": {"use_reentrant": False},
        "kbit": {"bits": 4, "double_quant": True},
        "lora": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": LINEAR},
    },
    ("axolotl", "loftq"): {
        "model": "NousResearch/Llama-2-7b-hf",
        "dtype": "bfloat16",
        "attn_implementation": "flash_attention_2",
        "gradient_checkpointing": {},
        "lora": {
            "r": 32,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": "all-linear",
            "init_lora_weights": "loftq",
            "loftq_config": {"loftq_bits": 4},
        },
    },
    ("axolotl", "experts in 4 bits"): {
        "model": "google/gemma-4-26B-A4B",
        "dtype": "bfloat16",
        "config": {"attention_dropout": 0.1},
        "attn_implementation": "flash_attention_2",
        "gradient_checkpointing": {},
        "kbit": {"bits": 4, "double_quant": False},
        "lora": {
            "r": 32,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 16},
        },
    },
    ("llama-factory", "kernels for the CPU"): {
        "model": LLAMA_3,
        "dtype": "bfloat16",
        "kbit": {"bits": 4, "quant_type": "fp4", "double_quant": True},
        "lora": {"target_modules": "all-linear", "r": 8, "lora_alpha": 16},
    },
    ("trl", "sft on a CPU"): {
        "model": "Qwen/Qwen2-0.5B",
        "dtype": "float32",
        "gradient_checkpointing": {},
        "kbit": {"bits": 4, "quant_type": "fp4", "double_quant": True},
        "lora": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05},
    },
    ("llama-factory", "lora reward"): {
        "model": LLAMA_3,
        "dtype": "float16",
        "lora": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 16},
    },
    ("llama-factory", "qlora"): {
        "model": LLAMA_3,
        "dtype": "bfloat16",
        "kbit": {"bits": 4, "double_quant": False},
        "lora": {"target_modules": "all-linear", "r": 8, "lora_alpha": 16},
    },
    ("llama-factory", "full"): {
        "model": LLAMA_3,
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "zero3": {"config": "examples/deepspeed/ds_z3_config.json"},
    },
    ("trl", "sft lora"): {
        "model": "Qwen/Qwen2-0.5B",
        "dtype": "float32",
        "gradient_checkpointing": {},
        "lora": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05},
    },
    ("trl", "zephyr sft qlora"): {
        "model": "mistralai/Mistral-7B-v0.1",
        "revision": "main",
        "dtype": "bfloat16",
        "attn_implementation": "flash_attention_2",
        "gradient_checkpointing": {"use_reentrant": False},
        "kbit": {"bits": 4},
        "lora": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": LINEAR},
    },
    ("trl", "dpo"): {
        "model": "Qwen/Qwen2-0.5B-Instruct",
        "dtype": "bfloat16",
        "dropout": {"p": 0.0},
        "gradient_checkpointing": {},
    },
}


@pytest.mark.parametrize(("tool", "name"), EXPECTED, ids=" ".join)
def test_a_spec_says_what_the_tool_does_its_defaults_included(tool: str, name: str) -> None:
    assert convert(CONFIGS[tool][name]).spec == EXPECTED[tool, name]


def left_out(tool: str, name: str) -> dict[str, str]:
    return {each.key: each.why for each in convert(CONFIGS[tool][name]).not_carried}


def test_what_is_left_out_is_named_with_the_reason() -> None:
    assert left_out("axolotl", "qwen dpo") == {
        "chat_template": "Save the template 'qwen_25' to a file, and write `tokenizer:"
        " {chat_template: FILE}`: llmload brings no templates along"
    }
    assert left_out("axolotl", "offloaded checkpoints") == {
        "attn_implementation": "apply it to `result.model`: what is loaded is not patched",
        "gradient_checkpointing": "the section is there with its defaults, 'offload' is not among"
        " its keys",
    }
    assert left_out("llama-factory", "pissa in few iterations") == {
        "pissa_iter": "Write `lora: {init_lora_weights: pissa_niter_4}`",
        "use_v1_kernels": "apply it to `result.model`: what is loaded is not patched",
    }
    assert left_out("trl", "zephyr sft full") == {
        "lora_r": "not in effect there: `use_peft` asks for no LoRA"
    }
    assert left_out("llama-factory", "freeze") == {
        "finetuning_type": "llmload has no such setting",
        "freeze_trainable_layers": "set `requires_grad` on `result.model`: `trainable` freezes the"
        " whole model",
        "freeze_trainable_modules": "set `requires_grad` on `result.model`: `trainable` freezes the"
        " whole model",
    }
    assert left_out("llama-factory", "merge").keys() == {
        "export_dir", "export_size", "export_device",
    }  # fmt: skip


def test_two_keys_that_disagree_are_not_both_carried() -> None:
    config = {"base_model": "m", "adapter": "lora", "lora_r": 8, "lora_alpha": 16}
    made = convert(
        config | {"lora_target_linear": True, "lora_target_modules": ["q_proj"]}, "axolotl"
    )
    assert made.spec["lora"]["target_modules"] == "all-linear"
    assert [(each.key, each.why) for each in made.not_carried] == [
        (
            "lora_target_modules",
            "`lora_target_linear` has given `lora.target_modules` another value",
        )
    ]


def test_a_saved_adapter_brings_its_own_fields() -> None:
    config = {"model_name_or_path": "m", "adapter_name_or_path": "a", "lora_rank": 16}
    made = convert(config, "llama-factory")
    assert made.spec["lora"] == {"adapter": "a"}
    assert [(each.key, each.why) for each in made.not_carried] == [
        ("lora_rank", "the saved adapter brings its own")
    ]


def test_a_value_that_a_spec_refuses_is_left_out_with_the_words_of_the_refusal() -> None:
    made = convert({"model_name_or_path": "m", "use_peft": True, "lora_dropout": 7}, "trl")
    assert "lora_dropout" not in made.spec["lora"]
    (left,) = made.not_carried
    assert left.key == "lora_dropout"
    assert left.why.startswith("refused here: must be ")


def test_a_key_that_nothing_knows_is_named_and_its_value_is_not_shown() -> None:
    made = convert({"base_model": "m", "datasets": [], "secret_sauce": "hf_abcdefghijk"})
    assert [(each.key, each.why) for each in made.not_carried] == [
        ("secret_sauce", "nothing here knows it; if it changes what is loaded, say so in the spec")
    ]
    assert "hf_abc" not in made.model_dump_json()


# --- the command ----------------------------------------------------------------------------------


def test_the_spec_goes_to_standard_output_and_the_rest_to_people(tmp_path: Path) -> None:
    file = tmp_path / "sft.yml"
    file.write_text(yaml.safe_dump(CONFIGS["axolotl"]["llama-3 full"], sort_keys=False))
    done = run(str(file))
    assert done.exit_code == 0, done.output
    assert done.stdout == (
        "# Converted by llmload from sft.yml, a config of axolotl.\n"
        f"model: {LLAMA_3}\n"
        "dtype: bfloat16\n"
        "attn_implementation: flash_attention_2\n"
        "gradient_checkpointing:\n"
        "  use_reentrant: false\n"
    )
    assert done.stderr.startswith(
        "a config of axolotl: 5 keys carried\n"
        "assumed: `bfloat16: true`, as axolotl does\n"
        "not carried: plugins: apply it to `result.model`: what is loaded is not patched\n"
    )
    assert "\nfor the trainer: datasets, " in done.stderr


def test_a_converted_file_is_a_spec_and_is_not_written_over(tmp_path: Path) -> None:
    file, spec = tmp_path / "sft.json", tmp_path / "spec.yaml"
    file.write_text(json.dumps(CONFIGS["llama-factory"]["lora sft"]))
    assert run(str(file), "--to", str(spec)).exit_code == 0
    assert REGISTRY.validate(spec).dtype == "bfloat16"
    again = run(str(file), "--to", str(spec))
    assert again.exit_code == 2
    assert again.stderr == (
        f"the file {str(spec)!r} is there, and nothing is written over. Name a new file.\n"
    )


def test_json_has_all_of_it() -> None:
    done = run("-", "--json", text=json.dumps(CONFIGS["trl"]["sft lora"]))
    found = json.loads(done.stdout)
    assert found["tool"] == "trl"
    assert found["carried"]["lora_r"] == ["lora.r"]
    assert found["assumed"] == {"dtype": "float32", "lora_dropout": 0.05}
    assert "bf16" in found["training"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "config", "said"),
    [
        (
            [],
            {"learning_rate": 1},
            "<stdin>: whose config this is cannot be told by its keys. Say so with `--from`:"
            " axolotl, llama-factory, trl.",
        ),
        (
            ["--from", "unsloth"],
            {"model_name": "m"},
            "--from: configs of 'unsloth' are not known. Known are: axolotl, llama-factory, trl.",
        ),
        (
            ["--from", "trl"],
            {"learning_rate": 1},
            "<stdin>: the config names no model that trl would load. Add the model to the file, or"
            " say whose it is with `--from`.",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(
    arguments: list[str], config: dict[str, Any], said: str
) -> None:
    done = run("-", *arguments, text=json.dumps(config))
    assert done.exit_code == 2
    assert done.stderr == f"{said}\n"
    assert done.stdout == ""


def test_a_quiet_command_says_nothing_of_what_is_left_out() -> None:
    config = (
        "base_model: gpt2\nadapter: lora\nlora_r: 8\nlora_target_linear: true\nwandb_project: p\n"
    )
    told, quiet = run("-", text=config), run("-", "-q", text=config)
    assert (told.exit_code, quiet.exit_code) == (0, 0)
    assert "for the trainer" in told.stderr or "not carried" in told.stderr
    assert (quiet.stderr, quiet.stdout) == ("", told.stdout)

"""The plugin ``parallel_experts``: trained, saved, loaded by another process, merged, in parts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import on_ranks
import peft
import pytest
import torch
import transformers

import llmload
from llmload.plugin import version_of
from llmload.testing import IDS, assert_plugin, losses, run_on_ranks
from llmload_parallel_experts.layers import ParallelExpertsLora
from llmload_parallel_experts.plugin import ParallelExpertsPlugin

EXPERTS = {"target_modules": ["input_linear", "output_linear"], "r": 2}
BOTH = {"target_modules": ["kv_proj", "input_linear", "output_linear"], "r": 2}
TRANSFORMERS_4 = transformers.__version__.startswith("4.")


@pytest.fixture(scope="module")
def jetmoe(llmload_checkpoint: Callable[..., Path]) -> str:
    return str(llmload_checkpoint("jetmoe"))


def load(folder: str, lora: dict[str, Any], **keys: Any) -> Any:
    return llmload.load({"model": folder, "dtype": "float32", "lora": lora, **keys})


def refusal(folder: str, lora: dict[str, Any], block: set[str] | None = None) -> str:
    registry = llmload.create_registry(block=block or ())
    (problem,) = llmload.plan({"model": folder, "lora": lora}, registry=registry).errors
    return str(problem)


def adapted(model: torch.nn.Module) -> dict[str, ParallelExpertsLora]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ParallelExpertsLora)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def trained(jetmoe: str) -> Any:
    model = load(jetmoe, BOTH | {"lora_dropout": 0.1, "use_rslora": True}).model
    first, *_, last = losses(model, 5)
    assert last < first
    return model.eval()


@pytest.fixture(scope="module")
def adapter(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("kept") / "adapter"
    trained.save_pretrained(folder)
    return str(folder)


def test_peft_alone_refuses_stacked_experts(jetmoe: str) -> None:
    told = refusal(jetmoe, EXPERTS, block={"parallel_experts"})
    assert "PEFT refuses this adapter: Target module JetMoeParallelExperts" in told


def test_all_factors_of_all_experts_are_trained_and_nothing_else(jetmoe: str) -> None:
    result = load(jetmoe, EXPERTS)
    model = result.model
    layers = adapted(model)
    assert len(layers) == len(result.plan.facts["lora"]["targets"]) > 0
    assert result.report.facts["lora"]["made_by"] == {
        "parallel_experts": [name.removeprefix("base_model.model.") for name in layers]
    }
    before = logits(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    first, *_, last = losses(model, 5)
    assert last < first
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    moved = [layer.lora_B["default"].weight for layer in layers.values()]
    assert all(weight.flatten(1).any(1).any() for weight in moved)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)  # factors B start at zero
    assert not torch.equal(logits(model), before)


def test_a_saved_adapter_names_the_plugin_and_another_process_finds_it(
    trained: Any, jetmoe: str, adapter: str, tmp_path: Path
) -> None:
    written = json.loads((Path(adapter) / "adapter_config.json").read_text())
    version = version_of("llmload-parallel-experts")
    distribution = f"llmload-parallel-experts {version}" if version else "given as an object"
    assert written["llmload_plugins"] == {"parallel_experts": distribution}
    made = json.loads((Path(adapter) / "llmload.json").read_text())
    assert made["plugins"]["parallel_experts"] == distribution

    script = tmp_path / "resume.py"
    script.write_text(
        "import sys, llmload, torch\n"
        "from llmload.testing import IDS\n"
        "spec = {'model': sys.argv[1], 'dtype': 'float32', 'lora': {'adapter': sys.argv[2]}}\n"
        "model = llmload.load(spec).model\n"
        "torch.save(model(input_ids=IDS).logits.detach(), sys.argv[3])\n"
    )
    found = tmp_path / "logits.pt"
    subprocess.run([sys.executable, str(script), jetmoe, adapter, str(found)], check=True)
    assert torch.equal(torch.load(found, weights_only=True), logits(trained))


def test_an_adapter_is_refused_where_the_plugin_takes_no_part(jetmoe: str, adapter: str) -> None:
    version = version_of("llmload-parallel-experts")
    assert refusal(jetmoe, {"adapter": adapter}, block={"parallel_experts"}) == (
        f"lora.adapter: the adapter in {adapter!r} has layers made by the plugin"
        f" 'parallel_experts' of llmload-parallel-experts {version}, which takes no part in this"
        f" load. llmload-parallel-experts {version} is installed: select it with `-p"
        " parallel_experts`; if it has a section, add `parallel_experts: {}` to the spec."
    )


def test_a_merged_adapter_is_in_the_weights_that_plain_transformers_reads(
    trained: Any, jetmoe: str, adapter: str, tmp_path: Path
) -> None:
    merged = load(jetmoe, {"adapter": adapter, "merge": True}).model
    assert not adapted(merged)
    merged.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), logits(trained))


def test_what_was_merged_is_taken_out_again(jetmoe: str, adapter: str) -> None:
    model = load(jetmoe, {"adapter": adapter}).model
    before = logits(model)
    model.merge_adapter()
    assert all(layer.merged for layer in adapted(model).values())
    torch.testing.assert_close(logits(model), before)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before)
    layer = next(iter(adapted(model).values()))
    layer.lora_B["default"].weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="the adapter 'default' makes weights that are not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_a_second_adapter_is_added_by_peft(jetmoe: str) -> None:
    model = load(jetmoe, EXPERTS).model
    model.add_adapter("second", peft.LoraConfig(**EXPERTS | {"r": 3, "lora_dropout": 0.1}))
    model.set_adapter("second")
    factors = [layer.lora_A["second"].weight.shape[1] for layer in adapted(model).values()]
    assert set(factors) == {3}
    first, *_, last = losses(model, 5)
    assert last < first


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.skipif(
    TRANSFORMERS_4 and not torch.cuda.is_available(),
    reason="transformers 4.51 refuses bitsandbytes on CPU",
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_the_base_under_it_may_be_quantised(jetmoe: str) -> None:
    kbit = {"bits": 4, "quant_type": "nf4"}
    model = load(jetmoe, BOTH, kbit=kbit).model
    kinds = {type(m).__name__ for m in model.modules()}
    assert {"Linear4bit", "ParallelExpertsLora"} <= kinds
    first, *_, last = losses(model, 5)
    assert last < first


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_the_base_under_it_may_lie_in_parts_on_two_ranks(jetmoe: str, adapter: str) -> None:
    spec = {"model": jetmoe, "dtype": "float32"}
    ranks = run_on_ranks(
        on_ranks.trained_and_merged,
        spec | {"lora": BOTH},
        spec | {"lora": {"adapter": adapter, "merge": True}},
        process_group=False,
    )
    for found in ranks:
        assert found["adapted"] > 0
        assert found["parts"] == {True}
        assert found["losses"][-1] < found["losses"][0]
        assert found["losses"] == ranks[0]["losses"]
        assert found["unlike"] == []


REFUSED = {
    "an initialisation of PEFT's own layers": (
        {"init_lora_weights": "olora"},
        "lora.init_lora_weights: adapters of stacked experts do not start with 'olora'. Write true,"
        " false or gaussian, or take the experts out of `target_modules`.",
    ),
    "DoRA": (
        {"use_dora": True},
        "lora.use_dora: adapters of stacked experts are two factors each, and know nothing of it."
        " Remove it, or take the experts out of `target_modules`.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_layers_of_peft_know_is_refused_by_the_plan(jetmoe: str, name: str) -> None:
    keys, message = REFUSED[name]
    assert refusal(jetmoe, EXPERTS | keys) == message


@pytest.mark.parametrize("start", [False, "gaussian"])
def test_factors_start_as_the_section_says(jetmoe: str, start: bool | str) -> None:
    model = load(jetmoe, EXPERTS | {"init_lora_weights": start}).model
    layers = adapted(model).values()
    assert all(layer.lora_A["default"].weight.flatten(1).any(1).all() for layer in layers)
    assert all(layer.lora_B["default"].weight.any() == (start is False) for layer in layers)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_plain_peft_loads_the_adapter_once_it_is_given_the_layer(
    trained: Any, jetmoe: str, adapter: str
) -> None:
    written = json.loads((Path(adapter) / "adapter_config.json").read_text())
    del written["llmload_plugins"]  # PEFT 0.13 takes no key that it does not know
    config = peft.LoraConfig(**written)
    base = transformers.AutoModelForCausalLM.from_pretrained(jetmoe)
    (kind,) = {type(m) for m in base.modules() if type(m).__name__ == "JetMoeParallelExperts"}

    def layer(target: torch.nn.Module, adapter_name: str, **_: Any) -> torch.nn.Module:
        return ParallelExpertsLora(target, adapter_name, config)

    config._register_custom_module({kind: layer})
    model = peft.PeftModel.from_pretrained(base, adapter, config=config)
    assert torch.equal(logits(model), logits(trained))


def test_the_plugin_keeps_the_contract(jetmoe: str) -> None:
    assert_plugin(ParallelExpertsPlugin, spec={"lora": EXPERTS}, folder=Path(jetmoe))

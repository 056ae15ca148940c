"""What holds on every version that is supported, small: run by ``nox -s versions`` on each of them,
and on the oldest of each other library.

On a version of transformers that is not supported, that it is refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from quantised import load, plain
from zero3.test_trainers import assert_trained_alike, results, train_each_way

import llmload
from llmload.errors import PluginError, SpecError
from llmload.hf.versions import SUPPORTED, refuse_unsupported
from llmload.host import tested
from llmload.testing import losses, same, tiny_checkpoint

INSTALLED = transformers.__version__
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
NO_BITSANDBYTES = Version(INSTALLED) < Version("4.57") and not torch.cuda.is_available()
DTYPE = "dtype" if Version(INSTALLED) >= Version("4.56") else "torch_dtype"


OF_NARROW_FREQUENCIES = Version("5.18") <= Version(INSTALLED) < Version("5.23")
WITHOUT_SCHEDULER = Version("4.57") <= Version(INSTALLED) < Version("5")


def _refused() -> bool:
    try:
        refuse_unsupported(INSTALLED)
    except PluginError:
        return True
    return False


works = pytest.mark.skipif(_refused(), reason="this transformers is refused")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("versions") / "model", request.param, pad=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = {"hidden_size": 64, "intermediate_size": 160}
    return tiny_checkpoint(tmp_path_factory.mktemp("versions") / "llama", pad=True, **size)


def theirs(folder: Path, dtype: str, **options: Any) -> Any:
    options[DTYPE] = getattr(torch, dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def unlike(ours: Any, others: Any) -> list[str]:
    mine, other = ({**m.state_dict(), **dict(m.named_buffers())} for m in (ours, others))
    assert mine.keys() == other.keys()
    return [name for name in mine if not same(mine[name], other[name])]


@pytest.mark.skipif(not _refused(), reason="this transformers is supported")
def test_a_version_that_is_not_supported_is_refused_by_name_before_anything_is_read() -> None:
    assert tested.TRANSFORMERS[INSTALLED] == "refused"
    said = f"transformers {INSTALLED} is installed, and llmload supports {SUPPORTED}"
    for ask in (llmload.plan, llmload.load):
        with pytest.raises(PluginError, match=re.escape(said)):
            ask({"model": "/no/such/folder"})


@works
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loader_of_the_table_loads_it_bit_by_bit(folder: Path, dtype: str) -> None:
    result = llmload.load({"model": str(folder), "dtype": dtype})
    assert result.report.loader == result.plan.loader == tested.TRANSFORMERS[INSTALLED]
    assert not unlike(result.model, theirs(folder, dtype))
    assert result.tokenizer is not None
    assert result.report.versions["transformers"] == INSTALLED


@works
def test_a_plan_foretells_names_and_memory(folder: Path) -> None:
    made = llmload.plan({"model": str(folder), "lora": LORA})
    result = llmload.load({"model": str(folder), "lora": LORA})
    assert not made.errors
    assert made.memory is not None
    assert {route.name for route in made.memory.routes} == dict(
        result.model.named_parameters()
    ).keys()
    assert made.loader == result.report.loader


@works
def test_an_adapter_trains_as_pefts_own_and_goes_to_peft_and_back(
    folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    ours = llmload.load({"model": str(folder), "lora": LORA}).model
    torch.manual_seed(0)
    other = theirs(folder, "float32")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
    other = peft.get_peft_model(other, config)
    _reseed(ours, other)
    assert losses(ours, 3) == losses(other, 3)
    ours.save_pretrained(tmp_path / "ours")
    other.save_pretrained(tmp_path / "theirs")
    in_peft = peft.PeftModel.from_pretrained(theirs(folder, "float32"), tmp_path / "ours")
    here = llmload.load({"model": str(folder), "lora": {"adapter": str(tmp_path / "theirs")}})
    assert not unlike(in_peft, ours)
    assert not unlike(here.model, other)


def _reseed(ours: Any, other: Any) -> None:
    """Both start from one adapter: what draws before it is not the same in every version."""
    drawn = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert drawn.keys() == {n for n, p in other.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in drawn:
                parameter.copy_(drawn[name])
    ours.train()
    other.train()


@works
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_transformers_own(llama: Path, bits: int) -> None:
    section = {"bits": bits}
    if NO_BITSANDBYTES:
        with pytest.raises(llmload.PlanError, match=f"transformers {INSTALLED} refuses bitsandb"):
            load(llama, section)
        return
    result = load(llama, section)
    assert result.report.loader == tested.TRANSFORMERS[INSTALLED]
    assert not unlike(result.model, plain(llama, section))


@works
@pytest.mark.skipif(NO_BITSANDBYTES, reason="this transformers refuses bitsandbytes")
def test_an_adapter_over_quantised_weights_trains_as_pefts_own(llama: Path) -> None:
    section = {"double_quant": True}
    ours = load(llama, section, lora=LORA).model
    config = peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
    other = peft.get_peft_model(plain(llama, section), config)
    _reseed(ours, other)
    assert losses(ours, 3) == losses(other, 3)


@works
@pytest.mark.slow
@pytest.mark.skipif(
    WITHOUT_SCHEDULER, reason="this Trainer fails under ZeRO-3, in the scheduler of torch 2.13"
)
@pytest.mark.xfail(
    OF_NARROW_FREQUENCIES,
    strict=True,
    reason="zero.Init has this transformers compute rotary frequencies in the model's dtype, which"
    " 5.23 mended (prevent_arange_dtype_change): llmload trains here what both train there",
)
@pytest.mark.parametrize("what", ["full", "adapter"])
def test_zero3_trains_on_two_ranks_as_trainers_own(
    trained: dict[str, list[dict[str, Any]]], what: str
) -> None:
    for mine, other in zip(trained["after"], trained["theirs"], strict=True):
        assert_trained_alike(mine[f"trainer {what}"], other[f"trainer {what}"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    ways = {way: ["trainer"] for way in ("theirs", "after")}
    return results(train_each_way(tmp_path_factory.mktemp("ranks"), ways))


@works
def test_a_wrong_spec_is_refused_in_the_same_words(llama: Path) -> None:
    with pytest.raises(SpecError) as told:
        llmload.load({"model": str(llama), "lora": {"rank": 4}})
    assert "rank" in str(told.value)

"""TRL's SFTTrainer takes a quantised model from here and trains it as it trains its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from quantised import load, plain

from llmload.testing import SENTENCES, tiny_checkpoint

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SEED = 42
"""The trainer seeds itself with this before it draws an adapter."""
BITS = pytest.mark.parametrize("section", [{"double_quant": True}, {"bits": 8}], ids=["4", "8"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("trl") / "llama",
        dtype=torch.bfloat16,
        pad=True,
        hidden_size=64,
        intermediate_size=160,
    )


def trainer(
    model: Any, tokenizer: Any, output: Path, *, checkpointing: bool, **options: Any
) -> Any:
    arguments = trl.SFTConfig(
        output_dir=str(output),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        seed=SEED,
        bf16=False,
        use_cpu=True,
        max_length=16,
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": list(SENTENCES)}),
        processing_class=tokenizer,
        **options,
    )


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@BITS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_give_the_losses_of_trls_own_path(
    section: dict[str, Any], checkpointing: bool, folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(SEED)
    keys = {"gradient_checkpointing": {}} if checkpointing else {}
    ours = load(folder, section, lora=LORA, **keys)
    mine = trainer(ours.model, ours.tokenizer, tmp_path / "ours", checkpointing=checkpointing)

    other = trainer(
        plain(folder, section),
        ours.tokenizer,
        tmp_path / "theirs",
        checkpointing=checkpointing,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
    )
    found = losses(mine)
    assert found == losses(other)
    assert len(found) == 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(mine.model.parameters(), other.model.parameters(), strict=True)
    )


@BITS
def test_the_profile_trl_is_what_the_trainer_would_make_of_it(
    section: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    ours = load(
        folder, section | {"prepare": "trl"}, lora=LORA | {"adapter_dtype": "bfloat16"}
    ).model
    before = {name: p.dtype for name, p in ours.named_parameters()}
    theirs = trainer(
        plain(folder, section),
        None,
        tmp_path,
        checkpointing=False,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
    ).model
    assert before == {name: p.dtype for name, p in theirs.named_parameters()}

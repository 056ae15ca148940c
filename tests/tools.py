"""The tools that train: each given a model of ours, or one made as its own documentation says."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations, cycle
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from accelerate.state import AcceleratorState
from quantised import plain
from stacks import IS_MODERN, NO_BITSANDBYTES
from torch import nn
from transformers import AutoTokenizer, Trainer, TrainingArguments

import llmload
from llmload.cli.environment import compatibility
from llmload.testing import SENTENCES, tiny_checkpoint

SEED = 42
"""The trainers seed themselves with this before they draw an adapter."""
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
_ROWS = 192

TOOLS = (
    "Trainer",
    "accelerate",
    *(("SFTTrainer", "DPOTrainer", "RewardTrainer") if importlib.util.find_spec("trl") else ()),
)


@dataclass(frozen=True)
class Combination:
    """Sections of a spec, and how a script without llmload comes by such a model."""

    sections: Mapping[str, Any] = field(default_factory=dict)
    changed: Callable[[Any], None] = lambda model: None
    """What the script does to what ``from_pretrained`` gives."""
    dtype: str = "float32"
    checkpointing: bool = False
    """Whether the trainer is told to recompute layers."""
    autocast: bool = False


def _with_dropout(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1


def _with_rows(model: Any) -> None:
    before = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(_ROWS, mean_resizing=False)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embeddings is not None:
            with torch.no_grad():
                embeddings.weight[before:] = 0


def _with_wide_norms(model: Any) -> None:
    for name, module in model.named_modules():
        if "norm" in name:
            module.to(torch.float32)


_RECOMPUTED: dict[str, Any] = {"gradient_checkpointing": {}}
PARTS: dict[str, Combination] = {
    "adapter": Combination({"lora": LORA}),
    "4 bits": Combination({"kbit": {"double_quant": True}}, dtype="bfloat16"),
    "8 bits": Combination({"kbit": {"bits": 8}}, dtype="bfloat16"),
    "recomputed": Combination(_RECOMPUTED, checkpointing=True),
    "dropout": Combination({"dropout": {"p": 0.1}}, _with_dropout),
    "more rows": Combination(
        {"embeddings": {"pad_to_multiple_of": _ROWS, "init_new": "zero"}}, _with_rows
    ),
    "wide norms": Combination(
        {"cast": {"modules": {"norm": "float32"}}},
        _with_wide_norms,
        dtype="bfloat16",
        autocast=True,
    ),
    "lazily": Combination({"colossalai": {}}),
}
"""One section each; what two of them name alike they have alike."""


def together(*names: str) -> Combination:
    """Return the combination of some parts; of none, a model as it is loaded without sections."""
    parts = [PARTS[name] for name in names]

    def changed(model: Any) -> None:
        for part in parts:
            part.changed(model)

    return Combination(
        {key: section for part in parts for key, section in part.sections.items()},
        changed,
        dtype="bfloat16" if any(part.dtype == "bfloat16" for part in parts) else "float32",
        checkpointing=any(part.checkpointing for part in parts),
        autocast=any(part.autocast for part in parts),
    )


def allowed() -> list[tuple[str, ...]]:
    """Return the combinations that the table of what goes with what lets through, and that train.

    Quantised weights take no gradients: there an adapter has to be trained.
    """
    table = compatibility(llmload.create_registry(environ={}))
    refused = {frozenset((p.one, p.other)) for p in table.pairs if p.works == "no"}
    found = []
    for names in chain.from_iterable(combinations(PARTS, n) for n in range(len(PARTS) + 1)):
        keys = [key for name in names for key in PARTS[name].sections]
        clashes = any(frozenset(pair) in refused for pair in combinations(keys, 2))
        twice = len(set(keys)) < len(keys)
        useless = "kbit" in keys and (NO_BITSANDBYTES or "lora" not in keys)
        if not (clashes or twice or useless):
            found.append(names)
    return found


_CHOSEN: list[tuple[str, ...]] = [
    (),
    ("adapter",),
    ("adapter", "4 bits"),
    ("adapter", "8 bits"),
    ("adapter", "4 bits", "recomputed"),
    ("recomputed",),
    ("adapter", "recomputed"),
    ("dropout",),
    ("more rows",),
    ("adapter", "more rows"),
    ("wide norms",),
    ("adapter", "wide norms"),
    ("lazily",),
    ("adapter", "lazily"),
]
SOME = [
    (tool, names)
    for tool, names in zip(cycle(TOOLS), _CHOSEN, strict=False)
    if not (NO_BITSANDBYTES and {"4 bits", "8 bits"} & set(names))
]
"""Each tool, and each part with an adapter or without, at least once."""


def called(names: tuple[str, ...]) -> str:
    """What a test calls a combination."""
    return ", ".join(names) or "all parameters"


def small_folders(place: Path) -> dict[str, Path]:
    """Return the folder of a causal model and one that has a score, by auto class."""
    size = {"hidden_size": 64, "intermediate_size": 160, "pad_token_id": 3}
    return {
        "causal_lm": tiny_checkpoint(place / "llama", pad=True, **size),
        "sequence_classification": tiny_checkpoint(
            place / "score", auto_class="sequence_classification", num_labels=1, pad=True, **size
        ),
    }


def auto_class(tool: str) -> str:
    return "sequence_classification" if tool == "RewardTrainer" else "causal_lm"


def ours(tool: str, combination: Combination, folder: Path) -> dict[str, Any]:
    """What a tool is handed of ours, as it is."""
    spec = {"model": str(folder), "auto_class": auto_class(tool), "dtype": combination.dtype}
    torch.manual_seed(SEED)
    result = llmload.load({**spec, **combination.sections})
    handed = {"model": result.model, "processing_class": result.tokenizer}
    if tool == "DPOTrainer" and "lora" not in combination.sections:
        # Nothing is recomputed of what is not trained.
        sections = {k: v for k, v in combination.sections.items() if k not in _RECOMPUTED}
        handed["ref_model"] = llmload.load({**spec, **sections, "trainable": False}).model
    return handed


def theirs(tool: str, combination: Combination, folder: Path) -> dict[str, Any]:
    """What a script hands over that knows only the tool and the libraries."""
    auto = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "sequence_classification": transformers.AutoModelForSequenceClassification,
    }[auto_class(tool)]
    if "kbit" in combination.sections:
        section = combination.sections["kbit"]
        model = plain(folder, section, dtype=combination.dtype, auto_class=auto)
    else:
        name = "dtype" if IS_MODERN else "torch_dtype"
        model = auto.from_pretrained(folder, **{name: getattr(torch, combination.dtype)})
    combination.changed(model)
    handed = {"model": model, "processing_class": AutoTokenizer.from_pretrained(folder)}
    if "lora" in combination.sections:
        kind = "SEQ_CLS" if tool == "RewardTrainer" else "CAUSAL_LM"
        config = peft.LoraConfig(task_type=kind, **LORA)
        if tool not in ("Trainer", "accelerate"):
            return handed | {"peft_config": config}
        torch.manual_seed(SEED)
        handed["model"] = peft.get_peft_model(model, config)
    elif tool == "DPOTrainer":
        handed["ref_model"] = copy.deepcopy(model)
    return handed


def train(
    tool: str, combination: Combination, handed: dict[str, Any], place: Path
) -> tuple[list[float], nn.Module]:
    """Train two steps; return their losses and what was trained."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if tool == "accelerate":
        return _accelerated(combination, handed["model"])
    trainer = _trainer(tool, combination, handed, place)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return found, trainer.model


def _trainer(tool: str, combination: Combination, handed: dict[str, Any], place: Path) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(place),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "seed": SEED,
        "bf16": combination.autocast,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": combination.checkpointing,
    }
    if combination.checkpointing:
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if tool == "Trainer":
        data = [{"input_ids": row, "labels": row} for row in _rows()]
        return Trainer(args=TrainingArguments(**options), train_dataset=data, **handed)
    import datasets
    import trl

    rows: dict[str, list[str]] = {"text": list(SENTENCES)}
    if tool != "SFTTrainer":
        rows = {"chosen": list(SENTENCES), "rejected": list(SENTENCES[::-1])}
    if tool == "DPOTrainer":
        rows["prompt"] = ["the quick "] * len(SENTENCES)
    config = getattr(trl, tool.replace("Trainer", "Config"))
    return getattr(trl, tool)(
        args=config(**options, max_length=16),
        train_dataset=datasets.Dataset.from_dict(rows),
        **handed,
    )


def _accelerated(combination: Combination, model: Any) -> tuple[list[float], nn.Module]:
    """The loop of accelerate's documentation."""
    torch.manual_seed(SEED)
    precision = "bf16" if combination.autocast else "no"
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    trained = [p for p in model.parameters() if p.requires_grad]
    if combination.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    loader = torch.utils.data.DataLoader(torch.tensor(_rows()), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(trained, 1e-2), loader)
    model.train()
    found = []
    for batch, _ in zip(loader, range(2), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, accelerator.unwrap_model(model)


def _rows() -> list[list[int]]:
    return [list(range(4 + row, 16 + row)) for row in range(4)]


def compare(tool: str, names: tuple[str, ...], folders: Mapping[str, Path], place: Path) -> None:
    """Train both ways: the losses, and every parameter after it, have to be the same."""
    combination, folder = together(*names), folders[auto_class(tool)]
    mine, model = train(tool, combination, ours(tool, combination, folder), place / "ours")
    other, their = train(tool, combination, theirs(tool, combination, folder), place / "theirs")
    assert mine == other
    assert len(mine) == 2
    assert mine[0] != mine[1]
    # TRL's DPO puts a second adapter beside one that it has not made, and trains the first.
    pairs = [dict(which.named_parameters()) for which in (model, their)]
    assert pairs[1].keys() == {name for name in pairs[0] if ".ref." not in name}
    assert [n for n, p in pairs[1].items() if not torch.equal(p, pairs[0][n])] == []

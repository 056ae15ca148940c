"""A whole run, offline: make a small model, load it by a spec, fine-tune it.

The model learns from what ships with Python: first the language reference that ``help()`` shows,
then, through its adapter, the Zen of Python. The training loops are plain torch.
"""

from __future__ import annotations

import io
import json
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel

from llmload.cli.progress import Track
from llmload.errors import RequestError
from llmload.host.registry import Registry
from llmload.loading import pipeline
from llmload.loading.plan import Plan
from llmload.loading.planning import require_stack
from llmload.loading.report import Report
from llmload.saving.writing import refused

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

VOCABULARY: Final = 1000
BATCH: Final = 8
LENGTH: Final = 128
"""Tokens per text while the small model is trained."""
FINE_TUNING_STEPS: Final = 240
LEARNING_RATE: Final = 5e-3
ADAPTER_LEARNING_RATE: Final = 3e-3
ROOM: Final = 8 * 2**20
"""Bytes of disk that model and spec take at most."""
MARK: Final = "<s>"
"""Begins each text that the adapter learns."""
PROMPTS: Final = ("Beautiful is", "Simple is", "Errors should")
"""What the model is to continue, before and after."""

SPEC: Final = """\
model: {model}
dtype: float32
tokenizer: {{add_tokens: ["<pad>"], pad_token: "<pad>"}}
embeddings: {{pad_to_multiple_of: 64}}
dropout: {{p: 0.0}}
lora: {{r: 64, lora_alpha: 128, target_modules: all-linear}}
"""


class Training(BaseModel):
    """How the small model came to be."""

    characters: int
    """Length of the text it learned from."""
    parameters: int
    """Elements in all its parameters."""
    steps: int
    """Each over a batch of random pieces of it."""
    seconds: float
    """Wall time."""
    first_loss: float
    """Cross-entropy per token of the first batch, in nats."""
    last_loss: float
    """The same of the last."""


class FineTuning(BaseModel):
    """What the adapter learned."""

    steps: int
    """Each over all lines of the text."""
    seconds: float
    """Wall time."""
    loss_before: float
    """Cross-entropy per token in nats, as loaded."""
    loss_after: float
    """The same after the last step."""
    written_before: list[str]
    """The prompts as the loaded model continues them."""
    written_after: list[str]
    """As it does after the last step."""
    known_by_heart: int
    """How many of the latter are lines of the text, or the beginning of one."""

    @property
    def loss_fell(self) -> bool:
        """Whether there was any use in it."""
        return self.loss_after < self.loss_before


class Demonstration(BaseModel):
    """All that a demo did."""

    folder: str
    """Where model and spec were written."""
    training: Training
    """The small model."""
    spec: str
    """The spec by which it was loaded, as YAML."""
    plan: Plan
    """What the load was going to do."""
    report: Report
    """What it did."""
    fine_tuning: FineTuning
    """What came of it."""


def require_new(folder: Path) -> None:
    """Refuse to write over what is there.

    :raises RequestError: ``folder`` exists and is not an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RequestError(
            f"{str(folder)!r} exists and is not an empty folder",
            fix="Remove it, or give the name of a new folder: `--dir NAME`.",
        )


def run(folder: Path, *, steps: int, registry: Registry, track: Track) -> Demonstration:
    """Make the model in ``folder``, load it and fine-tune its adapter.

    :param steps: training steps of the small model.
    :raises RequestError: ``folder`` exists and is not an empty folder; nothing is written then.
    """
    require_stack()
    require_new(folder)
    import torch

    # What the demo draws is the same each time, and does not move the caller's random stream.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        training = make_model(folder / "model", steps=steps, track=track)
        file = write_spec(folder)
        loaded = pipeline.load(file, registry=registry)
        fine_tuning = fine_tune(loaded.model, loaded.tokenizer, track=track)
    return Demonstration(
        folder=str(folder),
        training=training,
        spec=file.read_text(encoding="utf-8"),
        plan=loaded.plan,
        report=loaded.report,
        fine_tuning=fine_tuning,
    )


def write_spec(folder: Path) -> Path:
    """Write the spec of the model in ``folder``, beside it."""
    file = folder / "demo.yaml"
    model = json.dumps(str(folder / "model"))
    with refused(folder):
        file.write_text(SPEC.format(model=model), encoding="utf-8")
    return file


def make_model(folder: Path, *, steps: int, track: Track) -> Training:
    """Train a Llama of about 1.1 million parameters and save it in shards, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    started = time.perf_counter()
    text = language_reference()
    tokenizer = train_tokenizer(text)
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2 * LENGTH,
        attention_dropout=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    losses: list[float] = []
    for step in track(range(steps), "training a small model"):
        _set_rate(optimizer, LEARNING_RATE, step, steps)
        starts = torch.randint(len(ids) - LENGTH, (BATCH, 1))
        batch = ids[starts + torch.arange(LENGTH)]
        losses.append(_step(model, optimizer, input_ids=batch, labels=batch))
    with refused(folder):
        model.save_pretrained(folder, max_shard_size="2MB")
        tokenizer.save_pretrained(folder)
    return Training(
        characters=len(text),
        parameters=model.num_parameters(),
        steps=len(losses),
        seconds=time.perf_counter() - started,
        first_loss=losses[0],
        last_loss=losses[-1],
    )


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a begin and an end token, and no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        # transformers 4.51 would give token_type_ids too, which a Llama does not take.
        model_input_names=["input_ids", "attention_mask"],
    )


def fine_tune(model: Any, tokenizer: PreTrainedTokenizerBase, *, track: Track) -> FineTuning:
    """Teach the adapter the Zen of Python, line by line."""
    import torch

    lines = [f"{MARK}{line}{tokenizer.eos_token}" for line in zen_of_python()]
    batch = tokenizer(lines, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def loss() -> float:
        with torch.no_grad():
            return float(model.eval()(**batch, labels=labels).loss)

    before, written_before = loss(), [write(model, tokenizer, prompt) for prompt in PROMPTS]
    started = time.perf_counter()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, weight_decay=0.0)
    for step in track(range(FINE_TUNING_STEPS), "fine-tuning the adapter"):
        _set_rate(optimizer, ADAPTER_LEARNING_RATE, step, FINE_TUNING_STEPS)
        _step(model.train(), optimizer, **batch, labels=labels)
    seconds = time.perf_counter() - started
    written_after = [write(model, tokenizer, prompt) for prompt in PROMPTS]
    return FineTuning(
        steps=FINE_TUNING_STEPS,
        seconds=seconds,
        loss_before=before,
        loss_after=loss(),
        written_before=written_before,
        written_after=written_after,
        known_by_heart=sum(
            any(line.startswith(text) for line in zen_of_python()) for text in written_after
        ),
    )


def write(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Let the model continue a prompt, always with the likeliest token."""
    start = tokenizer(MARK + prompt, return_tensors="pt")
    ids = model.eval().generate(**start, max_new_tokens=20, do_sample=False)[0]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text.removeprefix(MARK)


def language_reference() -> str:
    """Return what ``help()`` shows on Python's keywords, types and statements."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def zen_of_python() -> list[str]:
    """Return the lines of ``import this`` without its title."""
    with redirect_stdout(io.StringIO()):
        import this
    text = "".join(this.d.get(letter, letter) for letter in this.s)
    return [line for line in text.splitlines()[1:] if line]


def _set_rate(optimizer: torch.optim.Optimizer, highest: float, step: int, steps: int) -> None:
    """Let the learning rate rise for twenty steps, and fall to nothing over all of them."""
    for group in optimizer.param_groups:
        group["lr"] = highest * min((step + 1) / 20, 1 - step / steps)


def _step(model: Any, optimizer: torch.optim.Optimizer, **batch: torch.Tensor) -> float:
    """Take one optimiser step and return the loss before it."""
    import torch

    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())

"""Two steps of TRL's SFT on the model of `examples/offline/sft.yaml`."""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import llmload

result = llmload.load("examples/offline/sft.yaml")
lines = ["Beautiful is better than ugly.", "Explicit is better than implicit."] * 4
trainer = SFTTrainer(
    result.model,
    args=SFTConfig("sft", max_steps=2, report_to="none", use_cpu=True, bf16=False),
    train_dataset=Dataset.from_dict({"text": lines}),
    processing_class=result.tokenizer,
)
print(trainer.train().global_step, "steps")

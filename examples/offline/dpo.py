"""Two steps of TRL's DPO on the policy of `examples/offline/dpo.yaml`."""

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import llmload

group = llmload.load_group("examples/offline/dpo.yaml")
pair = {"prompt": "Beautiful is", "chosen": " better than ugly.", "rejected": " ugly."}
trainer = DPOTrainer(
    group["policy"].model,
    args=DPOConfig("dpo", max_steps=2, report_to="none", use_cpu=True, bf16=False),
    train_dataset=Dataset.from_list([pair] * 8),
    processing_class=group["policy"].tokenizer,
)
print(trainer.train().global_step, "steps")

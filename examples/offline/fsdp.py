"""Two steps of a model that FSDP2 shards, and the adapter saved: `torchrun --nproc_per_node 2`."""

import torch

import llmload

spec = {"model": "demo/model", "dtype": "float32", "parallel": {}, "lora": {"r": 8}}
result = llmload.load(spec)
model = result.model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
batch = result.tokenizer("Beautiful is better than ugly.", return_tensors="pt").to(model.device)
for _ in range(2):
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"rank {torch.distributed.get_rank()}: 2 steps\n", end="")

model.save_pretrained("fsdp-adapter")  # on all ranks: each has a part of every weight
torch.distributed.destroy_process_group()

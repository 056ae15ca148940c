"""Two steps under ZeRO-3, and the adapter saved: for `torchrun --nproc_per_node 2`."""

import deepspeed

import llmload

config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
spec = {"model": "demo/model", "dtype": "float32", "zero3": {"config": config}, "lora": {"r": 8}}
result = llmload.load(spec)
engine, *_ = deepspeed.initialize(model=result.model, config=config)
batch = result.tokenizer("Beautiful is better than ugly.", return_tensors="pt").to(engine.device)
for _ in range(2):
    engine.backward(engine(**batch, labels=batch["input_ids"]).loss)
    engine.step()
print(f"rank {engine.global_rank}: {engine.global_steps} steps\n", end="")

# Every rank takes part in gathering the weights; the first one writes.
weights = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
if engine.global_rank == 0:
    result.model.save_pretrained("zero3-adapter", state_dict=weights)

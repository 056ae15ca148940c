"""Loads with the sample plugins, which are installed, and prints what came of it as JSON.

``python use.py FOLDER``, with llmload 0.1.0 or any later version.
"""

import contextlib
import io
import json
import sys

import llmload

FOLDER = sys.argv[1]
SPECS = {
    "model": {"past_model": {}, "past_wrapper": {}},
    "a tensor taken": {
        "past_model": {"take": "lm_head.weight"},
        "strict": {"allow_missing": ["lm_head.weight"]},
    },
    "loader": {"past_loader": {}, "weights": "random"},
    "adapter": {"past_adapter": {}},
    "layers": {"past_layers": {}, "lora": {"r": 2, "target_modules": ["q_proj"]}},
    "hooks": {"past_hooks": {}},
    "refused": {"past_model": {"by": 0}},
    "a tensor of nobody": {"past_model": {"take": "nothing"}},
}
PAST = "past_"


def ours(printed):
    # DeepSpeed logs on standard output, once in a process.
    return [line for line in printed.getvalue().splitlines() if line.startswith("stopped:")]


def used(keys):
    spec = {"model": FOLDER, "dtype": "float32", **keys}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            plan = llmload.plan(spec)
            result = llmload.load(spec)
    except llmload.LlmloadError as error:
        return {"error": str(error), "printed": ours(printed)}
    report = result.report
    steps = [[s.hook, s.plugin, s.notes] for s in plan.steps if s.plugin.startswith(PAST)]
    new = {n: why for n, why in report.newly_initialised.items() if "past" in n or "zeros" in why}
    return {
        "class": type(result.model).__name__,
        "steps": steps,
        "loader": report.loader,
        "trainable": report.trainable,
        "new": new,
        "facts": {n: facts for n, facts in report.facts.items() if n.startswith(PAST)},
        "sum": round(float(result.model.get_input_embeddings().weight.detach().abs().sum()), 1),
        "printed": ours(printed),
    }


if __name__ == "__main__":
    print(json.dumps({name: used(keys) for name, keys in SPECS.items()}, indent=1))

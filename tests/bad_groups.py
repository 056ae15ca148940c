"""Group files that must be refused, with every word of the refusal, whatever plugins there are."""

from __future__ import annotations

from bad_specs import BadSpec

BAD_GROUPS = [
    # --- the file ---
    BadSpec(
        "no members",
        "models: {}\n",
        (
            "1:1: models: expected a mapping of names to models, found an empty mapping."
            " Write at least `models: {policy: {model: ...}}`.",
        ),
    ),
    BadSpec(
        "members without names",
        "models:\n- {model: gpt2}\n",
        (
            "1:1: models: expected a mapping of names to models, found a list."
            " Write at least `models: {policy: {model: ...}}`.",
        ),
    ),
    BadSpec(
        "nothing below the key",
        "models:\n",
        (
            "1:1: models: expected a mapping of names to models, found nothing (null)."
            " Write at least `models: {policy: {model: ...}}`.",
        ),
    ),
    BadSpec(
        "a key beside the members",
        "models:\n  policy: {model: gpt2}\ndtype: float32\n",
        ("3:1: dtype: a group has no key beside `models`. Move it into the members that need it.",),
    ),
    # --- members ---
    BadSpec(
        "a name with a dot",
        "models:\n  a.b: {model: gpt2}\n",
        ("2:3: models['a.b']: 'a.b' cannot be a name. Use letters, digits, `_` and `-`.",),
    ),
    BadSpec(
        "a member that is a folder",
        "models:\n  policy: gpt2\n",
        ("2:3: models.policy: expected a mapping, found 'gpt2'. Write `{model: ...}`.",),
    ),
    BadSpec(
        "a member without a model",
        "models:\n  policy: {dtype: float32}\n",
        (
            "2:3: models.policy.model: the key is required."
            " Add it, such as `model: EleutherAI/pythia-2.8b`.",
        ),
    ),
    BadSpec(
        "a wrong value",
        "models:\n  policy:\n    model: gpt2\n    dtype: bf16\n",
        (
            "4:5: models.policy.dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found"
            " 'bf16'. Write bfloat16.",
        ),
    ),
    BadSpec(
        "a misspelt core key",
        "models:\n  policy: {model: gpt2, trainabel: false}\n",
        ("2:25: models.policy.trainabel: unknown key. Did you mean 'trainable'?",),
    ),
    BadSpec(
        "text for a switch",
        "models:\n  policy: {model: gpt2, trainable: no}\n",
        ("2:25: models.policy.trainable: expected true or false, found 'no'. Write false.",),
    ),
    BadSpec(
        "a key of another tool",
        "models:\n  policy: {model: gpt2, torch_dtype: bfloat16}\n",
        (
            "2:25: models.policy.torch_dtype: unknown key, known from transformers, TRL and"
            " ms-swift. Write `dtype: bfloat16`.",
        ),
    ),
    BadSpec(
        "a key in the wrong place",
        "models:\n  policy: {model: gpt2, strict: {dtype: float32}}\n",
        ("2:34: models.policy.strict.dtype: unknown key. Move it to `models.policy`.",),
    ),
    # --- like ---
    BadSpec(
        "like a member that is not there",
        "models:\n  policy: {model: gpt2}\n  reference: {like: polcy}\n",
        ("3:15: models.reference.like: no member is called 'polcy'. Did you mean 'policy'?",),
    ),
    BadSpec(
        "like nothing similar",
        "models:\n  actor: {model: gpt2}\n  critic: {model: gpt2}\n  reference: {like: x}\n",
        ("4:15: models.reference.like: no member is called 'x'. Others are: actor, critic.",),
    ),
    BadSpec(
        "like a number",
        "models:\n  policy: {model: gpt2}\n  reference: {like: 1}\n",
        ("3:15: models.reference.like: no member is called 1. Others are: policy.",),
    ),
    BadSpec(
        "like itself",
        "models:\n  policy: {like: policy}\n",
        ("2:12: models.policy.like: a member cannot be `like` itself. Name another member.",),
    ),
    BadSpec(
        "a circle, and one that leads into it",
        "models:\n  a: {like: b}\n  b: {like: c}\n  c: {like: b}\n",
        (
            "3:7: models.b.like: the members lead in a circle: 'b' is like 'c' is like 'b'."
            " Give one of them a `model`.",
            "4:7: models.c.like: the members lead in a circle: 'c' is like 'b' is like 'c'."
            " Give one of them a `model`.",
        ),
    ),
    BadSpec(
        "like a member without a model of its own",
        "models:\n  policy: {model: gpt2}\n  off: {adapter_of: policy}\n  other: {like: off}\n",
        (
            "4:11: models.other.like: 'off' has no model of its own."
            " Name the member whose adapter it is: 'policy'.",
        ),
    ),
    BadSpec(
        "misspelt like",
        "models:\n  policy: {model: gpt2}\n  reference: {liek: policy, model: gpt2}\n",
        ("3:15: models.reference.liek: unknown key. Did you mean 'like'?",),
    ),
    BadSpec(
        "the faults of another member are told once",
        "models:\n  policy: {model: gpt2, dtype: f}\n  reference: {like: policy, weights: w}\n",
        (
            "2:25: models.policy.dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found"
            " 'f'",
            "3:29: models.reference.weights: expected 'pretrained' or 'random', found 'w'",
        ),
    ),
    BadSpec(
        "the model taken away",
        "models:\n  policy: {model: gpt2}\n  reference: {like: policy, model: null}\n",
        (
            "3:29: models.reference.model: the key is required."
            " Add it, such as `model: EleutherAI/pythia-2.8b`.",
        ),
    ),
    BadSpec(
        "nothing to take away",
        "models:\n  policy: {model: gpt2}\n  reference: {like: policy, trainabel: null}\n",
        ("3:29: models.reference.trainabel: unknown key. Did you mean 'trainable'?",),
    ),
    # --- adapter_of ---
    BadSpec(
        "the adapter of no member",
        "models:\n  policy: {model: gpt2}\n  off: {adapter_of: polcy}\n",
        ("3:9: models.off.adapter_of: no member is called 'polcy'. Did you mean 'policy'?",),
    ),
    BadSpec(
        "the adapter of itself",
        "models:\n  off: {adapter_of: off}\n",
        (
            "2:9: models.off.adapter_of: a member cannot be `adapter_of` itself."
            " Name another member.",
        ),
    ),
    BadSpec(
        "the adapter of a number",
        "models:\n  policy: {model: gpt2}\n  off: {adapter_of: 1}\n",
        ("3:9: models.off.adapter_of: expected text, found 1. Put it in quotes.",),
    ),
    BadSpec(
        "an adapter with keys of a model",
        "models:\n  policy: {model: gpt2}\n  off: {adapter_of: policy, dtype: float16}\n",
        (
            "3:29: models.off.dtype: a member with `adapter_of` has no model of its own, and takes"
            " no such key. Remove it: the other member's holds.",
        ),
    ),
    BadSpec(
        "a misspelt copy",
        "models:\n  policy: {model: gpt2}\n  off: {adapter_of: policy, frozen_copi: true}\n",
        (
            "3:29: models.off.frozen_copi: a member with `adapter_of` has no model of its own, and"
            " takes no such key. Did you mean 'frozen_copy'?",
        ),
    ),
    BadSpec(
        "text for a copy",
        "models:\n  policy: {model: gpt2}\n  off: {adapter_of: policy, frozen_copy: yes}\n",
        ("3:29: models.off.frozen_copy: expected true or false, found 'yes'. Write true.",),
    ),
]

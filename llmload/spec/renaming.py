"""Checkpoint keys brought under the names that a model has: by rule, by regular expression.

Only names are handled here. Whoever renames gets every key with its new name, or an error that
names the keys: nothing is dropped and no two keys become one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from llmload.errors import CheckpointError, Problem, some
from llmload.spec import patterns

KeyRule: TypeAlias = (
    tuple[tuple[str, str], ...] | Callable[[Sequence[str], Collection[str]], Mapping[str, str]]
)
"""How what a system did to its keys is undone: regular expressions and their replacements, one
after the other; or a function, for what cannot be told from a key alone. It is called with the keys
and with the names of the model's parameters and buffers, and returns key -> name; a key that it
does not return stays."""

RULES: Mapping[str, KeyRule] = MappingProxyType(
    {
        # DeepSpeed-Chat misspelt the attribute of its reward model until October 2023.
        "deepspeed_chat": ((r"^rwtranrsformer\.", "rwtransformer."),),
        "ddp": ((r"^module\.", ""),),
        "compiled": ((r"(^|\.)_orig_mod\.", r"\1"),),
        "fsdp": ((r"(^|\.)_fsdp_wrapped_module\.", r"\1"),),
        "activation_checkpointing": ((r"(^|\.)_checkpoint_wrapped_module\.", r"\1"),),
        "fabric": ((r"^_forward_module\.", ""),),
        "peft": (
            (r"^base_model\.model\.", ""),
            (r"\.base_layer\.", "."),
            (r"\.modules_to_save\.default\.", "."),
            (r"(\.lora_\w+)\.default(?=\.|$)", r"\1"),
        ),
    }
)
"""Rule -> how it is undone; plugins have further ones in their ``key_rules``."""

_PEFT = "base_model.model."
WRAPPERS = ("ddp", "compiled", "fsdp", "activation_checkpointing", "fabric")
"""Those of the rules that take away what a wrapper put into keys, of an adapter too."""


def wrapped_by(keys: Collection[str]) -> list[str]:
    """Return the rules that would each change every one of the keys: whose wrappers they show."""
    found = []
    for rule in WRAPPERS:
        how = RULES[rule]
        assert not callable(how)
        if keys and all(any(re.search(pattern, key) for pattern, _ in how) for key in keys):
            found.append(rule)
    return found


def unwrapped(key: str, rules: Iterable[str]) -> str:
    """Return a key of an adapter without what wrappers put into it, around PEFT's model or inside.

    :param rules: names of a spec's ``key_rules``; others than those of wrappers change nothing.
    """
    for rule in rules:
        how = RULES.get(rule, ()) if rule in WRAPPERS else ()
        assert not callable(how)
        for pattern, replacement in how:
            key = re.sub(pattern, replacement, key)
            inner = key.removeprefix(_PEFT)
            if inner != key:
                key = _PEFT + re.sub(pattern, replacement, inner)
    return key


class Renaming:
    """The keys of a checkpoint on their way to the model's names.

    :param keys: as they are stored.
    :param where: the key of the spec that renames them, for messages.
    :param of: what holds them.
    """

    def __init__(
        self, keys: Iterable[str], *, where: str = "key_map", of: str = "the checkpoint"
    ) -> None:
        self._where, self._of = where, of
        self.names: dict[str, str] = {key: key for key in keys}
        """Key as stored -> name it has by now."""
        self.counts: dict[str, int] = {}
        """Rule or regular expression -> how many keys it changed or, if it replaces a match by
        itself, matched."""

    def by_regex(self, pattern: str, replacement: str) -> None:
        """Replace every match, as ``re.sub`` does.

        :raises CheckpointError: nothing matches.
        :raises RequestError: matching takes too long.
        """
        hits = sum(patterns.search(pattern, name) is not None for name in self.names.values())
        if not hits:
            found = list(self.names.values())
            raise CheckpointError(
                f"the regular expression matches none of the {len(found)} keys of {self._of}, which"
                f" are {some(found)}",
                fix="Correct the rule, or remove it. Rules are applied one after the other,"
                " each to what the one before it left.",
                where=f"{self._where}[{pattern!r}]",
            )
        self.counts[pattern] = hits
        self._change(
            {name: patterns.sub(pattern, replacement, name) for name in self.names.values()}
        )

    def by_rule(self, rule: str, how: KeyRule, of_model: Collection[str] = ()) -> None:
        """Undo what a system did to its keys, where it did.

        :param rule: its name in a spec.
        :param of_model: the names of the model's parameters and buffers, for a function.
        :raises CheckpointError: what a function raises.
        :raises TypeError: a function returns something else than names by key.
        """
        before = list(self.names.values())
        after = {name: name for name in before}
        if callable(how):
            answer: object = how(before, of_model)
            if not isinstance(answer, Mapping) or not all(
                key in after and isinstance(name, str) for key, name in answer.items()
            ):
                raise TypeError("it must return a mapping of keys of the checkpoint to names")
            after |= answer
        else:
            for pattern, replacement in how:
                after = {key: re.sub(pattern, replacement, name) for key, name in after.items()}
        self.counts[rule] = sum(after[name] != name for name in before)
        self._change(after)

    def _change(self, names: Mapping[str, str]) -> None:
        self.names = {key: names[name] for key, name in self.names.items()}

    def refuse_collisions(self) -> None:
        """Raise ``CheckpointError`` where two keys have come to the same name."""
        keys_of: dict[str, list[str]] = defaultdict(list)
        for key, name in self.names.items():
            keys_of[name].append(key)
        problems = [
            Problem(
                where=self._where,
                message=f"the keys {some(keys)} of {self._of} would all be called {name!r}",
                fix="Make the rules map each key to a name of its own.",
            )
            for name, keys in keys_of.items()
            if len(keys) > 1
        ]
        if problems:
            raise CheckpointError(problems)

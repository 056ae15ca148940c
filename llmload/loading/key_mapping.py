"""Which tensor of the checkpoint is for whom: the loader, under the model's name, or a plugin.

The one place where keys are renamed. It runs before any plugin or loader sees the checkpoint: first
the spec's ``key_map``, then its ``key_rules``, then what plugins say in ``map_keys``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmload.errors import LlmloadError, PluginError
from llmload.loading import hook_calls
from llmload.spec.renaming import Renaming

if TYPE_CHECKING:
    from llmload.context.context import LoadContext
    from llmload.host.registry import Host


def assign(host: Host, ctx: LoadContext) -> list[str]:
    """Give each tensor of ``ctx.checkpoint`` its name in the model, or its plugin.

    :returns: what was renamed and by which rule, a line each.
    :raises CheckpointError: a regular expression matches nothing, a key could have two names, or
        two keys would have the same.
    :raises PluginError: a plugin answers ``map_keys`` with something else than names of keys.
    """
    checkpoint = ctx.checkpoint
    if checkpoint is None:
        return []
    renaming = Renaming(checkpoint.tensors)
    for pattern, replacement in ctx.spec.key_map.items():
        renaming.by_regex(pattern, replacement)
    for rule in ctx.spec.key_rules:
        how = host.key_rules[rule]
        try:
            renaming.by_rule(rule, how, tuple(ctx.blank.state_dict()) if callable(how) else ())
        except LlmloadError:
            raise
        except Exception as error:  # a plugin's own function
            raise PluginError(
                f"the key rule {rule!r} failed: {type(error).__name__}: {error}",
                fix="The plugin that has it is at fault; say in `key_map` how keys are renamed.",
            ) from error
    renaming.refuse_collisions()
    for plugin in host.implementing("map_keys"):
        _ask(host, plugin, ctx, renaming)
    if any(key != name for key, name in renaming.names.items()) or ctx.claimed:
        ctx.found.checkpoint = checkpoint.renamed(renaming.names)
    return [f"{count} renamed by {rule}" for rule, count in renaming.counts.items()]


def _ask(host: Host, plugin: str, ctx: LoadContext, renaming: Renaming) -> None:
    """Let one plugin rename keys and take tensors for itself."""
    key_of = {name: key for key, name in renaming.names.items()}
    asked = tuple(key_of)
    answer = hook_calls.call(host, plugin, "map_keys", ctx=ctx, keys=asked) or {}
    if not isinstance(answer, Mapping) or not all(
        isinstance(new, str | None) for new in answer.values()
    ):
        raise PluginError(
            f"plugin {host.describe(plugin)} returned a {type(answer).__name__} from map_keys,"
            " which must return a mapping of keys to new names or None"
        )
    unknown = [key for key in answer if key not in key_of]
    if unknown:
        raise PluginError(
            f"plugin {host.describe(plugin)} renames {unknown[0]!r} in map_keys, which is no key of"
            " the checkpoint"
        )
    assert ctx.checkpoint is not None
    for name, new in answer.items():
        key = key_of[name]
        if new is None:
            ctx.claimed[name] = ctx.checkpoint.tensors[key]
            del renaming.names[key]
        else:
            renaming.names[key] = new
    changed = sum(new is not None and new != name for name, new in answer.items())
    if changed:
        renaming.counts[f"plugin {plugin!r}"] = changed
    renaming.refuse_collisions()

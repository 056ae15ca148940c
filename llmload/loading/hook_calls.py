"""Calling one plugin's hook, and the steps that rehearsal and load have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from llmload.errors import Decline, LlmloadError, LoadFailedError, Note, PluginError, Problem
from llmload.loading import room

if TYPE_CHECKING:
    from torch import nn

    from llmload.context.context import LoadContext
    from llmload.host.registry import Host

OnStep = Callable[[str, str], AbstractContextManager[None]]
"""Called with hook and plugin; the context is entered around the hook."""
OnMade = Callable[[str, "nn.Module"], None]
"""Called with plugin and model after each step that may have made parameters."""


def call(host: Host, plugin: str, hook: str, **kwargs: Any) -> Any:
    """Call a hook of one plugin; what it did not mean to raise becomes ``LoadFailedError``."""
    try:
        return host.call(plugin, hook, **kwargs)
    except LlmloadError:
        raise
    # SystemExit too: a hook that exits must not end the process, least of all as if all were well.
    except (Exception, SystemExit) as error:
        raise LoadFailedError(
            f"plugin {host.describe(plugin)} failed in {hook}: {type(error).__name__}: {error}",
            fix=room.advice(error),
        ) from error


def findings(host: Host, plugin: str, hook: str, **kwargs: Any) -> Iterator[Any]:
    """Call ``admit``, ``check`` or ``audit``; yield its findings, problems signed by the plugin.

    :raises PluginError: it yielded something that the hook does not know.
    """
    allowed = (Problem, Note, Decline) if hook == "check" else (Problem,)
    for finding in call(host, plugin, hook, **kwargs) or ():
        if not isinstance(finding, allowed):
            names = ", ".join(f"llmload.{kind.__name__}" for kind in allowed)
            raise PluginError(
                f"plugin {host.describe(plugin)} yielded a {type(finding).__name__} from {hook},"
                f" which may yield {names}"
            )
        yield finding.of(plugin) if isinstance(finding, Problem) else finding


def call_for_model(host: Host, plugin: str, hook: str, **kwargs: Any) -> nn.Module | Decline:
    """Call a hook that must return a module or a reason.

    :raises PluginError: it returned something else; ``None`` is what a forgotten return gives.
    """
    from torch import nn

    result = call(host, plugin, hook, **kwargs)
    may_decline = hook != "post_load"
    if isinstance(result, nn.Module) or (may_decline and isinstance(result, Decline)):
        return result
    found = "nothing" if result is None else f"a {type(result).__name__}"
    allowed = "a module or llmload.Decline(reason)" if may_decline else "the module"
    raise PluginError(
        f"plugin {host.describe(plugin)} returned {found} from {hook}, which must return {allowed}",
        fix="A forgotten `return model` is the usual cause.",
    )


def finish(
    host: Host, ctx: LoadContext, model: nn.Module, on_step: OnStep, on_made: OnMade
) -> tuple[nn.Module, dict[str, str]]:
    """Take the base model through ``post_load`` and ``wrap_adapter``, and freeze it if asked.

    Returns the model, and the reasons of the adapter plugins that declined. The same function
    serves the rehearsal on the meta device and the load, so that the one foretells the other.
    """
    for plugin in _acting(host, ctx, "post_load"):
        with on_step("post_load", plugin):
            changed = call_for_model(host, plugin, "post_load", ctx=ctx, model=model)
        assert not isinstance(changed, Decline)  # call_for_model refused it
        model = changed
        on_made(plugin, model)
    declined: dict[str, str] = {}
    for plugin in _acting(host, ctx, "wrap_adapter"):
        with on_step("wrap_adapter", plugin):
            wrapped = call_for_model(host, plugin, "wrap_adapter", ctx=ctx, model=model)
        if isinstance(wrapped, Decline):
            declined[plugin] = wrapped.reason
            continue
        on_made(plugin, wrapped)
        model = wrapped
        break
    if not ctx.spec.trainable:
        model.requires_grad_(False)
        model.eval()
    return model, declined


def _acting(host: Host, ctx: LoadContext, hook: str) -> list[str]:
    return host.shaping(hook) if ctx.rehearsing else host.implementing(hook)

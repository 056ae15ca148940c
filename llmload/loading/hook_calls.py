"""Calling one plugin's hook, and the steps that rehearsal and load have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from llmload.errors import Decline, LlmloadError, LoadFailedError, Note, PluginError, Problem, some
from llmload.loading import room
from llmload.loading.makers import named
from llmload.model import partitions

if TYPE_CHECKING:
    import torch
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
    may_decline = hook not in ("post_load", "distribute")
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


def distribute(
    host: Host, ctx: LoadContext, model: nn.Module, on_step: OnStep
) -> tuple[nn.Module, dict[int, torch.Tensor]]:
    """Take the finished model through ``distribute``.

    Returns the model, and what took the place of its parameters and buffers, by the identity of
    those. They are gone by then: nobody else may hold them.

    :raises PluginError: a plugin changed names or shapes.
    """
    moved: dict[int, torch.Tensor] = {}
    for plugin in host.implementing("distribute"):
        before = dict(named(model))
        with on_step("distribute", plugin):
            changed = call_for_model(host, plugin, "distribute", ctx=ctx, model=model)
        assert not isinstance(changed, Decline)  # call_for_model refused it
        model, after = changed, dict(named(changed))
        _hold_to_names(host.describe(plugin), before, after)
        steps = {id(tensor): after[name] for name, tensor in before.items()}
        moved = {key: steps[id(tensor)] for key, tensor in moved.items()}
        moved |= {key: tensor for key, tensor in steps.items() if key not in moved}
    return model, moved


def _hold_to_names(
    plugin: str, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> None:
    shapes = [{name: partitions.shape(t) for name, t in side.items()} for side in (before, after)]
    differing = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
    if differing:
        raise PluginError(
            f"plugin {plugin} changed names or shapes of {some(differing)} in distribute",
            fix="What changes them belongs into post_load, which is rehearsed for the plan.",
        )


def _acting(host: Host, ctx: LoadContext, hook: str) -> list[str]:
    return host.shaping(hook) if ctx.rehearsing else host.implementing(hook)

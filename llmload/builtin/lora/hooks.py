"""The hooks that the plugin ``lora`` declares: a say in the adapter, and layers for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llmload.hookspecs import hookspec

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from llmload.plugin import LoadContext, Note, Problem, Section


class Hooks:
    """Declared for every plugin that takes part in a load with the section ``lora``."""

    @staticmethod
    @hookspec
    def check_lora(
        ctx: LoadContext, section: Section, fields: Mapping[str, Any], changes_base: str
    ) -> Iterable[Problem | Note]:
        """Say what stands in the way of the adapter that was asked for.

        Called in the ``check`` of the plugin ``lora``, once it knows the adapter; not where there
        is no adapter, or one that is refused.

        :param ctx: the load, with the plugin's own section.
        :param section: the section ``lora``: ``adapter_name``, ``adapter_dtype``, ``merge`` and
            PEFT's fields. ``type(section)()`` has their defaults.
        :param fields: the fields of PEFT's ``LoraConfig`` that are set, as plain data, whether in
            the section, a saved adapter or ColossalChat's file; others keep PEFT's default.
        :param changes_base: what makes the adapter start from other base weights than the
            checkpoint's; empty for nothing.
        :returns: problems, and notes, which the plan shows with those of ``lora``.

        Example: a serving system that takes no adapter above a rank::

            import llmload

            class Serving:
                name = "serving"

                class Section(llmload.Section):
                    max_rank: int = 64

                @llmload.hookimpl
                def check_lora(self, ctx, fields):
                    limit = ctx.section(self.Section).max_rank
                    if fields.get("r", 8) > limit:
                        yield llmload.Problem(
                            where="lora.r",
                            message=f"ranks above {limit} cannot be served",
                            fix=f"Use `r: {limit}` or less.",
                        )
        """
        raise NotImplementedError

    @staticmethod
    @hookspec(firstresult=True)
    def lora_layer(
        ctx: LoadContext, target: nn.Module, adapter_name: str, config: LoraConfig
    ) -> LoraLayer | None:
        """Return the adapter layer for a module, or None to leave it to the next plugin.

        Asked for every module that the adapter targets, in plan order, before PEFT's own choice;
        the first layer wins. A wrapper of the hook goes around all answers together. Called in the
        rehearsal too, with a module on the meta device. The names of the plugins that made layers
        are saved with the adapter, which can be resumed only where they take part again.

        :param ctx: the load, with the plugin's own section.
        :param target: the module to adapt. The layer takes its place and keeps it as its
            ``base_layer``.
        :param adapter_name: the adapter's name in the model.
        :param config: PEFT's configuration, ``r`` and ``lora_alpha`` as they hold for this module.
        :returns: a module that is a ``peft.tuners.lora.LoraLayer`` and has a ``forward``. The
            adapter's parameters are held under names that begin with ``lora_``.

        Example: adapt any module with a two-dimensional weight as if it were a linear layer::

            import llmload

            class AnyMatrix:
                name = "any_matrix"

                @llmload.hookimpl
                def lora_layer(self, target, adapter_name, config):
                    if getattr(getattr(target, "weight", None), "ndim", 0) != 2:
                        return None
                    from my_package.layers import MatrixLora

                    return MatrixLora(target, adapter_name, config)
        """
        raise NotImplementedError

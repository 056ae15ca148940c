"""The hook that the plugin ``lora`` declares: layers for modules that PEFT does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmload.hookspecs import hookspec

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from llmload import LoadContext


class Hooks:
    """Declared for every plugin; called while the adapter is put around the model."""

    @staticmethod
    @hookspec(firstresult=True)
    def lora_layer(
        ctx: LoadContext, target: nn.Module, adapter_name: str, config: LoraConfig
    ) -> LoraLayer | None:
        """Return the adapter layer for a module, or None to leave it to the next plugin.

        Asked for every module that the adapter targets, in plan order, before PEFT's own choice;
        the first layer wins. Called in the rehearsal too, with a module on the meta device. The
        names of the plugins that made layers are saved with the adapter, which can be resumed only
        where they take part again.

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

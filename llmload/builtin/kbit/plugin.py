"""The plugin ``kbit``: bitsandbytes' 8 and 4 bits, one weight at a time as it streams.

The full-precision model never exists; under ZeRO-3 the whole quantised one does not either. What
comes out is what ``from_pretrained`` with a ``BitsAndBytesConfig`` gives; where the streaming
loader declines, that is what loads it. The base model is then frozen and prepared for training as
the section says, and no further.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from llmload.builtin.kbit import check
from llmload.builtin.kbit.section import KbitSection
from llmload.hookspecs import hookimpl
from llmload.plugin import Conflict, Note

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload.plugin import Cost, Forecast, LoadContext, Problem


@contextmanager
def _quantising(ctx: LoadContext) -> Iterator[None]:
    """Quantise fast on the CPU, and report what did it."""
    from llmload.builtin.kbit.kernel import fast_quantisation

    with fast_quantisation() as kernel:
        yield
    if kernel is not None and kernel.values:
        ctx.record("kbit", {"quantised_by": dict(kernel.values)})
        if kernel.not_compiled is not None:
            ctx.record("kbit", {"not_compiled": kernel.not_compiled})


class KbitPlugin:
    """Quantises while loading, freezes, casts as asked, and proves a piece of each weight."""

    name = "kbit"
    stage = "quantisation"
    Section = KbitSection
    requires = ("accelerate>=1.3", "bitsandbytes>=0.50")
    provides = ("quantisation",)
    conflicts = (
        Conflict(
            key="weights",
            when=lambda section, weights: weights == "random",
            reason="random weights are not read, so nothing can be quantised on the way",
            fix="Remove `kbit`, or load a checkpoint.",
        ),
    )

    @hookimpl
    def diagnose(self) -> Iterator[Problem | Note]:
        """Ask transformers whether it takes bitsandbytes on this machine's devices."""
        problems = list(check.backend())
        yield from problems
        if not problems:
            yield Note(text="8 and 4 bits by bitsandbytes")

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Problem | Note]:
        """Hold the section to the folder and to what is installed; say what will be done."""
        yield from check.check(ctx, ctx.section(KbitSection))
        ctx.placed_by = self.name

    @hookimpl
    def check_lora(
        self, ctx: LoadContext, section: Any, fields: Mapping[str, Any]
    ) -> Iterator[Problem]:
        """Hold the adapter to the preparation and the bits that were asked for."""
        yield from check.adapter(ctx.section(KbitSection), section.adapter_dtype)
        yield from check.dora(ctx, ctx.section(KbitSection), fields)

    @hookimpl
    def cost(self, ctx: LoadContext, forecast: Forecast) -> Iterator[Cost]:
        """Count codes and statistics, and the one weight that is being quantised."""
        from llmload.builtin.kbit import costs

        layers = ctx.handed_on[self.name]
        yield from costs.correct(ctx, ctx.section(KbitSection), layers, forecast)

    @hookimpl
    def relieve(self, ctx: LoadContext, forecast: Forecast) -> Iterator[str]:
        """Offer 4 bits."""
        from llmload.builtin.kbit import costs

        if ctx.providing("quantisation") or check.stored_quantisation(ctx) is not None:
            return
        if costs.in_4_bits(ctx, forecast).suffices():
            adapter = "" if ctx.wraps_adapter or not ctx.spec.trainable else " and train an adapter"
            yield f"Quantise to 4 bits with `kbit: {{}}`{adapter}"

    @hookimpl
    def init_context(self, ctx: LoadContext) -> AbstractContextManager[None] | None:
        """Tell both loaders what to quantise, and quantise fast on the CPU while they do.

        A checkpoint that is quantised already is left to ``from_pretrained``.
        """
        from llmload.builtin.kbit.quantise import KbitPlacement, configuration

        if check.stored_quantisation(ctx) is not None:
            return None
        section = ctx.section(KbitSection)
        config = configuration(ctx, section, ctx.blank)
        ctx.load_options["quantization_config"] = config
        ctx.placement = KbitPlacement(ctx, section, config)
        if ctx.spec.device_map is None and not check.partitioned(ctx):
            ctx.load_options["device_map"] = ctx.placement.default_device_map()
        return _quantising(ctx)

    @hookimpl
    def post_load(self, ctx: LoadContext, model: PreTrainedModel) -> PreTrainedModel:
        """Freeze the base model and cast what is not quantised."""
        from llmload.builtin.kbit import finish

        section = ctx.section(KbitSection)
        finish.finish(ctx, section, model)
        if section.cache is not None and not ctx.rehearsing:
            finish.say_of_cache(ctx)
        return model

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
        """Quantise a piece of each weight once more, from the file, and compare."""
        from llmload.builtin.kbit import finish

        yield from finish.audit(ctx, model)

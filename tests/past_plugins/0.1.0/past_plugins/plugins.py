"""Every hook, declaration and part of the context that llmload 0.1.0 offered, in use."""

from __future__ import annotations

from contextlib import contextmanager

import llmload
from llmload import Conflict, Decline, Note, Problem, RequestError, hookimpl, hookspec


class PastModel:
    """Scales the embeddings, and does a little at every hook."""

    name = "past_model"
    after = ("tokenizer", "embeddings")
    before = ("lora",)
    requires = ("torch>=2",)
    rehearsed = True
    conflicts = (
        Conflict(
            key="zero3",
            reason="it works on whole weights",
            fix="Remove `past_model`.",
            when=lambda section, other: section.by != 1.0,
        ),
    )

    class Section(llmload.Section):
        """How the embeddings are scaled."""

        by: float = 2.0
        """The factor."""
        take: str = ""
        """A tensor to take for itself."""

    @hookimpl
    def diagnose(self):
        yield Note(text="it works")
        yield Problem(message="it is old", fix="Write a newer one.", severity="warning")

    @hookimpl
    def map_keys(self, ctx, keys):
        take = ctx.section(self.Section).take
        if take and take not in keys:
            raise RequestError(
                Problem(where="past_model.take", message="it is not there", fix="Name another.")
            )
        return {take: None} if take else {}

    @hookimpl
    def check(self, ctx):
        section = ctx.section(self.Section)
        if section.by == 0:
            yield Problem(where="past_model.by", message="nothing would be left", fix="Write 1.0.")
        ctx.handed_on[self.name] = len(ctx.checkpoint.tensors)
        ctx.configure(use_cache=False)
        yield Note(text=f"scales by {section.by}; {ctx.spec.dtype}, {len(ctx.claimed)} taken")

    @hookimpl
    def init_context(self, ctx):
        @contextmanager
        def context():
            ctx.facts.setdefault(self.name, {})["entered"] = ctx.config.use_cache
            yield
            ctx.facts[self.name]["left"] = True

        return context()

    @hookimpl
    def post_load(self, ctx, model):
        from torch import nn

        model.past = nn.Linear(2, 2, bias=False, device="meta" if ctx.rehearsing else None)
        ctx.newly_initialised["past.weight"] = "made by an old plugin"
        for key in ctx.claimed:
            if not ctx.rehearsing:
                model.past_taken = ctx.read(key)
        if not ctx.rehearsing:
            model.get_input_embeddings().weight.data.mul_(ctx.section(self.Section).by)
            nn.init.ones_(model.past.weight)
            ctx.keep_alive(self)
        ctx.record(self.name, {"tensors": ctx.handed_on[self.name]})
        return model

    @hookimpl
    def audit(self, ctx, model):
        if not model.get_input_embeddings().weight.isfinite().all():
            yield Problem(where="past_model", message="not finite", fix="Scale by less.")
        if ctx.facts[self.name].get("left") is not True:
            yield Problem(where="past_model", message="its context is open", fix="Report it.")

    @hookimpl
    def stopped(self, asked, error):
        print("stopped:", asked[self.name], type(error).__name__)


class PastLoader:
    """Zeros instead of weights."""

    name = "past_loader"
    before = ("streaming",)

    class Section(llmload.Section):
        """Nothing to say."""

    @hookimpl
    def check(self, ctx):
        if ctx.spec.weights != "random":
            yield Decline("it wants `weights: random`")

    @hookimpl
    def load(self, ctx):
        model = ctx.model_class(ctx.config).to(ctx.dtype)
        for name, parameter in model.named_parameters():
            parameter.data.zero_()
            ctx.newly_initialised[name] = "zeros"
        return model.eval()


class PastAdapter:
    """(IA)^3 through PEFT."""

    name = "past_adapter"
    requires = ("peft",)

    class Section(llmload.Section):
        """Which modules are adapted."""

        targets: list[str] = ["k_proj"]
        """Their names."""

    @hookimpl
    def wrap_adapter(self, ctx, model):
        from peft import IA3Config, get_peft_model

        if not ctx.wraps_adapter:
            return Decline("nobody wraps")
        targets = ctx.section(self.Section).targets
        config = IA3Config(target_modules=targets, feedforward_modules=[])
        return get_peft_model(model, config).eval()


class PastLayers:
    """Makes the adapter's layer for linear modules itself."""

    name = "past_layers"

    class Section(llmload.Section):
        """Nothing to say."""

    @hookimpl(optionalhook=True)
    def lora_layer(self, ctx, target, adapter_name, config):
        from torch import nn

        if type(target) is not nn.Linear:
            return None
        from past_plugins.layers import PastLora

        return PastLora(target, adapter_name, config)


class PastHooks:
    """Declares hooks for others, and asks them."""

    name = "past_hooks"

    class Section(llmload.Section):
        """Nothing to say."""

    class Hooks:
        """What others may answer."""

        @staticmethod
        @hookspec
        def past_bid(item, ctx):
            """Bid."""

        @staticmethod
        @hookspec(firstresult=True)
        def past_first_bid(item):
            """Bid first."""

    @hookimpl
    def check(self, ctx):
        yield Note(text=f"bids {ctx.hook.past_bid(item='a chair', ctx=ctx)}")
        yield Note(text=f"first {ctx.hook.past_first_bid(item='a chair')}")


class PastBidder:
    """Answers the hooks of another."""

    name = "past_bidder"

    @hookimpl(optionalhook=True)
    def past_bid(self, item):
        return len(item)

    @hookimpl(optionalhook=True, specname="past_first_bid")
    def bid_first(self):
        return 1


class PastWrapper:
    """Goes around what others do."""

    name = "past_wrapper"

    class Section(llmload.Section):
        """Nothing to say."""

    @hookimpl(wrapper=True)
    def post_load(self, ctx):
        model = yield
        ctx.facts.setdefault(self.name, {})["seen"] = type(model).__name__
        return model

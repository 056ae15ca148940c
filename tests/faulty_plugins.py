"""Sample plugins: sound ones, and one for each way of breaking the contract that is looked for.

They import torch in their hooks only, as a plugin's module should.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

import llmload

# --- sound ones ---------------------------------------------------------------------------------


class First(llmload.Section):
    """How much is frozen."""

    first: int = Field(ge=0, le=2, examples=[1])
    """Layers that are frozen, from the first on."""


class FreezeLayers:
    name = "freeze_layers"
    Section = First
    before = ("lora",)

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        for layer in model.base_model.layers[: ctx.section(self.Section).first]:
            layer.requires_grad_(False)
        return model


class Scale(llmload.Section):
    """How a new parameter starts."""

    start: float = Field(default=1.0, gt=0)
    """Its first value."""


class Temperature:
    """Adds a parameter, and patches while the model is built."""

    name = "temperature"
    Section = Scale
    before = ("lora",)

    @llmload.hookimpl
    def check(self, ctx: Any) -> Iterator[llmload.Note]:
        yield llmload.Note(text=f"a temperature of {ctx.section(Scale).start}")

    @llmload.hookimpl
    def init_context(self, ctx: Any) -> Any:
        return marked()

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        import torch

        value = torch.full((1,), ctx.section(Scale).start, dtype=ctx.dtype)
        model.temperature = torch.nn.Parameter(value.to("meta") if ctx.rehearsing else value)
        ctx.newly_initialised["temperature"] = "starts as the spec says"
        return model

    @llmload.hookimpl
    def audit(self, ctx: Any, model: Any) -> Iterator[llmload.Problem]:
        if not hasattr(model, "temperature"):
            yield llmload.Problem(message="the temperature is gone")


@contextmanager
def marked() -> Iterator[None]:
    os.environ["MARKED"] = "1"
    try:
        yield
    finally:
        del os.environ["MARKED"]


class Zeros:
    """A loader."""

    name = "zeros"
    before = ("streaming",)

    class Section(llmload.Section):
        """Zeros in the place of weights."""

    @llmload.hookimpl
    def load(self, ctx: Any) -> Any:
        import torch

        if ctx.spec.weights != "random":
            return llmload.Decline("it replaces weights: write `weights: random`")
        model = ctx.model_class(ctx.config).to(ctx.dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.zero_()
                ctx.newly_initialised[name] = "zeros"
        return model.eval()


class Bystander:
    """Has neither section nor hooks."""

    name = "bystander"


SOUND: dict[str, tuple[Any, dict[str, Any]]] = {
    "freezes": (FreezeLayers, {"bad": [{"first": -1}, {"first": "all"}]}),
    "makes a parameter": (Temperature, {}),
    "makes a parameter beside an adapter": (
        Temperature,
        {"spec": {"temperature": {"start": 2.0}, "lora": {"r": 4}}},
    ),
    "loads": (Zeros, {"spec": {"weights": "random"}}),
    "declines": (Zeros, {}),
    "does nothing": (Bystander(), {}),
}
"""Plugin, and arguments for the suite."""

# --- what is seen without a load ----------------------------------------------------------------


class Misspelt:
    name = "faulty"

    @llmload.hookimpl
    def post_laod(self, ctx: Any, model: Any) -> Any:
        return model


class Unmarked:
    name = "faulty"

    def post_load(self, ctx: Any, model: Any) -> Any:
        return model


class OtherArgument:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, context: Any, model: Any) -> Any:
        return model


class Defaulted:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any = None) -> Any:
        return model


class Pushing:
    name = "faulty"

    @llmload.hookimpl(tryfirst=True)
    def post_load(self, ctx: Any, model: Any) -> Any:
        return model


class EmptyHooks:
    name = "faulty"

    class Hooks:
        def colour(self) -> str:
            return "none"


class Shouting:
    name = "Faulty-Plugin"


class Nameless:
    pass


class TakesCoreKey:
    name = "dtype"


class TakesName:
    name = "dropout"


class MisspeltAttribute:
    name = "faulty"
    requries = ("peft",)


class TextForTuple:
    name = "faulty"
    after = "lora"


class RequiresNothing:
    name = "faulty"
    requires = ("peft >= newest",)


class ConflictsWithNobody:
    name = "faulty"
    conflicts = (llmload.Conflict(key="loar", reason="one adapter", fix="Remove it."),)


class ActsNowhere:
    name = "faulty"
    stage = "adaptor"


class WantsArguments:
    name = "faulty"

    def __init__(self, size: int) -> None:
        self.size = size


class Truthy:
    name = "faulty"
    always_active = "yes"


class LooseSection:
    name = "faulty"

    class Section(BaseModel):
        """Takes anything."""

        model_config = ConfigDict(extra="allow")


class IncompleteAlways:
    name = "faulty"
    always_active = True
    Section = First


class Undescribed:
    name = "faulty"

    class Section(llmload.Section):
        """Has a key of which nothing is said."""

        size: int = 1


class WithoutDocstring:
    name = "faulty"

    class Section(llmload.Section):
        size: int = 1
        """How large."""


class NoJson:
    name = "faulty"

    class Section(llmload.Section):
        """Takes what no file can hold."""

        call: Callable[[], int] | None = None
        """A function."""


class NearMiss:
    name = "faulty"
    after = ("embedings",)


class Circle:
    name = "faulty"
    after = ("embeddings",)
    before = ("embeddings",)


class MovesOthers:
    name = "faulty"
    after = ("embeddings",)
    before = ("tokenizer",)


class AfterItself:
    name = "faulty"
    after = ("faulty",)


# --- what a load shows --------------------------------------------------------------------------


class Unguessable:
    name = "faulty"

    class Section(llmload.Section):
        """Wants what its type does not say."""

        code: str = Field(pattern=r"^[0-9]{4}$")
        """Four digits."""


class AlwaysRefuses:
    name = "faulty"

    @llmload.hookimpl
    def check(self, ctx: Any) -> Iterator[llmload.Problem]:
        yield llmload.Problem(message="not today")


class ForgetsReturn:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        model.requires_grad_(True)


class PeeksInCheck:
    name = "faulty"

    @llmload.hookimpl
    def check(self, ctx: Any) -> tuple[()]:
        from safetensors import safe_open

        with safe_open(ctx.folder / "model.safetensors", "pt") as file:
            file.get_tensor("lm_head.weight")
        return ()


class ReadsTheFile:
    name = "faulty"

    @llmload.hookimpl
    def check(self, ctx: Any) -> tuple[()]:
        (ctx.folder / "model.safetensors").read_bytes()
        return ()


class NeedsValues:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if next(model.parameters()).sum().item() > 1e9:
            model.requires_grad_(False)
        return model


class FailsInLoad:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            raise OSError("no space left")
        return model


class Exits:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            os._exit(0)
        return model


class FreezesLate:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            model.model.layers[0].requires_grad_(False)
        return model


class GrowsLate:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        import torch

        if not ctx.rehearsing:
            model.extra = torch.nn.Parameter(torch.zeros(1))
            ctx.newly_initialised["extra"] = "zero"
        return model


class CastsLate:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            model.lm_head.bfloat16()
        return model


class NotRehearsed:
    """Says that it changes no name, and does."""

    name = "faulty"
    rehearsed = False

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        model.lm_head.requires_grad_(False)
        return model


class LeavesTraining:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        return model.train()


class RecordsTensors:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        ctx.record(self.name, {"layer": model.model.layers[0]})
        return model


class Counts:
    """Does something else in every load."""

    name = "faulty"
    loads = 0

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            self.loads += 1
            if self.loads > 1:
                model.generation_config.max_length = self.loads
                model.model.norm.register_buffer("seen", model.model.norm.weight.detach().clone())
        return model


class Chatty:
    name = "faulty"

    @llmload.hookimpl
    def check(self, ctx: Any) -> tuple[()]:
        print("hello from the plugin")  # noqa: T201
        return ()


class LeavesEnvironment:
    name = "faulty"

    @llmload.hookimpl
    def init_context(self, ctx: Any) -> None:
        os.environ["FAULTY"] = "1"


class LeavesPatch:
    name = "faulty"

    @llmload.hookimpl
    def check(self, ctx: Any) -> tuple[()]:
        from torch import nn

        forward = nn.Embedding.forward
        nn.Embedding.forward = lambda self, ids: forward(self, ids)  # type: ignore[method-assign]
        return ()


class DrawsInPlan:
    name = "faulty"

    @llmload.hookimpl
    def check(self, ctx: Any) -> tuple[()]:
        import torch

        torch.rand(1)
        return ()


class LeavesThread:
    name = "faulty"

    @llmload.hookimpl
    def init_context(self, ctx: Any) -> None:
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class LeavesPatchOnError:
    """Puts back what it patched where nothing fails."""

    name = "faulty"

    @llmload.hookimpl
    def init_context(self, ctx: Any) -> Any:
        return careless()


@contextmanager
def careless() -> Iterator[None]:
    os.environ["FAULTY"] = "1"
    yield
    del os.environ["FAULTY"]


class HidesErrors:
    name = "faulty"

    @llmload.hookimpl
    def init_context(self, ctx: Any) -> Any:
        return other_error()


@contextmanager
def other_error() -> Iterator[None]:
    try:
        yield
    except Exception:
        raise KeyError("hidden") from None


class CatchesInterrupts:
    name = "faulty"

    @llmload.hookimpl
    def init_context(self, ctx: Any) -> Any:
        return no_interrupt()


@contextmanager
def no_interrupt() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise RuntimeError(f"stopped: {error}") from error


class StaysLocked:
    """Lets no load begin after one that failed."""

    name = "faulty"
    _busy: ClassVar[list[int]] = []

    @llmload.hookimpl
    def init_context(self, ctx: Any) -> Any:
        if self._busy:
            raise RuntimeError("another load is running")
        self._busy.append(1)

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing:
            self._busy.clear()
        return model


class AsksAsBefore:
    """Asks other plugins as llmload 0.1.0 had it."""

    name = "asks_as_before"

    class Hooks:
        @staticmethod
        @llmload.hookspec
        def bid(item: str) -> int: ...

    @llmload.hookimpl
    def bid(self, item: str) -> int:
        return len(item)

    @llmload.hookimpl
    def check(self, ctx: Any) -> Any:
        yield llmload.Note(text=f"bids {ctx.hook.bid(item='a chair')}")


class CrashesOnOddValue:
    name = "faulty"

    class Section(llmload.Section):
        """How it goes."""

        mode: str = "fast"
        """fast or slow."""

    @llmload.hookimpl
    def check(self, ctx: Any) -> Iterator[llmload.Note]:
        yield llmload.Note(text={"fast": "quick", "slow": "steady"}[ctx.section(self.Section).mode])


class FailsOnOddValue:
    name = "faulty"

    class Section(llmload.Section):
        """Which layer."""

        layer: int = 0
        """Its number."""

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if not ctx.rehearsing and ctx.section(self.Section).layer < 0:
            raise IndexError("no such layer")
        return model


class ValidatorCrashes:
    name = "faulty"

    class Section(llmload.Section):
        """How it goes."""

        mode: str = "fast"
        """fast or slow."""

        @field_validator("mode")
        @classmethod
        def _known(cls, value: str) -> str:
            return {"fast": "fast", "slow": "slow"}[value]


class TakesWhatItsAuthorRefuses:
    name = "faulty"

    class Section(llmload.Section):
        """How many."""

        count: int = 1
        """From one to nine."""


class DrawsByRank:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        import torch

        value = torch.full((1,), float(os.environ.get("RANK", "0")))
        model.extra = torch.nn.Parameter(value.to("meta") if ctx.rehearsing else value)
        ctx.newly_initialised["extra"] = "this rank's number"
        return model


class FreezesByRank:
    name = "faulty"

    @llmload.hookimpl
    def post_load(self, ctx: Any, model: Any) -> Any:
        if os.environ.get("RANK") == "1":
            model.lm_head.requires_grad_(False)
        return model


class WaitsAlone:
    name = "faulty"

    @llmload.hookimpl
    def init_context(self, ctx: Any) -> None:
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_rank() == 0:
            dist.barrier()


FAULTS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "a misspelt hook": (Misspelt, "hooks", "Did you mean 'post_load'?", {}),
    "an unmarked hook": (Unmarked, "hooks", "not marked with @llmload.hookimpl", {}),
    "an argument of nobody": (OtherArgument, "hooks", "the hook offers ctx, model", {}),
    "an argument with a default": (Defaulted, "hooks", "gives the argument 'model' a default", {}),
    "an order of pluggy's": (Pushing, "hooks", "uses tryfirst or trylast", {}),
    "hooks that are none": (EmptyHooks, "hooks", "its `Hooks` declares no hook", {}),
    "a name that is no word": (Shouting, "name", "its `name` is 'Faulty-Plugin'", {}),
    "no name": (Nameless, "name", "its `name` is None", {}),
    "a name that is a core key": (TakesCoreKey, "name", "'dtype' is a core key", {}),
    "a name that is taken": (TakesName, "name-is-free", "has a plugin 'dropout'", {}),
    "a misspelt attribute": (MisspeltAttribute, "declarations", "Did you mean 'requires'?", {}),
    "a text for a tuple": (TextForTuple, "declarations", "its `after` is the text 'lora'", {}),
    "a requirement of nothing": (RequiresNothing, "declarations", "names no distribution", {}),
    "a conflict with nobody": (ConflictsWithNobody, "declarations", "Did you mean 'lora'?", {}),
    "a stage that is none": (ActsNowhere, "declarations", "Did you mean 'adapter'?", {}),
    "a class that wants arguments": (WantsArguments, "declarations", "it cannot be made", {}),
    "a flag that is a text": (Truthy, "declarations", "its `always_active` is 'yes'", {}),
    "a section that takes anything": (LooseSection, "section", "does not forbid unknown keys", {}),
    "a section that is always there and incomplete": (
        IncompleteAlways,
        "section",
        "cannot be made without 'first'",
        {},
    ),
    "a key without description": (Undescribed, "section-schema", "'size' has no description", {}),
    "a section without docstring": (WithoutDocstring, "section-schema", "no docstring", {}),
    "a section without schema": (NoJson, "section-schema", "has no JSON schema", {}),
    "an order after a near miss": (NearMiss, "order", "Did you mean 'embeddings'?", {}),
    "an order that goes in a circle": (Circle, "order", "go in a circle: ", {}),
    "an order that moves others": (MovesOthers, "order", "would move 'embeddings' before", {}),
    "an order after itself": (AfterItself, "order", "its `after` names itself", {}),
    "a section that cannot be guessed": (Unguessable, "example", "no section could be made up", {}),
    "a plan that always fails": (AlwaysRefuses, "example", "not today", {}),
    "a forgotten return": (ForgetsReturn, "example", "returned nothing from post_load", {}),
    "weights read by safetensors in the plan": (
        PeeksInCheck,
        "rehearsal",
        "while the plan was made model.safetensors was read",
        {},
    ),
    "weights read as a file in the plan": (
        ReadsTheFile,
        "rehearsal",
        "while the plan was made model.safetensors was read",
        {},
    ),
    "a hook that needs values": (NeedsValues, "rehearsal", "could not be rehearsed", {}),
    "a load that fails": (FailsInLoad, "load", "no space left", {}),
    "an exit": (Exits, "load", "its process ended with exit code 0", {}),
    "parameters frozen in the load alone": (FreezesLate, "plan-equals-load", "trainable", {}),
    "a parameter made in the load alone": (GrowsLate, "plan-equals-load", "extra", {}),
    "a cast in the load alone": (CastsLate, "plan-equals-load", "bytes", {}),
    "changes by one that is not rehearsed": (NotRehearsed, "plan-equals-load", "trainable", {}),
    "train mode": (LeavesTraining, "eval-mode", "in train mode", {}),
    "a fact that is no JSON": (RecordsTensors, "report", "cannot be written as JSON", {}),
    "a load unlike the one before": (Counts, "repeatable", "names: 'model.norm.seen'", {}),
    "words on standard output": (Chatty, "silence", "'hello from the plugin'", {}),
    "an environment variable left": (
        LeavesEnvironment,
        "nothing-left-behind",
        "environment: FAULTY differ",
        {},
    ),
    "a patch left by the plan": (
        LeavesPatch,
        "nothing-left-behind",
        "after a plan, nn.Embedding: forward differ",
        {},
    ),
    "numbers drawn in the plan": (DrawsInPlan, "nothing-left-behind", "after a plan, random", {}),
    "a thread left": (LeavesThread, "nothing-left-behind", "threads: ", {}),
    "a patch left by a load that fails": (
        LeavesPatchOnError,
        "nothing-left-behind",
        "after a load in which another plugin's init_context fails, environment",
        {},
    ),
    "another error in the place of one": (HidesErrors, "failures", "KeyError: 'hidden'", {}),
    "Ctrl-C that is caught": (CatchesInterrupts, "failures", "Ctrl-C in post_load comes as", {}),
    "a lock that a failed load leaves": (StaysLocked, "failures", "another load is running", {}),
    "a crash on an odd value": (CrashesOnOddValue, "bad-sections", "mode: '' ends in", {}),
    "a late failure on an odd value": (
        FailsOnOddValue,
        "bad-sections",
        "with layer: -1 the plan has no errors, and the load fails",
        {},
    ),
    "a validator that crashes": (ValidatorCrashes, "bad-sections", "ends in KeyError", {}),
    "a section that its author calls bad": (
        TakesWhatItsAuthorRefuses,
        "bad-sections",
        "it takes {'count': 10}",
        {"bad": [{"count": 10}]},
    ),
    "values that differ by rank": (DrawsByRank, "two-ranks", "values of 'extra'", {}),
    "a plan that differs by rank": (FreezesByRank, "two-ranks", "disagree on the plan", {}),
    "a rank that waits alone": (WaitsAlone, "two-ranks", "fails where one process does not", {}),
    "what goes": (
        AsksAsBefore,
        "lasting",
        "`LoadContext.hook` goes with llmload 0.3.0",
        {},
    ),
}
"""Plugin, the rule that it breaks, words of the message, and arguments for the suite."""

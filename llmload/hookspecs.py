"""The manual: every hook a plugin can implement, in the order in which one load calls them.

A plugin is any object with a ``name``. Everything else is optional::

    class MyPlugin:
        name = "my_plugin"              # also its key in the spec and its entry-point name
        Section = MySection             # pydantic model of spec["my_plugin"]: see llmload.Section
        always_active = False           # True: takes part even where the spec lacks the key
        stage = "heads"                 # when it acts on the model: one of STAGES
        after = ("embeddings",)         # exceptions: plugins that go first; ("*",): all others
        before = ("lora",)              # exceptions: plugins that go later
        conflicts = (Conflict(...),)    # settings that cannot be combined with this section
        requires = ("peft>=0.13.2",)    # distributions it needs; a missing one is a plan problem
        provides = ("embeddings",)      # what others may count on: see below
        key_rules = {"mine": (...)}     # what a spec's `key_rules` can name: see llmload.plugin
        rehearsed = True                # False: its hooks change no name, shape or requires_grad
        audits_rehearsal = False        # True: its audit is asked of the rehearsed model too
        Hooks = MyHooks                 # hooks of its own, for other plugins: see below

A plugin that has a ``Section`` takes part in a load if the spec has its key, or always with
``always_active``. A plugin without one takes part in every load.

**Order.** Every hook is called in one order, whatever the order of installation: by stage, then by
name. A plugin names the stage of :data:`STAGES` at which it acts on the model, and needs to name no
other plugin; without ``stage`` it acts at ``load`` where it has that hook, at ``adapter`` where it
has ``wrap_adapter``, else at ``model``. ``after`` and ``before`` are for exceptions, and move the
plugin that has them; names of plugins that take no part are ignored.

**What plugins tell each other.** No plugin imports another or asks for it by name: another one may
do the same. What holds of a plugin in every load it declares in ``provides``; who asks, asks
``ctx.providing("embeddings")``. The words that others ask for are ``adapter``, ``embeddings``,
``gradient_checkpointing``, ``mapped_pages``, ``placement`` and ``quantisation``, described in
:data:`llmload.plugin.ABILITIES`; of plugins with ``adapter``, and with ``quantisation``, a load has
room for one. A word of the plugin's own begins with its name and a dot. What
turns out in a load it states on ``ctx``, such as ``placed_by`` and ``splits``, ``cast_later_by`` or
``changed_base``.

**What hooks keep.** One plugin object serves many loads. What one of its hooks finds out for a
later one goes to ``ctx.handed_on[self.name]``; what else ``ctx`` has is in
``help(llmload.LoadContext)``.

**What people see.** ``ctx.record(self.name, {...})`` keeps JSON-able facts for plan and report;
``ctx.show(self.name, "rank", "8 in 14 layers")`` adds a line to what ``llmload plan`` prints, or,
said while loading, ``llmload load``.

**What specs say.** A section's ``spellings`` tell what other tools call its keys, so that their
users are answered with ours (:class:`llmload.plugin.Spelling`). The names in ``key_rules`` can be
written in any spec, whether the plugin takes part in its load or not
(:data:`llmload.plugin.KeyRule`).

**Hooks of plugins.** A class ``Hooks`` declares hooks for others to implement. They exist in loads
that the plugin takes part in, and are called through ``ctx.hooks``, one plugin after the other, or
until the first that answers, wrappers included (``hookimpl(wrapper=True)``)::

    import llmload

    class Auction:
        name = "auction"

        class Hooks:
            @staticmethod
            @llmload.hookspec(firstresult=True)
            def bid(item: str) -> int | None: ...

        @llmload.hookimpl
        def check(self, ctx):
            bidder, price = ctx.hooks.first("bid", item="a chair")
            yield llmload.Note(text=f"{bidder} pays {price}")

    class Bidder:
        name = "bidder"

        @llmload.hookimpl
        def bid(self, item):
            return len(item)

The plugin ``lora`` declares two: ``check_lora``, for whoever has something against an adapter, and
``lora_layer``, which makes the adapter's layer for a module, of a kind that PEFT does not know, or
in another way than PEFT does. They are described in :mod:`llmload.builtin.lora.hooks`.

**Elsewhere.** What a plugin may import beside this module is in :mod:`llmload` and
:mod:`llmload.plugin`. Third parties register under the entry-point group ``llmload``::

    [project.entry-points.llmload]
    my_plugin = "my_package.plugin:MyPlugin"

``llmload doctor`` asks each plugin, apart from any load, what of it works here: ``diagnose``. The
way of one load::

    begun     started       every installed plugin        of a load, not of a plan alone
    plan      admit         each plugin, in order         before a file is opened
              open_checkpoint   each plugin, in order     where the tensors lie, if one knows
              map_keys      each plugin, in order         new names, claimed tensors
              check         each plugin, in order         Problems, Notes and Declines
              post_load     rehearsed on the meta device  (ctx.rehearsing is true)
              wrap_adapter  rehearsed on the meta device
              cost          each plugin, in order         memory, before it is taken
              relieve       every installed plugin        where there is too little
    load      init_context  each plugin, in order         contexts entered on one ExitStack
              load          loaders, in order             the first that does not decline
              post_load     each plugin, in order         sees the model the previous one left
              wrap_adapter  in order                      the first that does not decline
              distribute    each plugin, in order         spreads the finished model
                                                          contexts left, in reverse
    proof     audit         each plugin, in order         Problems
    refused   stopped       plugins that the spec names   instead of their init_context

The rehearsal runs the real ``post_load`` and ``wrap_adapter`` on a model without storage. That is
how the plan knows module names, new and trainable parameters before a weight is read. Whatever a
hook does to shapes, names and ``requires_grad`` it does in the rehearsal too; work on values is
skipped when ``ctx.rehearsing``. A hook that cannot run on meta tensors is reported as a warning,
and the plan then promises nothing about trainable parameters.

Raise :class:`llmload.RequestError` for what the user can mend; any other exception is reported as
:class:`llmload.LoadFailedError` with the plugin, its distribution and the hook.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from llmload.checkpoint import Checkpoint
    from llmload.context.context import LoadContext
    from llmload.context.forecast import Cost, Forecast
    from llmload.errors import Decline, Note, Problem
    from llmload.spec.loadspec import LoadSpec

PROJECT = "llmload"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

STAGES: Final[Mapping[str, str]] = {
    "load": "loaders, in the order in which they are asked",
    "parallel": "how the model is spread over processes",
    "tokens": "the tokenizer: which tokens there are",
    "model": "the base model itself: its embeddings, its layers, what of it is frozen",
    "quantisation": "how weights are stored in fewer bits",
    "heads": "further heads on the base model, in full precision",
    "training": "how it will be trained: dropout, gradient checkpointing",
    "adapter": "adapters around it",
    "dtype": "casts of what is there by then",
    "last": "what comes after all others: the loader that takes every model",
}
"""Stage -> what acts at it, in the order in which plugins are called."""


# --- while planning ---------------------------------------------------------------------------


@hookspec
def started(asked: Mapping[str, Any]) -> None:
    """Learn that a load begins, whether or not it asks for this plugin.

    Called for every installed plugin once the spec was found to be valid, and before the plan is
    made; of a group once, not for each member. So one process among several can show those that
    wait for it that it lives, or that its load is another. ``llmload.plan`` never calls it.

    :param asked: the spec as it was given, of a group the first member's that has the plugin's
        section, else the first member's.
    :returns: nothing. What it raises is dropped.

    Example: keep a record of loads::

        import llmload

        class Loads:
            name = "loads"

            class Section(llmload.Section):
                file: str

            @llmload.hookimpl
            def started(self, asked):
                if self.name in asked:
                    with open(asked[self.name]["file"], "a", encoding="utf-8") as file:
                        print(asked["model"], file=file)
    """
    raise NotImplementedError


@hookspec
def diagnose() -> Iterable[Problem | Note]:
    """Say what of this plugin works here, apart from any load.

    Called by ``llmload doctor`` and by nothing else, once the distributions in ``requires`` are
    known to be there. It tries what can be tried without a model: imports, private names of
    another library, a compiler, a device.

    :returns: any number of :class:`~llmload.Note` (what works) and :class:`~llmload.Problem`, whose
        ``fix`` is the way to the rest. Severity ``warning`` takes away a part of the plugin,
        ``error`` all of it.

    Example: a plugin that calls a program::

        import llmload

        class Notify:
            name = "notify"

            @llmload.hookimpl
            def diagnose(self):
                import shutil

                if shutil.which("notify-send"):
                    yield llmload.Note(text="tells the desktop when a load has ended")
                else:
                    yield llmload.Problem(
                        message="there is no program notify-send",
                        fix="Install libnotify.",
                    )
    """
    raise NotImplementedError


@hookspec
def admit(spec: LoadSpec, folder: Path) -> Iterable[Problem]:
    """Say whether a model folder may be read at all.

    Called once for each active plugin, in plan order, when it is known where the folder is and
    before any file in it is opened. What a hub repository brings is there by then; with ``plan``
    its weights may not be.

    :param spec: the validated spec; ``spec.sections[name]`` is this plugin's part of it, if it has
        one.
    :param folder: the folder, or the snapshot of the hub repository.
    :returns: problems. One of severity ``error`` refuses the load.

    Example: folders of one place only::

        from pathlib import Path

        import llmload

        class OnlyFrom:
            name = "only_from"

            class Section(llmload.Section):
                root: str

            @llmload.hookimpl
            def admit(self, spec, folder):
                root = Path(spec.sections[self.name].root).resolve()
                if not folder.resolve().is_relative_to(root):
                    yield llmload.Problem(
                        where="model",
                        message=f"{str(folder)!r} does not lie in {str(root)!r}",
                        fix="Have the model copied there by whoever checks models.",
                    )
    """
    raise NotImplementedError


@hookspec
def open_checkpoint(spec: LoadSpec, folder: Path, place: Path) -> Checkpoint | None:
    """Say where each tensor lies, of a layout that only this plugin knows, or of another place.

    Called once for each active plugin, in plan order, after ``admit`` and before anything else is
    made of the weights, with ``weights: pretrained`` only; ``plan`` calls it too. What is returned
    stands for the files that llmload knows, which are then not looked for: names, dtypes and shapes
    are held to the model, loaders read and place each tensor, rank by rank, and the audit compares
    values, as if it were safetensors. Headers and lists are read here, and no weight.

    Each tensor's bytes lie in one piece, row by row and little endian. Files on a disk are mapped
    (:meth:`CheckpointFile.on_disk <llmload.checkpoint.contents.CheckpointFile.on_disk>`). Of others
    the plugin fetches bytes, and only those are asked for that this process keeps, besides a few
    bytes of each tensor for the audit and, with several ranks, to compare what they load
    (:meth:`CheckpointFile.fetched <llmload.checkpoint.contents.CheckpointFile.fetched>`).

    :param spec: the validated spec; ``spec.sections[name]`` is this plugin's part of it, if it has
        one.
    :param folder: the folder, or the snapshot of the hub repository, with config and tokenizer.
    :param place: where the spec says that the weights are: ``weights_from``, else the folder.
    :returns: the checkpoint, or ``None`` where this plugin does not know it. Two that answer are an
        error.
    :raises RequestError: the files are not what they should be.

    Example: one file without a header, and a list of what lies in it::

        import json

        import llmload
        from llmload.plugin import Checkpoint, CheckpointFile, TensorInfo

        class Blob:
            name = "blob"

            class Section(llmload.Section):
                file: str = "weights.blob"

            @llmload.hookimpl
            def open_checkpoint(self, spec, folder, place):
                path = place / spec.sections[self.name].file
                listed = json.loads(path.with_suffix(".json").read_text())
                file = CheckpointFile.on_disk(path, place)
                tensors = [
                    TensorInfo(name, file.path, dtype, tuple(shape), start, stop)
                    for name, (dtype, shape, start, stop) in listed.items()
                ]
                return Checkpoint.described(place, [file], tensors)
    """
    raise NotImplementedError


@hookspec
def check(ctx: LoadContext) -> Iterable[Problem | Note | Decline]:
    """Say what this plugin will do in this load, and what stands in the way.

    Called once per load for each plugin, before anything is built and before a weight is read. The
    config, the checkpoint's headers and (after the ``tokenizer`` plugin) the tokenizer are there.

    :param ctx: the load; ``ctx.section(Section)`` is this plugin's part of the spec.
    :returns: any number of :class:`~llmload.Note` (a line of the plan),
        :class:`~llmload.Problem` (severity ``error`` stops the load, ``warning`` is shown), and,
        from a loader, :class:`~llmload.Decline` (its ``load`` will not be asked). A plugin that
        knows why another loader will not do names that in ``Decline.loader``.
    :raises RequestError: the same as yielding its problems, but stops this plugin's check.

    Example: a budget for the number of parameters, enforced before a byte of weights is read::

        import math

        import llmload

        class Budget:
            name = "budget"

            class Section(llmload.Section):
                max_parameters: int

            @llmload.hookimpl
            def check(self, ctx):
                limit = ctx.section(self.Section).max_parameters
                found = sum(math.prod(t.shape) for t in ctx.checkpoint.tensors.values())
                yield llmload.Note(text=f"{found:,} of {limit:,} parameters allowed")
                if found > limit:
                    yield llmload.Problem(
                        where="budget.max_parameters",
                        message=f"the checkpoint has {found:,} parameters, {limit:,} are allowed",
                        fix="Choose a smaller model or raise the budget.",
                    )
    """
    raise NotImplementedError


@hookspec
def map_keys(ctx: LoadContext, keys: tuple[str, ...]) -> Mapping[str, str | None]:
    """Say under which names the loader finds tensors, and take those that are for this plugin.

    Called while planning, before ``check``, with ``weights: pretrained`` only. The spec's
    ``key_map`` and ``key_rules`` have been applied; each plugin sees the keys that the one before
    it left. What is claimed is read with ``ctx.read(key)`` in ``post_load``, or left out with
    ``ctx.left_out[key] = "why"``; a claimed tensor with which nothing happens is an error.

    :param ctx: the load; ``ctx.blank`` has the names of the base model.
    :param keys: the checkpoint's keys, as the loader would see them.
    :returns: key -> its new name, or None to claim the tensor. Keys that are not mentioned stay.
    :raises RequestError: stops the load. So do two keys that would get the same name.

    Example: a linear head of the plugin's own, stored beside the model's weights::

        import llmload

        class Scorer:
            name = "scorer"

            class Section(llmload.Section):
                pass

            @llmload.hookimpl
            def map_keys(self, ctx, keys):
                return {"scorer.weight": None}

            @llmload.hookimpl
            def post_load(self, ctx, model):
                from torch import nn

                shape = ctx.claimed["scorer.weight"].shape
                device = "meta" if ctx.rehearsing else "cpu"
                model.scorer = nn.Linear(*reversed(shape), bias=False, device=device)
                if not ctx.rehearsing:
                    model.scorer.weight = nn.Parameter(ctx.read("scorer.weight").to(ctx.dtype))
                return model
    """
    raise NotImplementedError


@hookspec
def cost(ctx: LoadContext, forecast: Forecast) -> Iterable[Cost]:
    """Say what memory this plugin takes, and how it changes what weights take.

    Called for each plugin in order after the rehearsal, if the plan has no error; also for a
    machine that is only described (``ctx.machine``), so that nothing of this one may be asked for
    that ``forecast`` and ``ctx.machine`` say. ``forecast.weights`` has every parameter of the
    rehearsed model, counted as plain tensors: a plugin that stores, divides or moves some of them
    says so there (:class:`llmload.plugin.Weight`). What it takes beside them it yields: buffers,
    copies, scratch. The host adds gradients and optimizer of what is trained; activations are
    nobody's.

    :param ctx: the load as it was rehearsed: ``ctx.handed_on`` has what ``check`` and the rehearsal
        left there.
    :param forecast: to be corrected in place; ``forecast.replaced`` are weights of the base model
        in whose place the finished model has others.
    :returns: any number of :class:`llmload.plugin.Cost`.

    Example: a copy of every trained weight, kept for later, and a buffer while it is made::

        import llmload
        from llmload.plugin import Cost

        class Before:
            name = "before_training"

            class Section(llmload.Section):
                pass

            @llmload.hookimpl
            def post_load(self, ctx, model):
                if not ctx.rehearsing:
                    trained = [p.detach().clone() for p in model.parameters() if p.requires_grad]
                    ctx.keep_alive(trained)
                return model

            @llmload.hookimpl
            def cost(self, ctx, forecast):
                kept = [w.part(w.itemsize) for w in forecast.weights.values() if w.trained]
                yield Cost(what="copies", nbytes=sum(kept), phase="finish", lasting=True)
    """
    raise NotImplementedError


@hookspec
def relieve(ctx: LoadContext, forecast: Forecast) -> Iterable[str]:
    """Say what of this plugin would make a load fit for which there is too little memory.

    Called for every installed plugin, whether or not the spec asks for it (``ctx.active``), where a
    load or its training does not fit the machine. ``forecast.supposing()`` is a copy to try
    things on, and ``forecast.suffices()`` says whether they do.

    :param ctx: the load as it was rehearsed.
    :param forecast: what it will take, with every plugin's ``cost``.
    :returns: sentences for the problem's way out, each without a condition: it is known to do.
        What it raises is dropped.

    Example: load the weights in half as many bytes::

        import llmload

        class Narrow:
            name = "narrow"

            class Section(llmload.Section):
                pass

            @llmload.hookimpl
            def relieve(self, ctx, forecast):
                narrow = forecast.supposing()
                for weight in narrow.weights.values():
                    weight.itemsize = min(weight.itemsize, 2)
                    weight.loaded = min(weight.loaded, 2)
                if narrow.suffices():
                    yield "Add `narrow: {}`."
    """
    raise NotImplementedError


# --- while loading ----------------------------------------------------------------------------


@hookspec
def init_context(ctx: LoadContext) -> AbstractContextManager[Any] | None:
    """Prepare the ground before anything is built.

    Called for each plugin in order. What is returned is entered at once on the load's ExitStack and
    left in reverse order after ``distribute``, whatever happens, Ctrl-C included: before ``load``
    returns or raises every context is closed, so that the next model is unaffected. ``ctx.config``
    may be changed here: it belongs to this load alone and the model is built from it. What must
    live as long as the model goes through ``ctx.keep_alive``.

    :param ctx: the load.
    :returns: a context manager, or ``None`` for none.

    Example: build and load on a device of choice::

        import llmload

        class DefaultDevice:
            name = "default_device"

            class Section(llmload.Section):
                device: str

            @llmload.hookimpl
            def init_context(self, ctx):
                import torch

                return torch.device(ctx.section(self.Section).device)
    """
    raise NotImplementedError


@hookspec
def load(ctx: LoadContext) -> nn.Module | Decline:
    """Build the base model and fill it.

    Loaders are asked in plan order; the first that returns a model wins. ``transformers`` comes
    last and declines nothing. A loader that leaves a parameter without a value from the checkpoint
    initialises it and says so: ``ctx.newly_initialised[name] = "why"``.

    :param ctx: the load; ``ctx.model_class`` is the concrete class, ``ctx.config`` its config,
        ``ctx.dtype`` the dtype asked for, ``ctx.checkpoint`` the validated checkpoint.
    :returns: the model in eval mode, or :class:`~llmload.Decline` with the reason. ``None`` is a
        forgotten ``return`` and an error that names the plugin.

    Example: a model of zeros, to smoke-test a pipeline without its weights::

        import llmload

        class Zeros:
            name = "zeros"
            before = ("streaming",)

            class Section(llmload.Section):
                pass

            @llmload.hookimpl
            def load(self, ctx):
                import torch

                if ctx.spec.weights != "random":
                    return llmload.Decline("zeros replaces weights: it wants `weights: random`")
                model = ctx.model_class(ctx.config).to(ctx.dtype)
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        parameter.zero_()
                        ctx.newly_initialised[name] = "zeros"
                return model.eval()
    """
    raise NotImplementedError


@hookspec
def post_load(ctx: LoadContext, model: nn.Module) -> nn.Module:
    """Change the loaded model: resize, freeze, cast, wrap, add a head.

    Called for each plugin in order, each seeing the model as the previous one left it; rehearsed on
    the meta device for the plan. Parameters that are new, or no longer have their values from the
    checkpoint, are listed in ``ctx.newly_initialised``.

    Under ZeRO-3 a parameter is empty here and its values lie in parts on all ranks; under another
    plugin that splits it may have its shape, and no values either. What works for
    whole and partitioned models alike is in ``llmload.plugin.partitions``: sizes, a new module's
    parameters (``split``), values from a state dict, and all values for a block (``whole``).

    :param ctx: the load; ``ctx.tokenizer`` is set if the ``tokenizer`` plugin takes part.
    :param model: what the loader or the previous plugin returned.
    :returns: the same or a replacement module. ``None`` is a forgotten ``return`` and an error that
        names the plugin.

    Example: freeze the first layers::

        import llmload

        class FreezeLayers:
            name = "freeze_layers"
            stage = "model"

            class Section(llmload.Section):
                first: int

            @llmload.hookimpl
            def post_load(self, ctx, model):
                for layer in model.base_model.layers[: ctx.section(self.Section).first]:
                    layer.requires_grad_(False)
                return model
    """
    raise NotImplementedError


@hookspec
def wrap_adapter(ctx: LoadContext, model: nn.Module) -> nn.Module | Decline:
    """Put an adapter around the finished base model.

    Called in plan order; the first plugin that does not decline wins, so a model gets one
    adapter system. Rehearsed on the meta device for the plan. An adapter that is not PEFT's states
    ``ctx.adapter_switch``, so that a policy's reference can be the model without it.

    :param ctx: the load.
    :param model: the base model after every ``post_load``.
    :returns: the wrapped module (or ``model`` itself, changed in place), or
        :class:`~llmload.Decline` with the reason. ``None`` is a forgotten ``return`` and an error
        that names the plugin.

    Example: (IA)^3 through PEFT::

        import llmload

        class Ia3:
            name = "ia3"
            requires = ("peft",)
            provides = ("adapter",)  # and a load has room for one of these

            class Section(llmload.Section):
                target_modules: list[str]
                feedforward_modules: list[str]

            @llmload.hookimpl
            def wrap_adapter(self, ctx, model):
                from peft import IA3Config, get_peft_model

                section = ctx.section(self.Section)
                return get_peft_model(model, IA3Config(**section.model_dump()))
    """
    raise NotImplementedError


@hookspec
def distribute(ctx: LoadContext, model: nn.Module) -> nn.Module:
    """Spread the finished model over processes or devices, or move it as a whole.

    Called for each plugin in order once nothing is added any more: embeddings are resized, heads
    and adapters are there, what is frozen is frozen. Not rehearsed: names, shapes, dtypes and
    ``requires_grad`` stay as they are, and a parameter that has another name afterwards is an
    error. It may be another object, as torch's ``DTensor`` is; what is known of it follows it.

    :param ctx: the load.
    :param model: the finished model, all of it.
    :returns: the same or a replacement module. ``None`` is a forgotten ``return`` and an error that
        names the plugin.

    Example: weights that processes started by ``torch.multiprocessing`` use without a copy::

        import llmload

        class SharedMemory:
            name = "shared_memory"

            class Section(llmload.Section):
                pass

            @llmload.hookimpl
            def distribute(self, ctx, model):
                return model.share_memory()
    """
    raise NotImplementedError


# --- after loading ----------------------------------------------------------------------------


@hookspec
def audit(ctx: LoadContext, model: nn.Module) -> Iterable[Problem]:
    """Prove that this plugin's part of the plan came true.

    Called for each plugin in order on the finished model, after all contexts are closed. The host's
    own audit (no meta tensor, every parameter accounted for, trainable set as planned, a gradient
    path) runs before it. An adapter renames what it wraps: a parameter is found again where
    ``post_load`` left it, in ``ctx.handed_on[self.name]``.

    With ``audits_rehearsal`` the plan asks it of the rehearsed model too, which is on the meta
    device (``ctx.rehearsing`` is true): what it finds there is refused before a weight is read.

    :param ctx: the load.
    :param model: the finished model; it must be left unchanged.
    :returns: problems. One of severity ``error`` fails the load with
        :class:`llmload.AuditError`, and the model is not handed out.

    Example: refuse weights that are not finite::

        import llmload

        class Finite:
            name = "finite"

            class Section(llmload.Section):
                pass

            @llmload.hookimpl
            def audit(self, ctx, model):
                for name, parameter in model.named_parameters():
                    if not parameter.isfinite().all():
                        yield llmload.Problem(
                            where=name,
                            message="the parameter holds NaN or infinity",
                            fix="Check the checkpoint, or load in a wider dtype.",
                        )
    """
    raise NotImplementedError


@hookspec
def stopped(asked: Mapping[str, Any], error: BaseException) -> None:
    """Learn that a load ends before this plugin's ``init_context``.

    Its spec or its plan was refused, the ``init_context`` of a plugin before it failed, or a member
    of a group before the first one that this plugin takes part in. For plugins whose section is a
    key of the spec, so that one process among several can tell those that wait for it. From
    ``init_context`` on, contexts tell a plugin that the load has failed: those that it returned
    there and, up to the end of the last audit (of a group, that of its last member), those on
    ``ctx.until_end``. ``llmload.plan`` never calls it; a group calls it once, not for each member.

    :param asked: the spec as it was given, of a group the first member's that has the section; no
        key of it may be valid.
    :param error: what the load is about to raise.
    :returns: nothing. What it raises is dropped, so that the user sees ``error``.

    Example: keep a record of refused loads::

        import llmload

        class Refusals:
            name = "refusals"

            class Section(llmload.Section):
                file: str

            @llmload.hookimpl
            def stopped(self, asked, error):
                with open(asked["refusals"]["file"], "a", encoding="utf-8") as file:
                    print(type(error).__name__, error, file=file)
    """
    raise NotImplementedError


SPINE = ("init_context", "load", "post_load", "wrap_adapter", "distribute")
HELPERS = (
    "started",
    "diagnose",
    "admit",
    "open_checkpoint",
    "map_keys",
    "check",
    "cost",
    "relieve",
    "audit",
    "stopped",
)

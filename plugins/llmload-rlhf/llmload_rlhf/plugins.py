"""The plugins ``reward_head``, ``critic_head`` and ``value_head``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from llmload import Conflict, Note, Problem, RequestError, hookimpl
from llmload.plugin import some
from llmload_rlhf import factors, labels
from llmload_rlhf.layouts import (
    COATI_CRITIC,
    COATI_REWARD,
    DEEPSPEED_CHAT,
    LANGUAGE_MODEL_HEADS,
    TRL,
    Layout,
    pad_id,
)
from llmload_rlhf.sections import (
    CriticHeadSection,
    HeadSection,
    RewardHeadSection,
    ValueHeadSection,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from llmload import LoadContext

_SECTIONS = ("critic_head", "reward_head", "value_head")
_OF_LAYOUT = {
    "num_padding_at_beginning": "deepspeed_chat",
    "compute_fp32_loss": "deepspeed_chat",
    "version": "coati",
}
"""Setting -> the only layout that has it."""


class HeadPlugin:
    """Wraps the loaded transformer in a model with a head, read from the checkpoint or new."""

    name: ClassVar[str]
    Section: ClassVar[type[HeadSection]]
    layouts: ClassVar[Mapping[str, Layout]]
    stage = "heads"

    def __init_subclass__(cls) -> None:
        cls.conflicts = tuple(
            Conflict(key=other, reason="a model gets one head", fix=f"Remove `{other}`.")
            for other in _SECTIONS
            if other != cls.name
        )

    conflicts: ClassVar[tuple[Conflict, ...]] = ()

    @hookimpl
    def map_keys(self, ctx: LoadContext, keys: tuple[str, ...]) -> Mapping[str, str | None]:
        """Take the head's tensors, and give the transformer's the names that it has by itself."""
        layout = self._layout(ctx)
        if layout is None:
            return labels.map_keys(ctx, self._section(ctx), keys)
        self._refuse_class(ctx, layout.auto_class)
        heads = self._head_in(keys, layout)
        self._hold_to_request(ctx, layout, heads)
        claimed: dict[str, str | None] = dict.fromkeys(heads)
        if self._is_coati(ctx):
            found = factors.factors_in(keys)
            factors.hold_to_version(found, self.name, self._section(ctx).version)
            claimed |= dict.fromkeys(found)
        rest = [key for key in keys if key not in claimed]
        if layout.auto_class == "base":
            ours = tuple(f"{layout.prefix}{head}" for head in LANGUAGE_MODEL_HEADS)
            left = [key for key in rest if key.startswith((*LANGUAGE_MODEL_HEADS, *ours))]
            claimed |= dict.fromkeys(left)
            rest = [key for key in rest if key not in claimed]
        if rest and all(key.startswith(layout.prefix) for key in rest):
            return claimed | {key: key.removeprefix(layout.prefix) for key in rest}
        return claimed

    def _head_in(self, keys: tuple[str, ...], layout: Layout) -> list[str]:
        """Return the head's keys, those that no head of the layout has among them."""
        return [key for key in keys if key.startswith(f"{layout.head}.")]

    @hookimpl
    def check(self, ctx: LoadContext) -> Iterator[Problem | Note]:
        """Say what head there will be, and what it lacks."""
        layout, section = self._layout(ctx), self._section(ctx)
        if layout is None:
            yield from labels.check(ctx, section)
        else:
            self._refuse_class(ctx, layout.auto_class)
            if ctx.checkpoint is None:
                self._hold_to_request(ctx, layout, [])
            yield from self._shape_problems(ctx, layout)
            start = "new" if section.new else "from the checkpoint"
            which = f"coati {section.version}" if section.layout == "coati" else section.layout
            yield Note(text=f"{which}: {', '.join(layout.head_keys.values())}, {start}")
            if self._is_coati(ctx) and (merged := factors.said(ctx)):
                yield from factors.problems(ctx, layout.head, layout.prefix)
                yield Note(text=merged)
        yield from self._unused_keys(ctx)
        yield from self._frozen_by_lora(ctx, "score" if layout is None else layout.head)
        if section.layout in ("deepspeed_chat", "sequence_classification"):
            yield from self._no_pad_token(ctx)

    @hookimpl
    def post_load(self, ctx: LoadContext, model: PreTrainedModel) -> nn.Module:
        """Make the head, fill it, and put it on the transformer."""
        from llmload_rlhf import heads

        layout, section = self._layout(ctx), self._section(ctx)
        used = set() if layout is None else {*layout.head_keys.values()}
        if layout is not None and self._is_coati(ctx):
            used.update(factors.factors_in(ctx.claimed))
            if not ctx.rehearsing:
                factors.merge(ctx, model, layout.head, layout.prefix)
        for key in ctx.claimed:
            if key not in used:
                ctx.left_out[key] = f"a model with a {section.layout} head has no such part"
        if layout is None:
            return labels.finish(ctx, section, model)  # type: ignore[no-any-return]
        return heads.put(ctx, layout, section, model, self.name)

    @hookimpl
    def audit(self, ctx: LoadContext, model: nn.Module) -> Iterator[Problem]:
        """Hold a head that was read to the file, value by value."""
        from llmload_rlhf import heads

        layout = self._layout(ctx)
        if layout is not None and not self._section(ctx).new:
            yield from heads.differences(ctx, layout, self.name)

    # --- what is asked for --------------------------------------------------------------------

    def _section(self, ctx: LoadContext) -> Any:
        return ctx.section(self.Section)

    def _layout(self, ctx: LoadContext) -> Layout | None:
        """Return the layout; None for transformers' own class, which needs no wrapper."""
        return self.layouts.get(self._section(ctx).layout)

    def _is_coati(self, ctx: LoadContext) -> bool:
        return bool(self._section(ctx).layout == "coati")

    def _refuse_class(self, ctx: LoadContext, wanted: str) -> None:
        if ctx.spec.auto_class != wanted and ":" not in ctx.spec.auto_class:
            raise RequestError(
                f"`{self.name}: {{layout: {self._section(ctx).layout}}}` is put on a"
                f" model of class {wanted!r}, and {ctx.spec.auto_class!r} is asked for",
                fix=f"Write `auto_class: {wanted}`.",
                where="auto_class",
            )

    def _hold_to_request(self, ctx: LoadContext, layout: Layout, found: list[str]) -> None:
        """Refuse a head that is asked for and not there, or there and not asked for."""
        missing = [key for key in layout.head_keys.values() if key not in found]
        section = self._section(ctx)
        if section.new and not found:
            return
        if section.new:
            message = f"a new head is asked for, and the checkpoint has one: {some(found)}"
            fix = f"Remove `new` from `{self.name}`."
        elif missing:
            message = f"the checkpoint has no {some(missing)}"
            fix = f"Write `{self.name}: {{new: true}}` to start with a new head, or map the keys."
        else:
            return
        raise RequestError(message, fix=fix, where=self.name)

    def _shape_problems(self, ctx: LoadContext, layout: Layout) -> Iterator[Problem]:
        """Find head tensors that do not fit the transformer, and those that no head has."""
        from llmload_rlhf.models import head_size

        shapes = {"weight": (1, head_size(ctx.config)), "bias": (1,)}
        known = {key: shapes[part.rpartition(".")[2]] for part, key in layout.head_keys.items()}
        for key, info in ctx.claimed.items():
            if key in known and tuple(info.shape) != known[key]:
                yield Problem(
                    where=f"{info.file}: {key}",
                    message=f"the head has shape {tuple(info.shape)}, the model takes {known[key]}",
                    fix="Check that config.json and weights belong together.",
                )
            elif key in factors.factors_in(ctx.claimed) and self._is_coati(ctx):
                continue
            elif key not in known and key.startswith(f"{layout.head}."):
                yield Problem(
                    where=f"{info.file}: {key}",
                    message=f"a {self._section(ctx).layout} head has no {key!r}, only"
                    f" {some([*known])}",
                    fix=f"Choose another `layout` in `{self.name}`, or map the key.",
                )

    def _unused_keys(self, ctx: LoadContext) -> Iterator[Problem]:
        section = self._section(ctx)
        for key in sorted(section.model_fields_set & _OF_LAYOUT.keys()):
            if section.layout == _OF_LAYOUT[key]:
                continue
            yield Problem(
                where=f"{self.name}.{key}",
                message=f"the layout {section.layout!r} has no such setting",
                fix="Remove the key.",
            )

    def _frozen_by_lora(self, ctx: LoadContext, head: str) -> Iterator[Problem]:
        """Refuse a head that is to be trained and that PEFT would freeze."""
        lora: Any = ctx.sections.get("lora")
        section = self._section(ctx)
        if lora is None or not section.trainable or section.layout == "sequence_classification":
            return
        saved = lora.modules_to_save or ()
        if lora.adapter is None and not {head, "summary"}.intersection(saved):
            yield Problem(
                where="lora.modules_to_save",
                message=f"`{self.name}` is to be trained, and an adapter freezes all but itself",
                fix=f"Write `modules_to_save: [{head}]` in `lora`, or `trainable: false` in"
                f" `{self.name}`.",
            )

    def _no_pad_token(self, ctx: LoadContext) -> Iterator[Problem]:
        if pad_id(ctx, ctx.config) is None:
            yield Problem(
                where=self.name,
                message="sequences end at their pad token, and neither tokenizer nor config has"
                " one",
                fix="Write `tokenizer: {pad_token: eos}`, or another token.",
            )


class RewardHeadPlugin(HeadPlugin):
    """A score for a whole sequence."""

    name = "reward_head"
    Section = RewardHeadSection
    layouts: ClassVar = {"deepspeed_chat": DEEPSPEED_CHAT, "coati": COATI_REWARD}


class CriticHeadPlugin(HeadPlugin):
    """A value for every token, from a transformer without its language-model head."""

    name = "critic_head"
    Section = CriticHeadSection
    layouts: ClassVar = {"deepspeed_chat": DEEPSPEED_CHAT, "coati": COATI_CRITIC}


class ValueHeadPlugin(HeadPlugin):
    """A value for every token beside the logits of a language model."""

    name = "value_head"
    Section = ValueHeadSection
    layouts: ClassVar = {"trl": TRL}

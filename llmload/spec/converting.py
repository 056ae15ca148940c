"""A config of another tool as a spec: what it says of loading, and what was left out and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from pydantic import BaseModel, Field

from llmload.errors import Problem, SpecError
from llmload.spec.document import Document
from llmload.spec.foreign_keys import SAME_WORDS, Keys, Removal, Spelling, is_training
from llmload.spec.foreign_tools import TOOLS, Tool
from llmload.spec.loadspec import LoadSpec

_REMOVED: Final = re.compile("^Remove it(:| and) ")
"""How a fix begins; in a converted spec the key is gone already."""
_UNKNOWN: Final = "nothing here knows it; if it changes what is loaded, say so in the spec"


class NotCarried(BaseModel):
    """A key of theirs that the spec does not have, or has otherwise."""

    key: str
    """Theirs."""
    why: str
    """In one sentence, with what to do."""


class Conversion(BaseModel):
    """What became of a config of another tool."""

    tool: str
    """Whose it is."""
    spec: dict[str, Any]
    """Ours."""
    carried: dict[str, list[str]] = Field(default_factory=dict)
    """Key of theirs -> the keys of ours that it became; none where it asks for what happens without
    it."""
    assumed: dict[str, Any] = Field(default_factory=dict)
    """What the tool does though the file does not say so, and llmload would do otherwise: in the
    tool's keys."""
    not_carried: list[NotCarried] = Field(default_factory=list)
    """Keys about loading, and those that nothing here knows."""
    training: list[str] = Field(default_factory=list)
    """Keys that belong to the trainer."""


def convert(
    document: Document,
    tool: str | None,
    spellings: Mapping[str, Spelling],
    sections: Mapping[str, Any],
    validate: Callable[[Mapping[str, Any]], object],
) -> Conversion:
    """Convert a config of TRL, axolotl or LLaMA-Factory.

    :param tool: whose it is; None: to be found out.
    :param spellings: what other tools call our keys.
    :param sections: our keys beside those of the core.
    :param validate: raises ``SpecError`` for a spec that is wrong.
    :raises SpecError: whose it is cannot be told, or it names no model.
    """
    found = _tool(document, tool)
    return _Converter(found, document, spellings, sections).run(validate)


def _tool(document: Document, asked: str | None) -> Tool:
    """Return the tool that was asked for, or whose keys the file has most of.

    :raises SpecError: there is none, or two are as likely.
    """
    names = ", ".join(tool.name for tool in TOOLS)
    if asked is not None:
        for tool in TOOLS:
            if tool.name == asked.lower().replace("_", "-"):
                return tool
        raise SpecError(
            f"configs of {asked!r} are not known", fix=f"Known are: {names}.", where="--from"
        )
    counts = {tool.name: len(tool.known_by & document.data.keys()) for tool in TOOLS}
    first, second = sorted(TOOLS, key=lambda tool: -counts[tool.name])[:2]
    if counts[first.name] == counts[second.name]:
        raise SpecError(
            "whose config this is cannot be told by its keys",
            fix=f"Say so with `--from`: {names}.",
            file=document.file,
        )
    return first


class _Converter:
    def __init__(
        self,
        tool: Tool,
        document: Document,
        spellings: Mapping[str, Spelling],
        sections: Mapping[str, Any],
    ) -> None:
        self._tool = tool
        self._theirs = document.data
        self._file = document.file
        self._spellings = spellings
        self._sections = sections
        self._ours = [*LoadSpec.model_fields, *sections]
        self._says: dict[str, str] = {}  # dotted key of ours -> theirs
        self._made = Conversion(tool=tool.name, spec={})

    def run(self, validate: Callable[[Mapping[str, Any]], object]) -> Conversion:
        for key, value in self._theirs.items():
            self._take(key, value)
        for key, value in self._tool.assumed(self._theirs).items():
            if key not in self._theirs:
                self._assume(key, value)
        if "model" not in self._made.spec:
            raise SpecError(
                f"the config names no model that {self._tool.name} would load",
                fix="Add the model to the file, or say whose it is with `--from`.",
                file=self._file,
            )
        self._leave_to_saved_adapter()
        self._in_our_order()
        self._without_refused(validate)
        return self._made

    def _take(self, key: str, value: Any) -> None:
        spelling = SAME_WORDS.get(key) or self._spellings.get(key)
        if is_training(key, spelling):
            self._made.training.append(key)
        elif value is None or (value is False and spelling is not None and spelling.instead):
            self._made.carried[key] = []  # asks for nothing
        elif spelling is not None:
            self._answer(key, spelling, value)
        elif key in self._sections and isinstance(value, bool):
            self._put(key, {key: {}} if value else {})
        elif key in self._sections and not isinstance(value, Mapping):
            self._put(key, {key: {}})
            self._refuse(
                key, f"the section is there with its defaults, {value!r} is not among its keys"
            )
        elif key in self._ours:
            self._put(key, {key: value})
        else:
            self._refuse(key, _UNKNOWN)

    def _answer(self, key: str, spelling: Spelling, value: Any) -> None:
        answer = spelling.answer(value)
        if isinstance(answer, Keys):
            if answer.keys.keys() == {"lora"} and not self._tool.adapts(self._theirs):
                self._refuse(key, f"not in effect there: `{self._tool.switch}` asks for no LoRA")
            else:
                self._put(key, answer.keys)
        elif answer is Removal.DEFAULT:
            self._made.carried[key] = []
        elif isinstance(answer, Removal):
            self._refuse(key, "llmload has no such setting")
        else:
            self._refuse(key, _REMOVED.sub("", answer.text).rstrip("."))

    def _assume(self, key: str, value: Any) -> None:
        spelling = self._spellings.get(key)
        answer = spelling.answer(value) if spelling is not None else Keys({key: value})
        if isinstance(answer, Keys) and all(p not in self._says for p, _ in _leaves(answer.keys)):
            self._put(key, answer.keys)
            self._made.assumed[key] = value

    def _put(self, key: str, keys: Mapping[str, Any]) -> None:
        """Write our keys, unless another key of theirs has said otherwise."""
        self._made.carried.setdefault(key, [])
        for path, value in _leaves(keys):
            before = self._says.get(path)
            if before is not None and _at(self._made.spec, path) != value:
                self._refuse(key, f"`{before}` has given `{path}` another value")
                continue
            self._says.setdefault(path, key)
            _write(self._made.spec, path, value)
            self._made.carried[key].append(path)

    def _refuse(self, key: str, why: str) -> None:
        self._made.not_carried.append(NotCarried(key=key, why=why))

    def _leave_to_saved_adapter(self) -> None:
        """Leave out the fields of an adapter that is resumed: its own config has them."""
        if "adapter" not in self._made.spec.get("lora", {}):
            return
        for path, key in list(self._says.items()):
            if not path.startswith("lora.") or path in ("lora.adapter", "lora.merge_first"):
                continue
            _remove(self._made.spec, path)
            del self._made.carried[key], self._says[path]
            if self._made.assumed.pop(key, None) is None:
                self._refuse(key, "the saved adapter brings its own")

    def _in_our_order(self) -> None:
        spec = self._made.spec
        self._made.spec = {key: spec[key] for key in self._ours if key in spec}

    def _without_refused(self, validate: Callable[[Mapping[str, Any]], object]) -> None:
        """Take out what a spec cannot have, with the words of the refusal."""
        while True:
            try:
                validate(self._made.spec)
                return
            except SpecError as error:
                if not any(self._dropped(problem) for problem in error.problems):
                    raise

    def _dropped(self, problem: Problem) -> bool:
        where = problem.where.partition("[")[0]
        for path, key in list(self._says.items()):
            if path == where or where.startswith(f"{path}."):
                why = f"refused here: {problem.message}. {problem.fix}".strip().rstrip(".")
                self._refuse(key, why)
                _remove(self._made.spec, path)
                del self._says[path]
                self._made.carried.pop(key, None)
                return path != "model"
        return False


def _leaves(keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value; of a section its keys, or the empty section itself."""
    for key, value in keys.items():
        if key != "config" and isinstance(value, Mapping) and value:
            yield from ((f"{key}.{name}", part) for name, part in value.items())
        else:
            yield key, value


def _at(spec: Mapping[str, Any], path: str) -> Any:
    section, _, name = path.partition(".")
    return spec.get(section, {}).get(name) if name else spec.get(section)


def _write(spec: dict[str, Any], path: str, value: Any) -> None:
    section, _, name = path.partition(".")
    if name:
        spec.setdefault(section, {})[name] = value
    elif value == {}:
        spec.setdefault(section, {})
    else:
        spec[section] = value


def _remove(spec: dict[str, Any], path: str) -> None:
    section, _, name = path.partition(".")
    if name:
        spec.get(section, {}).pop(name, None)
    else:
        spec.pop(section, None)

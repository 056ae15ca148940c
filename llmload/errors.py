"""What hooks find and what goes wrong.

``Problem``, ``Note`` and ``Decline`` are what a ``check`` may yield, ``Conflict`` is data on a
plugin.
Errors are of two families: the request is wrong, or the work failed.

Every message says what was asked, what was found, what is allowed and what to do next. Nothing in
``RequestError`` is a bug of ``llmload``: the command line prints it without a traceback and exits
with 2. ``LoadFailedError`` means that a right request could not be carried out: exit code 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict

Severity = Literal["error", "warning"]

_SHOWN = 3
"""Names that a message lists."""
_LONG = 500
"""Characters of a library's error that a message repeats."""
_LONGEST = 4000
"""Characters of a message and of a place that are shown: what a file holds may have millions."""
_PROBLEMS = 100
"""Problems that are shown: a file can have as many as it has values."""
# A token of the hub, and what stands before the @ of an address.
_SECRET: Final = re.compile(r"\bhf_[A-Za-z0-9]{30,}|(?<=://)[^/\s]*(?=@)")


def without_secrets(text: str) -> str:
    """Return a text without what is a token of the hub, or names and passwords in addresses."""
    return _SECRET.sub("...", text)


# Controls but for line feed and tab, and what turns the direction in which a text is read.
_UNSEEN: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return a text that a terminal shows as it is: what a folder holds may have sequences that
    colour, hide or rewrite what stands around it, or set the window's title."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _shown(text: str) -> str:
    return visible(without_secrets(text))


_Shown: TypeAlias = Annotated[str, AfterValidator(_shown)]


class Problem(BaseModel):
    """One thing that is wrong, where it is, and the way out.

    Plugins yield problems from ``check`` and ``audit``; the spec reader makes them for bad keys and
    values. An ``error`` stops the load before any weight is read; a ``warning`` is shown.
    """

    # The first model that is built lets pydantic look for its plugins in every distribution, which
    # is a tenth of what the help takes.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    message: _Shown
    """What was asked and what was found, in one sentence without a final full stop."""
    fix: _Shown = ""
    """What to do next, in one imperative sentence."""
    where: _Shown = ""
    """Dotted path of the spec key (``lora.r``), or a file name; empty where neither fits."""
    plugin: str = ""
    """Name of the plugin that says so; the host fills it in for hook results."""
    severity: Severity = "error"
    file: _Shown = ""
    """The spec file, where the spec came from one."""
    line: int | None = None
    """Line in ``file``, counted from 1."""
    column: int | None = None
    """Column in ``file``, counted from 1."""

    def of(self, plugin: str) -> Problem:
        """Return it as this plugin's, unless it is another one's already."""
        return self if self.plugin else self.model_copy(update={"plugin": plugin})

    def __str__(self) -> str:
        position = f"{self.file}:{self.line}:{self.column}" if self.line is not None else self.file
        origin = self.where or (f"plugin {self.plugin!r}" if self.plugin else "")
        text = ": ".join(_cut(part) for part in (position, origin, self.message) if part)
        return f"{text}. {self.fix}" if self.fix else text


@dataclass(frozen=True, kw_only=True)
class Note:
    """A line of the plan: what the plugin is going to do in this load."""

    text: str | Callable[[], str]
    """What the plan shows; a function is called when every plugin has been asked, for what others
    decide on."""
    plugin: str = ""
    """Who says it; filled in where it is empty."""

    def of(self, plugin: str) -> Note:
        """Return it as this plugin's, unless it is another one's already."""
        return self if self.plugin else replace(self, plugin=plugin)

    def __str__(self) -> str:
        return self.text if isinstance(self.text, str) else self.text()


class Line(BaseModel):
    """One line that a plugin adds to what people see of a plan or report."""

    model_config = ConfigDict(defer_build=True)

    plugin: str
    """Who says it."""
    label: str
    """A word or two, which stand once before lines that follow each other."""
    text: str
    """What is so."""


@dataclass(frozen=True)
class Decline:
    """A plugin's "not me, ask the next one", with the reason that the plan shows.

    Yielded by ``check`` a loader is never asked; returned by ``load`` or ``wrap_adapter`` the next
    plugin is asked. ``None`` never means this: it is what a forgotten ``return`` gives.
    """

    reason: str
    loader: str = ""
    """For ``check``: the loader that is not to be asked, where it is another plugin's."""


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """A pair of settings that cannot both hold, as data on the plugin that knows.

    With a ``key``, another plugin's section or a core key of the spec, or with an ``ability``:
    whatever plugin provides that (``llmload.plugin.ABILITIES``). It holds when the key is set, or
    such a plugin takes part, and ``when(section, other)`` (if given) is true of the two values;
    of a plugin with an ability that is its section, None where it has none.
    """

    key: str = ""
    reason: str
    fix: str
    when: Callable[[Any, Any], bool] | None = None
    ability: str = ""
    """Since 0.1.0."""


class LlmloadError(Exception):
    """Root of every error that ``llmload`` raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        problems: str | Problem | Iterable[Problem],
        *,
        fix: str = "",
        where: str = "",
        file: str = "",
    ) -> None:
        """Make an error of problems that were found, or of one.

        :param problems: or the message of the only one, which the others are fields of.
        """
        if isinstance(problems, str):
            problems = Problem(message=problems, fix=fix, where=where, file=file)
        self.problems: tuple[Problem, ...] = (
            (problems,) if isinstance(problems, Problem) else tuple(problems)
        )
        super().__init__(self.problems)

    def __str__(self) -> str:
        # Made when it is asked for: whoever passes the error on puts names and places into it.
        shown = [str(problem) for problem in self.problems[:_PROBLEMS]]
        if len(self.problems) > _PROBLEMS:
            shown.append(f"... and {len(self.problems) - _PROBLEMS:,} more problems")
        return "\n".join(shown)


class RequestError(LlmloadError):
    """What was asked cannot be done as asked; nothing was read, built or changed."""

    exit_code: ClassVar[int] = 2


class SpecError(RequestError):
    """The spec itself is wrong: unknown keys, wrong types, unreadable YAML. All faults at once."""


class PluginError(RequestError):
    """A plugin the load names is broken, missing, ambiguous or breaks the hook contract."""


class CheckpointError(RequestError):
    """The model folder is missing, damaged, unsafe or does not fit the model."""


class PlanError(RequestError):
    """The plan has problems of severity ``error``: sections conflict, targets match nothing, ..."""


class LoadFailedError(LlmloadError):
    """A right request could not be carried out: a plugin or library raised while loading."""


class AuditError(LoadFailedError):
    """The loaded model is not what the plan promised. The model is not handed out."""


def some(names: Iterable[str]) -> str:
    """Return the first few names in quotes, and how many more there are."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - _SHOWN} more" if len(quoted) > _SHOWN else ""
    return ", ".join(quoted[:_SHOWN]) + more


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def in_one_line(error: BaseException) -> str:
    """Return what a library's error says, its lines joined; its type where it says nothing.

    The reason often stands below the first line. What is very long is cut. What a ``KeyError`` says
    is the key alone, which tells nothing without its type.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error) is KeyError:
        text = f"KeyError: {text}"
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."

"""YAML (and JSON) text as plain data, with the place of every key.

What is read is the core schema of YAML 1.2, so ``no`` is text and ``1e-4`` is a number, as people
mean them and as JSON has them; JSON is read as the YAML that it is. Nothing is ever constructed but
dict, list, str, int, float, bool and None.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final, NoReturn, TypeAlias, cast

import yaml

from llmload.errors import Problem, SpecError

Path: TypeAlias = tuple[str | int, ...]
"""Keys and list indices that lead to a value."""

MAX_DEPTH: Final = 32
"""Levels of a spec, which are fewer by far: what is deeper contains itself."""

MAX_VALUES: Final = 10_000
_NULLS: Final = re.compile(r"~|null|Null|NULL|")
_BOOLS: Final = re.compile(r"true|True|TRUE|false|False|FALSE")
INTS: Final = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
LONGEST_INT: Final = 100
"""Digits of a whole number; Python shows none that has over 4,300, and nothing here needs one."""
FLOATS: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

# A part of PyYAML's message -> what to do about it.
_SYNTAX_FIXES: Final = {
    r"character '\t'": "Indent with spaces: YAML allows no tabs.",
    "cannot start any token": "Put the text in quotes.",
    "mapping values are not allowed": "Put text that contains a colon in quotes, or mend the"
    " indentation.",
    "undefined alias": "Define the anchor above its first use, or put the text in quotes.",
    "expected <block end>": "Mend the indentation: keys of one mapping start in one column.",
    "expected '<document start>'": "Mend the indentation, or remove what follows the document.",
    "unexpected end of stream": "Close the quotes.",
    "<stream end>": "Close the bracket.",
}


def parse(text: str, file: str = "") -> tuple[Any, dict[Path, tuple[int, int]]]:
    """Return the data of one YAML or JSON document, and (line, column) of each path in it.

    :param file: name for messages.
    :raises SpecError: with the first fault of syntax, or with all tags, duplicate keys, keys that
        are not text, and values that are no finite numbers.
    """
    if file.endswith(".json"):
        text = _json_as_yaml(text)
    reader = _Reader(file)
    try:
        node = _Composer(text, reader).get_single_node()
        if node is None:
            reader.stop("the document is empty", "Write at least `model: ...`.", _Mark(0, 0))
        data = reader.value(node, ())
    except RecursionError:
        reader.stop_too_deep(_Mark(0, 0))
    except yaml.MarkedYAMLError as error:
        reader.stop(*_syntax_fault(error, file), error.problem_mark or error.context_mark)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        mark = _Mark(before.count("\n"), len(before) - before.rfind("\n") - 1)
        reader.stop(
            f"the character U+{ord(text[error.position]):04X} is not allowed in YAML",
            "Remove it; inside double quotes it can be written as an escape.",
            mark,
        )
    if reader.problems:
        raise SpecError(reader.problems)
    return data, reader.positions


def dotted(path: Path) -> str:
    """Return a path as one reads it: ``lora.target_modules[0]``, ``key_map['^a\\\\.']``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[\w-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{part!r}]"
    return text


_Pair: TypeAlias = tuple[yaml.ScalarNode, yaml.Node]
"""A key and its value."""


class _Mark:
    """A place in a text, counted from 0, as PyYAML's own marks are."""

    def __init__(self, line: int, column: int) -> None:
        self.line = line
        self.column = column


class _Composer(yaml.BaseLoader):
    """Makes the node tree. Tags are faults: in the tree, `!!str 1` would look like a plain 1."""

    def __init__(self, text: str, reader: _Reader) -> None:
        super().__init__(text)
        self._reader = reader

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            self._reader.fault(
                f"the tag {event.tag!r} is not allowed: a spec is plain data",
                "Remove the tag.",
                event.start_mark,
            )
        return super().compose_node(parent, index)


class _Reader:
    """Turns a node tree into data and positions, and gathers what is wrong with it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.positions: dict[Path, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self._values = 0

    def value(self, node: yaml.Node, path: Path) -> Any:
        if len(path) > MAX_DEPTH:
            self.stop_too_deep(node.start_mark)
        self._values += 1  # an alias counts as all that it stands for
        if self._values > MAX_VALUES:
            self.stop(
                f"the document has more than {MAX_VALUES:,} values once its aliases are expanded",
                "Shorten it, or give the spec from Python.",
                node.start_mark,
            )
        if isinstance(node, yaml.MappingNode):
            pairs = self._pairs(node, path)
            return {key: self._at(k, v, (*path, key)) for key, (k, v) in pairs.items()}
        if isinstance(node, yaml.SequenceNode):
            return [self._at(item, item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(cast("yaml.ScalarNode", node), path)

    def _at(self, place: yaml.Node, node: yaml.Node, path: Path) -> Any:
        self.positions[path] = (place.start_mark.line + 1, place.start_mark.column + 1)
        return self.value(node, path)

    def _pairs(self, node: yaml.MappingNode, path: Path) -> dict[str, _Pair]:
        """Return key -> (key node, value node), with ``<<`` merged in and duplicates reported."""
        own: dict[str, _Pair] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key in own:
                first = own[key][0].start_mark
                self.fault(
                    f"the key stands twice, first on line {first.line + 1}, column"
                    f" {first.column + 1}",
                    "Keep one of the two.",
                    key_node.start_mark,
                    (*path, key),
                )
            elif key is not None:
                own[key] = (key_node, value_node)
        if "<<" not in own or own["<<"][0].style is not None:
            return own
        merged: dict[str, _Pair] = {}
        for source in self._merge_sources(own.pop("<<")[1], path):
            merged = {**self._pairs(source, path), **merged}
        return {**merged, **own}

    def _merge_sources(self, node: yaml.Node, path: Path) -> list[yaml.MappingNode]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if all(isinstance(source, yaml.MappingNode) for source in sources):
            return list(sources)
        self.fault(
            "`<<` takes a mapping or a list of mappings",
            "Write `<<: *name`, with the anchor `&name` at a mapping.",
            node.start_mark,
            path,
        )
        return []

    def _key(self, node: yaml.Node, path: Path) -> str | None:
        if isinstance(node, yaml.ScalarNode):
            key = self._scalar(node, path)
            if isinstance(key, str):
                return key
            fix = f"Put it in quotes: {node.value!r}."
        else:
            fix = "Put text that starts with a bracket or brace in quotes."
        self.fault("a key must be text", fix, node.start_mark, path)
        return None

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        text: str = node.value
        if node.style is not None:
            return self._text(node, path)
        if _NULLS.fullmatch(text):
            return None
        if _BOOLS.fullmatch(text):
            return text.lower() == "true"
        if INTS.fullmatch(text) and len(text) > LONGEST_INT:
            self.fault(
                f"{text[:20]}... is a number of {len(text)} digits",
                f"Write one of at most {LONGEST_INT}, or put it in quotes if it is text.",
                node.start_mark,
                path,
            )
            return None
        if INTS.fullmatch(text):
            return int(text, 8 if text[:2] == "0o" else 16 if text[:2] == "0x" else 10)
        if _INFINITE.fullmatch(text) or FLOATS.fullmatch(text):
            number = float(text) if FLOATS.fullmatch(text) else math.inf
            if math.isfinite(number):
                return number
            self.fault(
                f"{text[:40]} is not a finite number",
                "Write a number, or put it in quotes if it is text.",
                node.start_mark,
                path,
            )
        return self._text(node, path)

    def _text(self, node: yaml.ScalarNode, path: Path) -> str:
        # JSON escapes a character beyond U+FFFF as two surrogates; PyYAML leaves them apart.
        try:
            return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.fault(
                "the text has half of a surrogate pair, which is no character",
                "Write the whole pair, or the character itself.",
                node.start_mark,
                path,
            )
            return ""

    def fault(self, message: str, fix: str, mark: Any, path: Path = ()) -> None:
        self.problems.append(
            Problem(
                message=message,
                fix=fix,
                where=dotted(path),
                file=self.file,
                line=mark.line + 1,
                column=mark.column + 1,
            )
        )

    def stop(self, message: str, fix: str, mark: Any) -> NoReturn:
        self.problems.clear()
        self.fault(message, fix, mark)
        raise SpecError(self.problems)

    def stop_too_deep(self, mark: Any) -> NoReturn:
        self.stop(
            f"the document is nested deeper than {MAX_DEPTH} levels",
            "Flatten it; an anchor must not contain its own alias.",
            mark,
        )


def _json_as_yaml(text: str) -> str:
    """Return JSON without what YAML lacks: tabs between tokens, some characters inside text."""
    text = text.replace("\t", " ")
    return re.sub(
        "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda m: f"\\u{ord(m[0]):04x}", text
    )


def _syntax_fault(error: yaml.MarkedYAMLError, file: str) -> tuple[str, str]:
    if error.context == "expected a single document in the stream":
        return "a second document starts here", "Keep one: remove `---` and what follows."
    problem = error.problem or ""
    if file.endswith(".toml"):
        return "this is TOML, and a spec is YAML or JSON", "Write it as YAML."
    fix = next((fix for part, fix in _SYNTAX_FIXES.items() if part in problem), "")
    language = "JSON" if file.endswith(".json") else "YAML"
    return f"this is not valid {language}: {problem}", fix

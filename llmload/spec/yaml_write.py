"""Plain data as YAML that every reader of YAML 1.1 and 1.2 understands alike."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import yaml

from llmload.spec.yaml_read import FLOATS, INTS


def dump(data: Mapping[str, Any]) -> str:
    """Return plain data as YAML, in its own order, text of several lines as a block."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_inline(data: object) -> str:
    """Return plain data as YAML on one line, for use inside a message."""
    text = yaml.dump(
        data, Dumper=_InlineDumper, sort_keys=False, default_flow_style=True, width=math.inf
    )
    return text.removesuffix("\n").removesuffix("\n...")


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""

    line_breaks: ClassVar[str] = "|"
    """Style of text with line breaks."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        style = self.line_breaks if "\n" in text else None
        if re.search("[\\x85\\u2028\\u2029]", text):
            style = '"'  # PyYAML loses these line breaks in every other style.
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


class _InlineDumper(_Dumper):
    line_breaks = '"'


_Dumper.add_representer(str, _Dumper.represent_text)
for _tag, _pattern in {"int": INTS, "float": FLOATS}.items():
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), list("-+.0123456789")
    )

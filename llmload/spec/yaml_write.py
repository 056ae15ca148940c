"""Plain data as YAML that every reader of YAML 1.1 and 1.2 understands alike."""

from __future__ import annotations

import math
import re

import yaml

from llmload.spec.yaml_read import FLOATS, INTS


def dump_inline(data: object) -> str:
    """Return plain data as YAML on one line, for use inside a message."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def dump(data: object) -> str:
    """Return plain data as YAML on lines of their own, as a file has it; empty for an empty one."""
    if not data and isinstance(data, dict):
        return ""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        # Of one line; and PyYAML loses all of these but the first in every other style.
        style = '"' if re.search("[\\n\\x85\\u2028\\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
for _tag, _pattern in {"int": INTS, "float": FLOATS}.items():
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), list("-+.0123456789")
    )

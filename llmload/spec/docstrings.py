"""The docstrings under the attributes of a class, read from its source."""

from __future__ import annotations

import ast
import inspect
import textwrap


def of_attributes(cls: type) -> dict[str, str]:
    """Return attribute -> docstring, inherited ones too; none of a class without source."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # built in, or typed at a prompt
            continue
        (definition,) = tree.body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            match statement, following:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = inspect.cleandoc(text)
    return found
